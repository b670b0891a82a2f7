"""Leaving a model early: the cut equals the model whose later layers were taken away, and lets the whole one be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, numpy_helper
from torch import nn

from ryzen_compile.api import export
from ryzen_compile.backends.onnxruntime import OnnxRuntimeBackend, artifact
from ryzen_compile.backends.onnxruntime.artifact import Artifact
from ryzen_compile.backends.onnxruntime.artifact_check import check_model
from ryzen_compile.backends.onnxruntime.early_exit import Exits, cut, find_exits
from ryzen_compile.backends.onnxruntime.session import OrtEngine, SessionOptions
from ryzen_compile.config import find_recipe
from ryzen_compile.errors import UnsupportedError
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.speculative.drafter import ExitsEarly
from tests.model_directory import case_named
from tests.zoo import VOCAB, build

LAYERS = 4
STOCK = SessionOptions(threads=1, native=frozenset())
RTOL, ATOL = 1e-4, 5e-5  # logits of order 10, two float32 implementations of up to three layers
IDS = np.random.default_rng(2).integers(3, VOCAB, (1, 14))


def tall(name: str, **settings: Any) -> nn.Module:
    """The zoo's model with ``LAYERS`` layers that all look at everything."""
    sizes = {"num_hidden_layers": LAYERS} | ({"n_layer": LAYERS} if name in ("gpt2", "gptj") else {})
    full = {"layer_types": ["full_attention"] * LAYERS} if name in ("gemma2", "cohere2") else {}
    return build(case_named(name, **sizes, **full, **settings))


def shortened(model: nn.Module, layers: int) -> nn.Module:
    """The same weights without the later layers, in place."""
    parent, name = next(
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) >= layers
    )
    setattr(parent, name, getattr(parent, name)[:layers])
    model.config.num_hidden_layers = layers
    return model


