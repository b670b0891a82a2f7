"""The structural check of ``model.onnx``: handcrafted bad models, one per rule, and the near-misses that must pass."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import FunctionProto, ModelProto, TensorProto, helper

from ryzen_compile.backends.onnxruntime import artifact_check
from ryzen_compile.backends.onnxruntime.artifact_check import check_model
from ryzen_compile.errors import ArtifactError, RyzenCompileError, TamperedError, UnsafeError

DATA = "model.onnx.data"
LISTED = {"model.onnx", DATA}


def external(name: str, dims: list[int], kind: int = TensorProto.FLOAT, **entries: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": DATA, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def model_of(*initializers: TensorProto, functions: list[FunctionProto] | None = None) -> ModelProto:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])],
        list(initializers),
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions or [], ir_version=10)


def function(name: str, *calls: str) -> FunctionProto:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    nodes += [helper.make_node(call, ["x"], [f"y{i}"], domain="own") for i, call in enumerate(calls)]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    return helper.make_function("own", name, ["x"], ["y"], nodes, opsets)


def chain(length: int, calls_each: int = 1) -> list[FunctionProto]:
    return [function(f"f{i}", *[f"f{i + 1}"] * calls_each) for i in range(1, length)] + [function(f"f{length}")]


def calling(model: ModelProto) -> ModelProto:
    model.graph.node.append(helper.make_node("f1", ["x"], ["z"], domain="own"))
    return model


def write(directory: Path, model: ModelProto) -> None:
    (directory / "model.onnx").write_bytes(model.SerializeToString())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / DATA).write_bytes(bytes(1024))
    return tmp_path


def subgraph_with(tensor: TensorProto) -> ModelProto:
    """``tensor`` hidden as a Constant inside a branch of an If."""
    value = helper.make_tensor_value_info("v", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("Constant", [], ["v"], value=tensor)], "branch", [], [value])
    model = model_of()
    model.graph.node.append(helper.make_node("If", ["c"], ["w"], then_branch=branch, else_branch=branch))
    return model


def calls_native(*functions: str, hidden: bool = False) -> ModelProto:
    """A node of the domain ``ryzen``, which the model may define, in the graph or in a function's body."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ryzen", 1)]
    node = helper.make_node("SkipRMSNorm", ["x", "", "x"], ["z"], "norm", domain="ryzen")
    body = [helper.make_node("Identity", ["x"], ["y"])]
    defined = [helper.make_function("ryzen", name, ["x"], ["y"], body, opsets) for name in functions]
    model = model_of(functions=defined)
    (model.functions.add() if hidden else model.graph).node.append(node)
    if hidden:
        model.functions[-1].name, model.functions[-1].domain = "hides", "own"
    return model


def in_function(tensor: TensorProto) -> ModelProto:
    body = function("f1")
    body.node.append(helper.make_node("Constant", [], ["v"], value=tensor))
    return model_of(functions=[body])


def sparse(tensor: TensorProto) -> ModelProto:
    model = model_of()
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(tensor, indices, [9]))
    return model


GOOD = {
    "none external": model_of(helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])),
    "raw": model_of(helper.make_tensor("w", TensorProto.FLOAT, [2], bytes(8), raw=True)),
    "half inline": model_of(helper.make_tensor("w", TensorProto.FLOAT16, [2], [1.0, 2.0])),
    "strings": model_of(helper.make_tensor("w", TensorProto.STRING, [2], [b"a", b"b"])),
    "zero elements": model_of(helper.make_tensor("w", TensorProto.FLOAT, [0, 5], [])),
    "whole file": model_of(external("w", [256])),
    "a part": model_of(external("w", [16], offset="960", length="64")),
    "shared bytes": model_of(external("v", [16], length="64"), external("w", [16], length="64")),
    "checksum": model_of(external("w", [256], checksum="da39a3")),
    "packed int4, odd count": model_of(external("w", [3, 5], TensorProto.INT4, length="8")),
    "packed uint2": model_of(external("w", [9], TensorProto.UINT2, length="3")),
    "empty external": model_of(external("w", [0], offset="1024", length="0")),
    "in a subgraph": subgraph_with(external("w", [16], length="64")),
    "100 nested functions": calling(model_of(functions=chain(100))),
    "a function of a standard name": model_of(functions=[function("Identity")]),
}

