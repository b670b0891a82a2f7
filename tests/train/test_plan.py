"""How long a run is, and that the rows of its steps do not depend on how many processes share them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ryzen_compile.errors import ConfigError
from ryzen_compile.train.config import Mode, parse_config
from ryzen_compile.train.plan import TEST_STEPS, Plan, Rows, make_plan

LENGTH = 16


def plan(
    rows: int = 37, mode: Mode = "optimized", processes: int = 1, *, every: int = 0, seed: int = 5, **settings: Any
) -> Plan:
    """A plan over ``rows`` rows of ``LENGTH`` tokens; batch 2 and 10 steps unless told otherwise."""
    if not {"tokens", "epochs", "steps"} & settings.keys():
        settings["steps"] = 10
    config = parse_config(
        {
            "output": "out",
            "seed": seed,
            "model": {"path": "somewhere"},
            "data": {"train": {"path": "text.txt"}, "length": LENGTH},
            "optimization": {"batch": 2, **settings},
            "controller": {"every": every},
        }
    )
    text = torch.zeros(rows, LENGTH + 1, dtype=torch.int64)
    return make_plan(config, mode, Rows(text, text[:3]), processes)


def test_a_step_is_batches_of_all_processes() -> None:
    found = plan(batch=3, accumulate=5, processes=2, rows=100)
    assert (found.batch, found.accumulate, found.processes, found.length) == (3, 5, 2, LENGTH)
    assert found.rows_per_step == 30 and found.tokens_per_step == 30 * LENGTH
    assert Rows(torch.zeros(4, 9), torch.zeros(1, 9)).length == 8


@pytest.mark.parametrize(
    ("settings", "processes", "steps"),
    [
        ({"steps": 7}, 1, 7),
        ({"steps": 7}, 4, 7),
        ({"tokens": 10 * 2 * LENGTH}, 1, 10),
        ({"tokens": 11 * 2 * LENGTH - 1}, 1, 10),
        ({"tokens": 10 * 2 * LENGTH}, 2, 5),
        ({"tokens": 10 * 2 * LENGTH, "accumulate": 5}, 1, 2),
        ({"epochs": 1}, 1, 18),  # 37 rows in batches of two, to the nearest step
        ({"epochs": 2.0}, 1, 37),
        ({"epochs": 0.1}, 1, 2),
        ({"epochs": 4, "accumulate": 2}, 2, 18),
    ],
)
def test_how_many_steps(settings: dict[str, Any], processes: int, steps: int) -> None:
    assert plan(processes=processes, **settings).steps == steps


@pytest.mark.parametrize(
    ("settings", "processes"),
    [({"tokens": 2 * LENGTH - 1}, 1), ({"tokens": 2 * LENGTH}, 2), ({"epochs": 0.01}, 1), ({"tokens": 1}, 1)],
)
def test_less_than_a_step_is_refused(settings: dict[str, Any], processes: int) -> None:
    with pytest.raises(ConfigError, match=f"shorter than a step, which reads {2 * processes * LENGTH} tokens"):
        plan(processes=processes, **settings)


def test_test_mode_takes_a_few_steps() -> None:
    assert plan(mode="test", steps=1000).steps == TEST_STEPS
    assert plan(mode="test", steps=2).steps == 2
    assert plan(mode="test", tokens=3).steps == 1  # of its few rows, a share of an epoch may be none


@pytest.mark.parametrize(("rows", "every", "epoch"), [(37, 0, 18), (37, 5, 5), (1, 0, 1), (4, 0, 2)])
def test_an_epoch_of_the_controller(rows: int, every: int, epoch: int) -> None:
    """Its own length, or a pass over the text, at least one step."""
    assert plan(rows=rows, every=every).epoch == epoch


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_and_accumulation_see_the_same_rows(processes: int) -> None:
    """Over more than a pass through 37 rows: as a step's set, and each batch in the same company."""
    alone = plan(accumulate=2 * processes, steps=12)
    shared = plan(accumulate=2, processes=processes, steps=12)
    for step in range(12):
        whole = alone.rows_of(step, 0)
        parts = torch.stack([shared.rows_of(step, process) for process in range(processes)], 1)
        assert whole.shape == (2 * processes, 2) and parts.shape == (2, processes, 2)
        assert torch.equal(parts.flatten(0, 1), whole)


def test_a_pass_reads_every_row_once() -> None:
    found = plan(rows=24, batch=2, accumulate=3)
    seen = torch.cat([found.rows_of(step, 0).flatten() for step in range(4)])
    assert sorted(seen.tolist()) == list(range(24))
    again = torch.cat([found.rows_of(step, 0).flatten() for step in range(4, 8)])
    assert sorted(again.tolist()) == list(range(24)) and not torch.equal(seen, again)


def test_the_order_is_the_seeds() -> None:
    assert torch.equal(plan(seed=1).rows_of(3, 0), plan(seed=1).rows_of(3, 0))
    assert not torch.equal(plan(seed=1).rows_of(3, 0), plan(seed=2).rows_of(3, 0))


def test_a_step_may_be_larger_than_the_text() -> None:
    found = plan(rows=3, batch=4, accumulate=2, steps=1).rows_of(0, 0)
    assert found.shape == (2, 4) and found.dtype == torch.int64
    assert torch.bincount(found.flatten(), minlength=3).min() >= 2
