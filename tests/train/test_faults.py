"""Whole runs that are killed, stopped, out of disk, damaged or poisoned: what they leave, what they say, and that they
end, once resumed, in the very bits of a run that nothing happened to.

All are runs of the command line in processes of their own, with one thread, forked by ``faults_child``. The model has
dropout: without the generators' states nothing here would be equal.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ryzen_compile.recipe_file import RECIPE_NAME
from ryzen_compile.train.checkpoint import STEPS, Checkpoints
from ryzen_compile.train.checkpoint_files import MANIFEST, MODEL, OPTIMIZER, STATE
from tests.train.checkpoint_child import SKIPPED
from tests.train.faults_child import MOMENTS, write_config
from tests.train.tiny_run import GPT2_WITH_DROPOUT, write_text

pytest.importorskip("accelerate")

KILLED = -signal.SIGKILL
SHELL = {"SIGINT": 130, "SIGTERM": 143}  # statuses
SAID = {"SIGINT": "error[interrupted]: stopped from the keyboard", "SIGTERM": "error[terminated]: stopped by SIGTERM"}
# What a clock or the machine says.
CLOCKS = ("time", "tokens_per_second", "batch_seconds", "memory_bytes", "seconds", "speedups")
REPEATED = ("resume", "best_taken")  # events: a run that is resumed behind its last step takes its best weights again
FACTS = ("steps", "tokens", "train_loss", "validation_loss", "validation_accuracy", "stopped")
FILES = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json")
Child = Callable[..., tuple[int, float]]


@dataclass(frozen=True)
class Run:
    """One run and its directories: ``base`` holds configuration and output, ``directory`` what the run writes."""

    base: Path
    child: Child

    @property
    def directory(self) -> Path:
        return self.base / "run" / "optimized"

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.directory / "checkpoints")

    def arguments(self, *more: str, resume: bool) -> list[str]:
        return ["train", "--config", str(self.base / "run.yaml"), "--json", *(["--resume"] if resume else []), *more]

    def train(self, *more: str, resume: bool | None = None, **faults: Any) -> int:
        """Starts it, or goes on with it if it has come to making its directory; returns the status."""
        return self.timed(*more, resume=resume, **faults)[0]

    def timed(self, *more: str, resume: bool | None = None, **faults: Any) -> tuple[int, float]:
        """The same, and the seconds of a processor that it took."""
        arguments = self.arguments(*more, resume=self.directory.is_dir() if resume is None else resume)
        return self.child("command", directory=str(self.base), arguments=arguments, **faults)

    @property
    def said(self) -> list[str]:
        """The lines on standard error."""
        return (self.base / "err").read_text().splitlines()

    @property
    def facts(self) -> dict[str, Any]:
        """What was printed in the end."""
        facts = json.loads((self.base / "out").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
        return {name: facts[name] for name in FACTS}

    def records(self, *kinds: str) -> list[dict[str, Any]]:
        lines = (self.directory / "metrics.jsonl").read_text().splitlines()
        return [record for line in lines if (record := json.loads(line))["kind"] in kinds]

    def figures(self) -> list[dict[str, Any]]:
        """Every record of the run, each without what depends on the time."""
        records = self.records("batch", "validation", "epoch", "event", "anomaly")
        return [
            {name: value for name, value in record.items() if name not in CLOCKS}
            for record in records
            if record.get("event") not in REPEATED and record.get("anomaly") != "throughput_drop"
        ]

    def error(self, code: str) -> str:
        """The error, which has to be the only one and the last line."""
        said = self.said
        assert said[-1].startswith(f"ryzen-compile: error[{code}]: "), said
        assert sum("error[" in line for line in said) == 1 and not any("Traceback" in line for line in said)
        return said[-1]


@pytest.fixture(scope="module")
def child(repository: Path) -> Iterator[Child]:
    """Runs a case of ``faults_child``; returns its status and the seconds of a processor that it took."""
    script = repository / "tests" / "train" / "faults_child.py"
    own = {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **own},
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def call(do: str, **case: Any) -> tuple[int, float]:
            print(json.dumps({"do": do, **case}), file=process.stdin, flush=True)
            ended = json.loads(process.stdout.readline())
            return ended["status"], ended["seconds"]

        yield call
        process.stdin.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """In memory where there is a place: hundreds of checkpoints would wait for a disk each time."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path_factory.mktemp("faults")
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


