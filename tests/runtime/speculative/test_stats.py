"""What is counted adds up, and reads well."""

from __future__ import annotations

import json

import pytest

from ryzen_compile.runtime.speculative.stats import DrafterStats, SpeculationStats


def some() -> SpeculationStats:
    stats = SpeculationStats(tokens=30, steps=12, drafts=6, drafted=24, accepted=18)
    stats.step_seconds, stats.verify_seconds, stats.draft_seconds, stats.plain_seconds = 0.9, 0.5, 0.1, 2.5
    stats.lengths.update({0: 1, 4: 4, 2: 1})
    stats.drafters["lookup"] = DrafterStats(asked=9, drafts=6, drafted=24, accepted=18, seconds=0.1)
    return stats


def test_figures() -> None:
    stats = some()
    assert (stats.acceptance_rate, stats.mean_accepted, stats.steps_saved) == (0.75, 3, 18)
    assert stats.speed_up == pytest.approx(2.5)
    assert stats.drafters["lookup"].acceptance_rate == 0.75


def test_nothing_yet_divides_by_nothing() -> None:
    stats = SpeculationStats()
    assert (stats.acceptance_rate, stats.mean_accepted, stats.steps_saved, stats.speed_up) == (0, 0, 0, 1)
    assert DrafterStats().acceptance_rate == 0
    assert "0 tokens in 0 steps" in stats.to_text()


def test_generations_add_up() -> None:
    total = SpeculationStats()
    total.add(some())
    other = some()
    other.of("suffix").drafts = 2
    other.dropped["suffix"] = "ValueError: no"
    total.add(other)
    assert total.tokens == 60 and total.lengths[4] == 8 and total.plain_seconds == 5
    assert total.drafters["lookup"].drafted == 48 and total.drafters["suffix"].drafts == 2
    assert total.dropped == {"suffix": "ValueError: no"} and total.speed_up == pytest.approx(2.5)
    assert other.drafters["lookup"].drafted == 24  # what is added is left alone


def test_json_is_json_with_counts_by_text() -> None:
    found = json.loads(json.dumps(some().to_json()))
    assert found["accepted_per_draft"] == {"0": 1, "2": 1, "4": 4} and found["steps_saved"] == 18
    assert found["drafters"]["lookup"]["acceptance_rate"] == 0.75


def test_the_text_has_a_bar_for_every_length_up_to_the_longest() -> None:
    lines = some().to_text().splitlines()
    assert lines[0] == "speculation: 30 tokens in 12 steps, 2.50 x the estimate without"
    assert lines[1] == "  lookup: 6 drafts, 18 of 24 tokens accepted (75 %), 100.0 ms"
    assert [line.split()[0] for line in lines[3:]] == ["0", "1", "2", "3", "4"]
    assert lines[-1] == "     4 " + "#" * 40 + " 4" and lines[4] == "     1  0"


def test_why_nothing_was_drafted_is_all_there_is_to_say() -> None:
    assert SpeculationStats(idle="two sequences").to_text() == "speculation: nothing drafted: two sequences"
    assert "lookup was dropped: ValueError: no" in SpeculationStats(dropped={"lookup": "ValueError: no"}).to_text()
