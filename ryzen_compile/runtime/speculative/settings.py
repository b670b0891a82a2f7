"""What a caller says of speculation: our own ``Speculation``, or transformers' names for parts of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ryzen_compile.errors import PromptError
from ryzen_compile.runtime.speculative.suffix import Corpus

Name = Literal["lookup", "suffix", "early_exit", "draft_model"]
NAMES: tuple[Name, ...] = ("lookup", "suffix", "early_exit", "draft_model")  # the cheapest first
MOST_TOKENS = 64
DEFAULT_TOKENS = 16
TRANSFORMERS_NAMES = (
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_model", "assistant_early_exit"),
    *("num_assistant_tokens", "assistant_confidence_threshold"),
)


@dataclass(frozen=True)
class Speculation:
    """How ``generate`` drafts tokens that one step of the model then verifies.

    ``drafters`` None takes what costs nothing (``"lookup"``: the text's own repetitions; with a ``corpus``,
    ``"suffix"``: the longest match in text and corpus) and what was given or found to pay: a draft model, and
    ``"early_exit"`` where ``tune`` measured a gain. A draft has at most ``tokens`` tokens; how many are drafted, and
    whether any, follows from the measured cost of a step and from how many were accepted lately, unless ``fixed``.
    ``exit_layers`` are the layers of an early exit. A drafting model stops behind a token less probable to it than
    ``threshold``. ``ngram`` is the longest match that a lookup starts from. ``required`` refuses a generation that
    cannot be drafted for (several sequences, an engine that cannot verify) instead of stepping it plainly.
    """

    drafters: tuple[Name, ...] | None = None
    tokens: int = DEFAULT_TOKENS
    fixed: bool = False
    corpus: Corpus | None = None
    exit_layers: int | None = None
    threshold: float = 0.4
    ngram: int = 3
    required: bool = True

    def __post_init__(self) -> None:
        unknown = [name for name in self.drafters or () if name not in NAMES]
        if unknown or self.drafters == ():
            raise PromptError(f"drafters are {', '.join(NAMES)}, got {self.drafters!r}")
        _integer("tokens of a draft", self.tokens, 1, MOST_TOKENS)
        _integer("ngram", self.ngram, 1, 16)
        if self.exit_layers is not None:
            _integer("exit_layers", self.exit_layers, 1, 1 << 16)
        is_number = isinstance(self.threshold, int | float) and not isinstance(self.threshold, bool)
        if not is_number or not 0 <= self.threshold <= 1:
            raise PromptError(f"threshold must be a probability from 0 to 1, got {self.threshold!r}")
        if self.corpus is not None and not isinstance(self.corpus, Corpus):
            raise PromptError(f"corpus must be a Corpus, got {type(self.corpus).__name__}")

    def wants(self, name: Name, *, unasked: bool) -> bool:
        """Whether the drafter ``name`` is to be used; ``unasked`` is what nobody's saying so means."""
        return unasked if self.drafters is None else name in self.drafters


def read_speculation(
    speculation: object, arguments: Mapping[str, Any], config: Mapping[str, Any]
) -> Speculation | None:
    """What ``speculation`` (None, a bool, "auto" or a ``Speculation``) and transformers' names among ``arguments``
    come to; None where no drafts are asked for.

    A name of transformers chooses its drafter; beside ``speculation`` it adjusts what that says. A generation
    ``config`` is read where neither says anything. Raises ``PromptError`` for values that mean nothing, and for
    arguments that nothing would read.
    """
    given = {name: arguments[name] for name in TRANSFORMERS_NAMES if arguments.get(name) is not None}
    if isinstance(speculation, Speculation):
        unread = [name for name in given if speculation.drafters is not None and not _readers(name, speculation)]
        if unread:
            raise PromptError(
                f"{unread[0]} is read by none of the drafters {', '.join(speculation.drafters or ())}",
                hint="leave it out, or let the drafters choose themselves (drafters=None)",
            )
        return _adjusted(speculation, given)
    said = {name: config[name] for name in TRANSFORMERS_NAMES if config.get(name) is not None} | given
    if speculation is True or speculation == "auto":
        return _adjusted(Speculation(required=False), said)
    if speculation is not None and speculation is not False:
        raise PromptError(f"speculation must be None, True, False, 'auto' or a Speculation, got {speculation!r}")
    chosen = () if speculation is False else _drafter_names(said)
    if chosen:
        if "prompt_lookup_num_tokens" in said and "num_assistant_tokens" not in given:
            said["num_assistant_tokens"] = said["prompt_lookup_num_tokens"]  # configs have the other for no reason
        return _adjusted(Speculation(drafters=chosen), said)
    if given:
        raise PromptError(
            f"{next(iter(given))} belongs to speculation, which nothing asks for",
            hint="give speculation='auto', assistant_model or prompt_lookup_num_tokens as well",
        )
    return None


def _adjusted(settings: Speculation, said: Mapping[str, Any]) -> Speculation:
    """``settings`` with the numbers that transformers' names give."""
    fields = {
        "tokens": said.get("num_assistant_tokens", said.get("prompt_lookup_num_tokens")),
        "exit_layers": said.get("assistant_early_exit"),
        "threshold": said.get("assistant_confidence_threshold"),
        "ngram": said.get("max_matching_ngram_size"),
    }
    return replace(settings, **{name: value for name, value in fields.items() if value is not None})


def _readers(name: str, speculation: Speculation) -> set[Name]:
    """Of the drafters asked for, those that transformers' ``name`` means something to."""
    every: set[Name] = set(speculation.drafters or ())
    of: dict[str, set[Name]] = {
        "prompt_lookup_num_tokens": {"lookup"},
        "max_matching_ngram_size": {"lookup"},
        "assistant_early_exit": {"early_exit"},
        "assistant_model": {"draft_model"},
        "assistant_confidence_threshold": {"early_exit", "draft_model"},
    }
    return every & of.get(name, every)


def _drafter_names(given: Mapping[str, Any]) -> tuple[Name, ...]:
    """The drafters that transformers' names call for."""
    of: dict[str, Name] = {
        "prompt_lookup_num_tokens": "lookup",
        "assistant_early_exit": "early_exit",
        "assistant_model": "draft_model",
    }
    return tuple(name for argument, name in of.items() if argument in given)


def _integer(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise PromptError(f"{name} must be an integer from {least} to {most}, got {value!r}")
