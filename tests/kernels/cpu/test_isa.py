"""Which instruction set runs: the best one unless another is asked for, and never one that this processor lacks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper


def norm(one_node: Callable[..., ModelProto], **attributes: str) -> ModelProto:
    node = helper.make_node("SkipRMSNorm", ["x", "", "weight"], ["y"], domain="ryzen", **attributes)
    kinds = {"x": TensorProto.FLOAT, "weight": TensorProto.FLOAT}
    return one_node(node, kinds, {"y": TensorProto.FLOAT}, {})


@pytest.mark.parametrize("name", ["avx2", "avx2_vnni", "avx512_vnni"])
def test_a_missing_instruction_set_is_refused(
    one_node: Callable[..., ModelProto],
    open_session: Callable[..., onnxruntime.InferenceSession],
    isas: list[str],
    name: str,
) -> None:
    if name in isas:
        pytest.skip(f"this processor has {name}")
    with pytest.raises(Exception, match=f"isa is {name}, which this processor does not have"):
        open_session(norm(one_node, isa=name))


@pytest.mark.parametrize("name", ["", "AVX2", "auto ", "avx512", "avx2\n"])
def test_an_unknown_name_is_refused(
    one_node: Callable[..., ModelProto], open_session: Callable[..., onnxruntime.InferenceSession], name: str
) -> None:
    with pytest.raises(Exception, match="expected auto, scalar, avx2, avx2_vnni or avx512_vnni"):
        open_session(norm(one_node, isa=name))


def test_the_best_one_runs_unless_told(
    one_node: Callable[..., ModelProto], open_session: Callable[..., onnxruntime.InferenceSession], isas: list[str]
) -> None:
    """Sums over a row are made in another order by each, so its bits tell which one ran."""
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((64, 999)).astype(np.float32), "weight": np.ones(999, np.float32)}
    best = isas[-1]
    auto, absent, forced = (
        open_session(norm(one_node, **settings)).run(None, feeds)[0]
        for settings in ({"isa": "auto"}, {}, {"isa": best})
    )
    np.testing.assert_array_equal(auto, forced)
    np.testing.assert_array_equal(absent, forced)
    if best != "scalar":
        assert (open_session(norm(one_node, isa="scalar")).run(None, feeds)[0] != forced).any()
