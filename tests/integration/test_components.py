"""Each component on the shipped model: that it does what it is for, and leaves alone what it has to."""

from __future__ import annotations

import copy
import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from ryzen_compile.api import load
from ryzen_compile.backends.onnxruntime import native
from ryzen_compile.config import Recipe
from ryzen_compile.errors import ResourceError, TamperedError
from ryzen_compile.manifest import read_manifest, verify_files
from ryzen_compile.numerics.codebook import CodebookTensor
from ryzen_compile.numerics.divergence import mean_divergence
from ryzen_compile.runtime.speculative.settings import Speculation
from ryzen_compile.validate.quality import EngineScorer, ModelScorer, score

NEW = 32
LOOKUP = Speculation(drafters=("lookup",), tokens=4, fixed=True)  # whatever a step costs on this machine today
FLOAT_TOLERANCE = 1e-4  # logits of order ten, float32 sums in another order; two best tokens are rarely that close
FUSIONS = ("fuse_rotary", "fuse_norm", "fuse_add_norm", "merge_linear", "fuse_linear", "insert_kv_cache")
PARTS = ("codes", "codebook", "scales", "gain", "offset", "slots", "kept")
Record = Callable[[str, object], None]
Windows = Callable[[int, int], np.ndarray]


def test_passes_leave_the_text_and_the_logits_as_they_were(
    artifacts: Any, float_model: Any, prompts: np.ndarray, greedy: Any, reference_greedy: Any, record_property: Record
) -> None:
    """Greedy tokens are equal to the last; logits are ``FLOAT_TOLERANCE`` apart at most."""
    with artifacts.open("fp32", native=False) as model:
        hits = {record["name"]: len(record["hits"]) for record in model.report["records"]}
        assert all(hits[name] for name in FUSIONS), hits  # or there was nothing to compare
        ours = np.concatenate([model(prompt[None])[:, -1] for prompt in prompts])
        with torch.inference_mode():
            theirs = float_model(torch.from_numpy(prompts)).logits[:, -1].numpy()
        text = greedy(model, prompts, NEW)
    record_property("largest_logit_difference", float(np.abs(ours - theirs).max()))
    record_property("tokens_compared", NEW * len(prompts))
    np.testing.assert_allclose(ours, theirs, rtol=FLOAT_TOLERANCE, atol=FLOAT_TOLERANCE)
    assert text == reference_greedy(float_model, prompts, NEW)
    assert len({token for row in text for token in row}) > len(prompts)  # not one token for ever


