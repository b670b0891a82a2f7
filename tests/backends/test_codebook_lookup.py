"""Lookups in tables of codes in ONNX Runtime's own operators: equal to the references to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn
from torch.export import Dim

from ryzen_compile import ops
from ryzen_compile.backends.eager import EagerEngine
from ryzen_compile.backends.onnxruntime import OnnxRuntimeBackend
from ryzen_compile.backends.onnxruntime.artifact_check import check_model
from ryzen_compile.backends.onnxruntime.codebook_lookup import Lookup
from ryzen_compile.backends.onnxruntime.codebook_lookup import codebook_embedding as rule
from ryzen_compile.backends.onnxruntime.emit import Emitter
from ryzen_compile.backends.onnxruntime.lowering import lower
from ryzen_compile.backends.onnxruntime.session import SessionOptions
from ryzen_compile.backends.onnxruntime.weights_file import WeightsFiles
from ryzen_compile.edit import Edit
from ryzen_compile.numerics.codebook import CODE_BITS, DIMS, STAGES, CodebookFormat, CodebookTensor
from ryzen_compile.program import Program
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.spec import ModelSpec

ROWS = 11
PARTS = ("codes", "codebook", "scales", "gain", "offset", "slots", "kept")
WIDTHS = (24, 40, 56)
ALL = ("gain", "offset", "kept")
SHAPES = [(1, 1), (3, 5), (2, 0)]


def stored(
    form: CodebookFormat, width: int, *optional: str, kept: torch.dtype = torch.float16, rows: int = ROWS
) -> CodebookTensor:
    """A random table; values of both signs, so that a sum in another order would be seen."""
    random = torch.Generator().manual_seed(width + form.bits)
    normal = lambda *shape: torch.randn(shape, generator=random)
    parts = {name: normal(width) for name in ("gain", "offset") if name in optional}
    if "kept" in optional:
        parts |= {"kept_ids": torch.tensor([3, 0, 10]), "kept": normal(3, width).to(kept)}
    return CodebookTensor.from_codes(
        torch.randint(0, form.entries, (rows, form.stages, width // form.dim), generator=random),
        normal(form.stages, form.entries, form.dim),
        form,
        width,
        scales=None if form.group is None else normal(rows, form.groups(width)),
        **parts,
    )


FORMS = [
    stored(CodebookFormat(*f, group), width, *ALL)
    for (f, group), width in zip(
        product(product(CODE_BITS, DIMS, STAGES), (0,)), WIDTHS * len(CODE_BITS) * len(DIMS), strict=False
    )
]
OPTIONAL = [
    stored(CodebookFormat(bits, 2, 2, group), 40, *optional, kept=kept)
    for bits, group, optional, kept in product(
        (4, 6),
        (None, 0, 8, 40),
        ((), ("gain",), ("offset",), ("gain", "offset"), ("kept",), ALL),
        (torch.float16, torch.float32),
    )
    if "kept" in optional or kept == torch.float16
]


class Tables(nn.Module):
    """Rows of every table for one ``ids``."""

    def __init__(self, tables: list[CodebookTensor]) -> None:
        super().__init__()
        self.tables = tables
        for i, table in enumerate(tables):
            for name in PARTS:
                value = getattr(table, name)
                self.register_buffer(f"{name}_{i}", value) if value is not None else setattr(self, f"{name}_{i}", None)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        out = []
        for i, table in enumerate(self.tables):
            form, parts = table.format, (getattr(self, f"{name}_{i}") for name in PARTS)
            out.append(ops.codebook_embedding(ids, *parts, table.shape[1], form.bits, form.group_argument))
        return tuple(out)


def lowered(tables: list[CodebookTensor], directory: Path, rank: int = 2) -> Path:
    dims = {0: Dim("batch"), 1: Dim("tokens")} if rank == 2 else {0: Dim("tokens")} if rank else {}
    ids = torch.zeros((2, 3)[:rank], dtype=torch.int64)
    exported = torch.export.export(Tables(tables).eval(), (ids,), dynamic_shapes=(dims,), strict=False)
    program = Program(exported, ModelSpec(0, 0, 0, 0, 0, 0, 0, False, 0, "toy"))
    return WeightsFiles(directory).write(lower(program), "model.onnx")


def opened(model: Path | ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    source = model if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"], enable_fallback=0)


def check(tables: list[CodebookTensor], model: Path, shapes: list[tuple[int, ...]]) -> None:
    """To the bit: both round after every step, in the same order."""
    session = opened(model)
    for shape in shapes:
        ids = torch.randint(0, ROWS, shape, generator=torch.Generator().manual_seed(1))
        for table, got in zip(tables, session.run(None, {"ids": ids.numpy()}), strict=True):
            want = table.rows(ids).numpy()
            assert got.shape == want.shape and got.tobytes() == want.tobytes(), (table.format, table.shape, shape)


BARE = [stored(replace(t.format, group=None), t.shape[1]) for t in FORMS]


@pytest.mark.parametrize("tables", [FORMS, BARE, OPTIONAL], ids=["forms", "codes alone", "optional tensors"])
def test_rows_equal_the_reference_to_the_bit(tables: list[CodebookTensor], tmp_path: Path) -> None:
    check(tables, lowered(tables, tmp_path), SHAPES)


@pytest.mark.parametrize(("rank", "shapes"), [(0, [()]), (1, [(0,), (1,), (7,)])])
def test_ids_may_have_any_rank(rank: int, shapes: list[tuple[int, ...]], tmp_path: Path) -> None:
    tables = [stored(CodebookFormat(b, 1, 2, g), 24, *ALL) for b, g in ((8, 8), (4, 0), (3, None), (1, 24))]
    check(tables, lowered(tables, tmp_path, rank), shapes)


def test_tables_of_one_form_share_a_function(tmp_path: Path) -> None:
    tables = [stored(CodebookFormat(8, 2, 1, 0), width, "gain") for width in (24, 24, 40)]
    tables += [stored(CodebookFormat(8, 2, 1, 0), 24, "offset")]
    model = onnx.load(lowered(tables, tmp_path), load_external_data=False)
    assert [node.op_type for node in model.graph.node] == ["CodebookLookup"] * 2 + [
        f"CodebookLookup_{i}" for i in (1, 2)
    ]
    assert {node.domain for node in model.graph.node} == {"ryzen"} and len(model.functions) == 3
    check_model(tmp_path)


def test_the_table_is_stored_as_codes_alone(tmp_path: Path) -> None:
    table = stored(CodebookFormat(4, 2, 1, 0), 40, *ALL)
    model = onnx.load(lowered([table], tmp_path))
    stored_bytes = sum(numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer)
    assert stored_bytes == table.nbytes


def test_bytes_are_decoded_whole_where_codes_fill_them() -> None:
    def by_bytes(bits: int, dim: int, stages: int, width: int) -> bool:
        return Lookup(width, bits, dim, stages, -1, False, False, False).by_bytes

    assert all(by_bytes(bits, 2, 1, 40) for bits in (1, 2, 4, 8))
    assert not any(by_bytes(bits, 2, 1, 40) for bits in (3, 5, 6, 7))
    assert by_bytes(4, 2, 2, 40) and not by_bytes(4, 8, 2, 24)  # 3 codes of 4 bits end within a byte


def test_the_backend_says_that_it_has_the_operator() -> None:
    assert "ryzen::codebook_embedding" in OnnxRuntimeBackend.supported_ops


def with_codes(program: Program, table: CodebookTensor) -> Program:
    """``program`` with its embedding read from ``table``."""
    edit = Edit(program, "test")
    node = next(n for n in edit.graph.nodes if n.target is torch.ops.aten.embedding.default)
    parts = [None if (value := getattr(table, name)) is None else edit.add_constant(name, value) for name in PARTS]
    rest = (table.shape[1], table.format.bits, table.format.group_argument)
    edit.replace(node, edit.call(ops.codebook_embedding, node.args[1], *parts, *rest, before=node))
    return edit.finish()


@pytest.mark.parametrize("form", [CodebookFormat(8, 2, 1, 0), CodebookFormat(6, 4, 2, 16)], ids=["8b", "6b"])
def test_a_decoder_over_codes_gives_the_same_logits_in_all_backends(
    library: Path, decoder_program: Callable[..., Program], form: CodebookFormat
) -> None:
    program = with_codes(decoder_program(tied=False), stored(form, 32, *ALL, rows=61))
    ids = np.random.default_rng(0).integers(0, 61, (1, 9))
    logits = []
    for kinds in (frozenset[str](), frozenset({"embedding"})):
        options = SessionOptions(threads=1, native=kinds, require_native=bool(kinds))
        engine = OnnxRuntimeBackend().compile(program, options=options)
        logits.append(engine.step(ids, KVCache(engine.slots, 1, 9)).copy())
        assert engine.claims.kinds == kinds
        engine.close()
    assert logits[0].tobytes() == logits[1].tobytes()
    eager = EagerEngine(program)
    # float32, other products and another attention.
    np.testing.assert_allclose(logits[0], eager.step(ids, KVCache(eager.slots, 1, 9)), rtol=1e-4, atol=1e-4)


# --- tables that nobody of us wrote


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ModelProto:
    """The model of one table with every part."""
    return onnx.load(lowered([stored(CodebookFormat(6, 2, 2, 8), 40, *ALL)], tmp_path_factory.mktemp("whole")))


def damaged(whole: ModelProto, change: Callable[[dict[str, np.ndarray]], None]) -> ModelProto:
    """``whole`` with its stored tensors changed."""
    model = ModelProto()
    model.CopyFrom(whole)
    parts = {t.name.removesuffix("_0"): np.array(numpy_helper.to_array(t)) for t in model.graph.initializer}
    change(parts)
    del model.graph.initializer[:]
    model.graph.initializer.extend(numpy_helper.from_array(array, f"{name}_0") for name, array in parts.items())
    return model


def beyond_kept(parts: dict[str, np.ndarray]) -> None:
    parts["slots"][:] = 3


def far_beyond_kept(parts: dict[str, np.ndarray]) -> None:
    parts["slots"][:] = 32767


def nothing_kept_but_asked_for(parts: dict[str, np.ndarray]) -> None:
    parts["kept"] = parts["kept"][:0]


def short_codes(parts: dict[str, np.ndarray]) -> None:
    parts["codes"] = np.ascontiguousarray(parts["codes"][:, :-1])


def few_codes(parts: dict[str, np.ndarray]) -> None:
    parts["codes"] = parts["codes"][:2]


def small_codebook(parts: dict[str, np.ndarray]) -> None:
    parts["codebook"] = np.ascontiguousarray(parts["codebook"][:, :2])


def one_stage(parts: dict[str, np.ndarray]) -> None:
    parts["codebook"] = parts["codebook"][:1]


def few_scales(parts: dict[str, np.ndarray]) -> None:
    parts["scales"] = parts["scales"][:2]


def short_gain(parts: dict[str, np.ndarray]) -> None:
    parts["gain"] = parts["gain"][:7]


def few_slots(parts: dict[str, np.ndarray]) -> None:
    parts["slots"] = parts["slots"][:2]


DAMAGES = (
    *(
        beyond_kept,
        far_beyond_kept,
        nothing_kept_but_asked_for,
        short_codes,
        few_codes,
        small_codebook,
        one_stage,
        few_scales,
    ),
    *(short_gain, few_slots),
)


@pytest.mark.parametrize("change", DAMAGES)
def test_a_damaged_table_is_an_error_of_the_runtime(
    whole: ModelProto, change: Callable[[dict[str, np.ndarray]], None]
) -> None:
    """Standard operators check what they read: while the model is loaded, or when the rows are asked for."""
    model = damaged(whole, change)
    with pytest.raises(Exception, match=r"\[ONNXRuntimeError\]"):
        opened(model).run(None, {"ids": np.arange(ROWS)[None]})


def test_a_codebook_of_unknown_shape_is_refused() -> None:
    shapes = (None, ir.Shape([1, 256]), ir.Shape([1, "entries", 2]))
    for shape in shapes:
        ids, codes, codebook = (ir.Value(name=name) for name in ("ids", "codes", "codebook"))
        codebook.shape = shape
        with pytest.raises(ValueError, match="the shape of codebook must be static"):
            rule(Emitter(), ids, codes, codebook, *[None] * 5, width=8, bits=8, group=-1)


@pytest.mark.parametrize("row", [ROWS, 1 << 40, -ROWS - 1])
def test_an_id_outside_of_the_table_is_an_error(row: int, tmp_path: Path) -> None:
    session = opened(lowered([stored(CodebookFormat(8, 2, 1, 0), 24)], tmp_path))
    with pytest.raises(Exception, match="out of data bounds"):
        session.run(None, {"ids": np.array([[0, row]])})


def test_nothing_of_a_body_is_folded_into_a_table(tmp_path: Path) -> None:
    """The runtime folds what is constant when it loads a model: that must never be the decoded table, or a part."""
    rows = 512
    table = stored(CodebookFormat(4, 2, 2, 8), 40, *ALL, rows=rows)
    path = lowered([table], tmp_path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    folded = onnx.load(tmp_path / "optimized.onnx")
    tensors = [
        *folded.graph.initializer,
        *(a.t for node in folded.graph.node for a in node.attribute if a.HasField("t")),
    ]
    held = sum(numpy_helper.to_array(tensor).nbytes for tensor in tensors)
    of_bytes = 2 * 256 * 4 * 4  # what a byte stands for: of each stage, two codes' entries
    assert table.nbytes <= held < table.nbytes + of_bytes + 4096 < table.nbytes + rows * 40
