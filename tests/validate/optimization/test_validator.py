"""Every check passes on what is as it should be; what was broken on purpose fails the check for it, by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ryzen_compile import api, ops
from ryzen_compile.backends.onnxruntime.artifact_check import check_model
from ryzen_compile.config import find_recipe
from ryzen_compile.errors import NumericalError, ResourceError, UsageError
from ryzen_compile.manifest import read_manifest, write_manifest
from ryzen_compile.passes.fuse_norm import FuseNorm
from ryzen_compile.runtime.speculative.drafter import MOST_CONFIDENT, Draft
from ryzen_compile.runtime.speculative.lookup import PromptLookup
from ryzen_compile.validate.optimization.measurements import Measurements, Subject
from ryzen_compile.validate.optimization.settings import ValidationSettings
from ryzen_compile.validate.optimization.validator import CHECKS, OptimizationValidator
from ryzen_compile.validate.outcome import Outcome
from ryzen_compile.validate.thresholds import Thresholds
from ryzen_compile.workflow.blame import blame

# Small, yet enough text that losing a norm's epsilon or a cache's rows cannot hide: 2,048 tokens.
SETTINGS = ValidationSettings(
    rounds=4,
    prompts=2,
    prompt_tokens=48,
    new_tokens=16,
    context=64,
    tokens=2048,
    length=128,
    memory=False,
    parts=False,
    # Speed is judged where it is broken on purpose: these are met on any machine that is not broken.
    thresholds=Thresholds(kernel_speedup=0.5, speculation_speedup=0.05, end_to_end_speedup=0.5, accuracy_loss=0.05),
)

COMMAND = "ryzen-compile validate X"


@pytest.fixture(scope="module")
def baseline(tiny_python_lm: Path) -> Any:
    return api.read_source(tiny_python_lm).model.float().eval()


@pytest.fixture(scope="module")
def artifact(tiny_python_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8-bit weights to nearest and a table as codes: all kinds of storage, quickly."""
    out = tmp_path_factory.mktemp("validated") / "artifact"
    api.export(tiny_python_lm, out, codes())
    return out


def codes() -> Any:
    return find_recipe("int8", method="rtn", kv="int8", embedding={"method": "kmeans", "ratio": 4.0})


@contextmanager
def subject(artifact: Path, baseline: Any, tiny_python_lm: Path, **settings: Any) -> Iterator[Subject]:
    with api.load(artifact) as model:
        changed = SETTINGS.model_copy(update=settings)
        yield Subject(artifact, model, baseline, changed, path=str(tiny_python_lm), arguments=COMMAND)


def check(name: str, found: Subject, **arguments: Any) -> Outcome:
    """The outcome of one check."""
    return OptimizationValidator(found, **arguments).outcome(name)


def test_what_is_as_it_should_be_passes_every_check(artifact: Path, baseline: Any, tiny_python_lm: Path) -> None:
    heard: list[str] = []
    with subject(artifact, baseline, tiny_python_lm) as found:
        outcomes = OptimizationValidator(found, progress=heard.append).validate()
    assert [(one.component, one.check) for one in outcomes] == [(component, name) for component, name, _ in CHECKS]
    by_name = {one.check: one for one in outcomes}
    assert not [one for one in outcomes if one.status == "FAIL"], [one for one in outcomes if one.status == "FAIL"]
    assert by_name["peak_memory"].status == "SKIPPED" and "switched off" in by_name["peak_memory"].reason
    assert all(one.command == COMMAND for one in outcomes)
    assert len(heard) == len(set(heard)) > 4  # nothing is measured twice
    saving = by_name["kv_memory_saving"].measured
    assert saving is not None and saving.value == pytest.approx(0.75)  # bytes for float32: the same rows, a quarter
    assert by_name["same_text"].measured is not None and by_name["same_text"].measured.value == 1
    assert by_name["accuracy_loss"].details["tokens"] == 16 * 127
    assert {"product", "attention", "norm"} <= set(by_name["kernel_speedup"].details)


# --- broken on purpose ------------------------------------------------------------------------------------------------
def too_large_epsilon(self: FuseNorm, edit: Any, m: Any) -> None:
    """The norm of vectors that are longer than they are."""
    edit.replace(m.out, edit.call(ops.rms_norm, m.x, m.weight, 1.0, m.unit_offset, before=m.out))


def test_a_pass_that_the_gate_rolled_back_is_named(
    baseline: Any, tiny_python_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FuseNorm, "rewrite", too_large_epsilon)
    api.export(tiny_python_lm, tmp_path / "out", "fp32")
    with subject(tmp_path / "out", baseline, tiny_python_lm) as found:
        outcome = check("passes_hold", found)
    assert outcome.status == "FAIL" and "fuse_norm rolled back" in outcome.culprit
    assert "first in model" in outcome.culprit  # and the module that moved


