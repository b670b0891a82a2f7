"""When steps are captured, kept and given up; capturing itself needs a GPU and is tested with the engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ryzen_compile.backends.triton import graphs
from ryzen_compile.backends.triton.graphs import StepGraphs


class Recorded:
    """Stands in for a captured graph: it says what was captured and replayed."""

    made: list[str]

    def __init__(self, inputs: list[Tensor], step: object, pool: object) -> None:
        Recorded.made.append("capture")
        self.graph = SimpleNamespace(pool=lambda: "pool")
        self._step = step

    def replay(self, inputs: list[Tensor]) -> Tensor:
        Recorded.made.append("replay")
        return self._step(*inputs)


@pytest.fixture
def made(monkeypatch) -> list[str]:
    Recorded.made = []
    monkeypatch.setattr(graphs, "_Captured", Recorded)
    return Recorded.made


def double(x: Tensor) -> Tensor:
    return 2 * x


def test_the_second_step_of_a_kind_is_captured(made):
    steps = StepGraphs()
    for number in range(3):
        assert steps.run(("a",), [torch.tensor(number)], double) == 2 * number
    assert made == ["capture", "replay", "replay"]
    steps.run(("b",), [torch.tensor(1)], double)
    assert made == ["capture", "replay", "replay"], "another kind starts anew"
    steps.clear()
    steps.run(("a",), [torch.tensor(1)], double)
    assert len(made) == 3


def test_the_least_recently_used_goes(made, monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 2)
    steps = StepGraphs()
    for key in ("a", "a", "b", "a", "c"):  # b goes
        steps.run((key,), [torch.tensor(1)], double)
    assert [key for (key,) in steps._known] == ["a", "c"]
    made.clear()
    steps.run(("a",), [torch.tensor(1)], double)
    assert made == ["replay"]


def test_what_cannot_be_captured_runs_plainly_and_says_so_once(monkeypatch):
    def failing(*arguments: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "_Captured", failing)
    steps = StepGraphs()
    assert steps.run(("a",), [torch.tensor(1)], double) == 2
    with pytest.warns(UserWarning, match="cannot be captured: operation not permitted when stream is capturing$"):
        assert steps.run(("a",), [torch.tensor(1)], double) == 2
    for key in ("a", "b", "b"):
        assert steps.run((key,), [torch.tensor(1)], double) == 2
