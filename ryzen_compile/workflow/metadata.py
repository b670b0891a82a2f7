"""Who wrote a report, of what, and where: what every figure in it stands beside."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

from ryzen_compile.validate.machine import read_machine
from ryzen_compile.validate.outcome import Outcome, Status
from ryzen_compile.workflow.report_schema import Metadata, Summary


def metadata(*, model: str, artifact: str, command: str, threads: int) -> Metadata:
    """Of this machine, now."""
    machine = read_machine()
    return Metadata(
        made_by=f"ryzen_compile {_version()}",
        written=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        model=model,
        artifact=artifact,
        machine=machine.cpu.name,
        microarchitecture=machine.cpu.microarchitecture,
        isa=machine.cpu.isa,
        threads=threads,
        memory_bytes=machine.memory_total,
        system=machine.system,
        python=machine.python,
        libraries={name: version for name, version in machine.versions.items() if version is not None},
    )


def summary(outcomes: Sequence[Outcome], seconds: float) -> Summary:
    """The verdict is the worst of all checks that were made."""
    counts = Counter(outcome.status for outcome in outcomes)
    return Summary(verdict=worst([one.status for one in outcomes]), counts=dict(counts), seconds=seconds)


def worst(statuses: Sequence[Status]) -> Status:
    """FAIL before WARN before PASS; SKIPPED where nothing else is there."""
    order: tuple[Status, ...] = ("FAIL", "WARN", "PASS")
    return next((status for status in order if status in statuses), "SKIPPED")


def _version() -> str:
    try:
        return importlib.metadata.version("ryzen-compile")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
