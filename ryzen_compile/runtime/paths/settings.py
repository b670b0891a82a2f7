"""What several paths are asked for: how many, where they may branch, who judges, who wins, and when it is enough."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from ryzen_compile.errors import PromptError
from ryzen_compile.runtime.paths.result import Path
from ryzen_compile.runtime.paths.verdict import Verifier, as_verifier
from ryzen_compile.runtime.sampling import spawn_generators
from ryzen_compile.runtime.stopping import integer

Chooses = Callable[[Sequence[Path]], int]
Answers = Callable[[str], Hashable | None]


def path_seed(seed: int, index: int) -> int:
    """The seed of path ``index`` of a search with ``seed``: 53 bits, which every reader of JSON takes exactly, of what
    NumPy's ``SeedSequence(seed, spawn_key=(index,))`` gives.

    ``generate(prompt, do_sample=True, seed=path_seed(seed, index), ...)`` is that path alone; of a forked one, the
    prompt is followed by the tokens that it has from its parent.
    """
    return int(np.random.SeedSequence(seed, spawn_key=(index,)).generate_state(1, np.uint64)[0]) >> 11


@dataclass(frozen=True)
class Budget:
    """What one prompt may take: new ``tokens`` of all its paths together, ``seconds``, ``samples`` (paths started).

    A path is started only if there are tokens left for all of it, so that tokens cut none short; only where they do
    not suffice for a single path, one gets what there is. Time ends paths wherever they are. ``read_search`` takes a
    mapping with these names as well.
    """

    tokens: int | None = None
    seconds: float | None = None
    samples: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "samples"):
            if getattr(self, name) is not None:
                integer(f"budget.{name}", getattr(self, name), 1)
        given = self.seconds
        if given is not None and not (isinstance(given, int | float) and math.isfinite(given) and given > 0):
            raise PromptError(f"budget.seconds must be a number above 0, got {given!r}")


@dataclass(frozen=True)
class Search:
    """``n`` paths, at most ``rows`` of them stepped together with those of other prompts.

    With a boundary every ``step_tokens`` tokens or behind any of ``step_strings``, up to ``max_depth`` times the worse
    half of the paths at a boundary is pruned and the better half forked. A path's rank there is ``guide``'s score of
    its text so far, ties and all without a guide by mean log probability. ``verifier`` judges whole texts.

    ``vote``: "majority" of ``answer(text)`` (None is no vote; a string is a pattern, whose first group or whole match
    is the answer; default: the stripped text), "best" by rank, or a callable that is given the paths and returns the
    winner's place among them. A path that fails its verifier has no vote unless all do. ``stop``: "never"; "first", at
    the first path that passes; "confident", when a majority's posterior reaches ``confidence`` or the paths that are
    left cannot change it, and a best one has passed with a score of 1. What may stop is started ``wave`` paths at a
    time, the next when the last are judged. Verdicts count in the order in which paths ended, so that a result does not
    depend on how long verifying takes.
    """

    n: int = 3
    max_depth: int = 5
    step_tokens: int | None = None
    step_strings: tuple[str, ...] = ()
    verifier: Verifier | None = None
    guide: Verifier | None = None
    vote: Literal["majority", "best"] | Chooses = "majority"
    answer: Answers = str.strip
    stop: Literal["never", "first", "confident"] = "never"
    confidence: float = 0.95
    wave: int = 4
    rows: int = 16
    budget: Budget = Budget()
    seed: int = 0

    @property
    def branches(self) -> bool:
        """Whether there are boundaries."""
        return self.max_depth > 0 and bool(self.step_tokens or self.step_strings)


def read_search(n: object, given: dict[str, Any]) -> Search:
    """``Search`` from ``generate_paths``'s own arguments; raises ``PromptError`` naming what is out of range."""
    given = {name: value for name, value in given.items() if value is not None}
    for name in ("verifier", "guide"):
        if name in given:
            given[name] = as_verifier(given[name])
    given["step_strings"] = _strings(given.get("step_strings", ()))
    given["budget"] = _budget(given.get("budget", {}))
    answer = given.get("answer")
    if isinstance(answer, str):
        given["answer"] = _pattern(answer)
    search = Search(n=integer("n", n, 1), **given)
    for name in ("wave", "rows"):
        integer(name, getattr(search, name), 1)
    integer("max_depth", search.max_depth, 0)
    if search.step_tokens is not None:
        integer("step_tokens", search.step_tokens, 1)
    spawn_generators(search.seed, 0)  # checks it
    _check_choices(search)
    return search


def _check_choices(search: Search) -> None:
    if search.vote not in ("majority", "best") and not callable(search.vote):
        raise PromptError(f"vote must be 'majority', 'best' or a callable, got {search.vote!r}")
    if not callable(search.answer):
        raise PromptError(f"answer must be a pattern or a callable, got {search.answer!r}")
    if search.stop not in ("never", "first", "confident"):
        raise PromptError(f"stop must be 'never', 'first' or 'confident', got {search.stop!r}")
    if not (isinstance(search.confidence, int | float) and 0 < search.confidence < 1):
        raise PromptError(f"confidence must be a number with 0 < confidence < 1, got {search.confidence!r}")
    if search.stop == "first" and search.verifier is None:
        raise PromptError("stop='first' waits for a path that passes", hint="give a verifier")
    if search.stop == "confident" and search.vote != "majority" and (search.verifier is None or callable(search.vote)):
        raise PromptError(
            "stop='confident' needs a majority, or the best by a verifier: nothing else says how sure it is"
        )
    if search.branches and search.n > search.rows:
        raise PromptError(
            f"{search.n} paths that branch are stepped together, and there are {search.rows} rows",
            hint="give rows=, or fewer paths",
        )


def _strings(given: object) -> tuple[str, ...]:
    several = (given,) if isinstance(given, str) else given
    if not isinstance(several, list | tuple) or not all(isinstance(one, str) and one for one in several):
        raise PromptError(f"step_strings must be a non-empty string or a list of them, got {given!r}")
    return tuple(several)


def _budget(given: object) -> Budget:
    """``given``, or one with the fields of a mapping."""
    if isinstance(given, Budget):
        return given
    names = [field.name for field in fields(Budget)]
    if not isinstance(given, Mapping):
        raise PromptError(f"budget must be a Budget or a mapping with some of {', '.join(names)}, got {given!r}")
    for name in given:
        if name not in names:
            raise PromptError(f"budget has no {name!r}, only {', '.join(names)}")
    return Budget(**given)


def _pattern(pattern: str) -> Answers:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise PromptError(f"answer {pattern!r} is not a regular expression: {error}") from error

    def answer(text: str) -> str | None:
        found = compiled.search(text)
        return None if found is None else str(found[1] if compiled.groups else found[0])

    return answer
