"""A check's outcome: what was measured, what was wanted, and the verdict that follows from the two."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field

from ryzen_compile.fields import Fields
from ryzen_compile.validate.measured import Measured

Status = Literal["PASS", "WARN", "FAIL", "SKIPPED"]
STATUSES: tuple[Status, ...] = ("PASS", "WARN", "FAIL", "SKIPPED")
# What is checked, in the order of reports.
Component = Literal["kernels", "passes", "embedding", "kv_cache", "speculation", "correctness", "end_to_end", "tests"]


class Target(Fields):
    """``at_least`` or at most ``value``; a miss by no more than ``tolerance`` (a share of the value) is a warning."""

    value: float
    at_least: bool = True
    tolerance: float = Field(default=0.0, ge=0)
    advisory: bool = Field(default=False, description="a miss is a warning, however large")

    def to_text(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.value:g}"


class Outcome(Fields):
    """One check. ``culprit`` names what is to blame for a miss: a pass, a file, a row of a table, a drafter."""

    component: Component
    check: str = Field(description="the threshold's name, where it has one")
    status: Status
    measured: Measured | None = None
    target: Target | None = None
    reason: str = Field(default="", description="why it was missed, nearly missed, or not measured")
    culprit: str = ""
    command: str = Field(default="", description="what measures it again")
    seconds: float = Field(default=0.0, ge=0, description="that the check took")
    details: dict[str, Any] = Field(default_factory=dict, description="JSON: the parts of the figure")


def judge(measured: Measured, target: Target) -> tuple[Status, str]:
    """The verdict on ``measured``, and why it is not a plain pass.

    A value that meets its target passes; where its interval reaches beyond the target, that is a warning: another run
    may miss it. NaN meets nothing.
    """
    if not _meets(measured.value, target):
        short = abs(measured.value - target.value) / abs(target.value) if target.value else float("inf")
        missed = f"{measured.to_text()}, expected {target.to_text()}"
        if target.advisory:
            return "WARN", missed
        if short <= target.tolerance:
            return "WARN", f"{missed}; within the tolerance of {target.tolerance:.0%}"
        return "FAIL", missed
    worst = measured.low if target.at_least else measured.high
    if worst is not None and not _meets(worst, target):
        return "WARN", f"{measured.to_text()}: the interval reaches beyond {target.to_text()}"
    return "PASS", ""


def failed(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Those that make a run fail."""
    return [outcome for outcome in outcomes if outcome.status == "FAIL"]


def _meets(value: float, target: Target) -> bool:
    return value >= target.value if target.at_least else value <= target.value
