"""Encoders in ONNX Runtime: the nodes that attention becomes, padding, native operators and stock ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ryzen_compile import ops
from ryzen_compile.backends.eager import EagerBackend
from ryzen_compile.backends.onnxruntime import MODEL_NAME, PREFILL_NAME, OnnxRuntimeBackend, native
from ryzen_compile.backends.onnxruntime.encoder_session import OrtEncoder
from ryzen_compile.backends.onnxruntime.lowering import lower
from ryzen_compile.backends.onnxruntime.session import SessionOptions
from ryzen_compile.capture_encoder import capture_encoder
from ryzen_compile.config import find_recipe
from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.pipeline import encoder_passes, run_passes
from ryzen_compile.program import Program
from tests.backends.test_lowering import check_each
from tests.test_capture_encoder import MEAN, texts, tiny

STOCK = SessionOptions(threads=1, native=frozenset())


class Attentions(nn.Module):
    """Padded in every way: the first three are MultiHeadAttention's, the others a function's."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        narrow = k[:, :2], v[:, :2]
        return (
            ops.attention(q, k, v, None, 0.3, 0, 0.0, False, mask),
            ops.attention(q, k, v, None, 0.3, 0, 0.0, False),
            ops.attention(q, k, k, None, 40.0, 0, 0.0, False, mask),  # scores far above what hides padding elsewhere
            ops.attention(q, k, v, None, 0.3, 2, 0.0, False, mask),  # padding in a window of padding sees nothing
            ops.attention(q, *narrow, None, 0.3, 0, 0.0, False, mask),
            ops.attention(q, k, v, None, 0.3, 0, 3.0, False, mask),
            ops.attention(q, k, v, None, 0.3, 0, 0.0, True, mask),
        )


def test_padded_attention_matches_the_reference(plain_program: Any, tmp_path: Path) -> None:
    mask = torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1]])
    inputs = {"q": torch.randn(2, 6, 7, 5), "k": torch.randn(2, 6, 7, 5), "v": torch.randn(2, 6, 7, 11), "mask": mask}
    program = plain_program(Attentions(), *inputs.values())
    nodes = Counter(node.op_type.split("_")[0] for node in lower(program).graph)
    assert (nodes["MultiHeadAttention"], nodes["Attention"]) == (3, 4)
    check_each(program, Attentions(), inputs, tmp_path, atol=3e-5)  # scores in the hundreds


def rewritten(family: str, recipe: str) -> Program:
    program = capture_encoder(tiny(family), MEAN)
    return run_passes(program, encoder_passes(find_recipe(recipe)))[0]


@pytest.fixture(scope="module")
def bert() -> Program:
    return rewritten("Bert", "fp32")


@pytest.fixture(scope="module")
def integers() -> Program:
    return rewritten("Bert", "int8")


def compare(program: Program, engine: OrtEncoder, atol: float) -> None:
    """To the references, on padded rows, a lone token and a lone text; ``atol`` for channels of vectors of length 1."""
    oracle = EagerBackend().compile(program)
    for rows, tokens in ((4, 17), (3, 7), (3, program.spec.context)):
        ids, mask = (x.numpy() for x in texts(rows, tokens))
        np.testing.assert_allclose(engine.embed(ids, mask), oracle.embed(ids, mask), rtol=0, atol=atol)
    one = np.array([[7]])
    np.testing.assert_allclose(engine.embed(one, one * 0 + 1), oracle.embed(one, one * 0 + 1), rtol=0, atol=atol)


def test_a_layer_has_no_transposes(bert: Program) -> None:
    model = lower(bert)
    assert [v.name for v in (*model.graph.inputs, *model.graph.outputs)] == [
        "input_ids", "attention_mask", "sentence_embedding",
    ]  # fmt: skip
    nodes = Counter(node.op_type for node in model.graph)
    assert nodes["MultiHeadAttention"] == 2 and nodes["LayerNormalization"] == 5 and not model.functions
    assert nodes["Transpose"] == nodes["SkipLayerNormalization"] == 0
    assert nodes["MatMul"] == 2 * 4 + 1  # Q, K and V as one; the last is the mean
    assert not [n.name for n in model.graph if n.op_type == "Reshape" and n.name and "layer" in n.name]
    values = [value for node in model.graph for value in node.outputs]
    assert not [v.name for v in values if v.shape is not None and v.type is None]  # else writing it warns of each


@pytest.mark.parametrize("family", ["Bert", "ModernBert", "MPNet", "EuroBert"])
def test_vectors_are_the_references(family: str) -> None:
    program = rewritten(family, "fp32")
    engine = OnnxRuntimeBackend().compile(program, options=STOCK)
    assert isinstance(engine, OrtEncoder) and engine.spec is program.spec
    compare(program, engine, 5e-6)  # float32 in another order through two layers
    engine.close()
    engine.close()


def test_int8_is_near_on_stock_operators(integers: Program, tmp_path: Path) -> None:
    """Rows are rounded to 8 bits before each product; the references round weights alone."""
    engine = OnnxRuntimeBackend().compile(integers, options=STOCK, directory=tmp_path)
    assert (tmp_path / PREFILL_NAME).exists() and not engine.claims.claimed
    products = Counter(node.op_type for node in engine_model(tmp_path / PREFILL_NAME))
    assert products["MatMulIntegerToFloat"] == 8 and products["MatMulNBits"] == 0
    assert Counter(node.op_type for node in engine_model(tmp_path / MODEL_NAME))["MatMulNBits"] == 8
    compare(integers, engine, 2e-2)
    ids, mask = (x.numpy() for x in texts())
    alone = engine.embed(ids[:1, :9], mask[:1, :9])
    np.testing.assert_allclose(alone, engine.embed(ids, mask)[:1], rtol=0, atol=5e-3)  # a code may round the other way
    assert engine.weights_bytes > 0


def engine_model(path: Path) -> Any:
    import onnx

    return onnx.load(path, load_external_data=False).graph.node


@pytest.mark.skipif(bool(native.unusable()), reason="no native operators here")
def test_native_operators_take_products_and_norms(integers: Program, bert: Program, tmp_path: Path) -> None:
    engine = OnnxRuntimeBackend().compile(integers, options=SessionOptions(threads=1), directory=tmp_path)
    assert engine.claims.claimed["MatMulNBits"] == 8 and engine.claims.fused["rounding"] == 4
    compare(integers, engine, 2e-2)
    plain = OnnxRuntimeBackend().compile(bert, options=SessionOptions(threads=1, require_native=True))
    assert plain.claims.whole == {"norm"}
    compare(bert, plain, 5e-6)
    engine.close()
    plain.close()


def test_what_cannot_be_embedded_is_refused(bert: Program, tmp_path: Path) -> None:
    engine = OnnxRuntimeBackend().compile(bert, options=STOCK, directory=tmp_path)
    for tokens, mask in (((2, 3), (2, 4)), ((1, 65), (1, 65)), ((1, 0), (1, 0)), ((3,), (3,))):
        with pytest.raises(UsageError, match="T from 1 to 64"):
            engine.embed(np.ones(tokens, np.int64), np.ones(mask, np.int64))
    from ryzen_compile.backends.onnxruntime.weights_file import WeightsFiles

    model = lower(bert)
    model.graph.outputs[0].name = "logits"
    (tmp_path / "other").mkdir()
    WeightsFiles(tmp_path / "other").write(model, MODEL_NAME)
    with pytest.raises(UnsupportedError, match="has no sentence_embedding"):
        OrtEncoder(tmp_path / "other" / MODEL_NAME, bert.spec, STOCK)