def test_a_pass_that_no_gate_saw_is_found_by_the_accuracy_that_is_missing(
    baseline: Any, tiny_python_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FuseNorm, "rewrite", too_large_epsilon)
    api.export(tiny_python_lm, tmp_path / "out", "fp32", verify=False)
    with subject(tmp_path / "out", baseline, tiny_python_lm) as found:
        unseen = check("passes_hold", found)
        outcome = check("accuracy_loss", found, blame=blame)
    assert unseen.status == "SKIPPED" and "without the gate" in unseen.reason
    assert outcome.status == "FAIL" and outcome.culprit.startswith("pass fuse_norm: logits moved by")


def test_a_recipe_that_keeps_too_little_is_named_with_its_pass(
    baseline: Any, tiny_python_lm: Path, tmp_path: Path
) -> None:
    api.export(tiny_python_lm, tmp_path / "out", "int2", verify=False)
    with subject(tmp_path / "out", baseline, tiny_python_lm) as found:
        outcome = check("accuracy_loss", found, blame=blame)
    assert outcome.status == "FAIL" and outcome.culprit.startswith("pass quantize_weights: mean KL")
    assert "keeps too little" in outcome.culprit


def test_a_codebook_that_was_damaged_is_found_by_its_rows(
    artifact: Path, baseline: Any, tiny_python_lm: Path, tmp_path: Path
) -> None:
    """One entry of the codebook: a few rows read it, and only these are named."""
    damaged = tmp_path / "damaged"
    shutil.copytree(artifact, damaged)
    name, offset = tensor_in_file(damaged, lambda each: "codebook" in each)
    with (damaged / name).open("r+b") as stream:
        stream.seek(offset)
        stream.write(np.full(2, 3e4, np.float32).tobytes())
    manifest = read_manifest(damaged)
    write_manifest(
        damaged, {key: value for key, value in manifest.items() if key not in ("files", "made_by", "schema_version")}
    )
    with subject(damaged, baseline, tiny_python_lm) as found:
        outcome = check("table_rows", found)
    assert outcome.status == "FAIL" and outcome.culprit.startswith("the table's rows of tokens ")
    assert 0 < outcome.details["rows_off"] < outcome.details["rows"]
    with subject(artifact, baseline, tiny_python_lm) as found:
        assert check("table_rows", found).status == "PASS"


def tensor_in_file(directory: Path, chosen: Callable[[str], bool]) -> tuple[str, int]:
    """The file and the offset of a weight."""
    for tensor in check_model(directory).graph.initializer:
        if chosen(tensor.name):
            where = {entry.key: entry.value for entry in tensor.external_data}
            return where["location"], int(where.get("offset", 0))
    names = [tensor.name for tensor in check_model(directory).graph.initializer]
    pytest.fail(f"no such weight among {names}")


