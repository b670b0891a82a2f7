"""Learning from a teacher's predictions (Hinton et al., 2015), and drafting for it afterwards.

A small model that guesses what a large one would have said can draft for it: of k tokens drafted, each is accepted with
probability a if those before it were, and a step of the large model then gives (1 - a^(k + 1)) / (1 - a) tokens in the
time of 1 + c k steps, c being what a step of the small one costs (Leviathan et al., 2023; verifying k + 1 tokens is
taken to cost what one does). a is measured where validation is: how often both have the same first guess, on the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ryzen_compile.errors import ConfigError, ModelError, UsageError
from ryzen_compile.runtime.speculative.length import StepCost, best_length
from ryzen_compile.train.component import ComponentFacts
from ryzen_compile.train.config import DistillSettings
from ryzen_compile.train.objective import Levers, Objective, Teacher

MOST_DRAFTED = 16
UNMEASURED_LENGTH = 5  # drafted until the acceptance is known
_FLAT = {0: {1: 1.0, 2: 1.0}}  # seconds of a step of 1, 2, ... tokens behind any context


class DistillComponent:
    """While it is on, ``objective`` has ``teacher_model``, a transformers causal LM, for its teacher.

    The teacher is frozen and follows the model to its device; it is no part of checkpoints. What is validated is the
    text's loss all the same, so this component has no share in a validation loss at the moment it is measured.
    """

    name = "distill"
    optional = True

    def __init__(self, objective: Objective, teacher_model: nn.Module, settings: DistillSettings) -> None:
        self.settings = settings
        self.start = settings.start
        self.active = False
        self.acceptance: float | None = None
        self._objective = objective
        self._teacher: Any = teacher_model
        self._cost = settings.draft_cost or 1.0

    def prepare(self, model: nn.Module) -> list[nn.Parameter]:
        """Raises ``ConfigError`` for a teacher of another vocabulary, and for one whose logits are more than its head's
        product where the loss is to do without them."""
        self._teacher.requires_grad_(False).eval()
        theirs, ours = (_vocabulary(part) for part in (self._teacher, model))
        if theirs != ours:
            raise ConfigError(
                f"distill: the teacher predicts {theirs} tokens, the model {ours}",
                hint="train the model with the teacher's tokenizer",
            )
        rows = torch.arange(min(ours, 9), device=next(self._teacher.parameters()).device)[None]
        if self._objective.levers.linear_cross_entropy and not Objective(self._teacher, Levers()).logits_are_a_product(
            rows
        ):
            raise ConfigError(
                f"distill: logits of the teacher, {type(self._teacher).__name__}, are more than its head's product",
                hint="set precision.linear_cross_entropy=false",
            )
        if self.settings.draft_cost is None:
            self._cost = _parameters(model) / _parameters(self._teacher)
        return []

    def activate(self) -> None:
        self._switch(active=True)

    def deactivate(self) -> None:
        self._switch(active=False)

    def advance(self, progress: float) -> None:
        """There is nothing to anneal."""

    def tighten(self) -> bool:
        return False

    def relax(self) -> bool:
        return False

    def observe(self, agreement: float) -> None:
        """``agreement``: share of validation tokens for which both have the same first guess.

        Raises ``UsageError`` for what is no share.
        """
        if not 0 <= agreement <= 1:
            raise UsageError(f"distill: agreement {agreement}, expected a share from 0 to 1")
        self.acceptance = agreement

    def draft_length(self) -> int:
        """How many tokens to draft, 1 to ``MOST_DRAFTED``; ``UNMEASURED_LENGTH`` before anything was observed."""
        return self._best()[0]

    def facts(self) -> ComponentFacts:
        """``speedup`` is what drafts promise: the teacher's tokens per second with drafts over those without."""
        length, speedup = self._best()
        return ComponentFacts(
            settings={
                "weight": self.settings.weight,
                "temperature": self.settings.temperature,
                "acceptance": self.acceptance,
                "draft_cost": self._cost,
                "draft_length": length,
                "speedup": speedup,
            }
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"active": self.active, "acceptance": self.acceptance}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:  # noqa: ARG002 - the protocol's
        """Raises ``ModelError`` for values that ``state`` does not give."""
        if not isinstance(values.get("active"), bool) or "acceptance" not in values:
            raise ModelError(f"distill: the checkpoint's state is {dict(values)}, expected active and acceptance")
        self.acceptance = values["acceptance"]
        self._switch(active=values["active"])

    def detach(self, model: nn.Module) -> None:
        """Nothing is attached to the model."""
        if model is self._objective.model:
            self.deactivate()

    def recipe_changes(self) -> Mapping[str, Any]:
        return {}

    def _switch(self, *, active: bool) -> None:
        self.active = active
        self._teacher.to(next(self._objective.parameters()).device)  # which moved after it was prepared
        teacher = Teacher(self._teacher, self.settings.weight, self.settings.temperature) if active else None
        self._objective.teacher = teacher

    def _best(self) -> tuple[int, float | None]:
        if self.acceptance is None:
            return UNMEASURED_LENGTH, None
        return best_length(self.acceptance, MOST_DRAFTED, StepCost(_FLAT), 0, draft_seconds=self._cost)


def _vocabulary(model: Any) -> int:
    """Tokens that a causal LM predicts."""
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise ConfigError(f"distill: {type(model).__name__} has no output head", hint="expected a causal LM")
    return int(head.weight.shape[0])


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