BAD: dict[str, tuple[ModelProto, type[RyzenCompileError], str]] = {
    "parent": (
        model_of(external("w", [1], location="../x")),
        UnsafeError,
        r"'w': its location '\.\./x' contains '\.\.'",
    ),
    "absolute": (model_of(external("w", [1], location="/etc/passwd")), UnsafeError, "is an absolute path"),
    "drive": (model_of(external("w", [1], location="C:x")), UnsafeError, "starts with a drive letter"),
    "backslash": (model_of(external("w", [1], location="..\\x")), UnsafeError, "contains a backslash"),
    "home": (model_of(external("w", [1], location="~root")), UnsafeError, "starts with '~'"),
    "NUL": (model_of(external("w", [1], location="a\0b")), UnsafeError, r"'a\\x00b' contains a NUL byte"),
    "long": (model_of(external("w", [1], location="x" * 5000)), UnsafeError, r"x\.\.\.' is too long"),
    "empty location": (model_of(external("w", [1], location="")), UnsafeError, "is not a file name"),
    "memory marker": (
        model_of(external("w", [1], location="*/_ORT_MEM_ADDR_/*", offset="140000000", length="4")),
        UnsafeError,
        "points into another directory",
    ),
    "other folder": (model_of(external("w", [1], location="sub/x")), UnsafeError, "points into another directory"),
    "not listed": (
        model_of(external("w", [1], location="extra")),
        UnsafeError,
        "'extra' is not listed in the manifest",
    ),
    "unknown key": (model_of(external("w", [1], __class__="x")), UnsafeError, "unknown key '__class__'"),
    "basepath": (model_of(external("w", [1], basepath="/")), UnsafeError, "unknown key 'basepath'"),
    "negative offset": (model_of(external("w", [1], offset="-4")), TamperedError, "offset '-4' is not a whole number"),
    "word as length": (model_of(external("w", [1], length="all")), TamperedError, "length 'all' is not a whole"),
    "other digits": (model_of(external("w", [1], length="٤")), TamperedError, "is not a whole number"),
    "2^63": (model_of(external("w", [1], offset=str(2**63))), TamperedError, r"not a whole number below 2\^63"),
    "beyond the end": (
        model_of(external("w", [256], offset="4", length="1024")),
        TamperedError,
        r"bytes 4\.\.1028 lie outside 'model\.onnx\.data' of 1024 bytes",
    ),
    "offset beyond": (model_of(external("w", [0], offset="2000")), TamperedError, "lie outside"),
    "shape needs more": (model_of(external("w", [300], length="1024")), TamperedError, "needs 1200 bytes.* is 1024"),
    "shape needs less": (model_of(external("w", [3])), TamperedError, "needs 12 bytes, its length is 1024"),
    "packed too long": (
        model_of(external("w", [3, 5], TensorProto.UINT4, length="15")),
        TamperedError,
        "needs 8 bytes, its length is 15",
    ),
    "external strings": (model_of(external("w", [1], TensorProto.STRING)), ArtifactError, "holds strings"),
    "unknown type": (model_of(external("w", [1], 77)), ArtifactError, "'w' has the unknown type 77"),
    "undefined type": (model_of(external("w", [1], 0)), ArtifactError, "unknown type 0"),
    "negative size": (model_of(external("w", [-1])), ArtifactError, "negative dimension -1"),
    "overflow": (model_of(external("w", [2**40, 2**40])), ArtifactError, "product of its dimensions overflows"),
    "overflow, then 0": (model_of(external("w", [2**40, 2**40, 0])), ArtifactError, "overflows"),
    "rank": (model_of(external("w", [1] * 1025)), ArtifactError, "has 1025 dimensions, the limit is 1024"),
    "hidden in a subgraph": (subgraph_with(external("w", [1], location="../x")), UnsafeError, r"contains '\.\.'"),
    "hidden in a function": (in_function(external("w", [1], location="../x")), UnsafeError, r"contains '\.\.'"),
    "hidden in a sparse": (sparse(external("w", [1], location="../x")), UnsafeError, r"contains '\.\.'"),
    "101 nested functions": (calling(model_of(functions=chain(101))), ArtifactError, "nests over 100 deep"),
    "recursion": (
        model_of(functions=[function("f1", "f2"), function("f2", "f1")]),
        ArtifactError,
        "function 'f1' calls itself",
    ),
    "functions that double": (
        calling(model_of(functions=chain(60, calls_each=2))),
        ArtifactError,
        r"has 2\.31e\+18 nodes with its functions inlined, the limit is 1000000",
    ),
    "function twice": (model_of(functions=[function("f1"), function("f1")]), ArtifactError, "function 'f1' twice"),
    "a native operator": (calls_native("Other"), ArtifactError, "node 'norm' calls ryzen::'SkipRMSNorm', which"),
    "a hidden native operator": (
        calls_native(hidden=True),
        ArtifactError,
        "calls ryzen::'SkipRMSNorm', which the model",
    ),
    "a native operator's name": (
        calls_native("SkipRMSNorm"),
        ArtifactError,
        "function 'SkipRMSNorm' has the name of a native operator, which we never write",
    ),
    "inline too short": (
        model_of(TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2**30], raw_data=b"1234")),
        TamperedError,
        "expected 4294967296 bytes, got 4",
    ),
    "inline values": (
        model_of(TensorProto(name="w", data_type=TensorProto.INT64, dims=[3], int64_data=[1, 2])),
        TamperedError,
        "expected 3 values, got 2",
    ),
    "inline nothing": (
        model_of(TensorProto(name="w", data_type=TensorProto.INT8, dims=[3])),
        TamperedError,
        "expected 3 values, got none",
    ),
    "raw strings": (
        model_of(TensorProto(name="w", data_type=TensorProto.STRING, dims=[1], raw_data=b"x")),
        ArtifactError,
        "holds strings as raw bytes",
    ),
}