def test_a_drafter_that_lies_is_named(
    artifact: Path, baseline: Any, tiny_python_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is as sure as can be, and always wrong: the text stays the model's own, and nothing is gained."""

    def lie(self: PromptLookup, context: np.ndarray, most: int) -> Draft:
        return Draft([1 + int(context[-1]) % 3] * most, MOST_CONFIDENT)

    monkeypatch.setattr(PromptLookup, "draft", lie)
    thresholds = SETTINGS.thresholds.model_copy(update={"speculation_speedup": 1.2})
    with subject(artifact, baseline, tiny_python_lm, drafters=("lookup",), thresholds=thresholds) as found:
        validator = OptimizationValidator(found)
        assert validator.outcome("same_text").status == "PASS"
        faster = validator.outcome("speculation_speedup")
    assert faster.status == "FAIL" and "lookup: " in faster.culprit and "% of" in faster.culprit
    assert faster.details["acceptance_rate"] < 0.2


def test_a_drafter_whose_drafts_changed_the_text_is_named(
    artifact: Path, baseline: Any, tiny_python_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a draft had been taken without being verified."""
    with subject(artifact, baseline, tiny_python_lm) as found:
        measured = Measurements(found)
        plain, drafted = measured.continued
        wrong = replace(drafted, same_text=drafted.prompts - 1)
        monkeypatch.setattr(Measurements, "continued", (plain, wrong))
        outcome = check("same_text", found)
    assert outcome.status == "FAIL" and "not the model's own" in outcome.culprit


@pytest.mark.parametrize(
    "threshold", ["kernel_speedup", "compression_ratio", "end_to_end_speedup", "speculation_speedup"]
)
def test_a_threshold_out_of_reach_is_missed_and_says_by_what(
    threshold: str, artifact: Path, baseline: Any, tiny_python_lm: Path
) -> None:
    unreachable = SETTINGS.thresholds.model_copy(update={threshold: 1e6})
    with subject(artifact, baseline, tiny_python_lm, thresholds=unreachable) as found:
        outcome = check(threshold, found)
    assert outcome.status == "FAIL" and outcome.culprit
    assert "expected >= 1e+06" in outcome.reason


def test_a_pass_that_was_rolled_back_is_not_blamed_for_what_is_lost(
    baseline: Any, tiny_python_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It left nothing in the artifact: what lost the accuracy is the recipe."""
    monkeypatch.setattr(FuseNorm, "rewrite", too_large_epsilon)
    api.export(tiny_python_lm, tmp_path / "out", "int2")
    with subject(tmp_path / "out", baseline, tiny_python_lm) as found:
        assert "fuse_norm" in check("passes_hold", found).culprit
        outcome = check("accuracy_loss", found, blame=blame)
    assert outcome.status == "FAIL" and outcome.culprit.startswith("pass quantize_weights: mean KL")


def test_a_search_for_the_culprit_that_fails_leaves_the_verdict(
    artifact: Path, baseline: Any, tiny_python_lm: Path
) -> None:
    def no_memory(_: Measurements) -> str:
        raise ResourceError("no memory for the model")

    strict = SETTINGS.thresholds.model_copy(update={"accuracy_loss": 0.0})
    with subject(artifact, baseline, tiny_python_lm, thresholds=strict) as found:
        measured = Measurements(found).quality
        outcome = check("accuracy_loss", found, blame=no_memory)
    if measured.accuracy_loss.value > 0:  # an artifact may be right more often than its model
        assert outcome.status == "FAIL" and outcome.culprit == "not found: no memory for the model"


# --- what cannot be measured ------------------------------------------------------------------------------------------
def test_a_threshold_of_none_is_not_checked(artifact: Path, baseline: Any, tiny_python_lm: Path) -> None:
    free = SETTINGS.thresholds.model_copy(update={"kv_memory_saving": None})
    with subject(artifact, baseline, tiny_python_lm, thresholds=free) as found:
        outcome = check("kv_memory_saving", found)
    assert outcome.status == "SKIPPED" and outcome.measured is not None and outcome.reason == "no threshold"


def test_random_weights_have_no_quality_to_keep(artifact: Path, baseline: Any, tiny_python_lm: Path) -> None:
    with subject(artifact, baseline, tiny_python_lm) as found:
        outcomes = OptimizationValidator(replace(found, random=True)).validate()
    by_name = {one.check: one for one in outcomes}
    skipped = {name for name, one in by_name.items() if one.status == "SKIPPED"}
    assert skipped == {"accuracy_loss", "same_text", "speculation_speedup", "peak_memory"}
    assert "random" in by_name["accuracy_loss"].reason
    assert by_name["kv_memory_saving"].status == "PASS"  # speed and size hardly depend on what the ids are


def test_an_error_while_measuring_fails_that_check_and_no_other(
    artifact: Path, baseline: Any, tiny_python_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(self: Any, ids: np.ndarray) -> np.ndarray:
        raise NumericalError("logits of window 0 are NaN or infinite")

    monkeypatch.setattr("ryzen_compile.validate.quality.EngineScorer.logits", overflow)
    with subject(artifact, baseline, tiny_python_lm) as found:
        outcome = check("accuracy_loss", found)
        others = check("kv_memory_saving", found)
    assert outcome.status == "FAIL" and outcome.reason.startswith("numerical: ") and "window 0" in outcome.culprit
    assert others.status == "PASS"


def test_what_is_no_error_of_ours_passes_through(
    artifact: Path, baseline: Any, tiny_python_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ryzen_compile.validate.quality.EngineScorer.logits", lambda self, ids: 1 / 0)
    with subject(artifact, baseline, tiny_python_lm) as found, pytest.raises(ZeroDivisionError):
        check("accuracy_loss", found)


def test_an_error_where_no_threshold_asks_is_no_failure(
    artifact: Path, baseline: Any, tiny_python_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(self: Any, ids: np.ndarray) -> np.ndarray:
        raise NumericalError("logits of window 0 are NaN or infinite")

    monkeypatch.setattr("ryzen_compile.validate.quality.EngineScorer.logits", overflow)
    free = SETTINGS.thresholds.model_copy(update={"accuracy_loss": None})
    with subject(artifact, baseline, tiny_python_lm, thresholds=free) as found:
        outcome = check("accuracy_loss", found)
    assert outcome.status == "SKIPPED" and "window 0" in outcome.reason


def test_what_failed_is_not_tried_again(
    artifact: Path, baseline: Any, tiny_python_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def fail(*_: Any, **__: Any) -> Any:
        calls.append("measured")
        raise NumericalError("the baseline overflowed")

    monkeypatch.setattr("ryzen_compile.validate.optimization.measurements.InferenceValidator", fail)
    with subject(artifact, baseline, tiny_python_lm) as found:
        validator = OptimizationValidator(found)
        outcomes = [validator.outcome(name) for name in ("compression_ratio", "kv_memory_saving", "ttft_ms")]
        table = validator.outcome("table_rows")
    assert [one.status for one in outcomes] == ["FAIL"] * 3 and calls == ["measured"]
    assert table.status == "PASS"  # which asks for no requests


def test_more_new_tokens_than_the_context_holds_are_refused_at_once(
    artifact: Path, baseline: Any, tiny_python_lm: Path
) -> None:
    with (
        subject(artifact, baseline, tiny_python_lm, new_tokens=1023) as found,
        pytest.raises(UsageError, match="1023 new tokens and a prompt do not fit the model's context of 1024"),
    ):
        Measurements(found)
