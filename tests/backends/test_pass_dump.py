"""The graph after each pass as files: numbered, complete, and never over what is there."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from ryzen_compile.backends.onnxruntime.pass_dump import PassDumper
from ryzen_compile.errors import ResourceError, UsageError
from ryzen_compile.passes.canonicalize import Canonicalize
from ryzen_compile.passes.fuse_norm import FuseNorm
from ryzen_compile.pipeline import run_passes
from ryzen_compile.program import Program
from tests.passes.graphs import captured


@pytest.fixture(scope="module")
def program() -> Program:
    return captured("llama")


class Odd(FuseNorm):
    """A pass of the user's, with a name that is no file name."""

    name = "../my pass\n"


def test_a_file_for_the_capture_and_one_for_each_pass(program: Program, tmp_path: Path) -> None:
    out = tmp_path / "graphs"
    dumper = PassDumper(out)
    assert not out.exists()  # nothing is made before there is something to write
    run_passes(program, (Canonicalize(), FuseNorm(), FuseNorm(), Odd()), observe=dumper)
    files = sorted(path.name for path in out.iterdir())
    assert files == [
        "00_captured.onnx", "01_canonicalize.onnx", "02_fuse_norm.onnx", "03_fuse_norm.onnx", "04____my_pass_.onnx",
    ]  # fmt: skip
    models = [onnx.load(out / name) for name in files]
    for model, name in zip(models, files, strict=True):
        onnx.checker.check_model(model)
        assert model.graph.name == name.removesuffix(".onnx")
    norms = [sum(node.op_type == "rms_norm" for node in model.graph.node) for model in models]
    assert norms == [0, 0, 5, 5, 5]
    assert models[2].graph.node == models[3].graph.node


def test_the_same_run_gives_the_same_bytes(program: Program, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run_passes(program, (Canonicalize(),), observe=PassDumper(tmp_path / name))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_directories_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".hidden").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name, why in (("file", "no directory"), ("full", "not empty"), ("link", "no directory"), ("a/b", "no parent")):
        with pytest.raises(UsageError, match=why):
            PassDumper(tmp_path / name)
    PassDumper(tmp_path / "empty")
    assert [path.name for path in (tmp_path / "full").iterdir()] == [".hidden"]


def test_a_directory_that_was_filled_meanwhile(program: Program, tmp_path: Path) -> None:
    dumper = PassDumper(tmp_path / "graphs")
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "00_captured.onnx").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        run_passes(program, (Canonicalize(),), observe=dumper)
    assert (tmp_path / "graphs" / "00_captured.onnx").read_text() == "mine"


def test_what_cannot_be_written_leaves_no_half(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ResourceError, match=r"cannot write .*00_captured\.onnx.*: No space left"):
        run_passes(program, (Canonicalize(),), observe=PassDumper(tmp_path / "graphs"))
    assert not list((tmp_path / "graphs").iterdir())
