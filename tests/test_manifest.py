"""The manifest: what it records, and every way in which a directory can fail to be what it says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ryzen_compile.errors import ArtifactError, RyzenCompileError, TamperedError, UnsafeError, UsageError
from ryzen_compile.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    name_fault,
    read_manifest,
    shown,
    verify_files,
    write_manifest,
)

ZEROS = "0" * 64


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    directory = tmp_path / "artifact"
    (directory / "templates").mkdir(parents=True)
    (directory / "model.onnx").write_bytes(b"graph")
    (directory / "model.onnx.data").write_bytes(bytes(range(256)) * 8)
    (directory / "templates" / "chat.jinja").write_text("{{ x }}")
    write_manifest(directory, {"recipe": "none", "passes": [{"name": "a", "hits": 1}]})
    return directory


def rewrite(directory: Path, **changes: Any) -> None:
    manifest = json.loads((directory / MANIFEST_NAME).read_text())
    manifest.update(changes)
    (directory / MANIFEST_NAME).write_text(json.dumps(manifest))


def test_round_trip(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    assert manifest["recipe"] == "none"
    assert manifest["schema_version"] == SCHEMA_VERSION
    assert set(manifest["files"]) == {"model.onnx", "model.onnx.data", "templates/chat.jinja"}
    assert manifest["files"]["model.onnx.data"]["size"] == 2048
    assert verify_files(artifact, manifest) == ()


def test_writing_is_deterministic(artifact: Path) -> None:
    first = (artifact / MANIFEST_NAME).read_bytes()
    write_manifest(artifact, {"passes": [{"hits": 1, "name": "a"}], "recipe": "none"})
    assert (artifact / MANIFEST_NAME).read_bytes() == first


def test_an_empty_file_and_odd_names_are_fine(tmp_path: Path) -> None:
    for name in ("empty", "with space", "käse.json", "..dots", "a..b", "line\nbreak"):
        (tmp_path / name).touch()
    assert verify_files(tmp_path, write_manifest(tmp_path, {})) == ()


@pytest.mark.parametrize(
    ("facts", "message"),
    [({"files": {}}, "files"), ({"x": float("nan")}, "not JSON"), ({"x": object()}, "not JSON")],
)
def test_facts_that_cannot_be_written(tmp_path: Path, facts: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        write_manifest(tmp_path, facts)


def test_extra_files_are_warned_about_and_named(artifact: Path) -> None:
    (artifact / "extra\x1b[31m.bin").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"1 unlisted file\(s\), not loaded: 'extra\\x1b\[31m\.bin'"):
        assert verify_files(artifact, read_manifest(artifact)) == ("extra\x1b[31m.bin",)


def flip(directory: Path) -> None:
    data = bytearray((directory / "model.onnx.data").read_bytes())
    data[1000] ^= 1
    (directory / "model.onnx.data").write_bytes(data)


def link(directory: Path) -> None:
    (directory / "model.onnx").rename(directory.parent / "elsewhere")
    (directory / "model.onnx").symlink_to(directory.parent / "elsewhere")


def link_parent(directory: Path) -> None:
    (directory / "templates").rename(directory.parent / "elsewhere")
    (directory / "templates").symlink_to(directory.parent / "elsewhere")


def fifo(directory: Path) -> None:
    (directory / "model.onnx").unlink()
    os.mkfifo(directory / "model.onnx")


def folder(directory: Path) -> None:
    (directory / "model.onnx").unlink()
    (directory / "model.onnx").mkdir()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (flip, TamperedError, r"'model\.onnx\.data': expected SHA-256 [0-9a-f]{64}, got [0-9a-f]{64}"),
        (lambda d: os.truncate(d / "model.onnx.data", 100), TamperedError, "expected 2048 bytes, got 100"),
        (lambda d: os.truncate(d / "model.onnx", 0), TamperedError, "'model.onnx': expected 5 bytes, got 0"),
        (lambda d: (d / "model.onnx").unlink(), TamperedError, "'model.onnx' is missing"),
        (link, UnsafeError, r"model\.onnx' is a symbolic link"),
        (link_parent, UnsafeError, r"templates' is a symbolic link"),
        (lambda d: os.link(d / "model.onnx", d.parent / "twin"), UnsafeError, r"is a hard link \(2 names\)"),
        (fifo, UnsafeError, "is a FIFO"),
        (folder, UnsafeError, "is a directory"),
        (lambda d: (d / MANIFEST_NAME).unlink(), ArtifactError, "holds no ryzen_compile.json"),
        (lambda d: (d / MANIFEST_NAME).write_text("{"), ArtifactError, "is not JSON"),
        (lambda d: (d / MANIFEST_NAME).write_bytes(b"\xff\xfe"), ArtifactError, "is not JSON"),
        (lambda d: (d / MANIFEST_NAME).write_text("[" * 100_000), ArtifactError, "is not JSON"),
        (lambda d: (d / MANIFEST_NAME).write_text("[1]"), ArtifactError, "holds a list"),
        (lambda d: (d / MANIFEST_NAME).write_text('{"a": 1, "a": 2}'), ArtifactError, "key 'a' twice"),
        (lambda d: (d / MANIFEST_NAME).write_text("{}"), ArtifactError, "states no schema_version"),
        (lambda d: rewrite(d, schema_version=True), ArtifactError, "states no schema_version"),
        (
            lambda d: rewrite(d, schema_version=99, made_by="ryzen_compile 9.9"),
            ArtifactError,
            r"newer schema 99: made by 'ryzen_compile 9\.9', this is ryzen_compile .* with schema 1; re-export",
        ),
        (lambda d: rewrite(d, schema_version=0), ArtifactError, "older schema 0"),
        (lambda d: rewrite(d, files=[]), ArtifactError, "no table 'files'"),
        (lambda d: rewrite(d, files={"a": {"size": -1, "sha256": ZEROS}}), ArtifactError, "size of 'a'"),
        (lambda d: rewrite(d, files={"a": {"size": 1, "sha256": "0"}}), ArtifactError, "sha256 of 'a'"),
        (lambda d: rewrite(d, files={"../a": {"size": 1, "sha256": ZEROS}}), UnsafeError, r"contains '\.\.'"),
        (lambda d: rewrite(d, files={"/etc/passwd": {"size": 1, "sha256": ZEROS}}), UnsafeError, "absolute path"),
        (lambda d: rewrite(d, files={"a\0": {"size": 1, "sha256": ZEROS}}), UnsafeError, r"NUL byte: 'a\\x00'"),
    ],
)
def test_damage(artifact: Path, damage: Any, error: type[RyzenCompileError], message: str) -> None:
    damage(artifact)
    with pytest.raises(error, match=message) as caught:
        verify_files(artifact, read_manifest(artifact))
    assert caught.type is error
    assert "\n" not in str(caught.value)


def test_sizes_are_checked_without_digests(artifact: Path) -> None:
    flip(artifact)
    verify_files(artifact, read_manifest(artifact), digests=False)
    (artifact / "model.onnx").write_bytes(b"longer graph")
    with pytest.raises(TamperedError, match="expected 5 bytes, got 12"):
        verify_files(artifact, read_manifest(artifact), digests=False)


@pytest.mark.parametrize("name", ["a", "a.b", "..a", "a..", "a~", "deep/er/file", "CON", " ", "x" * 255])
def test_good_names(name: str) -> None:
    assert name_fault(name) is None


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("", "not a file name"),
        (3, "not a file name"),
        ("..", "contains '..'"),
        ("a/../b", "contains '..'"),
        ("/a", "absolute"),
        ("C:\\a", "backslash"),
        ("C:a", "drive letter"),
        ("~/a", "'~'"),
        ("a//b", "normalised"),
        ("./a", "normalised"),
        ("x" * 256, "too long"),
    ],
)
def test_bad_names(name: object, fault: str) -> None:
    assert fault in (name_fault(name) or "")


def test_shown_escapes_and_cuts() -> None:
    assert shown("a\n\x1b[0m\udc80") == r"'a\n\x1b[0m\udc80'"
    assert len(shown("ä" * 10_000_000)) == 100
    assert shown("x" * 98) == f"'{'x' * 98}'"
