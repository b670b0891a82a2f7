"""Where a run's figures can be watched while it goes on, by libraries that are installed for it.

A tracker shows, it does not keep: the record is ``metrics.jsonl``. So one that fails while the run goes on is left out
from then on, with a warning, and the run goes on.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ryzen_compile.errors import ConfigError

TRACKERS = ("tensorboard", "trackio")
PROJECT = "ryzen-compile"  # of all runs, in libraries that group runs by project
FLUSH_SECONDS = 10  # a killed run loses no more of its curves


class Tracker(Protocol):
    """Somewhere that figures go."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """``figures`` ("train/loss": 2.3) as they were after ``step``; may be NaN or infinite."""
        ...

    def close(self) -> None:
        """Nothing is logged afterwards."""
        ...


class TensorBoardTracker:
    """Event files in ``directory``/tensorboard, one curve a figure; ``resume_step``: what an earlier run logged behind
    it is no longer shown."""

    def __init__(self, directory: Path, resume_step: int | None = None) -> None:
        library = _import("torch.utils.tensorboard", "tensorboard", "tensorboard")
        self._writer = library.SummaryWriter(
            str(directory / "tensorboard"),
            purge_step=None if resume_step is None else resume_step + 1,
            flush_secs=FLUSH_SECONDS,
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class TrackioTracker:
    """A run of project PROJECT in trackio's own place (``TRACKIO_DIR``, or where ``trackio show`` looks); resumed, the
    run of that name goes on. What it says on standard output goes to standard error, as that is not ours."""

    def __init__(self, run_name: str, resume_step: int | None = None) -> None:
        self._library = _import("trackio", "trackio", "trackio>=0.43")
        resume = "never" if resume_step is None else "allow"
        with redirect_stdout(sys.stderr):
            # The same figures as everywhere: nothing of its own about the machine, no page in a notebook.
            self._library.init(
                project=PROJECT, name=run_name, resume=resume, embed=False, auto_log_gpu=False, auto_log_cpu=False
            )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._library.log(dict(figures), step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._library.finish()


class Trackers:
    """Several, as one; those that fail are left out from then on."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)

    @property
    def names(self) -> tuple[str, ...]:
        """Those that have not failed."""
        return tuple(self._trackers)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, tracker in list(self._trackers.items()):
            self._try(name, f"at step {step}", partial(tracker.log, step, figures))

    def close(self) -> None:
        """All of them; again, it does nothing."""
        for name, tracker in list(self._trackers.items()):
            self._try(name, "when it was closed", tracker.close)
        self._trackers.clear()

    def _try(self, name: str, when: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - libraries raise what they like; hours of training outweigh a curve
            self._trackers.pop(name, None)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            warnings.warn(f"tracker {name!r} failed {when} and gets nothing from now on: {reason}", stacklevel=4)


def open_trackers(
    names: Sequence[str], directory: str | Path, run_name: str, resume_step: int | None = None
) -> Trackers:
    """The trackers ``names`` for a run, called ``run_name``, that writes into ``directory``; ``resume_step`` is what
    a resumed run goes on from.

    Raises ``ConfigError`` for a name that is none, and for a library that is missing or does not start.
    """
    opened: dict[str, Tracker] = {}
    try:
        for name in names:
            if name not in TRACKERS:
                raise ConfigError(f"there is no tracker {name!r}, expected one of {', '.join(TRACKERS)}")
            if name not in opened:
                opened[name] = _open(name, Path(directory), run_name, resume_step)
    except ConfigError:
        Trackers(opened).close()
        raise
    return Trackers(opened)


def _open(name: str, directory: Path, run_name: str, resume_step: int | None) -> Tracker:
    try:
        if name == "tensorboard":
            return TensorBoardTracker(directory, resume_step)
        return TrackioTracker(run_name, resume_step)
    except ConfigError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"tracker {name!r} does not start: {reason}", hint="take it out of metrics.trackers, or set it up"
        ) from error


def _import(module: str, package: str, requirement: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"tracker {package!r} needs the package {package}, which cannot be imported: {error}",
            hint=f"pip install '{requirement}', or take it out of metrics.trackers",
        ) from error
