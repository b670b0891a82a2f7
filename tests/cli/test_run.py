"""``ryzen-compile run``: exit codes, what goes to which stream, one JSON document, and a trace that can be opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ryzen_compile.validate.measured import Measured
from ryzen_compile.validate.outcome import Outcome
from ryzen_compile.workflow import run as mechanics
from ryzen_compile.workflow.config import WorkflowConfig
from ryzen_compile.workflow.phase import ARTIFACT_NAME
from ryzen_compile.workflow.phases import validation
from ryzen_compile.workflow.report_schema import FINAL_NAME, PHASES, VALIDATION_NAME, FinalReport, ValidationReport
from tests.workflow.tiny_workflow import copied, finished_workflow, settings, statuses, times

Run = Callable[..., tuple[int, str, str]]
CHECKS = {
    "kernel_speedup", "passes_hold", "compression_ratio", "table_rows", "kv_memory_saving", "same_text",
    "speculation_speedup", "accuracy_loss", "end_to_end_speedup", "ttft_ms", "tokens_per_second", "peak_memory",
    "test_pass_rate",
}  # fmt: skip


@pytest.fixture
def file(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """A configuration whose output holds a finished run, but for its last phase: the command line is in its report."""
    output = copied(finished_workflow(tmp_path_factory), tmp_path / "out")
    return written(tmp_path, settings(output))


def written(directory: Path, tree: dict[str, Any]) -> Path:
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def one_line(err: str, code: str) -> str:
    """The error, of the given code, which is the last line and the only one of its kind."""
    lines = err.splitlines()
    assert lines[-1].startswith(f"ryzen-compile: error[{code}]: "), err
    assert sum("error[" in line for line in lines) == 1 and "Traceback" not in err
    return lines[-1]


# --- verdicts ---------------------------------------------------------------------------------------------------------
def test_a_run_that_meets_its_targets(run: Run, file: Path) -> None:
    """Checks and verdict on stdout, one phase a line on stderr."""
    status, out, err = run("run", file)
    assert status == 0, err
    lines = out.splitlines()
    assert lines[-2:] == ["verdict: PASS", f"report: {file.parent / 'out' / 'report.html'}"]
    checks = [line.split() for line in lines[:-2] if not line.startswith(" ")]
    assert {words[2] for words in checks} == CHECKS and {words[0] for words in checks} == {"PASS", "SKIPPED"}
    assert "        the workflow has no tests" in lines
    told = [line.split() for line in err.splitlines() if not line.startswith(" ")]
    assert [words[0] for words in told] == list(PHASES)
    assert [words[1] for words in told] == ["reused", "skipped", "reused", "reused", "skipped", "done"]
    assert "  writing reports" in err.splitlines() and "writing reports" not in out and "verdict" not in err


def test_quiet_is_quiet_on_stderr_only(run: Run, file: Path) -> None:
    status, out, err = run("run", file, "-q")
    assert (status, err) == (0, "") and "verdict: PASS" in out


def test_a_target_out_of_reach(run: Run, file: Path) -> None:
    """Exit status 7, what was missed by how much, and what is to blame; the phases before the check are reused."""
    change = ("--set", "validation.thresholds.compression_ratio=1000")
    status, out, err = run("run", file, *change)
    assert status == 7
    lines = out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("FAIL"))
    words = lines[at].split()
    assert words[1:3] == ["embedding", "compression_ratio"] and words[-2:] == [">=", "1000"]
    weights = (file.parent / "out" / ARTIFACT_NAME / "model.onnx.data").stat().st_size
    assert f"expected >= 1000; culprit: {weights:,} bytes of weights" in lines[at + 1]
    assert sum(line.startswith("FAIL") for line in lines) == 1 and lines[-2] == "verdict: FAIL"
    assert "error[" not in err and "optimize  reused" in err and "validate  done" in err
    report = FinalReport.model_validate_json((file.parent / "out" / FINAL_NAME).read_bytes())
    assert report.summary.verdict == "FAIL" and report.metadata.command.endswith(f"tiny.yaml {' '.join(change)}")
    before = times(file.parent / "out")
    again, said, _ = run("run", file, *change)
    assert (again, said) == (7, out)  # what was found to fail fails again, without being measured again
    assert times(file.parent / "out") == before


def test_as_json_it_is_the_final_report(run: Run, file: Path) -> None:
    status, out, err = run("run", file, "--json")
    assert (status, err) == (0, "")
    found = FinalReport.model_validate_json(out)
    written = (file.parent / "out" / FINAL_NAME).read_text()
    assert found == FinalReport.model_validate_json(written) and json.loads(out) == json.loads(written)
    assert found.summary.verdict == "PASS" and statuses(found)["optimize"] == "reused"


def test_json_of_numbers_that_are_none(run: Run, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strict JSON knows no NaN; reports spell it out, the final one and what a phase alone found."""
    written = ValidationReport.model_validate_json((file.parent / "out" / VALIDATION_NAME).read_bytes())
    odd = written.outcomes[0].model_copy(
        update={"measured": Measured(value=float("nan")), "details": {"ratio": float("inf")}}
    )
    found = written.model_copy(update={"outcomes": (odd, *written.outcomes[1:])})
    monkeypatch.setattr(validation, "validate_artifact", lambda *_, **__: found)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    status, out, err = run("run", file, "--only", "validate", "--json")
    assert status == 0, err
    alone = json.loads(out, parse_constant=refuse)["outcomes"][0]
    status, out, err = run("run", file, "--json")
    assert status == 0, err
    check = json.loads(out, parse_constant=refuse)["components"][0]["checks"][0]
    for one in (alone, check):
        assert (one["measured"]["value"], one["details"]["ratio"]) == ("NaN", "Infinity")


