"""Figures arrive where they are watched, and a tracker that fails costs a warning."""

from __future__ import annotations

import importlib
import math
import sqlite3
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest

from ryzen_compile.errors import ConfigError
from ryzen_compile.train import trackers as module
from ryzen_compile.train.trackers import PROJECT, Trackers, open_trackers


def curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would draw."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


class Memory:
    """A tracker that keeps what it gets, and fails at step ``fails`` or when it is closed (-1)."""

    def __init__(self, fails: int | None = None, error: type[Exception] = RuntimeError) -> None:
        self.fails, self.error = fails, error
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.closed = 0

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        if step == self.fails:
            raise self.error("no\nspace")
        self.logged.append((step, dict(figures)))

    def close(self) -> None:
        self.closed += 1
        if self.fails == -1:
            raise self.error("no space")


def test_tensorboard_gets_every_figure(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    opened = open_trackers(("tensorboard",), tmp_path, "run")
    for step in (1, 2, 7):
        opened.log(step, {"train/loss": 1 / step, "train/accuracy": 0.5})
    opened.log(8, {"train/loss": math.nan})
    opened.close()
    found = curves(tmp_path)
    assert found["train/accuracy"] == [(1, 0.5), (2, 0.5), (7, 0.5)]
    steps, values = zip(*found["train/loss"], strict=True)
    assert steps == (1, 2, 7, 8) and math.isnan(values[3])
    assert values[:3] == pytest.approx([1, 1 / 2, 1 / 7], rel=1e-6)  # event files hold float32


def test_a_resumed_run_hides_what_was_logged_behind_its_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    first = open_trackers(("tensorboard",), tmp_path, "run")
    for step in range(1, 6):
        first.log(step, {"train/loss": 1.0})
    first.close()
    second = open_trackers(("tensorboard",), tmp_path, "run", resume_step=3)
    second.log(4, {"train/loss": 2.0})
    second.close()
    assert curves(tmp_path)["train/loss"] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


@pytest.fixture
def trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The real library, with its database in ``tmp_path``; it reads the place when it is imported."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WEBHOOK_URL"):
        monkeypatch.delenv(name, raising=False)
    pytest.importorskip("trackio")
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    return importlib.import_module("trackio")


def test_trackio_gets_every_figure(trackio: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = open_trackers(("trackio",), tmp_path, "first")
    for step in (1, 2, 7):
        opened.log(step, {"train/loss": 1 / step, "epoch/speedups/qat": 1.25})
    opened.close()
    again = open_trackers(("trackio",), tmp_path, "first", resume_step=7)
    again.log(8, {"train/loss": 0.125})
    again.close()
    assert capsys.readouterr().out == ""
    (run,) = trackio.Api().runs(PROJECT)
    assert run.name == "first"
    logs = trackio.sqlite_storage.SQLiteStorage.get_logs(PROJECT, "first")
    assert [(row["step"], row["train/loss"]) for row in logs] == [(1, 1.0), (2, 0.5), (7, 1 / 7), (8, 0.125)]
    assert logs[0]["epoch/speedups/qat"] == 1.25


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_a_library_that_is_missing_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for loaded in [m for m in sys.modules if m.startswith(("tensorboard", "torch.utils.tensorboard", "trackio"))]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"tracker '{name}' needs the package {name}.*pip install '{name}"):
        open_trackers((name,), tmp_path, "run")


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tracker 'wandb', expected one of tensorboard, trackio"):
        open_trackers(("wandb",), tmp_path, "run")


def test_a_tracker_that_does_not_start_closes_those_that_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Memory()

    def fail(run_name: str, resume_step: int | None) -> Memory:
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(module, "TensorBoardTracker", lambda directory, resume_step: first)
    monkeypatch.setattr(module, "TrackioTracker", fail)
    with pytest.raises(ConfigError, match="'trackio' does not start: OperationalError: database is locked"):
        open_trackers(("tensorboard", "trackio"), tmp_path, "run")
    assert first.closed == 1


@pytest.mark.parametrize("error", [OSError, sqlite3.Error, Exception])
def test_a_tracker_that_fails_is_left_out_with_one_warning(error: type[Exception]) -> None:
    good, bad = Memory(), Memory(fails=2, error=error)
    both = Trackers({"bad": bad, "good": good})
    both.log(1, {"loss": 1.0})
    with pytest.warns(UserWarning, match=rf"tracker 'bad' failed at step 2 .*{error.__name__}: no space") as caught:
        both.log(2, {"loss": 2.0})
    assert len(caught) == 1 and both.names == ("good",)
    both.log(3, {"loss": 3.0})  # a warning here would fail the test
    both.close()
    assert both.names == ()
    assert [step for step, _ in bad.logged] == [1] and bad.closed == 0
    assert good.logged == [(step, {"loss": float(step)}) for step in (1, 2, 3)] and good.closed == 1


def test_a_run_that_is_interrupted_is_not_held_up() -> None:
    class Interrupted(Memory):
        def log(self, step: int, figures: Mapping[str, float]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trackers({"one": Interrupted()}).log(1, {})


def test_closing_fails_with_a_warning_and_happens_once() -> None:
    bad = Memory(fails=-1)
    one = Trackers({"bad": bad})
    with pytest.warns(UserWarning, match="'bad' failed when it was closed"):
        one.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one.close()
    assert bad.closed == 1


def test_no_trackers_is_the_default(tmp_path: Path) -> None:
    none = open_trackers((), tmp_path, "run")
    none.log(1, {"loss": 1.0})
    none.close()
    assert none.names == () and list(tmp_path.iterdir()) == []
