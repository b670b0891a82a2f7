"""The manifest: what it records, and every way in which a directory can fail to be what it says."""

from __future__ import annotations

import concurrent.futures
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ryzen_compile import manifest as subject
from ryzen_compile.errors import (
    ArtifactError,
    BusyError,
    ResourceError,
    RyzenCompileError,
    TamperedError,
    UnsafeError,
    UsageError,
)
from ryzen_compile.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    name_fault,
    read_manifest,
    require_writable,
    shown,
    tuned,
    update_tuning,
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
            r"newer schema 99: made by 'ryzen_compile 9\.9', this is ryzen_compile .* with schema 2; re-export",
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


# --- figures of machines ----------------------------------------------------------------------------------------------
def test_tuning_is_added_and_nothing_else_changes(artifact: Path) -> None:
    rewrite(artifact, big=12345678901234567890, small=1e-300, text="käse\u2028", unknown={"kept": [None, True, 0.1]})
    before = read_manifest(artifact)
    (artifact / MANIFEST_NAME).chmod(0o640)
    update_tuning(artifact, "zen4-2c-32M", {"threads": 2})
    written = update_tuning(artifact, "zen5-8c-64M", {"threads": 4})
    after = read_manifest(artifact)
    assert after == written
    assert tuned(after) == {"zen4-2c-32M": {"threads": 2}, "zen5-8c-64M": {"threads": 4}}
    assert {name: value for name, value in after.items() if name != "tuned"} == before
    assert verify_files(artifact, after) == ()
    assert (artifact / MANIFEST_NAME).stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in artifact.iterdir()) == [
        "model.onnx",
        "model.onnx.data",
        MANIFEST_NAME,
        "templates",
    ]


def test_tuning_again_replaces_that_machines_figures(artifact: Path) -> None:
    update_tuning(artifact, "zen4-2c-32M", {"threads": 2, "old": 1})
    update_tuning(artifact, "zen4-2c-32M", {"threads": 1})
    assert tuned(read_manifest(artifact)) == {"zen4-2c-32M": {"threads": 1}}


def test_writers_at_the_same_time_all_get_in(artifact: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ryzen_compile.manifest import update_tuning\n"
        "for i in range(5): update_tuning(Path(sys.argv[1]), f'{sys.argv[2]}-{i}', {'i': i})"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(artifact), name]) for name in "ab"]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda i: update_tuning(artifact, f"own-{i}", {"i": i}), range(9)))
    assert [child.wait(60) for child in children] == [0, 0]
    names = {f"own-{i}" for i in range(9)} | {f"{name}-{i}" for name in "ab" for i in range(5)}
    assert set(tuned(read_manifest(artifact))) == names
    assert not list(artifact.glob(".*"))


def test_a_held_lock_is_waited_for_and_then_given_up(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "LOCK_SECONDS", 0.05)
    before = (artifact / MANIFEST_NAME).read_bytes()
    holder = os.open(artifact, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        for attempt in (lambda: update_tuning(artifact, "k", {}), lambda: require_writable(artifact)):
            with pytest.raises(BusyError, match="another process is changing"):
                attempt()
    finally:
        os.close(holder)
    assert (artifact / MANIFEST_NAME).read_bytes() == before
    require_writable(artifact)
    update_tuning(artifact, "k", {})


def test_a_failed_write_leaves_the_old_manifest(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (artifact / MANIFEST_NAME).read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(subject.os, "replace", full)
    with pytest.raises(ResourceError, match=r"cannot write ryzen_compile\.json: No space left"):
        update_tuning(artifact, "k", {})
    assert (artifact / MANIFEST_NAME).read_bytes() == before
    assert not list(artifact.glob(".*"))


def test_what_a_killed_writer_left_is_ignored_and_swept(artifact: Path) -> None:
    left = artifact / f".{MANIFEST_NAME}.0123456789abcdef"
    left.write_text("{half")
    assert verify_files(artifact, read_manifest(artifact)) == ()
    update_tuning(artifact, "k", {})
    assert not left.exists()


def test_an_export_that_comes_between_wins(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = artifact.parent / "other"
    other.mkdir()
    (other / "model.onnx").write_bytes(b"another graph")
    write_manifest(other, {})
    reading = subject.read_manifest

    def read_then_replaced(directory: Path) -> dict[str, Any]:
        found = reading(directory)
        artifact.rename(artifact.parent / "old")
        other.rename(artifact)
        return found

    monkeypatch.setattr(subject, "read_manifest", read_then_replaced)
    with pytest.raises(BusyError, match="was replaced meanwhile"):
        update_tuning(artifact, "k", {})
    monkeypatch.undo()
    for directory in (artifact, artifact.parent / "old"):
        assert "tuned" not in read_manifest(directory)


@pytest.mark.parametrize("key", ["", "a\nb", "x" * 101, "\x1b[31m"])
def test_odd_keys_of_machines(artifact: Path, key: str) -> None:
    with pytest.raises(UsageError, match="1 to 100 printable characters"):
        update_tuning(artifact, key, {})


@pytest.mark.parametrize("facts", [{"x": float("inf")}, {"x": object()}])
def test_figures_that_are_not_json(artifact: Path, facts: dict[str, Any]) -> None:
    before = (artifact / MANIFEST_NAME).read_bytes()
    with pytest.raises(UsageError, match="not JSON"):
        update_tuning(artifact, "k", facts)
    assert (artifact / MANIFEST_NAME).read_bytes() == before


def test_figures_of_too_many_machines(artifact: Path) -> None:
    rewrite(artifact, tuned={str(i): {} for i in range(100)})
    update_tuning(artifact, "7", {"again": True})
    with pytest.raises(ArtifactError, match="101 entries, the limit is 100"):
        update_tuning(artifact, "one more", {})
    rewrite(artifact, tuned=[1])
    with pytest.raises(ArtifactError, match="not a table of machines: list"):
        update_tuning(artifact, "k", {})


def test_there_must_be_an_artifact_to_tune(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no ryzen_compile\.json"):
        update_tuning(tmp_path, "k", {})
    for wrong in (tmp_path / "absent", Path(__file__)):
        with pytest.raises(ArtifactError, match="cannot open"):
            update_tuning(wrong, "k", {})
