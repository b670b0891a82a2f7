"""Checkpoints of a training run: each appears whole or not at all, and a damaged one is never taken for a whole one.

    directory/step-00000500/  (``checkpoint_files``), directory/step-00001000/, ...

``publish.Staging`` writes each. Which one is the best is read off the checkpoints themselves: a pointer could disagree
with them after a crash.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from ryzen_compile.errors import (
    ArtifactError,
    BusyError,
    ModelError,
    ResourceError,
    TamperedError,
    UnsafeError,
    UsageError,
)
from ryzen_compile.manifest import shown_path
from ryzen_compile.publish import Staging, require_space
from ryzen_compile.train import checkpoint_files
from ryzen_compile.train.checkpoint_files import MANIFEST, Packed, Snapshot, read_record, read_snapshot, verify

STEPS = ("sweep", "stage", *checkpoint_files.STEPS, "publish", "prune")  # of a save, in their order
_NAME = re.compile(r"step-([0-9]{8,15})")
# What a process that died leaves: Staging's, and what was being deleted (`_delete`).
_LEFTOVER = re.compile(r"\.(step-[0-9]{8,15})\.(?:lock|(?:tmp|old)-[0-9]+-[0-9a-f]{8}|(pruned))")
_NEXT = "next"  # what a writer holds the lock of
_DAMAGE = (ModelError, TamperedError, UnsafeError)


class Checkpoints:
    """The checkpoints of one run, in ``directory``, which the first save makes.

    The last ``keep`` stay, and with ``best`` the one with the lowest metric: of equals the earliest. ``on_step`` is
    told each of ``STEPS`` as it begins.
    """

    def __init__(
        self, directory: Path, *, keep: int = 2, best: bool = True, on_step: Callable[[str], None] | None = None
    ) -> None:
        if keep < 1:
            raise UsageError(f"checkpoints to keep: expected at least 1, got {keep}")
        self.directory = Path(directory)
        self._keep = keep
        self._best_stays = best
        self._on_step = on_step or (lambda _: None)

    def save(self, snapshot: Snapshot, *, metric: float | None = None) -> Path:
        """Writes a checkpoint, or replaces that of the same step; deletes those not kept; returns its directory.

        ``metric`` is the validation loss; NaN and infinity count as none, which is never the best. Afterwards
        ``newest`` is this one: checkpoints of later steps are of a run that was not gone on with, and are set aside
        with a warning (renamed, not deleted). A process that dies on the way leaves the checkpoints that were there,
        or these and the new one, and the next save removes its leftovers.

        Raises, before anything is written, UsageError for what cannot be stored, BusyError while another process saves
        into ``directory``, ResourceError where space is short. ResourceError may come later, too; what is published by
        then stays.
        """
        packed = Packed(snapshot, metric)
        target = self._path(snapshot.step)
        self._make_directory()
        require_space(self.directory, packed.nbytes)
        self._on_step("sweep")
        with self._alone():
            self._on_step("stage")
            if not self._settle(target):
                _set_aside(target, "is no checkpoint")
            with self._staging(target) as stage:
                packed.write(stage.path, self._on_step)
                self._on_step("publish")
                stage.commit()
            self._on_step("prune")
            self._prune(snapshot.step)
        return target

    def newest(self) -> Snapshot | None:
        """The newest checkpoint that is whole; None where there is none at all.

        Damaged ones are skipped with a warning that names checkpoint, file and fault. Raises ModelError, listing them,
        when all are: training must not begin anew unasked. ResourceError when reading fails.
        """
        self._recover()
        faults: list[str] = []
        for step in reversed(self.steps()):
            path = self._path(step)
            try:
                snapshot = self.load(path)
            except _DAMAGE as error:
                faults.append(f"{path.name}: {error.message}")
                continue
            for fault in faults:
                warnings.warn(f"damaged checkpoint {fault}; {path.name} is taken", stacklevel=2)
            return snapshot
        if faults:
            raise ModelError(
                f"{shown_path(self.directory)} holds no checkpoint that is whole: {'; '.join(faults)}",
                hint="restore one, or move them away to begin anew",
            )
        return None

    def load(self, path: Path) -> Snapshot:
        """The checkpoint in the directory ``path``, every byte checked. Raises as ``read_snapshot``, and ModelError
        where the name says another step."""
        path = Path(path)
        snapshot = read_snapshot(path)
        _refuse_other_step(path, snapshot.step)
        return snapshot

    def steps(self) -> list[int]:
        """Of the checkpoints that are there, whole or not; ascending."""
        found = ((_NAME.fullmatch(name), name) for name in self._names())
        return sorted(int(match[1]) for match, name in found if match and self._path(int(match[1])).name == name)

    def best(self) -> Path | None:
        """Of the whole checkpoints that have a metric, the one with the lowest, of equals the earliest; or None.
        Damaged ones are skipped with a warning."""
        metrics = self._metrics()
        for step in sorted((s for s in metrics if metrics[s] is not None), key=lambda s: (metrics[s], s)):
            path = self._path(step)
            try:
                verify(path)
            except _DAMAGE as error:
                warnings.warn(f"damaged checkpoint {path.name}: {error.message}; it is not the best", stacklevel=2)
            else:
                return path
        return None

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _names(self) -> list[str]:
        try:
            return sorted(path.name for path in self.directory.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ResourceError(f"cannot list {shown_path(self.directory)}: {error.strerror}") from error

    def _make_directory(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"cannot make {shown_path(self.directory)}: {error.strerror}") from error

    # --- one writer ---

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps other writers of the directory out, whatever their step, and sweeps what dead ones left.

        A ``Staging`` that is never committed: of it, only the lock is wanted.
        """
        with Staging(self.directory / _NEXT):
            for name, leftover in self._leftovers():
                if leftover[2]:
                    shutil.rmtree(self.directory / name, ignore_errors=True)
                else:
                    self._settle(self.directory / leftover[1])
            yield

    def _staging(self, target: Path) -> Staging:
        return Staging(target, force=True, owner_marker=MANIFEST)

    def _settle(self, target: Path) -> bool:
        """Sweeps leftovers of ``target``, then says whether the name is free or a checkpoint, which may be replaced."""
        try:
            with self._staging(target):
                return True
        except (ArtifactError, UsageError):
            return False

    def _leftovers(self) -> list[tuple[str, re.Match[str]]]:
        return [(name, match) for name in self._names() if (match := _LEFTOVER.fullmatch(name))]

    def _recover(self) -> None:
        """Before reading: a leftover may be the only checkpoint, on its way back (``publish``, two renames)."""
        # Neither another writer, who sweeps himself, nor a directory that may not be written hinders reading.
        if self._leftovers() or any(name.startswith(f".{_NEXT}.") for name in self._names()):
            with suppress(BusyError, ResourceError), self._alone():
                pass

    # --- which stay ---

    def _metrics(self) -> dict[int, float | None]:
        """Step and metric of the checkpoints that can be told to be some; tensors are not looked at."""
        metrics = {}
        for step in self.steps():
            with suppress(*_DAMAGE):
                record = read_record(self._path(step))
                _refuse_other_step(self._path(step), record.step)
                metrics[step] = record.metric
        return metrics

    def _prune(self, saved: int) -> None:
        for step in self.steps():
            if step > saved:
                _set_aside(self._path(step), f"is of a later step than {saved}, which was saved after it")
        metrics = self._metrics()
        kept = set(sorted(metrics)[-self._keep :])
        rated = [(metric, step) for step, metric in metrics.items() if metric is not None]
        if self._best_stays and rated:
            kept.add(min(rated)[1])
        for step in sorted(set(metrics) - kept):
            _delete(self._path(step))


def _refuse_other_step(path: Path, step: int) -> None:
    match = _NAME.fullmatch(path.name)
    if match and int(match[1]) != step:
        raise ModelError(f"{shown_path(path)} holds step {step}, expected {int(match[1])}")


def _delete(path: Path) -> None:
    """Under another name first: a process that dies meanwhile leaves no half of a checkpoint."""
    doomed = path.with_name(f".{path.name}.pruned")
    try:
        path.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        raise ResourceError(f"cannot delete {shown_path(path)}: {error.strerror}") from error


def _set_aside(path: Path, why: str) -> None:
    aside = next(name for i in count(1) if not os.path.lexists(name := path.with_name(f"{path.name}.aside-{i}")))
    try:
        path.rename(aside)
    except OSError as error:
        raise ResourceError(f"cannot rename {shown_path(path)}: {error.strerror}") from error
    warnings.warn(f"{path.name} {why}: renamed to {aside.name}", stacklevel=4)
