"""The ONNX model that a Program becomes: its numbers, its nodes, its interface, and what it refuses."""

from __future__ import annotations

from collections import Counter
from inspect import signature
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional

from ryzen_compile import ops
from ryzen_compile.backends.eager import EagerEngine
from ryzen_compile.backends.onnxruntime import OnnxRuntimeBackend
from ryzen_compile.backends.onnxruntime.attention import padded_head_dim
from ryzen_compile.backends.onnxruntime.lowering import cache_slots, lower
from ryzen_compile.backends.onnxruntime.rules import RULES
from ryzen_compile.backends.onnxruntime.session import SessionOptions
from ryzen_compile.backends.onnxruntime.weights_file import WeightsFiles
from ryzen_compile.edit import Edit
from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.numerics.rows import RowFormat, decode
from ryzen_compile.program import Program
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.spec import ModelSpec

RTOL, ATOL = 1e-5, 2e-6  # float32, two implementations of the same sums
STOCK = SessionOptions(threads=1, native=frozenset())  # what is lowered is looked at here, not what claims it


def run(model: ir.Model, directory: Path, inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
    WeightsFiles(directory).write(model, "model.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(directory / "model.onnx", options, providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})


def check_each(
    program, module: nn.Module, inputs: dict[str, torch.Tensor], directory: Path, atol: float = ATOL
) -> None:
    """Every output of ``module`` against the lowered model's."""
    with torch.no_grad():
        expected = module(**inputs)
    for index, (want, got) in enumerate(zip(expected, run(lower(program), directory, inputs), strict=True)):
        np.testing.assert_allclose(got, want.numpy(), rtol=RTOL, atol=atol, err_msg=f"output {index}")


class Norms(nn.Module):
    """Every form of every norm, at widths 1, 7 and 33 and ranks 2 to 4."""

    def __init__(self) -> None:
        super().__init__()
        self.ws = nn.ParameterList(torch.randn(c) for c in (1, 7, 33))
        self.bs = nn.ParameterList(torch.randn(c) for c in (1, 7, 33))

    def forward(self, a, b, c):
        out = []
        for x, w, bias in zip((a, b, c), self.ws, self.bs, strict=True):
            r = x.flip(0)
            out += [ops.rms_norm(x, w, 1e-6, False), ops.rms_norm(x, w, 1e-3, True), ops.rms_norm(x, None, 1e-6, False)]
            out += [*ops.add_rms_norm(x, r, w, 1e-6, True), *ops.add_rms_norm(x, r, None, 1e-6, False)]
            out += [ops.layer_norm(x, w, bias, 1e-5), ops.layer_norm(x, w, None, 1e-5)]
            out += [ops.layer_norm(x, None, None, 1e-5)]
            out += [*ops.add_layer_norm(x, r, w, bias, 1e-5), *ops.add_layer_norm(x, r, None, None, 1e-5)]
        return tuple(out)


def test_norms_match_their_references(plain_program, tmp_path):
    inputs = {"a": torch.randn(3, 1), "b": torch.randn(1, 5, 7), "c": torch.randn(2, 3, 4, 33)}
    module = Norms()
    check_each(plain_program(module, *inputs.values()), module, inputs, tmp_path)


class Linears(nn.Module):
    """Plain, activated and gated layers, with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(13, 7)), nn.Parameter(torch.randn(13))
        self.gate_up = nn.Parameter(torch.randn(22, 7))

    def forward(self, x):
        out = [functional.linear(x, self.w), functional.linear(x, self.w, self.b), functional.linear(x[0], self.w)]
        for act in ops.ACTIVATIONS:
            out += [ops.linear_act(x, self.w, None, act), ops.linear_act(x, self.w, self.b, act)]
            out.append(ops.gated_linear(x, self.gate_up, act))
        return tuple(out)


def test_linear_layers_match_their_references(plain_program, tmp_path):
    module, inputs = Linears(), {"x": 2 * torch.randn(3, 5, 7)}
    # Products of two activations reach 300, and tanh-GELU is a polynomial in the runtime.
    check_each(plain_program(module, *inputs.values()), module, inputs, tmp_path, atol=2e-5)


class Rotations(nn.Module):
    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.sizes = sizes
        for r in {r for _, r in sizes}:
            angle = torch.rand(40, r) * 6
            self.register_buffer(f"cos_{r}", angle.cos())
            self.register_buffer(f"sin_{r}", angle.sin())

    def forward(self, x, positions):
        return tuple(
            ops.rotary(x[..., :d], positions, getattr(self, f"cos_{r}"), getattr(self, f"sin_{r}"), interleaved)
            for d, r in self.sizes
            for interleaved in (False, True)
        )


def test_rotations_match_the_reference(plain_program, tmp_path):
    module = Rotations([(16, 8), (12, 6), (20, 10), (80, 10), (80, 40), (14, 7), (10, 3), (2, 1)])
    inputs = {"x": torch.randn(2, 3, 5, 80), "positions": torch.randint(0, 40, (2, 5))}
    check_each(plain_program(module, *inputs.values()), module, inputs, tmp_path)


class FullAttentions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(6))

    def forward(self, q, k, v):
        return (
            ops.attention(q, k, v, None, 0.3, 0, 0.0, True),
            ops.attention(q, k, v, None, 0.3, 0, 0.0, False),
            ops.attention(q, k, v, None, 0.3, 3, 0.0, True),
            ops.attention(q, k, v, None, 0.3, 2, 4.0, False),
            ops.attention(q, k, v, self.sinks, 0.3, 3, 0.0, True),
            ops.attention(q, k[:, :1], v[:, :1], self.sinks, 1.0, 0, 30.0, True),
            ops.attention(q[:, :, :1], k[:, :, :1], v[:, :, :1], None, 1.0, 0, 0.0, True),
        )


def test_attention_without_a_cache_is_a_local_function(plain_program, tmp_path):
    module = FullAttentions()
    inputs = {"q": torch.randn(2, 6, 7, 5), "k": torch.randn(2, 3, 7, 5), "v": torch.randn(2, 3, 7, 11)}
    program = plain_program(module, *inputs.values())
    names = [node.op_type for node in lower(program).graph if node.domain == "ryzen"]
    assert len(names) == 7
    assert len(set(names)) == 7
    check_each(program, module, inputs, tmp_path)


@pytest.fixture(scope="module")
def lowered(decoder) -> ir.Model:
    return lower(decoder)


def test_llama_layer_is_eight_nodes(lowered):
    ops_in_order = [node.op_type for node in lowered.graph]
    lengths = ["Cast", "Sub", "ReduceMax"]  # once per graph
    layer = ["MatMul", "GroupQueryAttention", "MatMul", "SkipSimplifiedLayerNormalization"]
    layer += ["MatMul", "GatedAct", "MatMul"]
    norm, skip = "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"
    first = [norm, layer[0], *lengths, *layer[1:]]
    assert ops_in_order == ["Gather", "ReduceSum", *first, skip, *layer, skip, "FusedMatMul"]


def test_interface_is_what_genai_reads(lowered, tmp_path):
    WeightsFiles(tmp_path).write(lowered, "model.onnx")
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    past, present = ["batch", 2, "capacity", 16], ["batch", 2, "present_capacity", 16]
    assert shapes == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total"],
        **{f"past_key_values.{i}.{half}": past for i in (0, 1) for half in ("key", "value")},
        "logits": ["batch", "sequence", 61],
        **{f"present.{i}.{half}": present for i in (0, 1) for half in ("key", "value")},
    }
    assert {o.domain: o.version for o in model.opset_import} == {"": 21, "com.microsoft": 1, "ryzen": 1}
    assert [f"{f.domain}::{f.name}" for f in model.functions] == ["ryzen::GatedAct"]
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert "layers.1/MatMul_1" in {node.name for node in model.graph.node}


def weight_shapes(model: ir.Model) -> Counter:
    return Counter(tuple(value.shape.numpy()) for value in model.graph.initializers.values())


def test_tied_table_is_stored_once(lowered):
    assert weight_shapes(lowered)[61, 32] == 1
    assert weight_shapes(lowered)[32, 61] == 0


def test_an_untied_head_is_stored_transposed_and_one_row_has_a_static_one(decoder_program, heads):
    model = lower(decoder_program(heads(), tied=False, last_only=True))
    assert list(model.graph.outputs[0].shape) == ["batch", 1, 61]
    assert weight_shapes(model)[61, 32] == weight_shapes(model)[32, 61] == 1
    assert model.graph[-1].op_type == "MatMul"


def test_weights_refer_to_the_program_until_written(decoder, lowered):
    owned = {weight.data_ptr() for weight in decoder.weights.values()}
    tensors = [value.const_value for value in lowered.graph.initializers.values() if value.const_value.size > 1]
    lazy = [tensor for tensor in tensors if isinstance(tensor, ir.LazyTensor)]
    assert len(lazy) == 8  # the matrices of two layers: two merged, two transposed
    assert all(tensor.raw.data_ptr() in owned for tensor in tensors if tensor not in lazy)


def variants(heads):
    return {
        "packed": heads(),
        "window": heads(window=3, packed=False),
        "softcap": heads(head_dim=8, value_dim=8, rotated=0, softcap=5.0),
        "sinks": heads(sinks=True, window=2),
        "one kv head": heads(kv_heads=1),
        "partial inside": heads(head_dim=32, value_dim=32, rotated=8),
        "partial interleaved, widened": heads(rotated=4, interleaved=True),
        "interleaved inside": heads(head_dim=32, value_dim=32, rotated=16, interleaved=True, packed=False),
        "12 half-split, padded, rotated before": heads(head_dim=12, value_dim=12, rotated=6),
        "20 half-split": heads(head_dim=20, value_dim=20, rotated=10),
        "20 unpacked, window, sinks": heads(head_dim=20, value_dim=20, rotated=10, packed=False, window=4, sinks=True),
        "80 partial": heads(heads=2, kv_heads=1, head_dim=80, value_dim=80, rotated=10),
        "24 interleaved": heads(head_dim=24, value_dim=24, rotated=12, interleaved=True),
        "7, no rotation": heads(heads=5, kv_heads=5, head_dim=7, value_dim=7, rotated=0),
        "14 interleaved, padded, inside": heads(head_dim=14, value_dim=14, rotated=7, interleaved=True),
        "wide values": heads(head_dim=12, value_dim=20, rotated=6),
        "narrow values": heads(head_dim=16, value_dim=8, rotated=8, packed=False),
    }


@pytest.fixture(scope="module")
def attentions(attentions_program, heads, tmp_path_factory):
    """All variants in one Program: (Program, directory with its model, engine)."""
    program = attentions_program(*variants(heads).values())
    directory = tmp_path_factory.mktemp("attentions")
    engine = OnnxRuntimeBackend().compile(program, directory=directory, options=STOCK)
    yield program, directory, engine
    engine.close()


def test_every_attention_is_one_group_query_attention(attentions, heads):
    program, directory, _ = attentions
    graph = onnx.load(directory / "model.onnx", load_external_data=False).graph
    counts = Counter(node.op_type for node in graph.node)
    assert counts["GroupQueryAttention"] == len(program.slots)
    assert counts["RotaryEmbedding"] == 2 * 6  # q and k of the six that cannot rotate inside
    assert counts["ReduceMax"] == counts["Range"] == 1
    assert counts["Cast"] == 2  # of the lengths and of position_ids


@pytest.mark.parametrize("chunks", [(11,), (1,) * 11, (5, 1, 1, 4), (3, 7, 1)])
def test_attention_in_any_chunks_matches_the_reference(attentions, heads, chunks):
    program, _, engine = attentions
    ids = np.random.default_rng(0).integers(0, 61, (1, 11))
    whole = EagerEngine(program)
    expected = whole.step(ids, KVCache(whole.slots, 1, 11))
    got = play(engine, ids, chunks)
    edges = np.cumsum([0, *(s.heads * s.value_dim for s in variants(heads).values())])
    for name, start, stop in zip(variants(heads), edges, edges[1:], strict=False):
        np.testing.assert_allclose(
            got[..., start:stop], expected[..., start:stop], rtol=1e-5, atol=5e-6, err_msg=f"{name}, chunks {chunks}"
        )


def play(engine, ids: np.ndarray, chunks: tuple[int, ...]) -> np.ndarray:
    cache, outs, at = KVCache(engine.slots, 1, ids.shape[1] + 2), [], 0
    for new in chunks:
        outs.append(engine.step(ids[:, at : at + new], cache).copy())
        cache.advance(new)
        at += new
    return np.concatenate(outs, axis=1)


def test_cache_heads_are_padded_where_the_operator_needs_it(attentions, heads):
    assert [padded_head_dim(d) for d in (1, 7, 8, 12, 16, 20, 80)] == [8, 8, 8, 16, 16, 24, 80]
    program, _, engine = attentions
    assert engine.slots == cache_slots(program.slots)
    widths = [slot.head_dim for slot in engine.slots]
    assert widths == [padded_head_dim(max(s.head_dim, s.value_dim)) for s in variants(heads).values()]
    assert widths == [slot.value_dim for slot in engine.slots]


def stored_variants(heads):
    return {
        "int8": heads(form="int8"),
        "int4": heads(form="int4"),
        "int4, no rotation, softcap": heads(rotated=0, softcap=5.0, form="int4"),
        "int8, 12 padded, rotated before": heads(head_dim=12, value_dim=12, rotated=6, form="int8"),
        "int4, 14 padded, interleaved": heads(head_dim=14, value_dim=14, rotated=7, interleaved=True, form="int4"),
        "int8, narrow values, sinks": heads(value_dim=8, packed=False, sinks=True, form="int8"),
        "int4, looking back": heads(window=5, form="int4"),
        "rolling": heads(window=5, rolling=True),
        "rolling, softcap": heads(window=16, packed=False, softcap=5.0, rolling=True),
        "rolling, one row": heads(window=1, rolling=True),
        "rolling int8": heads(window=5, form="int8", rolling=True),
        "rolling int8, 24 padded": heads(head_dim=24, value_dim=24, window=5, form="int8", rolling=True),
        "rolling int4, 16 padded": heads(window=5, form="int4", rolling=True),
        "rolling int4, 20 padded": heads(
            head_dim=20, value_dim=20, rotated=10, packed=False, window=7, form="int4", rolling=True
        ),
    }


@pytest.fixture(scope="module")
def stored(attentions_program, heads, tmp_path_factory):
    """All variants of storing in one Program: (Program, directory with its model, engine)."""
    program = attentions_program(*stored_variants(heads).values())
    directory = tmp_path_factory.mktemp("stored")
    engine = OnnxRuntimeBackend().compile(program, directory=directory, options=STOCK)
    yield program, directory, engine
    engine.close()


# The windows are left behind after 17 to 32 tokens, and again after every 16 or 17 more.
@pytest.mark.parametrize("chunks", [(60,), (1,) * 60, (5, 1, 30, 1, 23), (17, 17, 1, 25), (40, 3, 1, 1, 15)])
def test_stored_rows_in_any_chunks_match_the_reference(stored, heads, chunks):
    program, _, engine = stored
    assert engine.slots == cache_slots(program.slots)
    ids = np.random.default_rng(0).integers(0, 61, (1, 60))
    whole = EagerEngine(program)
    expected = whole.step(ids, KVCache(whole.slots, 1, 60))
    got = play(engine, ids, chunks)
    edges = np.cumsum([0, *(s.heads * s.value_dim for s in stored_variants(heads).values())])
    for name, start, stop in zip(stored_variants(heads), edges, edges[1:], strict=False):
        np.testing.assert_allclose(
            got[..., start:stop], expected[..., start:stop], rtol=1e-5, atol=1e-5, err_msg=f"{name}, chunks {chunks}"
        )


def test_stored_rows_are_the_references_rows(stored):
    """Codes are compared as numbers that may be one apart: a value between two codes may go either way."""
    program, _, engine = stored
    ids = np.random.default_rng(0).integers(0, 61, (1, 57))
    caches = [KVCache(one.slots, 1, 60) for one in (engine, EagerEngine(program))]
    for cache, one in zip(caches, (engine, EagerEngine(program)), strict=True):
        one.step(ids, cache)
    for index, slot in enumerate(program.slots):
        held = slot.resident(57)
        form = RowFormat.parse(slot.key_format)
        for (ours, theirs), dim in (
            ((c.keys[index] for c in caches), slot.head_dim),
            ((c.values[index] for c in caches), slot.value_dim),
        ):
            one, other = (codes(rows[:, :, :held], form)[..., :dim] for rows in (ours, theirs))
            np.testing.assert_allclose(one, other, atol=1e-5 if form.bits == 32 else 1)
            assert form.bits == 32 or (one != other).mean() < 0.002


def codes(rows: np.ndarray, form: RowFormat) -> np.ndarray:
    """Stored rows as one number a channel."""
    if form.bits == 32:
        return rows
    width = rows.shape[-1] * 8 // form.bits
    return np.rint(decode(rows, form, width, np.float32(1)))


def test_how_rows_are_stored_is_said_in_the_graph(stored, heads):
    _, directory, _ = stored
    graph = onnx.load(directory / "model.onnx", load_external_data=False).graph
    types = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output)}
    nodes = {node.input[3].split(".")[1]: node for node in graph.node if node.op_type == "GroupQueryAttention"}
    for index, (name, spec) in enumerate(stored_variants(heads).items()):
        said = {a.name: onnx.helper.get_attribute_value(a) for a in nodes[str(index)].attribute}
        wanted = {"fp32": {}, "int8": {"kv_cache_bit_width": 8}, "int4": {"kv_cache_bit_width": 4}}[spec.form]
        if wanted:
            wanted |= {"k_quant_type": b"PER_CHANNEL", "v_quant_type": b"PER_CHANNEL"}
        wanted |= {"local_window_size": spec.window} if spec.window else {}
        wanted |= {"sliding_window_cache": 1} if spec.rolling else {}
        told = {"kv_cache_bit_width", "k_quant_type", "v_quant_type", "local_window_size", "sliding_window_cache"}
        assert {key: value for key, value in said.items() if key in told} == wanted, name
        multiple = {"fp32": 8, "int8": 16, "int4": 32}[spec.form] if spec.rolling else 8
        width = -(-max(spec.head_dim, spec.value_dim) // multiple) * multiple // (2 if spec.form == "int4" else 1)
        capacity = f"window_{spec.window}_capacity" if spec.rolling else "capacity"
        element = {"fp32": np.float32, "int8": np.int8, "int4": np.uint8}[spec.form]
        for half in ("past_key_values.{}.key", "past_key_values.{}.value", "present.{}.key", "present.{}.value"):
            tensor = types[half.format(index)]
            prefix = "present_" if half.startswith("present") else ""
            dims = [d.dim_param or d.dim_value for d in tensor.shape.dim]
            assert dims == ["batch", 2, prefix + capacity, width], name
            assert onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type) == element, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_format": "int8", "v_format": "int4"}, "keep keys as int8 and values as int4"),
        ({"k_format": "int8-g8", "v_format": "int8-g8"}, "keep keys as int8-g8 and values as int8-g8"),
        ({"turned": True}, "keep keys as fp32 and values as fp32"),
    ],
)
def test_what_the_operator_cannot_store_is_refused(changes, message):
    given = {"heads": 2, "scale": 1.0, "window": 0, "softcap": 0.0, "interleaved": 0, "turned": 0, "rolling": 0}
    given |= {"k_format": "fp32", "v_format": "fp32"} | changes
    tensors = [None] * sum(name not in given for name in signature(RULES["cached_attention"]).parameters)
    with pytest.raises(UnsupportedError, match=f"{message}; both as one of fp32, int8, int4, or backend='eager'"):
        RULES["cached_attention"](*tensors, **given)


class Chains(nn.Module):
    """What torch.onnx makes long: splits, views over dynamic sizes, and a bias before a residual norm."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(24, 8)), nn.Parameter(torch.randn(24))
        self.o, self.c, self.g = (
            nn.Parameter(torch.randn(8, 8)),
            nn.Parameter(torch.randn(8)),
            nn.Parameter(torch.randn(8)),
        )

    def forward(self, x):
        q, k, v = functional.linear(x, self.w, self.b).split((8, 8, 8), dim=-1)
        q = ops.rms_norm(q.view(x.shape[0], x.shape[1], 2, 4), self.g[:4], 1e-6, False).view(*x.shape[:2], -1)
        k, _ = k.split(5, dim=-1)
        y = functional.linear(q + v, self.o, self.c)
        y, total = ops.add_layer_norm(y, x, self.g, None, 1e-5)
        z, again = ops.add_rms_norm(functional.linear(y, self.o, self.c), total, self.g, 1e-5, False)
        return z, again, k


def test_chains_of_shapes_and_splits_are_shortened(tmp_path):
    module, x = Chains(), torch.randn(2, 3, 8)
    batch, tokens = Dim("batch"), Dim("tokens")
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: batch, 1: tokens},), strict=False)
    table = torch.export.default_decompositions()
    table.pop(torch.ops.aten.linear.default)
    program = Program(exported.run_decompositions(table), ModelSpec(0, 0, 0, 0, 0, 0, 0, False, 0, "toy"))
    linear, norm = ["MatMul", "Add", "Split", "Split", "Reshape"], "SimplifiedLayerNormalization"
    found = [node.op_type for node in lower(program).graph]
    rest = ["Reshape", "Add", "MatMul", "SkipLayerNormalization", "MatMul", "SkipSimplifiedLayerNormalization"]
    assert sorted(found) == sorted([*linear, norm, *rest])
    inputs = {"x": torch.randn(4, 5, 8)}
    check_each(program, module, inputs, tmp_path, atol=1e-5)


