"""Tuning for real, on a tiny artifact and with a small budget: structure is asserted, never a time."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from ryzen_compile.api import load
from ryzen_compile.backends.onnxruntime import tune as tuning_run
from ryzen_compile.backends.onnxruntime.session import OrtEngine
from ryzen_compile.backends.onnxruntime.tune import read_tuning, thread_candidates, tune, tuned_options
from ryzen_compile.backends.onnxruntime.tuning import Tuning
from ryzen_compile.errors import ArtifactError, TamperedError, UsageError
from ryzen_compile.manifest import read_manifest, update_tuning
from ryzen_compile.runtime.speculative.exit_choice import ExitChoice
from ryzen_compile.validate import machine
from ryzen_compile.validate.machine import CacheGroup, Cpu, Limits, Machine, Topology, cpu_key, read_machine
from tests.model_directory import shared_artifact
from tests.zoo import CONTEXT


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_artifact(tmp_path_factory)


@pytest.fixture(scope="module")
def tuning(artifact: Path) -> Tuning:
    return tune(artifact, threads=[2, 1, 1], budget_seconds=0.5)


def test_everything_asked_for_was_measured(tuning: Tuning) -> None:
    assert {(c.threads, c.spinning) for c in tuning.candidates} == {(1, True), (2, True), (2, False)}
    assert all(len(c.visits) >= tuning_run.LEAST_ROUNDS for c in tuning.candidates)
    assert (tuning.threads, tuning.spinning) in {(c.threads, c.spinning) for c in tuning.candidates}
    assert tuning.context == CONTEXT - tuning_run.LONGEST
    assert list(tuning.curves) == [tuning.context // 8, tuning.context]
    assert all(list(curve) == list(range(1, tuning_run.LONGEST + 1)) for curve in tuning.curves.values())
    assert list(tuning.prefill) == [min(CONTEXT, tuning_run.MEASURED_PROMPT)]
    figures = [*(seconds for curve in tuning.curves.values() for seconds in curve.values()), *tuning.prefill.values()]
    assert all(math.isfinite(seconds) and seconds > 0 for seconds in figures)
    assert tuning.key == cpu_key(read_machine())
    assert tuning.versions["onnxruntime"] == read_machine().versions["onnxruntime"]


def test_an_early_exit_was_tried(tuning: Tuning) -> None:
    """Of two layers, the first; random weights rarely agree, so it is said and not used, or used and said."""
    found = tuning.exit
    assert found is not None and found.layers == 1
    assert 0 <= found.agreement <= 1 and found.seconds > 0 and math.isfinite(found.gain)
    assert found.pays is (found.gain > 1)


def test_without_a_tokenizer_no_early_exit_is_tried(artifact: Path, tmp_path: Path) -> None:
    found = tuning_run.artifact.read(artifact)
    assert tuning_run._text(dataclasses.replace(found, directory=tmp_path)) is None
    few = dataclasses.replace(found, spec=dataclasses.replace(found.spec, vocab=10))
    assert tuning_run._text(few) is None  # the tokenizer's ids are not all the model's
    windows = tuning_run._text(found)
    assert windows is not None and windows.shape == (tuning_run.WINDOWS, min(tuning_run.WINDOW, CONTEXT))


def test_the_record_survives_the_manifest_and_is_found_again(artifact: Path, tuning: Tuning, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(artifact, tmp_path / "copy"))
    update_tuning(copied, tuning.key, tuning.to_json())
    manifest = read_manifest(copied)
    assert Tuning.from_json(tuning.key, manifest["tuned"][tuning.key]) == tuning
    found = read_tuning(manifest, tuning.key)
    assert found == tuning
    options = tuned_options(tuning)
    assert (options.threads, options.spinning) == (tuning.threads, tuning.spinning)
    assert json.loads(json.dumps(tuning.to_json())) == tuning.to_json()
    with load(copied) as model:  # digests and all
        assert model.generate([[1, 2, 3]], max_new_tokens=2).shape == (1, 5)


@pytest.mark.parametrize("gain", [0.9, 1.4])
def test_a_loaded_model_drafts_by_what_was_measured(
    artifact: Path, tuning: Tuning, tmp_path: Path, gain: float
) -> None:
    copied = Path(shutil.copytree(artifact, tmp_path / "copy"))
    measured = dataclasses.replace(tuning, exit=ExitChoice(1, 0.8, 0.0001, gain))
    update_tuning(copied, tuning.key, measured.to_json())
    with load(copied) as model:
        assert model._experience.cost.measured
        assert model._experience.cost.seconds(1, tuning.context) == pytest.approx(tuning.curves[tuning.context][1])
        assert model._tuned_exit() == (1 if gain > 1 else None)
        plain = model.generate([[1, 2, 3]], max_new_tokens=8)
        np.testing.assert_array_equal(model.generate([[1, 2, 3]], max_new_tokens=8, speculation="auto"), plain)
    with load(copied, threads=tuning.threads + 1) as model:
        assert not model._experience.cost.measured, "the seconds are those of another session"


def test_one_session_is_open_at_a_time(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[OrtEngine] = []

    class Watched(OrtEngine):
        def __init__(self, *arguments: object) -> None:
            assert all(engine.closed for engine in opened)
            super().__init__(*arguments)  # type: ignore[arg-type]
            self.closed = False
            opened.append(self)

        def close(self) -> None:
            super().close()
            self.closed = True

    monkeypatch.setattr(tuning_run, "OrtEngine", Watched)
    said: list[str] = []
    tune(artifact, threads=[1, 2], budget_seconds=0.1, progress=said.append)
    assert len(opened) >= 3 * tuning_run.LEAST_ROUNDS + 1 and all(engine.closed for engine in opened)
    # Rounds run forwards and backwards in turn.
    order = [line.split(": ")[0].removeprefix("round ") for line in said if line.startswith("round")]
    assert order[:6] == [
        "1, 1 thread, spinning on",
        "1, 2 threads, spinning on",
        "1, 2 threads, spinning off",
        "2, 2 threads, spinning off",
        "2, 2 threads, spinning on",
        "2, 1 thread, spinning on",
    ]


def test_a_failing_candidate_is_closed(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    closed: list[bool] = []
    monkeypatch.setattr(tuning_run, "_request_seconds", lambda _: 1 / 0)
    original = OrtEngine.close
    monkeypatch.setattr(OrtEngine, "close", lambda self: (closed.append(True), original(self))[1])
    with pytest.raises(ZeroDivisionError):
        tune(artifact, threads=[1], budget_seconds=0.1)
    assert closed == [True] and threading.active_count() == before


def test_a_single_candidate_is_visited_often_enough_for_a_spread(artifact: Path) -> None:
    found = tune(artifact, threads=[1], budget_seconds=0.1)
    assert len(found.candidates) == 1 and len(found.candidates[0].visits) >= tuning_run.LEAST_ROUNDS
    assert "nothing else was tried" in found.reason


@pytest.mark.parametrize(
    ("context", "held", "longest"), [(1, 0, 1), (2, 1, 1), (17, 8, 9), (18, 1, 17), (4096, 512, 17)]
)
def test_contexts_that_fit_the_model(context: int, held: int, longest: int, artifact: Path) -> None:
    found = tuning_run.artifact.read(artifact)
    bench = tuning_run._Bench(dataclasses.replace(found, spec=dataclasses.replace(found.spec, context=context)))
    assert (bench.context, bench.longest) == (held, longest)
    assert bench.context + bench.longest <= context and 1 <= bench.prompt <= context


@pytest.mark.parametrize("threads", [[], [0], [-1], [1, 10_000]])
def test_threads_out_of_range(artifact: Path, threads: list[int]) -> None:
    with pytest.raises(UsageError, match="threads to try must be from 1 to"):
        tune(artifact, threads=threads)


@pytest.mark.parametrize("budget", [0.0, -1.0, float("inf"), float("nan")])
def test_a_budget_that_is_none(artifact: Path, budget: float) -> None:
    with pytest.raises(UsageError, match="budget must be a number of seconds above 0"):
        tune(artifact, budget_seconds=budget)


def test_a_damaged_artifact_is_refused_before_anything_runs(artifact: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(artifact, tmp_path / "copy"))
    with (copied / "model.onnx.data").open("r+b") as stream:
        stream.write(b"\xff")
    with pytest.raises(TamperedError, match="SHA-256"):
        tune(copied)
    with pytest.raises(ArtifactError, match=r"holds no ryzen_compile\.json"):
        tune(tmp_path)


def described(cores: int, groups: int = 1, smt: int = 1, quota: float | None = None) -> Machine:
    numbers = [tuple(core + cores * thread for thread in range(smt)) for core in range(cores)]
    each = cores // groups
    caches = tuple(
        CacheGroup(tuple(cpu for core in numbers[g * each : (g + 1) * each] for cpu in core), 32 << 20)
        for g in range(groups)
    )
    return Machine(
        cpu=Cpu("x", "AuthenticAMD", "zen4", ("avx2",), cores, cores * smt, groups * (32 << 20)),
        limits=Limits(tuple(range(cores * smt)), cores, quota, None),
        memory_total=1,
        memory_available=1,
        system="Linux",
        python="3",
        versions={},
        topology=Topology(tuple(numbers), caches),
    )


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        (described(1), (1,)),
        (described(2), (1, 2)),
        (described(2, smt=2), (1, 2, 4)),
        (described(8, groups=2, smt=2), (1, 2, 3, 4, 6, 8, 16)),
        (described(8, quota=1.5), (1,)),
        (described(16, groups=2), (1, 2, 3, 4, 6, 8, 12, 16)),
        (described(96, groups=12), (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)),
        (dataclasses.replace(described(6, smt=2), topology=Topology()), (1, 2, 3, 4, 6, 12)),
    ],
    ids=["1", "2", "2 SMT", "2 x 4 SMT", "quota 1.5", "2 x 8", "12 x 8", "unknown"],
)
def test_numbers_of_threads_worth_trying(here: Machine, expected: tuple[int, ...]) -> None:
    assert thread_candidates(here) == expected


def test_key_names_what_is_usable() -> None:
    assert machine.cpu_key(described(8, groups=2, smt=2)) == "zen4-8c-64M"