def opened(found: Artifact, options: SessionOptions = STOCK) -> OrtEngine:
    return OrtEngine(found.model, found.spec, found.slots, options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("exit") / "llama"
    export(tall("llama"), out, "fp32", verify=False)
    return artifact.read(out)


@pytest.fixture
def model(llama: Artifact) -> ModelProto:
    return check_model(llama.directory)


# --- equal to the model without its later layers


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"tie_word_embeddings": True}),  # sums and norms in one node
        ("gpt2", {}),  # biases inside these nodes, a table of positions
        ("gpt_neox", {}),  # attention and MLP side by side, positions from a shape within the first layer
        ("olmo2", {}),  # norms before the sums, which are nodes of their own but for the last one
        ("opt", {}),  # rows of all tokens one after another around the sums
        ("opt", {"do_layer_norm_before": False}),  # a layer ends in its own norm, and no other follows
        ("gemma2", {}),  # norms on both sides, a capped and tied head
    ],
)
def test_an_exit_is_the_model_without_its_later_layers(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    whole = tall(name, **settings)
    export(whole, tmp_path / "out", find_recipe("fp32", logits="all") if name == "olmo2" else "fp32", verify=False)
    engine = opened(artifact.read(tmp_path / "out"))
    assert engine.exits == (1, 2, 3) and engine.exits_why == "" and isinstance(engine, ExitsEarly)
    for layers in (3, 2, 1):
        with torch.no_grad():
            want = shortened(whole, layers)(torch.from_numpy(IDS), use_cache=False).logits[0].numpy()
        early = engine.early_exit(layers)
        assert early.slots == engine.slots and early.spec.layers == layers and early.verifies
        cache = KVCache(engine.slots, 1, 16)
        np.testing.assert_allclose(early.step(IDS[:, :9], cache, 9)[0], want[:9], rtol=RTOL, atol=ATOL)
        cache.advance(9)
        for place in range(9, 14):
            got = early.step(IDS[:, place : place + 1], cache)[0, -1]
            np.testing.assert_allclose(got, want[place], rtol=RTOL, atol=ATOL)
            cache.advance(1)
        assert not any(buffer.any() for buffer in (*cache.keys[layers:], *cache.values[layers:]))
        early.close()
    engine.close()


def test_on_native_operators_it_is_so_to_the_bit(library: Path, tmp_path: Path) -> None:
    recipe = find_recipe("int4", method="rtn")
    settings = {"hidden_size": 128, "intermediate_size": 160}
    export(tall("llama", **settings), tmp_path / "whole", recipe, verify=False)
    export(shortened(tall("llama", **settings), 2), tmp_path / "short", recipe, verify=False)
    native = SessionOptions(2, require_native=True)
    whole, short = (opened(artifact.read(tmp_path / name), native) for name in ("whole", "short"))
    early = whole.early_exit(2)
    assert early.claims.claimed == short.claims.claimed and early.claims.fused == short.claims.fused
    ours, theirs = KVCache(whole.slots, 1, 16), KVCache(short.slots, 1, 16)
    np.testing.assert_array_equal(early.step(IDS, ours, 14), short.step(IDS, theirs, 14))
    for layer in range(2):
        np.testing.assert_array_equal(ours.keys[layer], theirs.keys[layer])
        np.testing.assert_array_equal(ours.values[layer], theirs.values[layer])
    for engine in (early, whole, short):
        engine.close()


def test_drafting_on_the_models_own_cache_leaves_its_results_alone(llama: Artifact) -> None:
    """What an exit writes of wrong tokens lies behind the length that it goes back to, and is written over."""
    engine = opened(llama)
    early = engine.early_exit(2)
    alone, shared = KVCache(engine.slots, 1, 32), KVCache(engine.slots, 1, 32)
    for cache in (alone, shared):
        engine.step(IDS[:, :6], cache)
        cache.advance(6)
    for place in range(6, 14):
        token = IDS[:, place : place + 1]
        for draft in (token, (token + 7) % VOCAB, (token + 20) % VOCAB):  # the first is right, the others are not
            early.step(draft, shared)
            shared.advance(1)
        shared.truncate(place)
        got = engine.step(token, shared).copy()
        np.testing.assert_array_equal(got, engine.step(token, alone))
        for cache in (alone, shared):
            cache.advance(1)
    for mine, plain in zip((*shared.keys, *shared.values), (*alone.keys, *alone.values), strict=True):
        np.testing.assert_array_equal(mine[:, :, :14], plain[:, :, :14])
    early.close()
    engine.close()


# --- what cannot be left early


def test_layers_out_of_range_are_refused(llama: Artifact, model: ModelProto) -> None:
    engine = opened(llama)
    for layers in (0, -1, LAYERS, 99):
        with pytest.raises(UnsupportedError, match=f"after {layers} of its 4 layers; it can after 1, 2, 3"):
            engine.early_exit(layers)
        with pytest.raises(UnsupportedError, match=f"after {layers} of its 4 layers; it can after 1, 2, 3"):
            cut(model, llama.slots, layers)
    early = engine.early_exit(1)
    assert early.exits == () and early.exits_why == "the model is left early already"
    early.close()
    engine.close()


def test_a_window_is_refused(decoder_program: Callable, heads: Callable) -> None:
    program = decoder_program(heads(window=5, rolling=True), heads())
    engine = OnnxRuntimeBackend().compile(program, options=STOCK)
    assert engine.exits == () and "a layer keeps a window" in engine.exits_why
    with pytest.raises(UnsupportedError, match="after 1 of its 2 layers; a layer keeps a window of its past only"):
        engine.early_exit(1)
    engine.close()


def test_a_lone_layer_and_attentions_side_by_side_have_no_exits(
    decoder_program: Callable, attentions_program: Callable, heads: Callable
) -> None:
    for program, why in (
        (decoder_program(heads()), "it has one layer"),
        (attentions_program(heads(), heads()), "no residual addition lies on every path from its last layer"),
    ):
        engine = OnnxRuntimeBackend().compile(program, options=STOCK)
        assert engine.exits == () and why in engine.exits_why
        engine.close()


def _bypassed(model: ModelProto) -> None:
    """The embedding reaches the head beside all layers."""
    head = next(node for node in model.graph.node if "logits" in node.output)
    embedded = next(node for node in model.graph.node if "input_ids" in node.input).output[0]
    model.graph.node.insert(
        len(model.graph.node) - 1, onnx.helper.make_node("Add", [head.input[0], embedded], ["bypassed"])
    )
    head.input[0] = "bypassed"


def _unlike_the_others(model: ModelProto) -> None:
    """One more residual addition behind the last layer."""
    last = [node for node in model.graph.node if node.op_type.startswith("Skip")][-1]
    place = list(model.graph.node).index(last)
    model.graph.node.insert(place, onnx.helper.make_node("Tanh", [last.input[0]], ["more"]))
    model.graph.node.insert(place + 1, onnx.helper.make_node("Add", ["more", last.input[0]], ["once_more"]))
    model.graph.node.insert(place + 2, onnx.helper.make_node("Add", ["once_more", last.input[1]], ["twice_more"]))
    last.input[0], last.input[1] = "twice_more", "once_more"


def _out_of_order(model: ModelProto) -> None:
    """The first two layers' caches change places."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                for old, new in ((".0.", ".1."), (".1.", ".0.")):
                    if name.startswith(("past_key_values" + old, "present" + old)):
                        names[place] = name.replace(old, new)
                        break


def _without_a_cache(model: ModelProto) -> None:
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name.startswith("past_key_values.2."):
                node.input[place] = "elsewhere" + name


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_bypassed, "its layers do not end in residual additions as the last one does"),
        (_unlike_the_others, "its layers do not end in residual additions as the last one does"),
        (_out_of_order, "its attentions do not follow each other in the order of their slots"),
        (_without_a_cache, "nothing reads the cache of slot 2"),
    ],
)
def test_other_graphs_are_not_cut(
    llama: Artifact, model: ModelProto, change: Callable[[ModelProto], None], why: str
) -> None:
    change(model)
    found = find_exits(model, llama.slots)
    assert found.layers == () and why in found.why
    with pytest.raises(UnsupportedError, match=f"the model cannot be left after 2 of its 4 layers; {why}"):
        cut(model, llama.slots, 2)


def test_a_bias_is_no_residual(llama: Artifact, model: ModelProto) -> None:
    """A constant added on every path changes nothing; it belongs to what it is added to."""
    last = [node for node in model.graph.node if node.op_type.startswith("Skip")][-1]
    bias = numpy_helper.from_array(np.ones(64, np.float32), "bias")
    model.graph.initializer.append(bias)
    model.graph.node.insert(len(model.graph.node) - 2, onnx.helper.make_node("Add", [last.output[0], "bias"], ["more"]))
    model.graph.node[-2].input[0] = "more"
    assert find_exits(model, llama.slots) == Exits((1, 2, 3))
    assert any("more" in node.output for node in cut(model, llama.slots, 1).graph.node)


def test_a_cut_is_a_copy_that_holds_what_it_reads_only(llama: Artifact, model: ModelProto) -> None:
    before = model.SerializeToString(deterministic=True)
    short = cut(model, llama.slots, 1)
    assert model.SerializeToString(deterministic=True) == before
    graph = short.graph
    assert [value.name for value in graph.output] == ["logits", "present.0.key", "present.0.value"]
    assert {value.name for value in graph.input} == {
        "input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value",
    }  # fmt: skip
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    assert {tensor.name for tensor in graph.initializer} <= read
    assert all(read.intersection(node.output) for node in graph.node)
    assert len(graph.node) < len(model.graph.node) / 2
