"""The built operator library, and sessions of one-node models that use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import archspec.cpu.detect
import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, NodeProto, helper, numpy_helper

from ryzen_compile.kernels import cpu

# What each path needs of the processor, in archspec's names and in ascending order of preference. Some processors with
# the 512-bit VNNI lack VBMI.
NEEDS = {"scalar": set(), "avx2": {"avx2"}, "avx2_vnni": {"avx_vnni"}, "avx512_vnni": {"avx512_vnni", "avx512vbmi"}}


@pytest.fixture(scope="session")
def library() -> Path:
    found = cpu.library()
    if found is None:
        pytest.skip(cpu.reason())
    return found


@pytest.fixture(scope="session")
def isas() -> list[str]:
    """The paths that this processor can run, the best one last."""
    features = archspec.cpu.detect.detected_info().features
    return [name for name, need in NEEDS.items() if need <= features]


@pytest.fixture(params=list(NEEDS))
def isa(request: pytest.FixtureRequest, isas: list[str]) -> str:
    """Every path in turn; those that this processor cannot run are skipped."""
    if request.param not in isas:
        pytest.skip(f"this processor lacks some of {', '.join(sorted(NEEDS[request.param]))}")
    return str(request.param)


@pytest.fixture(scope="session")
def open_session(library: Path) -> Callable[..., onnxruntime.InferenceSession]:
    """``open_session(model, threads=1)``: a session that knows the library's operators."""

    def opened(model: ModelProto, threads: int = 1) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # refusals are expected here and raised anyway
        options.intra_op_num_threads = threads
        options.register_custom_ops_library(str(library))
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    return opened


@pytest.fixture(scope="session")
def one_node() -> Callable[..., ModelProto]:
    """``one_node(node, inputs, outputs, constants)``: a model of one node. Inputs and outputs are element types by
    name, their shapes are left open."""

    def model(
        node: NodeProto,
        inputs: Mapping[str, int],
        outputs: Mapping[str, int],
        constants: Mapping[str, np.ndarray[Any, Any]],
    ) -> ModelProto:
        graph = helper.make_graph(
            [node],
            "one node",
            [helper.make_tensor_value_info(name, kind, None) for name, kind in inputs.items()],
            [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        )
        versions = {"": 21, "com.microsoft": 1, "ryzen": 1}
        opsets = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    return model