class Untranslatable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.forward = torch.special.bessel_j0

    def forward(self, x):
        return (self.inner(x) + 1,)


def test_an_operator_without_translation_is_named(plain_program, capfd):
    program = plain_program(Untranslatable(), torch.randn(2, 3))
    expected = r"aten\.special_bessel_j0 has no ONNX translation \(node special_bessel_j0, module inner\): No ONNX"
    with pytest.raises(UnsupportedError, match=expected):
        lower(program)
    assert capfd.readouterr() == ("", "")


def test_edited_programs_lower_too(decoder, capfd):
    edit = Edit(decoder, "test")
    before = edit.graph.output_node()
    extra = edit.add_input("past_key_values_9_key", edit.fake_empty((3,), torch.float32))
    edit.set_output(0, edit.call(torch.ops.aten.mul.Tensor, before.args[0][0], 2.0, before=before))
    model = lower(edit.finish())
    assert model.graph.inputs[-1].name == "past_key_values.9.key"
    assert [node.op_type for node in model.graph][-2:] == ["FusedMatMul", "Mul"]
    assert extra.name == "past_key_values_9_key"
    assert capfd.readouterr() == ("", "")


def test_outputs_must_match_the_slots(decoder):
    broken = Edit(decoder, "test")
    broken.set_cache(decoder.slots[:1], heads=4)
    with pytest.raises(UsageError, match="1 cache slots and 5 outputs"):
        lower(broken.finish())


def test_supported_operators_are_those_with_rules():
    assert OnnxRuntimeBackend.supported_ops == {f"ryzen::{name}" for name in RULES if name != "linear"}
