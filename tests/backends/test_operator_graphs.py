"""Operators taken out of a graph: which nodes, of which sizes, over which values; and why others stay behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ryzen_compile.backends.onnxruntime.node_facts import CONTRIB
from ryzen_compile.backends.onnxruntime.operator_graphs import OperatorGraph, operator_graph

RANDOM = np.random.default_rng(3)
WEIGHT = RANDOM.standard_normal((5, 7), dtype=np.float32)  # (K, N)
VECTORS = {name: RANDOM.standard_normal(5, dtype=np.float32) for name in ("scale", "shift", "added")}


def model(
    *nodes: onnx.NodeProto,
    shapes: dict[str, list[Any]] | None = None,
    constants: dict[str, np.ndarray] | None = None,
    outputs: tuple[str, ...] = (),
) -> ModelProto:
    """Those nodes over ``x`` (batch, sequence, 5), and what other values are told to be."""
    told = {"x": ["batch", "sequence", 5], **(shapes or {})}
    made = {name for node in nodes for name in node.output}
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in told.items()}
    last = outputs or (nodes[-1].output[0],)
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in last]
    graph = helper.make_graph(
        nodes,
        "test",
        [value for name, value in values.items() if name not in made],
        results,
        [numpy_helper.from_array(array, name) for name, array in {"w": WEIGHT, **(constants or {})}.items()],
        value_info=[value for name, value in values.items() if name in made and name not in last],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1), helper.make_opsetid("ryzen", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def node(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
    standard = op in ("MatMul", "Gemm", "Add", "Slice", "LayerNormalization", "SimplifiedLayerNormalization")
    return helper.make_node(op, inputs, outputs, domain="" if standard else CONTRIB, **attributes)


def taken(graph: ModelProto, kind: Any = "product", *, context: int = 3, tokens: int = 2) -> OperatorGraph:
    return operator_graph(graph, kind, context=context, tokens=tokens)


def results(graph: OperatorGraph, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(graph.model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def filled(graph: OperatorGraph) -> dict[str, np.ndarray]:
    return {name: RANDOM.standard_normal(shape, dtype=np.float32) for name, shape in graph.inputs.items()}


# --- products


@pytest.mark.parametrize(
    ("made", "constants", "bias"),
    [
        (node("MatMul", ["x", "w"], ["y"]), {}, 0.0),
        (node("FusedMatMul", ["x", "w"], ["y"], transB=1), {"w": WEIGHT.T.copy()}, 0.0),
        (node("Gemm", ["x", "w", "b"], ["y"]), {"b": np.full(7, 0.5, np.float32)}, 0.5),
        (node("Gemm", ["x", "w"], ["y"], transB=1), {"w": WEIGHT.T.copy()}, 0.0),
    ],
    ids=["MatMul", "FusedMatMul", "Gemm with a bias", "Gemm turned"],
)
def test_a_product_computes_what_it_did(made: onnx.NodeProto, constants: dict[str, np.ndarray], bias: float) -> None:
    flat = made.op_type == "Gemm"
    graph = taken(model(made, shapes={"x": ["sequence", 5]} if flat else None, constants=constants))
    (site,) = graph.sites
    assert (site.text, site.out_shape, graph.left) == ("2x5x7", (2, 7) if flat else (1, 2, 7), {})
    assert site.bias == bool(bias)  # type: ignore[union-attr]
    inputs = filled(graph)
    found = results(graph, inputs)[site.out]
    np.testing.assert_allclose(found, inputs[site.x] @ WEIGHT + np.float32(bias), rtol=1e-6, atol=1e-6)  # type: ignore[index]


def test_products_are_independent_and_share_inputs_of_one_size() -> None:
    """The second reads the first, a third a single row of it."""
    square = RANDOM.standard_normal((5, 5), dtype=np.float32)
    graph = taken(
        model(
            node("MatMul", ["x", "s"], ["y"]),
            node("MatMul", ["y", "w"], ["z"]),
            node("MatMul", ["last", "w"], ["logits"]),
            shapes={"y": ["batch", "sequence", 5], "last": ["batch", 1, 5]},
            constants={"s": square},
        )
    )
    assert [site.text for site in graph.sites] == ["2x5x5", "2x5x7", "1x5x7"]
    assert [site.x for site in graph.sites] == ["x_1_2_5", "x_1_2_5", "x_1_1_5"]
    assert graph.inputs == {"x_1_2_5": (1, 2, 5), "x_1_1_5": (1, 1, 5)}
    assert {t.name for t in graph.model.graph.initializer} == {"s", "w"}
    assert {opset.domain for opset in graph.model.opset_import} == {"", CONTRIB}  # no functions are left to import
    inputs = filled(graph)
    found = results(graph, inputs)
    for site, weight in zip(graph.sites, (square, WEIGHT, WEIGHT), strict=True):
        np.testing.assert_allclose(found[site.out], inputs[site.x] @ weight, rtol=1e-6, atol=1e-6)  # type: ignore[index]


def test_names_of_the_model_are_not_taken() -> None:
    constants = {"x_1_2_5": WEIGHT, "out_0": WEIGHT}
    made = node("MatMul", ["x", "x_1_2_5"], ["y"]), node("MatMul", ["x", "out_0"], ["z"])
    graph = taken(model(*made, constants=constants, outputs=("y", "z")))
    assert len(results(graph, filled(graph))) == 2


@pytest.mark.parametrize(
    ("made", "changes", "why"),
    [
        (node("MatMul", ["x", "v"], ["y"]), {"shapes": {"v": ["batch", 5, 7]}}, "multiplies no input by a constant"),
        (node("MatMul", ["w", "v"], ["y"]), {"shapes": {"v": [7, 5]}}, "multiplies no input by a constant"),
        (node("MatMul", ["x", "v"], ["y"]), {"constants": {"v": np.ones((1, 5, 7), np.float32)}}, "has 3 dimensions"),
        (node("FusedMatMul", ["x", "w"], ["y"], transA=1), {}, "turns what it multiplies"),
        (node("MatMul", ["x", "w"], ["y"]), {"shapes": {"x": ["experts", 5]}}, "are not known beforehand"),
        (node("MatMul", ["x", "w"], ["y"]), {"shapes": {"x": ["batch", "sequence", 6]}}, "are not known beforehand"),
    ],
    ids=["of two inputs", "constant first", "a batch of weights", "turned", "an expert's rows", "another depth"],
)
def test_products_that_stay_behind_are_counted(made: onnx.NodeProto, changes: dict[str, Any], why: str) -> None:
    graph = taken(model(made, **changes))
    assert not graph.sites and not graph.model.graph.node
    (reason,) = graph.left
    assert why in reason and graph.left[reason] == 1


# --- norms


def rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5)


def layer(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.astype(np.float64).var(-1, keepdims=True) + 1e-5)


@pytest.mark.parametrize(
    ("op", "extra", "want"),
    [
        ("SimplifiedLayerNormalization", [], lambda x, s: rms(x) * VECTORS["scale"]),
        ("LayerNormalization", ["shift"], lambda x, s: layer(x) * VECTORS["scale"] + VECTORS["shift"]),
        ("LayerNormalization", [], lambda x, s: layer(x) * VECTORS["scale"]),
        ("SkipSimplifiedLayerNormalization", [], lambda x, s: rms(x + s) * VECTORS["scale"]),
        ("SkipSimplifiedLayerNormalization", ["added"], lambda x, s: rms(x + s + VECTORS["added"]) * VECTORS["scale"]),
        (
            "SkipLayerNormalization",
            ["shift", "added"],
            lambda x, s: layer(x + s + VECTORS["added"]) * VECTORS["scale"] + VECTORS["shift"],
        ),
        ("SkipLayerNormalization", ["", "added"], lambda x, s: layer(x + s + VECTORS["added"]) * VECTORS["scale"]),
    ],
)
def test_a_norm_computes_what_it_did(op: str, extra: list[str], want: Any) -> None:
    for sums in (False, True) if op.startswith("Skip") else (False,):
        norm_computes(op, extra, want, sums)


def norm_computes(op: str, extra: list[str], want: Any, sums: bool) -> None:
    skips = op.startswith("Skip")
    inputs = ["x", "skip", "scale", *extra] if skips else ["x", "scale", *extra]
    made = node(op, inputs, ["y", "", "", "total"] if sums else ["y"], epsilon=1e-5)
    outputs = ("y", "total") if sums else ("y",)
    whole = model(made, shapes={"skip": ["batch", "sequence", 5]} if skips else {}, constants=VECTORS, outputs=outputs)
    graph = taken(whole, "norm")
    (site,) = graph.sites
    assert (site.text, graph.left, bool(site.sums)) == ("2x5", {}, sums)  # type: ignore[union-attr]
    arrays = filled(graph)
    found = results(graph, arrays)
    x, skip = arrays[site.x], arrays.get(site.skip, np.float32(0))  # type: ignore[index, union-attr]
    np.testing.assert_allclose(found[site.out], want(x, skip), rtol=1e-5, atol=1e-5)
    if sums:
        total = x + skip + (VECTORS["added"] if "added" in extra else 0)
        np.testing.assert_allclose(found[site.sums], total, rtol=1e-6, atol=1e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("made", "changes", "why"),
    [
        (node("LayerNormalization", ["x", "scale"], ["y"], axis=1), {}, "rows that it is over are not known"),
        (node("LayerNormalization", ["x", "one"], ["y"]), {"constants": {"one": np.ones(1, np.float32)}}, "no"),
        (node("LayerNormalization", ["x", "v"], ["y"]), {"shapes": {"v": [5]}}, "are not vectors of float32"),
        (
            node("SkipSimplifiedLayerNormalization", ["x", "skip", "scale"], ["y"]),
            {"shapes": {"skip": [1, "sequence", 5], "x": ["other", "sequence", 5]}},
            "rows that it is over are not known",
        ),
        (
            node("SkipSimplifiedLayerNormalization", ["x", "skip", "scale"], ["y"]),
            {"shapes": {"skip": ["sequence", 5]}},
            "may be of another shape",
        ),
    ],
    ids=["another axis", "one weight for all", "a weight that is computed", "unknown rows", "what is added, spread"],
)
def test_norms_that_stay_behind_are_counted(made: onnx.NodeProto, changes: dict[str, Any], why: str) -> None:
    changes["constants"] = {**VECTORS, **changes.get("constants", {})}
    graph = taken(model(made, **changes), "norm")
    assert not graph.sites and list(graph.left.values()) == [1] and why in next(iter(graph.left))


# --- attentions


def attention_model(inputs: dict[int, str] | None = None, past: int = 0, **attributes: Any) -> ModelProto:
    """A packed attention of 4 heads over 2 with 8 channels; ``inputs`` by place."""
    shapes: dict[str, list[Any]] = {"q": ["batch", "sequence", 64], "mask": ["batch", 1, 1, 1]}
    names = [f"{kind}.{past}.{half}" for kind in ("past_key_values", "present") for half in ("key", "value")]
    shapes |= {name: ["batch", 2, "capacity", 8] for name in names}
    given = {0: "q", 3: names[0], 4: names[1], 5: "last", 6: "total", **(inputs or {})}
    made = helper.make_node(
        "GroupQueryAttention",
        [given.get(place, "") for place in range(max(given) + 1)],
        ["y", *names[2:]],
        domain=CONTRIB,
        **{"num_heads": 4, "kv_num_heads": 2, **attributes},
    )
    return model(made, shapes=shapes, outputs=("y", *names[2:]))


def test_an_attention_keeps_its_cache_and_gets_lengths_of_its_own() -> None:
    graph = taken(attention_model(scale=0.5, local_window_size=6), "attention", context=3, tokens=1)
    (site,) = graph.sites
    assert (site.text, site.out_shape, site.slot) == ("1x4/2x8", (1, 1, 32), 0)  # type: ignore[union-attr]
    assert (site.scale, site.window, site.tables, site.sinks) == (0.5, 6, None, "")  # type: ignore[union-attr]
    names = [value.name for value in graph.model.graph.input]
    wanted = {"q_1_1_64", "last_position", "total_length", "past_key_values.0.key", "past_key_values.0.value"}
    assert set(names) == wanted and len(names) == len(wanted)
    assert {value.name for value in graph.model.graph.output} == {site.out, "present.0.key", "present.0.value"}
    assert taken(attention_model(), "attention").sites[0].scale == 8**-0.5  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("whole", "why"),
    [
        (attention_model(smooth_softmax=1), "its attribute smooth_softmax has no counterpart"),
        (attention_model({9: "positions"}), "an input that has no counterpart"),
        (attention_model({10: "mask"}), "an input that has no counterpart"),
        (attention_model({7: "mask", 8: "mask"}, do_rotary=1), "an input that has no counterpart"),
        (attention_model({3: "past_key_values.0.value"}), "its cache is not its own"),
        (attention_model({4: "past_key_values.0.key"}), "its cache is not its own"),
        (attention_model(num_heads=0), "it has 0 heads over 2"),
        (attention_model(num_heads=3), "it has 3 heads over 2"),
        (attention_model(num_heads=6), "the tokens that it reads are not known beforehand"),
    ],
    ids=["attribute", "positions", "a bias", "tables that are computed", "keys", "values", "none", "odd", "uneven"],
)
def test_attentions_that_stay_behind_are_counted(whole: ModelProto, why: str) -> None:
    graph = taken(whole, "attention")
    assert not graph.sites and graph.left == {why: 1}


def test_two_attentions_over_one_cache_are_not_both_taken() -> None:
    whole = attention_model()
    twin = whole.graph.node.add()
    twin.CopyFrom(whole.graph.node[0])
    twin.output[0] = "again"
    graph = taken(whole, "attention")
    assert len(graph.sites) == 1 and graph.left == {"its cache is not its own": 1}
