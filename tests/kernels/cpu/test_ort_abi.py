"""ONNX Runtime's C ABI as ort_abi.h declares it: the positions are right in the runtime that is installed."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state

HEADER = "kernels/cpu/ort_abi.h"

CREATE_STATUS, CREATE_DOMAIN, RELEASE_DOMAIN = 0, 26, 101  # the last is no part of ort_abi.h: only a test lets go


class ApiBase(ctypes.Structure):
    _fields_ = (
        ("get_api", ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint32)),
        ("version", ctypes.CFUNCTYPE(ctypes.c_char_p)),
    )


@pytest.fixture(scope="module")
def declared(repository: Path) -> dict[str, int]:
    """The header's entries: position by name."""
    text = (repository / HEADER).read_text()
    return {name: int(position) for name, position in re.findall(r"using (\w+)\s*=\s*Entry<(\d+),", text)}


@pytest.fixture(scope="module")
def version(repository: Path) -> int:
    found = re.search(r"API_VERSION = (\d+);", (repository / HEADER).read_text())
    assert found
    return int(found[1])


@pytest.fixture(scope="module")
def base() -> ApiBase:
    """What the runtime in this process hands to the library: from its Python module or from a library beside that."""
    module = Path(onnxruntime_pybind11_state.__file__)
    for file in (module, *sorted(module.parent.glob("libonnxruntime.so*"))):
        get = getattr(ctypes.CDLL(str(file)), "OrtGetApiBase", None)
        if get is not None:
            get.restype = ctypes.POINTER(ApiBase)
            return get().contents
    pytest.skip("this build of ONNX Runtime does not export OrtGetApiBase")


def test_positions_are_distinct_and_in_the_tables_order(declared: dict[str, int]) -> None:
    assert len(declared) >= 20
    assert list(declared.values()) == sorted(set(declared.values()))


def test_the_runtime_serves_our_version_and_no_later_one_than_it_has(base: ApiBase, version: int) -> None:
    assert base.version().decode() == onnxruntime.__version__
    assert base.get_api(1) and base.get_api(version)
    assert not base.get_api(int(onnxruntime.__version__.split(".")[1]) + 1)  # how an old runtime looks to us


def test_entries_that_need_no_session(base: ApiBase, declared: dict[str, int], version: int) -> None:
    api = base.get_api(version)
    make = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(api[declared["CreateStatus"]])
    text = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(api[declared["GetErrorMessage"]])
    release = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(api[declared["ReleaseStatus"]])
    status = make(2, b"as it was given")
    assert text(status) == b"as it was given"
    release(status)

    domain = ctypes.c_void_p()
    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(api[declared["CreateCustomOpDomain"]])
    assert create(b"ours", ctypes.addressof(domain)) is None
    assert domain.value
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(api[RELEASE_DOMAIN])(domain)


def test_everything_else_through_an_operator(
    one_node: Callable[..., ModelProto], open_session: Callable[..., onnxruntime.InferenceSession]
) -> None:
    """Integer, float and text attributes, inputs and outputs that are left out, shapes, types and parallel tasks: with
    a wrong position the result would not be this one."""
    attributes = {"epsilon": 0.5, "block_size": 64, "isa": "scalar"}
    node = helper.make_node(
        "SkipLayerNorm", ["x", "", "w", "", "b"], ["", "sum", "c", "s"], domain="ryzen", **attributes
    )
    kinds = dict.fromkeys(("x", "w", "b"), TensorProto.FLOAT)
    outputs = {"sum": TensorProto.FLOAT, "c": TensorProto.INT8, "s": TensorProto.FLOAT}
    x = np.tile(np.array([1.0, -1.0], np.float32), (500, 50))
    feeds = {"x": x, "w": np.ones(100, np.float32), "b": np.full(100, 2, np.float32)}
    total, codes, steps = open_session(one_node(node, kinds, outputs, {}), threads=2).run(None, feeds)
    np.testing.assert_array_equal(total, x + 2)
    assert codes.shape == (500, 128) and codes.dtype == np.int8
    np.testing.assert_array_equal(codes[:, :100], 127 * x)
    assert not codes[:, 100:].any()
    np.testing.assert_allclose(steps, np.full((500, 2), 1 / np.sqrt(1.5) / 127), rtol=1e-6)


def test_what_the_runtime_refuses_is_passed_on(
    one_node: Callable[..., ModelProto], open_session: Callable[..., onnxruntime.InferenceSession]
) -> None:
    node = helper.make_node("SkipRMSNorm", ["x", "", "w"], ["y"], domain="ryzen")
    session = open_session(one_node(node, dict.fromkeys("xw", TensorProto.FLOAT), {"y": TensorProto.FLOAT}, {}))
    binding = session.io_binding()
    binding.bind_cpu_input("x", np.ones((2, 8), np.float32))
    binding.bind_cpu_input("w", np.ones(8, np.float32))
    held = np.zeros((2, 7), np.float32)
    binding.bind_output("y", "cpu", 0, np.float32, held.shape, held.ctypes.data)
    with pytest.raises(Exception, match=r"SkipRMSNorm: ONNX Runtime: .*shape"):
        session.run_with_iobinding(binding)


def test_an_operator_that_the_library_lacks_is_not_found(
    one_node: Callable[..., ModelProto], open_session: Callable[..., onnxruntime.InferenceSession]
) -> None:
    node = helper.make_node("SkipGroupNorm", ["x"], ["y"], domain="ryzen")
    with pytest.raises(Exception, match="SkipGroupNorm"):
        open_session(one_node(node, {"x": TensorProto.FLOAT}, {"y": TensorProto.FLOAT}, {}))


def test_two_sessions_share_the_library(
    one_node: Callable[..., ModelProto], open_session: Callable[..., onnxruntime.InferenceSession]
) -> None:
    node = helper.make_node("SkipRMSNorm", ["x", "", "w"], ["y"], domain="ryzen")
    model = one_node(node, dict.fromkeys("xw", TensorProto.FLOAT), {"y": TensorProto.FLOAT}, {})
    feeds = {"x": np.ones((1, 8), np.float32), "w": np.full(8, 3, np.float32)}
    first = open_session(model)
    second = open_session(model)
    del first
    np.testing.assert_allclose(second.run(None, feeds)[0], np.full((1, 8), 3), rtol=1e-5)
