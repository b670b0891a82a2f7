"""``ryzen-compile tune`` as a user types it, on a tiny artifact with a tiny budget."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import ryzen_compile
from ryzen_compile import cli
from ryzen_compile.backends.onnxruntime.tuning import Tuning
from ryzen_compile.manifest import MANIFEST_NAME, read_manifest, tuned, write_manifest
from ryzen_compile.validate.machine import cpu_key, read_machine
from tests.model_directory import listing, shared_artifact


@pytest.fixture
def artifact(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared_artifact(tmp_path_factory), tmp_path / "artifact"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        status = cli.main(["tune", *map(str, arguments)])
        return status, *capsys.readouterr()

    return call


def test_measures_prints_and_writes(run: Callable[..., tuple[int, str, str]], artifact: Path) -> None:
    before = read_manifest(artifact)
    status, out, err = run(artifact, "--threads", "1,2", "--seconds", 0.3)
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0] == "a request of 512 + 128 tokens, ms:"
    assert lines[1].split() == ["threads", "spinning", "median", "±", "spread"]
    assert [line.split()[:2] for line in lines[2:5]] == [["1", "on"], ["2", "on"], ["2", "off"]]
    assert sum(line.endswith("chosen") for line in lines[2:5]) == 1
    assert any(line.split()[::5] == ["M", "T(M)/T(1)"] for line in lines)  # between them, two contexts
    assert (
        sum(" of the layers: " in line and line.endswith((": used to draft with", ": not used")) for line in lines) == 1
    )
    assert next(line for line in lines if line.split()[:1] == ["1"] and "1.00" in line)
    key = cpu_key(read_machine())
    assert lines[-1] == f"wrote {key} to {artifact}"
    assert "round 1, 1 thread, spinning on" in err
    after = read_manifest(artifact)
    record = Tuning.from_json(key, tuned(after)[key])
    assert lines[5] == record.reason
    assert {name: value for name, value in after.items() if name != "tuned"} == before
    with ryzen_compile.load(artifact) as model:
        assert model.generate([[1, 2, 3]], max_new_tokens=3).shape == (1, 6)


def test_a_dry_run_writes_nothing(run: Callable[..., tuple[int, str, str]], artifact: Path) -> None:
    before, manifest = listing(artifact.parent), (artifact / MANIFEST_NAME).read_bytes()
    status, out, _ = run(artifact, "--threads", "1", "--seconds", 0.1, "--dry-run")
    assert status == 0 and out.splitlines()[-1].startswith("nothing written: the entry would be ")
    assert listing(artifact.parent) == before and (artifact / MANIFEST_NAME).read_bytes() == manifest


def test_json(run: Callable[..., tuple[int, str, str]], artifact: Path) -> None:
    status, out, err = run(artifact, "--threads", "1", "--seconds", 0.1, "--json", "--dry-run")
    assert status == 0 and err == ""
    found = json.loads(out)
    assert found["threads"] == 1 and found["written"] is False and found["key"] == cpu_key(read_machine())
    assert found["candidates"][0]["median"] > 0 and found["candidates"][0]["spread"] > 0
    assert bool(found["kernels"]["timings"]) != bool(found["kernels"]["skipped"])


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--threads", "two"), 2, "must be numbers with commas between them, got 'two'; as 1,2,4"),
        (("--threads", "0"), 2, "threads to try must be from 1 to"),
        (("--threads", "1,"), 2, "must be numbers"),
        (("--threads", "1,100000"), 2, "threads to try must be from 1 to"),
        (("--seconds", "0"), 2, "--seconds"),
    ],
)
def test_bad_arguments(
    run: Callable[..., tuple[int, str, str]], artifact: Path, arguments: tuple[str, ...], status: int, said: str
) -> None:
    before = listing(artifact.parent)
    found, out, err = run(artifact, *arguments)
    assert found == status and said in err and out == "" and err.count("\n") == 1
    assert listing(artifact.parent) == before


def test_bad_artifacts(run: Callable[..., tuple[int, str, str]], artifact: Path, tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "absent"):
        status, _, err = run(directory)
        assert status == 3 and "error[artifact]" in err
    with (artifact / "model.onnx.data").open("r+b") as stream:
        stream.write(b"\xff\xff")
    status, _, err = run(artifact)
    assert status == 4 and "error[tampered]" in err


def test_a_hostile_table_of_machines(run: Callable[..., tuple[int, str, str]], artifact: Path) -> None:
    facts = {
        name: value
        for name, value in read_manifest(artifact).items()
        if name not in ("schema_version", "made_by", "files")
    }
    write_manifest(artifact, {**facts, "tuned": "all of them"})
    status, _, err = run(artifact, "--threads", "1", "--seconds", 0.1)
    assert status == 3 and "'tuned' is not a table of machines" in err
