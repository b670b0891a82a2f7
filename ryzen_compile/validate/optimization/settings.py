"""How an optimized model is validated: what is measured, on what, how often, and what has to come out."""

from __future__ import annotations

from pydantic import Field

from ryzen_compile.runtime.speculative.settings import Name
from ryzen_compile.settings import Section
from ryzen_compile.text import BUILTIN
from ryzen_compile.validate.thresholds import Thresholds


class ValidationSettings(Section):
    """Speed: ``rounds`` in which model and artifact take turns, each round ``prompts`` prompts of ``prompt_tokens``
    tokens and ``new_tokens`` behind them; operators behind ``context`` tokens; memory of each in a process of its own,
    unless ``memory`` is off. Quality: ``tokens`` of ``text`` in windows of ``length``; "builtin" is its second half,
    which calibration does not read.

    ``parts`` measures what each part of the work gives alone, which exports the model a few times more. ``drafters``
    None lets the artifact choose who drafts. ``compare`` are recipes to export and to measure beside the artifact's
    own, for the trade of size, speed and quality.
    """

    rounds: int = Field(default=9, ge=1)
    prompts: int = Field(default=2, ge=1)
    prompt_tokens: int = Field(default=128, ge=1)
    new_tokens: int = Field(default=64, ge=2)
    context: int = Field(default=256, ge=1)
    text: str = BUILTIN
    tokens: int = Field(default=16_384, ge=2)
    length: int = Field(default=256, ge=2)
    drafters: tuple[Name, ...] | None = None
    draft: str | None = Field(default=None, description="artifact that drafts as draft_model")
    memory: bool = True
    parts: bool = False
    compare: tuple[str, ...] = ()
    thresholds: Thresholds = Thresholds()