def no_location() -> ModelProto:
    tensor = external("w", [1])
    del tensor.external_data[:]
    return model_of(tensor)


def twice() -> ModelProto:
    tensor = external("w", [256])
    tensor.external_data.add(key="location", value="../x")
    return model_of(tensor)


def unmarked() -> ModelProto:
    tensor = external("w", [1])
    tensor.data_location = TensorProto.DEFAULT
    return model_of(tensor)


def unversioned() -> ModelProto:
    model = model_of()
    model.ClearField("ir_version")
    return model


BAD |= {
    "no location": (no_location(), ArtifactError, "has no location"),
    "key twice": (twice(), UnsafeError, "has the key location twice"),
    "not marked": (unmarked(), UnsafeError, "not marked as external"),
    "no version": (unversioned(), ArtifactError, "is not an ONNX model: it lacks a version"),
}


@pytest.mark.parametrize("model", GOOD.values(), ids=GOOD.keys())
def test_good_models(directory: Path, model: ModelProto) -> None:
    write(directory, model)
    assert check_model(directory, listed=LISTED) == model


@pytest.mark.parametrize(("model", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_models(directory: Path, model: ModelProto, error: type[RyzenCompileError], message: str) -> None:
    write(directory, model)
    with pytest.raises(error, match=message) as caught:
        check_model(directory, listed=LISTED)
    assert caught.type is error
    assert "\n" not in str(caught.value)


def cut(directory: Path) -> None:
    os.truncate(directory / "model.onnx", 100)


def garbage(directory: Path) -> None:
    (directory / "model.onnx").write_bytes(bytes(range(256)) * 40)


def link(directory: Path) -> None:
    (directory / DATA).rename(directory / "elsewhere")
    (directory / DATA).symlink_to("elsewhere")


def fifo(directory: Path) -> None:
    (directory / DATA).unlink()
    os.mkfifo(directory / DATA)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (garbage, ArtifactError, "is not an ONNX model"),
        (cut, ArtifactError, "is not an ONNX model"),
        (lambda d: os.truncate(d / "model.onnx", 0), ArtifactError, "is empty"),
        (lambda d: os.truncate(d / "model.onnx", (1 << 30) + 1), ArtifactError, "has 1073741825 bytes, the limit"),
        (lambda d: (d / "model.onnx").unlink(), TamperedError, "'model.onnx' is missing"),
        (lambda d: (d / DATA).unlink(), TamperedError, r"'model\.onnx\.data' is missing"),
        (lambda d: os.truncate(d / DATA, 1023), TamperedError, "needs 1024 bytes, its length is 1023"),
        (link, UnsafeError, "is a symbolic link"),
        (lambda d: os.link(d / DATA, d / "twin"), UnsafeError, "is a hard link"),
        (fifo, UnsafeError, "is a FIFO"),
    ],
)
def test_bad_files(
    directory: Path, damage: Callable[[Path], None], error: type[RyzenCompileError], message: str
) -> None:
    write(directory, model_of(external("w", [256])))
    check_model(directory, listed=LISTED)
    damage(directory)
    with pytest.raises(error, match=message) as caught:
        check_model(directory, listed=LISTED)
    assert caught.type is error


def test_too_many_nodes(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_check, "MAX_NODES", 50)
    model = model_of()
    model.graph.node.extend([helper.make_node("Identity", ["x"], ["z"])] * 50)
    write(directory, model)
    with pytest.raises(ArtifactError, match="has 51 nodes"):
        check_model(directory)
    del model.graph.node[-1]
    write(directory, model)
    check_model(directory)


def test_deep_subgraphs_do_not_overflow(directory: Path) -> None:
    """The protobuf parser itself stops at 100 levels; the check must turn that into an error, not a crash."""

    def message(field: int, payload: bytes) -> bytes:
        size, length = len(payload), b""
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        return bytes([field << 3 | 2]) + length + bytes([size]) + payload

    graph = b""
    for _ in range(1000):  # GraphProto.node (1) > NodeProto.attribute (5) > AttributeProto.g (6)
        graph = message(1, message(5, message(6, graph)))
    (directory / "model.onnx").write_bytes(model_of().SerializeToString() + message(7, graph))
    with pytest.raises(ArtifactError, match="is not an ONNX model"):
        check_model(directory)


def test_every_single_byte_flip_is_an_error_of_ours_or_harmless(directory: Path) -> None:
    write(directory, model_of(external("w", [16], offset="960", length="64")))
    good = (directory / "model.onnx").read_bytes()
    for position in range(len(good)):
        data = bytearray(good)
        data[position] ^= 1 << (position % 8)
        (directory / "model.onnx").write_bytes(data)
        with contextlib.suppress(ArtifactError, TamperedError, UnsafeError):
            check_model(directory, listed=LISTED)


def test_what_onnx_itself_writes_passes(directory: Path) -> None:
    model = model_of(helper.make_tensor("w", TensorProto.FLOAT, [500], bytes(2000), raw=True))
    onnx.save(model, directory / "model.onnx", save_as_external_data=True, location="own.data", size_threshold=0)
    assert check_model(directory).graph.initializer[0].data_location == TensorProto.EXTERNAL
