"""The verdict on many checks is that of the worst; and who wrote a report, of what, and where."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest

from ryzen_compile.validate.machine import read_machine
from ryzen_compile.validate.outcome import STATUSES, Outcome, Status
from ryzen_compile.workflow.metadata import metadata, summary, worst


def outcomes(statuses: Sequence[Status]) -> list[Outcome]:
    return [Outcome(component="kernels", check=f"{number}", status=one) for number, one in enumerate(statuses)]


@pytest.mark.parametrize(
    ("statuses", "verdict"),
    [
        ((), "SKIPPED"),
        (("SKIPPED",), "SKIPPED"),
        (("SKIPPED", "SKIPPED", "SKIPPED"), "SKIPPED"),
        (("PASS",), "PASS"),
        (("SKIPPED", "PASS"), "PASS"),
        (("PASS", "WARN", "PASS"), "WARN"),
        (("SKIPPED", "WARN"), "WARN"),
        (("PASS", "WARN", "FAIL", "SKIPPED"), "FAIL"),
        (("FAIL",), "FAIL"),
    ],
)
def test_the_worst(statuses: tuple[Status, ...], verdict: Status) -> None:
    """In whatever order they come."""
    for order in itertools.permutations(statuses):
        assert worst(order) == worst(list(order)) == verdict
        assert summary(outcomes(order), 0.0).verdict == verdict


def test_counts_are_of_statuses_that_occur() -> None:
    found = summary(outcomes(("PASS", "FAIL", "PASS", "SKIPPED", "PASS", "SKIPPED")), 12.5)
    assert found.counts == {"PASS": 3, "FAIL": 1, "SKIPPED": 2} and found.seconds == 12.5
    assert sum(found.counts.values()) == 6
    assert summary([], 0.0).counts == {}
    assert summary(outcomes(STATUSES), 0.0).counts == dict.fromkeys(STATUSES, 1)


def test_a_report_says_who_wrote_it_of_what_and_where() -> None:
    found = metadata(model="a/b", artifact="out", command="ryzen-compile run x.yaml", threads=3)
    machine = read_machine()
    assert (found.model, found.artifact, found.command, found.threads) == ("a/b", "out", "ryzen-compile run x.yaml", 3)
    assert found.made_by.startswith("ryzen_compile ")
    assert (found.machine, found.isa, found.memory_bytes) == (machine.cpu.name, machine.cpu.isa, machine.memory_total)
    written = datetime.fromisoformat(found.written)
    assert written.utcoffset() == timedelta(0) and abs(datetime.now(UTC) - written) < timedelta(minutes=1)
    assert found.libraries["torch"] and None not in found.libraries.values()
