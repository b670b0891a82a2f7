"""What a reader wants first: the verdict in a sentence, the few figures that matter, and what went wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ryzen_compile.validate.measured import Measured
from ryzen_compile.validate.outcome import Outcome, Status
from ryzen_compile.workflow import wording
from ryzen_compile.workflow.report_schema import FinalReport, ValidationReport


@dataclass(frozen=True)
class Headline:
    """One of the figures at the top. ``status`` is its check's, none where it is not held to a target."""

    label: str
    figure: Measured
    meaning: str
    status: Status | None
    target: str

    @property
    def value(self) -> str:
        return wording.amount(self.figure.value, self.figure.unit, 3)

    @property
    def interval(self) -> str:
        return wording.interval(self.figure, 3)


def checks(final: FinalReport) -> Iterator[Outcome]:
    """Every check, in the order of the report."""
    for component in final.components:
        yield from component.checks


def findings(final: FinalReport) -> list[Outcome]:
    """What failed, then what nearly did."""
    return [one for status in ("FAIL", "WARN") for one in checks(final) if one.status == status]


def headlines(final: FinalReport, validation: ValidationReport | None = None) -> list[Headline]:
    """The figures that were measured, of: end to end, decode, first token, size, accuracy loss, cache."""
    whole = final.end_to_end
    ratios = validation.inference.speed_ups if validation is not None and validation.inference is not None else {}
    faster = "times as fast as the baseline"
    rows = (
        ("End to end", whole and whole.speed_up, ratios.get("end_to_end"), "end_to_end_speedup", faster),
        ("Decode", whole and whole.decode, ratios.get("decode"), "", faster),
        ("First token", whole and whole.prefill, ratios.get("ttft"), "", faster),
        ("Size", None, None, "compression_ratio", "times smaller than the baseline"),
        ("Accuracy loss", None, None, "accuracy_loss", "against the baseline"),
        ("KV cache", None, None, "kv_memory_saving", "of its memory saved"),
    )
    by_name = {one.check: one for one in checks(final)}
    found = []
    for label, first, second, name, meaning in rows:
        check = by_name.get(name)
        figure = first or second or (check.measured if check is not None else None)
        if figure is not None:
            status, target = (check.status, wording.target(check)) if check is not None else (None, "")
            found.append(Headline(label, figure, meaning, status, target))
    return found


def sentence(final: FinalReport) -> str:
    """The verdict and what it rests on, in one sentence."""
    every = list(checks(final))
    if not every or all(one.status == "SKIPPED" for one in every):
        return "Nothing was checked."
    skipped = sum(one.status == "SKIPPED" for one in every)
    apart = f"; {wording.count(skipped, 'check')} left out" if skipped else ""
    of = wording.count(len(every) - skipped, "check")
    for status, what in (("FAIL", "failed"), ("WARN", "came with a warning")):
        names = [wording.words(one.check) for one in every if one.status == status]
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            return f"{len(names)} of {of} {what}: {shown}{apart}."
    return f"{'The one check' if len(every) - skipped == 1 else f'All {of}'} passed{_gain(final)}{apart}."


def _gain(final: FinalReport) -> str:
    whole = final.end_to_end
    return f", {wording.amount(whole.speed_up.value, whole.speed_up.unit, 3)} end to end" if whole is not None else ""