NewRun = Callable[..., Run]


@pytest.fixture(scope="module")
def new(child: Child, folder: Path) -> NewRun:
    """A run of its own over the one text, six steps unless ``changes`` say otherwise; nothing is started yet."""
    source = {"train": {"path": str(write_text(folder))}}

    def make(**changes: Any) -> Run:
        base = Path(tempfile.mkdtemp(dir=folder))
        write_config(base, {"model": {"architecture": GPT2_WITH_DROPOUT}, "data": source, **changes})
        return Run(base, child)

    return make


@pytest.fixture(scope="module")
def whole(new: NewRun) -> Callable[..., Run]:
    """The run of the same ``changes`` that nothing happened to."""
    done: dict[str, Run] = {}

    def made(**changes: Any) -> Run:
        key = json.dumps(changes)
        if key not in done:
            done[key] = new(**changes)
            assert done[key].train() == 0, done[key].said
        return done[key]

    return made


@pytest.fixture(scope="module")
def killed(new: NewRun) -> Run:
    """Killed in step 6: there are checkpoints of steps 2 and 4. To be copied."""
    run = new()
    assert run.train(moment="step", count=6, signals=["SIGKILL"]) == KILLED
    assert run.checkpoints.steps() == [2, 4]
    return run


def copied(run: Run, folder: Path) -> Run:
    """Its directories under another name, which is free to change; the configuration names them."""
    base = Path(tempfile.mkdtemp(dir=folder))
    shutil.copytree(run.base, base, dirs_exist_ok=True)
    config = base / "run.yaml"
    config.write_text(config.read_text().replace(str(run.base), str(base)))
    return Run(base, run.child)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def assert_equal(found: Run, expected: Run) -> None:
    """All that a run computes, bit for bit: weights, losses and accuracies of steps and validations."""
    for name in FILES:
        assert contents(found.directory / "model")[name] == contents(expected.directory / "model")[name], name
    assert contents(found.directory / "model").keys() == contents(expected.directory / "model").keys()
    assert found.figures() == expected.figures()
    steps = [record["step"] for record in found.records("batch")]
    assert steps == list(range(1, found.facts["steps"] + 1))
    assert found.facts == expected.facts
    card = (found.directory / "model" / "README.md").read_text()
    assert "nan" not in card.partition("```yaml")[0]
    # Of a last save that was killed when it was through, a lock and an empty directory ".next" may be left.
    assert list((found.directory / "checkpoints").glob(".step-*")) == []


