"""``ryzen-compile validate``: exit codes, the report in every form, and what it is held to where nobody says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ryzen_compile.manifest import MANIFEST_NAME
from ryzen_compile.workflow.report_schema import VALIDATION_NAME, ValidationReport
from tests.workflow.tiny_workflow import MODEL, NO_TARGETS, VALIDATION, finished_workflow, times

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float32 artifact of the shipped model; not to be changed."""
    return finished_workflow(tmp_path_factory) / "artifact"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings that take a moment, and hold to nothing."""
    path = tmp_path_factory.mktemp("settings") / "small.yaml"
    path.write_text(yaml.safe_dump({**VALIDATION, "thresholds": NO_TARGETS}))
    return path


def one_line(err: str, code: str) -> str:
    lines = err.splitlines()
    assert lines[-1].startswith(f"ryzen-compile: error[{code}]: "), err
    assert sum("error[" in line for line in lines) == 1 and "Traceback" not in err
    return lines[-1]


# --- verdicts ---------------------------------------------------------------------------------------------------------
def test_an_artifact_that_meets_its_targets(run: Run, artifact: Path, small: Path, tmp_path: Path) -> None:
    """Checks on stdout, what is being measured on stderr, the report where it was asked for; the artifact stays."""
    before = times(artifact)
    path = tmp_path / "found.json"
    status, out, err = run("validate", artifact, "--baseline", MODEL, "--config", small, "--report", path)
    assert status == 0, err
    lines = out.splitlines()
    assert lines[-1] == "verdict: PASS"
    report = ValidationReport.model_validate_json(path.read_bytes())
    assert [line.split()[:3] for line in lines[:-1] if not line.startswith(" ")] == [
        [one.status, one.component, one.check] for one in report.outcomes
    ]
    assert report.inference is not None and (report.inference.rounds, report.inference.prompt_tokens) == (1, 7)
    assert report.text is not None and report.text.tokens == 56  # of 58 in two windows, each first one given
    assert report.metadata.model == str(MODEL) and report.metadata.artifact == "artifact"
    assert report.metadata.command == (f"ryzen-compile validate {artifact} --baseline {MODEL} --config {small}")
    assert report.end_to_end is None and report.pareto == ()
    assert "  requests on both models" in err.splitlines() and "requests" not in out
    assert times(artifact) == before and [one.name for one in tmp_path.iterdir()] == ["found.json"]


def test_targets_out_of_reach(run: Run, artifact: Path, small: Path) -> None:
    """Two at once, of which each names what is to blame; the accuracy of a float32 artifact is none of them."""
    changes = ("--set", "thresholds.kv_memory_saving=0.9", "--set", "thresholds.compression_ratio=1000")
    status, out, err = run("validate", artifact, "--baseline", MODEL, "--config", small, "-q", *changes)
    assert (status, err) == (7, "")
    lines = out.splitlines()
    failed = {line.split()[2]: lines[at + 1] for at, line in enumerate(lines) if line.startswith("FAIL")}
    weights = (artifact / "model.onnx.data").stat().st_size
    assert set(failed) == {"compression_ratio", "kv_memory_saving"}
    assert failed["compression_ratio"].endswith(f"expected >= 1000; culprit: {weights:,} bytes of weights, "
                                                f"{failed['compression_ratio'].rpartition(', ')[2]}")  # fmt: skip
    assert failed["kv_memory_saving"].endswith("expected >= 0.9; culprit: rows of fp32/fp32")
    assert lines[-1] == "verdict: FAIL"


def test_as_json_it_is_the_report(run: Run, artifact: Path, small: Path, tmp_path: Path) -> None:
    path = tmp_path / VALIDATION_NAME
    path.write_text("an older one")
    status, out, err = run(
        "validate", artifact, "--baseline", MODEL, "--config", small, "--json", "--report", path,
        "--set", "thresholds.accuracy_loss=0.5",
    )  # fmt: skip
    assert (status, err) == (0, "")
    report = ValidationReport.model_validate_json(out)
    assert json.loads(out) == json.loads(path.read_text())
    outcome = {one.check: one for one in report.outcomes}["accuracy_loss"]
    assert outcome.status == "PASS" and outcome.target is not None and outcome.target.value == 0.5
    assert outcome.measured is not None and outcome.measured.value == 0


def test_without_a_baseline_there_is_nothing_to_hold_it_to(run: Run, artifact: Path) -> None:
    status, out, err = run("validate", artifact)
    assert (status, out) == (2, "") and "--baseline" in one_line(err, "usage")


# --- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--set", "thresholds.kernel_sped=3"], (3, "config"), "such setting, the nearest is 'kernel_speedup'"),
        (["--set", "rouns=3"], (3, "config"), "rouns: there is no such setting, the nearest is 'rounds'"),
        (["--set", "rounds=0"], (3, "config"), "rounds: Input should be greater than or equal to 1, got '0'"),
        (["--set", "rounds"], (3, "config"), "'rounds': expected a.b=value"),
        (["--config", "absent.yaml"], (3, "config"), "absent.yaml' cannot be read"),
        (["--baseline", "/none/such"], (3, "model"), "model directory '/none/such' does not exist"),
        (["--set", "draft=/none/such"], (3, "artifact"), "/none/such"),
        (["--report", "TMP"], (2, "usage"), "is a directory"),
        (["--report", "absent/found.json"], (2, "usage"), "name a file, as validation_report.json"),
        (["--reprot", "found.json"], (2, "usage"), "--report"),
    ],
)  # fmt: skip
def test_refusals(
    run: Run, artifact: Path, tmp_path: Path, arguments: list[str], code: tuple[int, str], message: str
) -> None:
    baseline = () if "--baseline" in arguments else ("--baseline", MODEL)
    given = [tmp_path if argument == "TMP" else argument for argument in arguments]
    status, out, err = run("validate", artifact, *baseline, *given)
    assert (status, out) == (code[0], "")
    assert message in one_line(err, code[1])
    assert list(tmp_path.iterdir()) == []


def test_a_missing_artifact(run: Run, tmp_path: Path) -> None:
    for place in (tmp_path / "absent", tmp_path):
        status, out, err = run("validate", place, "--baseline", MODEL)
        assert (status, out) == (3, "") and MANIFEST_NAME in one_line(err, "artifact")
    assert run("validate")[0] == 2


@pytest.mark.parametrize("name", ["model.onnx.data", "model.onnx", "report.json"])
def test_a_tampered_artifact(run: Run, artifact: Path, tmp_path: Path, name: str) -> None:
    """One bit, the size as it was."""
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    status, out, err = run("validate", copy, "--baseline", MODEL, "-q")
    assert (status, out) == (4, "") and name in one_line(err, "tampered")


def test_an_artifact_of_another_model_fails_and_says_so(
    run: Run, artifact: Path, small: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Its vocabulary is another one: what cannot be compared has failed, and stops no other check."""
    from tests.model_directory import shared_model

    other = shared_model(tmp_path_factory)
    target = ("--set", "thresholds.end_to_end_speedup=1")
    status, out, err = run("validate", artifact, "--baseline", other, "--config", small, "--json", *target)
    assert status == 7, err
    report = ValidationReport.model_validate_json(out)
    failed = {one.check: one for one in report.outcomes if one.status == "FAIL"}
    assert "end_to_end_speedup" in failed and "compare with the model that it was made from" in (
        failed["end_to_end_speedup"].reason
    )
    measured = {one.check: one.measured for one in report.outcomes}
    assert report.inference is None and measured["kernel_speedup"] is not None