# --- phases -----------------------------------------------------------------------------------------------------------
def test_only_a_phase_that_checks_nothing_has_no_verdict(run: Run, file: Path) -> None:
    status, out, err = run("run", file, "--only", "setup")
    assert (status, out) == (0, "")
    assert [line.split()[:2] for line in err.splitlines() if not line.startswith(" ")] == [["setup", "done"]]
    status, out, err = run("run", file, "--only", "setup", "--json")
    assert (status, err) == (0, "")
    assert [(one["phase"], one["status"]) for one in json.loads(out)["phases"]] == [("setup", "done")]


def test_only_a_phase_that_checks_has_its_own_verdict(run: Run, file: Path) -> None:
    """The whole has one only when its report is written."""
    change = ("--set", "validation.thresholds.compression_ratio=1000")
    status, out, _ = run("run", file, "--only", "validate", *change)
    lines = out.splitlines()
    assert status == 7 and lines[-1] == "verdict: FAIL" and "report:" not in out
    assert {line.split()[2] for line in lines[:-1] if not line.startswith(" ")} == CHECKS - {"test_pass_rate"}
    status, out, err = run("run", file, "--only", "validate", *change, "--json")
    assert (status, err) == (7, "")
    found = json.loads(out)
    assert [one["phase"] for one in found["phases"]] == ["setup", "train", "optimize", "validate"]
    assert [one["check"] for one in found["outcomes"] if one["status"] == "FAIL"] == ["compression_ratio"]
    assert [Outcome.model_validate(one).check for one in found["outcomes"]]


def test_from_the_last_phase_on(run: Run, file: Path) -> None:
    run("run", file, "-q")
    status, out, err = run("run", file, "--from", "report")
    assert status == 0 and "verdict: PASS" in out
    assert "validate  reused" in err and "report    done" in err


