"""The components that a configuration asks for, in the order in which they are attached."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ryzen_compile.train.component import Component
from ryzen_compile.train.config import PassSettings
from ryzen_compile.train.distill import DistillComponent
from ryzen_compile.train.dkm_table import DkmComponent
from ryzen_compile.train.fake_quant import QatComponent
from ryzen_compile.train.lora import LoraComponent
from ryzen_compile.train.matryoshka import MatryoshkaComponent
from ryzen_compile.train.model import load_teacher
from ryzen_compile.train.objective import Objective
from ryzen_compile.train.ternary import TernaryComponent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_components(
    settings: PassSettings, objective: Objective, tokenizer: PreTrainedTokenizerBase
) -> list[Component]:
    """Attached to nothing yet. Raises what loading a teacher raises, and ``ConfigError`` for depths that do not fit."""
    found: list[Component] = []
    if settings.distill is not None:
        teacher = load_teacher(settings.distill.teacher, tokenizer)
        found.append(DistillComponent(objective, teacher, settings.distill))
    if settings.matryoshka is not None:
        found.append(MatryoshkaComponent(objective, settings.matryoshka))
    if settings.lora is not None:
        found.append(LoraComponent(settings.lora))
    if settings.dkm is not None:
        found.append(DkmComponent(settings.dkm))
    if settings.qat is not None:
        found.append(QatComponent(settings.qat))
    if settings.ternary is not None:
        found.append(TernaryComponent(settings.ternary))
    return found