def test_the_runs_that_are_compared_with_are_what_they_seem(whole: Callable[..., Run], new: NewRun) -> None:
    """Two are equal, one with another seed or without dropout is not: equality says something."""
    again = new()
    assert again.train() == 0
    assert_equal(again, whole())
    plain = {**GPT2_WITH_DROPOUT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    for changes in ({"seed": 1}, {"model": {"architecture": plain}}):
        assert whole(**changes).figures() != whole().figures()
        assert whole(**changes).facts["validation_loss"] != whole().facts["validation_loss"]


# --- kill -9 ----------------------------------------------------------------------------------------------------------
def test_kill_at_random_moments(new: NewRun, whole: Callable[..., Run]) -> None:
    """Twenty runs, each killed in another twentieth of its life; every second one again while it goes on."""
    life = new().timed()[1]
    random_share, ends, begun = random.Random(0), [], set()
    for number in range(20):
        run = new()
        shares = [(number + random_share.random()) / 20, random_share.random()][: 1 + number % 2]
        for share in shares:
            ends.append(run.train(seconds=life * share))
            assert ends[-1] in (KILLED, 0), run.said
            begun.add(run.checkpoints.steps()[-1] if run.checkpoints.steps() else None)
        assert run.train() == 0, run.said
        assert_equal(run, whole())
        assert run.checkpoints.steps()[-1] == 6
    assert ends.count(KILLED) >= 18  # a run that goes on is shorter: its kill may come too late
    assert begun >= {None, 4, 6}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("save", [1, 3])
def test_kill_at_every_step_of_a_checkpoint(
    new: NewRun, whole: Callable[..., Run], folder: Path, step: str, save: int
) -> None:
    """Of the first one, without which there is nothing, and of the last, behind which nothing is left to train."""
    run = new()
    assert run.train(moment=f"save {step}", count=save, signals=["SIGKILL"]) == KILLED
    newest = run.checkpoints.newest()
    before = {1: 0, 3: 4}[save]
    assert (newest.step if newest else 0) == (before + 2 if step == "prune" else before)
    assert run.train() == 0, run.said
    assert_equal(run, whole())


@pytest.mark.parametrize("moment", [name for name in MOMENTS if name not in ("text", "records")])
def test_kill_at_a_named_moment(new: NewRun, whole: Callable[..., Run], moment: str) -> None:
    run = new()
    assert run.train(moment=moment, signals=["SIGKILL"]) == KILLED
    assert run.train() == 0, run.said
    assert_equal(run, whole())


def test_kill_before_anything_was_written(new: NewRun, whole: Callable[..., Run]) -> None:
    """While texts are read there is no run yet; it says so, and is started."""
    run = new()
    assert run.train(moment="text", signals=["SIGKILL"]) == KILLED
    assert not run.directory.exists()
    assert run.train(resume=True) == 3
    assert "holds no run to resume; start it without --resume" in run.error("config")
    assert run.train() == 0
    assert_equal(run, whole())


def test_kill_before_the_first_checkpoint(new: NewRun, whole: Callable[..., Run]) -> None:
    """``--resume`` begins at step 0 again; without it what was recorded is not overwritten."""
    run = new()
    assert run.train(moment="record", count=2, signals=["SIGKILL"]) == KILLED
    assert run.checkpoints.steps() == []
    assert run.train(resume=False) == 2
    assert "holds the records of another run; resume it" in run.error("usage")
    assert run.train() == 0
    assert "no checkpoint yet: starting at step 0" in run.said
    assert_equal(run, whole())


def test_kill_while_records_are_rewritten(killed: Run, whole: Callable[..., Run], folder: Path) -> None:
    run = copied(killed, folder)
    before = (run.directory / "metrics.jsonl").read_bytes()
    assert run.train(moment="records", signals=["SIGKILL"]) == KILLED
    assert (run.directory / "metrics.jsonl").read_bytes() == before
    assert run.train() == 0
    assert_equal(run, whole())


def test_a_torn_record_is_dropped(killed: Run, whole: Callable[..., Run], folder: Path) -> None:
    run = copied(killed, folder)
    with (run.directory / "metrics.jsonl").open("ab") as stream:
        stream.write(b'{"step":6,"time":17')
    assert run.train() == 0
    assert_equal(run, whole())
    facts = run.records("event")[0]["facts"]
    assert facts == {"from_step": 4, "dropped": 1, "unreadable": 1}


@pytest.mark.parametrize(
    ("moment", "count"), [("save model", 2), ("save prune", 2), ("exact validation", 1), ("model", 1)]
)
def test_kill_after_early_stopping(new: NewRun, whole: Callable[..., Run], moment: str, count: int) -> None:
    """A run that had enough does not train on when it is resumed. At this rate the loss soon rises: the weights that
    it ends with are older ones, of a checkpoint."""
    changes = {"optimization": {"steps": 60, "lr": 0.3}, "early_stopping": {"patience": 2, "least": 0.01}}
    changes |= {"schedule": {"warmup": 0}, "checkpoint": {"every": 0}}
    run = new(**changes)
    assert run.train(moment=moment, count=count, signals=["SIGKILL"]) == KILLED
    assert run.train() == 0, run.said
    assert run.facts["stopped"] == "early"
    assert [event["event"] for event in whole(**changes).records("event")] == ["early_stop", "best_taken"]
    assert_equal(run, whole(**changes))


@pytest.mark.parametrize(("moment", "count"), [("epoch", 2), ("record", 8)], ids=["before", "behind"])
def test_kill_around_an_epochs_end(new: NewRun, whole: Callable[..., Run], moment: str, count: int) -> None:
    """Where a checkpoint is due because a validation was the best, and the controller's epoch ends with that step."""
    changes = {"optimization": {"steps": 12}, "controller": {"every": 3}, "early_stopping": {"patience": 50}}
    changes["checkpoint"] = {"every": 0}
    run = new(**changes)
    assert run.train(moment=moment, count=count, signals=["SIGKILL"]) == KILLED
    assert run.train() == 0, run.said
    assert [record["epoch"] for record in run.records("epoch")] == [1, 2, 3, 4]
    assert_equal(run, whole(**changes))


# --- signals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SHELL)
@pytest.mark.parametrize(
    ("moment", "count", "reached"),
    [("step", 3, 3), ("record", 5, 5), ("save optimizer", 2, 4), ("validation", 1, 3), ("step", 6, 6)],
    ids=["step", "record", "checkpoint", "validation", "last step"],
)
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(
    new: NewRun, whole: Callable[..., Run], name: str, moment: str, count: int, reached: int
) -> None:
    run = new()
    assert run.train(moment=moment, count=count, signals=[name]) == SHELL[name]
    assert run.error(SAID[name].partition("[")[2].partition("]")[0]) == f"ryzen-compile: {SAID[name]}"
    assert run.checkpoints.steps()[-1] == reached == run.records("batch")[-1]["step"]
    assert not (run.directory / "model").exists()
    assert run.train() == 0, run.said
    assert f"going on behind step {reached} of 6" in run.said
    assert_equal(run, whole())


@pytest.mark.parametrize("name", SHELL)
@pytest.mark.parametrize(
    ("moment", "count", "saved"),
    [("text", 1, []), ("exact validation", 1, [4, 6]), ("model is published", 1, [4, 6])],
    ids=["text", "exact validation", "model"],
)
def test_a_signal_outside_the_steps_stops_at_once(
    new: NewRun, whole: Callable[..., Run], name: str, moment: str, count: int, saved: list[int]
) -> None:
    run = new()
    assert run.train(moment=moment, count=count, signals=[name]) == SHELL[name]
    assert run.said[-1] == f"ryzen-compile: {SAID[name]}"
    assert run.checkpoints.steps() == saved
    left = {path.name for path in run.directory.iterdir()} if saved else set()
    assert left == ({"checkpoints", "metrics.jsonl"} if saved else set())
    assert run.train() == 0, run.said
    assert_equal(run, whole())


@pytest.mark.parametrize("moment", ["step", "save optimizer"])
def test_the_second_signal_does_not_wait(new: NewRun, whole: Callable[..., Run], moment: str) -> None:
    run = new()
    assert run.train(moment=moment, count={"step": 4}.get(moment, 2), signals=["SIGINT", "SIGINT"]) == 130
    assert run.said[-1] == f"ryzen-compile: {SAID['SIGINT']}"
    assert [path.name for path in (run.directory / "checkpoints").iterdir()] == ["step-00000002"]
    assert run.train() == 0, run.said
    assert_equal(run, whole())


# --- no space ---------------------------------------------------------------------------------------------------------
LONG = {"optimization": {"steps": 24}, "checkpoint": {"every": 12}}  # records of some 9 KB


@pytest.mark.parametrize(
    ("moment", "count", "size", "named", "changes", "left"),
    [
        ("save model", 2, 10_000, "model.safetensors", {}, [2]),
        ("save optimizer", 3, 60_000, "optimizer.safetensors", {}, [2, 4]),
        ("save model", 2, None, "step-00000004", {}, [2]),
        ("save sweep", 2, None, "checkpoints", {}, [2]),
        ("step", 13, 6_000, "metrics.jsonl", LONG, [12]),
        ("step", 13, None, "metrics.jsonl", LONG, [12]),
        ("model", 1, 10_000, "optimized/model", {}, [4, 6]),
        ("model", 1, None, "optimized/model", {}, [4, 6]),
        ("table", 1, 3_000, "the report of", {}, [4, 6]),
    ],
)
def test_no_space(
    new: NewRun,
    whole: Callable[..., Run],
    moment: str,
    count: int,
    size: int | None,
    named: str,
    changes: dict[str, Any],
    left: list[int],
) -> None:
    """No file may grow beyond ``size`` bytes, or a disk of 1 MiB is full: status 5, what cannot be written is named,
    and nothing that was whole is lost."""
    disk = new().base
    made = new(output=str(disk / "run"), **changes)
    faults = {"moment": moment, "count": count, "size": size}
    paths = {"directory": str(disk), "kept": str(made.base)}
    status = made.child("run_out_of_space", **paths, arguments=made.arguments(resume=False), **faults)[0]
    if status == SKIPPED:
        pytest.skip("this kernel lets nobody mount a small disk")
    assert status == 0, (made.base / "stopped" / "err").read_text()
    stopped, resumed = (Moved(made.base / name, made.child) for name in ("stopped", "resumed"))
    assert (stopped.base / "status").read_text() == "5", stopped.said
    message = stopped.error("resource")
    assert named in message and (
        "No space left on device" in message or "File too large" in message or "fit" in message
    )
    assert stopped.checkpoints.steps() == left
    newest = stopped.checkpoints.newest()
    assert newest is not None and newest.step == left[-1]
    assert [path.name for path in stopped.directory.rglob(".*")] == []
    assert (resumed.base / "status").read_text() == "0", resumed.said
    assert_equal(resumed, whole(**changes))


class Moved(Run):
    """A run that was copied from the disk which only its own process saw."""

    @property
    def directory(self) -> Path:
        return self.base / "run" / "run" / "optimized"


# --- damage -----------------------------------------------------------------------------------------------------------
def flip(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray((path / name).read_bytes())
        data[len(data) // 2] ^= 1
        (path / name).write_bytes(data)

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped weights": (flip(MODEL), "model.safetensors: expected SHA-256"),
    "flipped moments": (flip(OPTIMIZER), "optimizer.safetensors: expected SHA-256"),
    "truncated": (lambda path: os.truncate(path / STATE, 100), "state.json: expected"),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), "holds no manifest.json, so it is no checkpoint"),
    "empty": (lambda path: shutil.rmtree(path) or path.mkdir(), "holds no manifest.json, so it is no checkpoint"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_taken(
    killed: Run, whole: Callable[..., Run], folder: Path, name: str
) -> None:
    run = copied(killed, folder)
    damage, fault = DAMAGE[name]
    damage(run.directory / "checkpoints" / "step-00000004")
    assert run.train() == 0, run.said
    warned = [line for line in run.said if "warning" in line]
    assert len(warned) >= 1 and warned[0].startswith("ryzen-compile: warning: damaged checkpoint step-00000004: ")
    assert fault in warned[0] and warned[0].endswith("; step-00000002 is taken")
    assert "going on behind step 2 of 6" in run.said
    assert_equal(run, whole())


def test_when_all_checkpoints_are_damaged_nothing_is_trained_anew(
    killed: Run, whole: Callable[..., Run], folder: Path
) -> None:
    run = copied(killed, folder)
    kept = run.directory / "checkpoints" / "step-00000004" / MODEL
    data = kept.read_bytes()
    flip(MODEL)(kept.parent)
    flip(STATE)(run.directory / "checkpoints" / "step-00000002")
    before = contents(run.directory)
    assert run.train() == 3
    message = run.error("model")
    assert "holds no checkpoint that is whole: step-00000004: model.safetensors: " in message
    assert "; step-00000002: state.json: " in message and "move them away to begin anew" in message
    assert contents(run.directory) == before
    assert run.train(resume=False) == 3  # nor without --resume
    assert "holds checkpoints of a run already, the last of step 4" in run.error("config")
    assert contents(run.directory) == before
    kept.write_bytes(data)
    assert run.train() == 0
    assert_equal(run, whole())


def test_a_run_that_may_not_go_on_is_left_as_it_was(killed: Run, whole: Callable[..., Run], folder: Path) -> None:
    run = copied(killed, folder)
    before = contents(run.directory)
    assert run.train("--set", "optimization.lr=0.02", "--set", "seed=7") == 3
    assert (
        "the run cannot go on under other settings: seed was 0, now 7; optimization.lr was 0.01, now 0.02; "
        "set them back, or start a run of its own with another output"
    ) in run.error("config")
    assert contents(run.directory) == before
    assert run.train() == 0
    assert_equal(run, whole())


# --- not finite -------------------------------------------------------------------------------------------------------
def refusals(run: Run) -> list[tuple[int, int]]:
    """Step and how many in a row."""
    events = [event for event in run.records("event") if event["event"] == "step_refused"]
    return [(event["step"], event["facts"]["in_a_row"]) for event in events]


def test_two_steps_with_infinite_gradients_are_refused_and_the_run_goes_on(
    new: NewRun, whole: Callable[..., Run]
) -> None:
    """Killed behind them and resumed, too, it is the same run; and another one than that without them."""
    gradients = [3, 4, None]
    through, run = new(), new()
    assert through.train(gradients=gradients) == 0, through.said
    assert refusals(through) == [(3, 1), (4, 2)]
    assert sum("step refused, gradient_norm nan" in line for line in through.said) == 2
    norms = [record["gradient_norm"] for record in through.records("batch")]
    assert [step for step, norm in enumerate(norms, start=1) if norm == "NaN"] == [3, 4]
    assert through.facts["validation_loss"] != whole().facts["validation_loss"]
    assert run.train(gradients=gradients, moment="step", count=6, signals=["SIGKILL"]) == KILLED
    assert run.train(gradients=gradients) == 0
    assert_equal(run, through)


def test_infinite_gradients_for_good_end_the_run_also_when_it_was_killed_between_them(new: NewRun) -> None:
    for moment in ({}, {"moment": "step", "count": 5, "signals": ["SIGKILL"]}):
        run = new()
        ended = run.train(gradients=[3, 99, None], **moment)
        if moment:
            assert (ended, run.checkpoints.steps()) == (KILLED, [2, 4])
            ended = run.train(gradients=[3, 99, None])
        assert ended == 3
        assert (
            "the gradients' norm is nan in 3 steps in a row, up to step 5; the last checkpoint is of step 4; "
            "try a lower optimization.lr or precision.dtype=fp32"
        ) in run.error("numerical")
        assert refusals(run) == [(3, 1), (4, 2), (5, 3)]
        assert run.checkpoints.steps() == [2, 4]


def test_a_component_that_makes_gradients_infinite_is_turned_off(new: NewRun) -> None:
    """Two steps it is given, then the run goes on without it: also one that is killed behind that and resumed."""
    changes = {"optimization": {"steps": 9}, "passes": {"qat": {"block": 16, "start": 0.2}}}
    gradients = [1, 99, "qat"]
    through, run = new(**changes), new(**changes)
    assert through.train(gradients=gradients) == 0, through.said
    assert refusals(through) == [(3, 1), (4, 2), (5, 3)]
    told = [(e["event"], e["step"], e["facts"].get("component")) for e in through.records("event")]
    assert [event for event in told if event[0] != "step_refused"] == [("activate", 3, "qat"), ("fallback", 5, "qat")]
    fallback = next(event for event in through.records("event") if event["event"] == "fallback")
    assert fallback["facts"]["reason"] == "gradients were nan in 3 steps in a row"
    assert through.records("epoch")[-1]["active"] == ["loss"]
    assert not (through.directory / "model" / RECIPE_NAME).exists()
    assert through.records("batch")[-1]["loss"] < through.records("batch")[0]["loss"]
    assert run.train(gradients=gradients, moment="step", count=8, signals=["SIGKILL"]) == KILLED
    assert run.train(gradients=gradients) == 0
    assert_equal(run, through)


def test_a_validation_that_is_not_finite_does_not_keep_the_run_from_checkpoints(new: NewRun) -> None:
    through, run = new(), new()
    assert through.train(validation=3) == 0, through.said
    assert [record["loss"] == "NaN" for record in through.records("validation")] == [True, False]
    assert run.train(validation=3, moment="step", count=5, signals=["SIGKILL"]) == KILLED
    assert run.train(validation=3) == 0, run.said
    assert_equal(run, through)
