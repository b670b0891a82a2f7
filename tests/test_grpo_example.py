"""What examples/grpo.py rewards: what runs and is right, and nothing else. Training itself needs trl."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "grpo.py"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="endings run within POSIX limits")


@pytest.fixture(scope="module")
def grpo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grpo_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("asked", [0, 1])
def test_a_doctest_becomes_asserts_that_only_its_answer_passes(grpo: ModuleType, asked: int) -> None:
    problem = grpo.getter("Point", "x", "y", asked=asked)
    right, wrong = (" self.x", " self.y") if asked == 0 else (" self.y", " self.x")
    assert problem.tests == f"assert repr(Point(3, 7).get_{'xy'[asked]}()) == '{(3, 7)[asked]}'"
    assert grpo.reward(problem.prompt, right) == 1.0
    assert grpo.reward(problem.prompt, wrong) == grpo.PARSES


@pytest.mark.parametrize(
    ("ending", "reward"),
    [
        (" self.y\n\n    def rest(self:", 1.0),  # what follows the line is not asked for
        (" self.y + 0", 1.0),  # another way to be right
        (" (self.y", 0.0),
        ("", 0.1),
        (" __import__('os')._exit(0)", 0.1),
        (" '7'", 0.1),  # text that looks like the number
    ],
)
def test_endings_are_rewarded_for_what_they_do(grpo: ModuleType, ending: str, reward: float) -> None:
    assert grpo.reward(grpo.getter("Point", "x", "y", asked=1).prompt, ending) == reward


def test_rewards_come_in_the_order_of_the_endings(grpo: ModuleType) -> None:
    prompts = [grpo.getter("Node", "left", "right", asked=k).prompt for k in (0, 1, 1)]
    assert grpo.rewards(prompts, [" self.left", " self.left", " )"], trainer_state=None) == [1.0, 0.1, 0.0]


def test_what_is_asked_afterwards_is_in_no_prompt_of_the_training(grpo: ModuleType) -> None:
    trained = {one.prompt for one in grpo.problems(grpo.TRAINED, 200, 0)}
    asked = {one.prompt for one in grpo.problems(grpo.HELD_OUT, 50, 0)}
    assert len(trained) > 100 and len(asked) > 25
    assert not set(grpo.TRAINED) & set(grpo.HELD_OUT) and not trained & asked
    assert grpo.problems(grpo.TRAINED, 5, 3) == grpo.problems(grpo.TRAINED, 5, 3)