# --- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], (2, "usage"), "run needs a configuration; for example examples/configs/workflow.yaml"),
        (["FILE", "--only", "optimise"], (2, "usage"), "there is no phase 'optimise'; phases are setup, train, optim"),
        (["FILE", "--from", "end"], (2, "usage"), "there is no phase 'end'; phases are setup, train, optimize, valid"),
        (["FILE", "--only", "setup", "--from", "setup"], (2, "usage"), "exclude each other; give --only or --from"),
        (["FILE", "--onyl", "setup"], (2, "usage"), "--only"),
        (["FILE", "--trace", "OUT"], (2, "usage"), "is a directory"),
        (["FILE", "--trace", "absent/trace.json"], (2, "usage"), "name a file, as trace.json"),
        (["absent.yaml"], (3, "config"), "absent.yaml' cannot be read: No such file or directory"),
        (["FILE", "--set", "optimize.recipee=int8"], (3, "config"), "such setting, the nearest is 'recipe'"),
        (["FILE", "--set", "validation.thresholds.ttft_m=3"], (3, "config"), "such setting, the nearest is 'ttft_ms'"),
        (["FILE", "--set", "optimize.recipe=int7"], (3, "config"), "there is no recipe 'int7'; did you mean 'int"),
        (["FILE", "--set", "model=null"], (3, "config"), "expected exactly one of model, shape and train"),
        (["FILE", "--set", "model"], (3, "config"), "'model': expected a.b=value"),
        (["FILE", "--set", "model=/none/such"], (3, "model"), "model directory '/none/such' does not exist"),
    ],
)  # fmt: skip
def test_refusals(run: Run, file: Path, arguments: list[str], code: tuple[int, str], message: str) -> None:
    """One line each, and of what was finished nothing is touched but, where the model is looked for, setup's entry."""
    output = file.parent / "out"
    before = times(output)
    given = [{"FILE": file, "OUT": output}.get(argument, argument) for argument in arguments]
    status, out, err = run("run", *given)
    assert (status, out) == (code[0], "")
    assert message in one_line(err, code[1])
    after = times(output)
    if code[1] == "model":
        del before["workflow.json"], after["workflow.json"]
    assert after == before


def test_a_phase_whose_predecessors_are_missing(run: Run, tmp_path: Path) -> None:
    status, out, err = run("run", written(tmp_path, settings(tmp_path / "out")), "--only", "validate")
    assert (status, out) == (2, "") and "phase setup was not finished" in one_line(err, "usage")


def test_an_output_that_holds_somebody_elses_files(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    status, out, err = run("run", written(tmp_path, settings(tmp_path / "out")))
    assert (status, out) == (3, "") and "'thesis.txt' and no workflow" in one_line(err, "artifact")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_an_artifact_that_is_not_what_its_manifest_says(run: Run, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workflow makes a damaged artifact again. Where that gives the same once more, the check refuses it."""
    weights = file.parent / "out" / ARTIFACT_NAME / "model.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    steps = [
        replace(step, work=lambda _: (ARTIFACT_NAME, "graph_changes.json")) if step.phase == "optimize" else step
        for step in mechanics.STEPS
    ]
    monkeypatch.setattr(mechanics, "STEPS", tuple(steps))
    status, out, err = run("run", file)
    assert (status, out) == (4, "") and "model.onnx.data" in one_line(err, "tampered")


def test_stopped_from_the_keyboard(run: Run, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ryzen_compile.workflow.phases import report

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "render_html", stop)
    trace = file.parent / "trace.json"
    status, out, err = run("run", file, "--trace", trace)
    assert (status, out) == (130, "") and "stopped from the keyboard" in one_line(err, "interrupted")
    events = json.loads(trace.read_text())["traceEvents"]  # what was done until then is in it
    assert [event["name"] for event in events if event["ph"] == "X"] == ["report"]
    monkeypatch.undo()
    status, out, err = run("run", file)
    assert status == 0 and "validate  reused" in err and "report    done" in err


# --- other outputs ----------------------------------------------------------------------------------------------------
def test_the_schema_is_json_and_needs_no_configuration(run: Run) -> None:
    status, out, err = run("run", "--schema")
    assert (status, err) == (0, "")
    schema = json.loads(out)
    assert schema["title"] == WorkflowConfig.__name__ and set(schema["properties"]) == set(WorkflowConfig.model_fields)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["additionalProperties"] is False


def test_a_trace_is_json_with_a_span_for_each_phase_that_ran(run: Run, file: Path, tmp_path: Path) -> None:
    status, out, err = run("run", file, "--trace", tmp_path / "trace.json", "--from", "report", "--json")
    assert status == 0, err
    FinalReport.model_validate_json(out)
    assert "wrote the timeline" in err
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    assert set(spans) == {"report"} and spans["report"]["dur"] > 0
    assert "workflow" in {event["args"].get("name") for event in events if event["ph"] == "M"}


def test_what_is_printed_can_be_printed(run: Run, file: Path) -> None:
    """A path with an escape sequence does not reach the terminal as one."""
    output = file.parent / "out\x1b[31m"
    shutil.move(file.parent / "out", output)
    status, out, err = run("run", written(file.parent, settings(output)))
    assert status == 0, err
    assert "\x1b" not in out and r"out\x1b[31m" in out
