"""With which options an artifact is opened on this machine: as ``tune`` found best, unless it is told otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from ryzen_compile.backends.onnxruntime.artifact import Artifact
from ryzen_compile.backends.onnxruntime.claim_report import KINDS
from ryzen_compile.backends.onnxruntime.session import SessionOptions
from ryzen_compile.backends.onnxruntime.tune import read_tuning, tuned_options
from ryzen_compile.validate.machine import cpu_key, read_machine


def engine_options(found: Artifact, *, threads: int | None, native: Literal["auto"] | bool = "auto") -> SessionOptions:
    """What ``load`` opens ``found`` with, the number of threads said: one per usable core where nobody says another.

    ``native`` True insists on our own operators, False does without, "auto" has those that ``tune`` found best, or all.
    Raises ``UsageError`` for fewer than one thread and ``ArtifactError`` for a record that ``tune`` does not write.
    """
    machine = read_machine()
    tuning = read_tuning(found.manifest, cpu_key(machine)) if "tuned" in found.manifest else None
    options = SessionOptions() if tuning is None else tuned_options(tuning)
    if threads is not None:
        options = SessionOptions(threads, native=options.native)  # spinning was found best for another number
    elif options.threads is None:
        options = replace(options, threads=machine.usable_cores)
    if native == "auto":
        return options
    return replace(options, native=KINDS if native else frozenset(), require_native=native)