def test_integer_weights_take_the_recipes_bytes_and_keep_its_budget(
    artifacts: Any, recipes: dict[str, Recipe], float_model: Any, windows: Windows, record_property: Record
) -> None:
    """Codes take exactly what the shapes call for, scales no less, and all floats little more than that. The divergence
    on unseen text is within the recipe's budget, and at most three times what the gate measured on the text that it
    held back: the texts differ, and a method that had learned its calibration text by heart would miss it by far."""
    settings = recipes["int4"].weights
    assert settings is not None and settings.head_bits is not None
    table = float_model.get_input_embeddings().weight
    matrices = [weight for weight in float_model.parameters() if weight.ndim == 2]
    codes = scales = 0
    for weight in matrices:
        rows, width = weight.shape
        # A block that would pad a row by more than a sixteenth makes way for a smaller one.
        block = next(size for size in (settings.block, 64, 32, 16) if -width % size <= width / 16)
        blocks = rows * -(-width // block)
        scales += 4 * blocks
        codes += blocks * block * (settings.head_bits if weight is table else settings.bits) // 8
    stored = stored_bytes(artifacts.path("int4"))
    with artifacts.open("int4") as model:
        gate = next(record["kl"] for record in model.report["records"] if record["name"] == "quantize_weights")
        quality = score(EngineScorer(model.engine), ModelScorer(float_model), windows(8, 128))
    whole = 4 * sum(weight.numel() for weight in matrices)
    record_property("bytes_of_weights", codes + scales)
    record_property("times_smaller", whole / (codes + scales))
    record_property("kl", quality.kl.value)
    record_property("kl_of_the_gate", gate)
    assert stored["UINT8"] == codes
    assert scales <= stored["FLOAT"] <= scales + 0.05 * whole  # norms and tables of angles
    assert 0 < quality.kl.value <= min(settings.max_kl, 3 * gate)


def stored_bytes(artifact: Path) -> dict[str, int]:
    """Bytes of the model's stored tensors by element type; equal bytes, which are stored once, count once."""
    found: dict[str, dict[tuple[str, ...], int]] = {}
    for tensor in onnx.load(artifact / "model.onnx", load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        place = (entries["location"], entries["offset"]) if entries else (tensor.name,)
        size = int(entries["length"]) if entries else numpy_helper.to_array(tensor).nbytes
        found.setdefault(onnx.TensorProto.DataType.Name(tensor.data_type), {})[place] = size
    return {kind: sum(sizes.values()) for kind, sizes in found.items()}


def test_a_table_of_codes_is_as_small_as_asked_and_read_as_it_decodes(
    artifacts: Any, recipes: dict[str, Recipe], float_model: Any, prompts: np.ndarray, greedy: Any,
    reference_greedy: Any, record_property: Record,
) -> None:  # fmt: skip
    """The artifact gives the tokens and logits of transformers' model over the decoded table, within
    ``FLOAT_TOLERANCE``; those over the table itself are further away, so that one would not pass for the other."""
    table = stored_table(artifacts.path("codes"))
    ratio = 4 * table.shape[0] * table.shape[1] / table.nbytes
    wanted = recipes["codes"].embedding
    decoded = copy.deepcopy(float_model)
    decoded.set_input_embeddings(torch.nn.Embedding.from_pretrained(table.decode()))  # the head keeps its weights
    with artifacts.open("codes", native=False) as model, torch.inference_mode():
        ours = np.concatenate([model(prompt[None])[:, -1] for prompt in prompts])
        theirs, plain = (m(torch.from_numpy(prompts)).logits[:, -1].numpy() for m in (decoded, float_model))
        text = greedy(model, prompts, NEW)
    record_property("ratio", ratio)
    record_property("largest_logit_difference", float(np.abs(ours - theirs).max()))
    assert wanted is not None and wanted.ratio is not None and ratio >= wanted.ratio
    np.testing.assert_allclose(ours, theirs, rtol=FLOAT_TOLERANCE, atol=FLOAT_TOLERANCE)
    assert np.abs(ours - plain).max() > 100 * FLOAT_TOLERANCE
    assert text == reference_greedy(decoded, prompts, NEW)


def stored_table(artifact: Path) -> CodebookTensor:
    """The table that an artifact looks tokens up in, from its file."""
    graph = onnx.load(artifact / "model.onnx").graph
    lookup = next(node for node in graph.node if node.op_type.startswith("CodebookLookup"))
    tensors = {t.name: t for t in graph.initializer if t.name in lookup.input}
    parts = {
        part: next((torch.from_numpy(numpy_helper.to_array(t).copy()) for name, t in tensors.items()
                    if name.endswith(f"_{part}")), None)
        for part in PARTS
    }  # fmt: skip
    codebook, gain = parts["codebook"], parts["gain"]
    assert codebook is not None and gain is not None
    return CodebookTensor.stored(**parts, width=len(gain), bits=codebook.shape[1].bit_length() - 1, group=0)


def test_an_int8_cache_is_four_times_smaller_and_does_not_drift(
    artifacts: Any, recipes: dict[str, Recipe], windows: Windows, record_property: Record
) -> None:
    """A byte for a float of four. Divergence from the float cache stays within the recipe's budget in the last quarter
    of long texts, too, and there it is at most three times that of the first quarter: rounding that adds up with the
    tokens held would grow by far more."""
    text = windows(3, 640)
    with artifacts.open("fp32", native=False) as plain, artifacts.open("int8 cache", native=False) as small:
        sizes = [model.memory_breakdown().bytes_per_token for model in (plain, small)]
        theirs, ours = (torch.from_numpy(EngineScorer(model.engine).logits(text)) for model in (plain, small))
    quarter = text.shape[1] // 4
    early, late = (
        mean_divergence(theirs[:, part], ours[:, part])[0] for part in (slice(quarter), slice(-quarter, None))
    )
    record_property("bytes_per_token", sizes[1])
    record_property("times_smaller", sizes[0] / sizes[1])
    record_property("kl_early", early)
    record_property("kl_late", late)
    assert sizes[0] == 4 * sizes[1]
    assert 0 < late <= min(recipes["int8 cache"].kv.budget, 3 * early)


def test_speculation_leaves_the_text_as_it_was(
    artifacts: Any, prompts: np.ndarray, greedy: Any, record_property: Record
) -> None:
    """To the last token: floats are summed alike in steps of one token and of several, but for their last bits. Some
    drafts are accepted, and so some steps saved; how many depends on the text."""
    with artifacts.open("fp32") as model:
        plain = greedy(model, prompts, 2 * NEW)
        drafted = greedy(model, prompts, 2 * NEW, speculation=LOOKUP)
        found = model.speculation
    record_property("acceptance", found.acceptance_rate)
    record_property("tokens_per_step", found.tokens / found.steps)
    assert drafted == plain
    assert 0 < found.accepted < found.drafted
    assert found.steps_saved == found.accepted


def test_native_operators_give_what_stock_ones_give(
    artifacts: Any, prompts: np.ndarray, windows: Windows, greedy: Any, record_property: Record
) -> None:
    """Over floats the same tokens. Over integers both round activations to 8 bits, and a last bit decides some of these
    roundings: what that moves is at most a third of what rounding the weights does."""
    if why := native.unusable():
        pytest.skip(f"native operators: {why}")
    with artifacts.open("fp32", native=True) as ours, artifacts.open("fp32", native=False) as stock:
        assert ours.engine.claims.kinds and not stock.engine.claims.kinds
        assert greedy(ours, prompts, NEW) == greedy(stock, prompts, NEW)
        text = windows(4, 96)
        floats = EngineScorer(stock.engine)
        with artifacts.open("int4", native=True) as one, artifacts.open("int4", native=False) as other:
            assert "matmul" in one.engine.claims.whole
            apart = score(EngineScorer(one.engine), EngineScorer(other.engine), text).kl.value
            rounding = score(EngineScorer(other.engine), floats, text).kl.value
    record_property("kl_to_stock", apart)
    record_property("kl_of_int4", rounding)
    assert apart <= rounding / 3


def test_an_artifact_appears_whole_and_a_changed_byte_is_refused(
    artifacts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    """A disk that fills up while the weights are written leaves nothing behind."""
    out = tmp_path / "artifact"
    with artifacts.open("int4") as model:
        with monkeypatch.context() as broken:
            broken.setattr(shutil, "copyfile", full_disk)
            with pytest.raises(ResourceError, match="No space left"):
                model.save_pretrained(out)
        assert list(tmp_path.iterdir()) == []
        model.save_pretrained(out)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    manifest = read_manifest(out)
    assert verify_files(out, manifest) == ()  # and no file that nobody listed
    record_property("files", len(manifest["files"]))
    load(out, threads=1).close()
    data = out / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(TamperedError, match=r"'model\.onnx\.data': expected SHA-256"):
        load(out, threads=1)


def full_disk(source: Path, target: Path) -> None:
    """``shutil.copyfile`` that gets as far as half of the weights."""
    content = Path(source).read_bytes()
    if Path(target).suffix == ".data":
        Path(target).write_bytes(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")
    Path(target).write_bytes(content)
