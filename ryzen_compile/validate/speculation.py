"""What speculation gives on text: the same prompts continued plainly and with each kind of drafts, in turns.

Random ids, which ``latency`` feeds, would say nothing here: what is drafted, and how much of it is accepted, depends on
the text. Times are those of a whole generation behind its first token, drafting and bookkeeping included.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ryzen_compile.errors import UsageError
from ryzen_compile.runtime.compiled import CompiledModel
from ryzen_compile.runtime.generate import GenerationStats
from ryzen_compile.runtime.speculative.stats import SpeculationStats
from ryzen_compile.validate.latency import Timing, Workload

PROMPTS = 4
PROMPT_TOKENS = 128


@dataclass(frozen=True)
class Continuation(Workload):
    """The test ``sg128``: 128 tokens generated behind ``depth`` tokens of text and the first one that follows them.

    It is ``tg128`` on text, with sampling and whatever else a generation does; ``sg128 +lookup`` names the ``drafts``.
    """

    drafts: str = ""

    @property
    def name(self) -> str:
        """``sg128``, or ``sg128 +lookup``."""
        return f"sg{self.tokens}" + (f" +{self.drafts}" if self.drafts else "")


@dataclass(frozen=True)
class Continued:
    """One kind of drafts, or none: ``timing`` with a sample for each repeat, the mean of its prompts; ``stats`` of all
    that was timed, and how many ``tokens_per_step`` of the model it gave, 1 without drafts; in how many of the
    ``prompts`` the text was that of plain generation; how many ``times_plain`` its mean rate is."""

    timing: Timing
    stats: SpeculationStats
    tokens_per_step: float
    prompts: int
    same_text: int
    times_plain: float

    @property
    def drafts(self) -> str:
        """The kind; "" for plain generation."""
        workload = self.timing.workload
        return workload.drafts if isinstance(workload, Continuation) else ""

    def record(self) -> dict[str, Any]:
        """What a row of a table says beyond its timing."""
        return {
            "drafts": self.drafts,
            "n_texts": self.prompts,
            "same_text": self.same_text,
            "times_plain": self.times_plain,
            "acceptance": self.stats.acceptance_rate,
            "tokens_per_step": self.tokens_per_step,
        }

    def to_text(self) -> str:
        """One line for people."""
        said = f"{self.timing.workload.name}: {self.times_plain:.2f} x plain"
        if self.stats.idle:
            return f"{said}, nothing drafted: {self.stats.idle}"
        return (
            f"{said}, {100 * self.stats.acceptance_rate:.0f} % of {self.stats.drafted} drafted tokens accepted, "
            f"{self.tokens_per_step:.2f} tokens per step, the same text in {self.same_text} of {self.prompts}"
        )


def spread_prompts(
    text: str, encode: Callable[[str], list[int]], *, count: int = PROMPTS, length: int = PROMPT_TOKENS
) -> np.ndarray:
    """Windows that do not overlap, from the text's first to its last: ``(count, length)`` int64.

    Raises ``UsageError`` for a text that is too short, and for no windows.
    """
    if count < 1 or length < 1:
        raise UsageError(f"prompts need a count and a length of at least 1, got {count} and {length}")
    ids = np.array(encode(text), dtype=np.int64)
    if len(ids) < count * length:
        raise UsageError(
            f"the text has {len(ids)} tokens, {count * length} are needed for {count} prompts of {length}",
            hint="give a longer text",
        )
    starts = np.linspace(0, len(ids) - length, count).astype(np.int64)
    return ids[starts[:, None] + np.arange(length)]


def measure_speculation(
    model: CompiledModel,
    prompts: np.ndarray,
    kinds: Mapping[str, Mapping[str, Any]],
    *,
    new: int,
    repeats: int,
) -> list[Continued]:
    """``prompts`` ``(N, P)`` int64 continued greedily by ``new`` tokens behind the first one, through any EOS.

    That is done plainly, which comes first in the result, and with the arguments that each of ``kinds`` gives
    ``model.generate``. They take turns prompt by prompt, after one generation each that is not counted. Raises
    ``UsageError`` before anything runs where the context is too short or ``repeats`` below 1, and what ``generate``
    raises.
    """
    if repeats < 1:
        raise UsageError(f"repeats must be at least 1, got {repeats}")
    length = prompts.shape[1]
    if length + new + 1 > model.spec.context:
        raise UsageError(
            f"test sg{new} needs {length + new + 1} positions, the model has a context of {model.spec.context}"
        )
    # A generation config may ask for drafts, too: False keeps them out.
    trials = [_Trial(model, kind, given) for kind, given in {"": {"speculation": False}, **kinds}.items()]
    for trial in trials:
        trial.run(prompts[0], new)
    for repeat in range(repeats):
        for trial in trials:
            trial.begin_repeat()
        for number, prompt in enumerate(prompts):
            # Forwards and backwards in turn: no kind always runs in the wake of the same other one.
            for trial in trials if (repeat + number) % 2 == 0 else reversed(trials):
                trial.sample(number, prompt, new)
    return [trial.result(trials[0], Continuation("tg", new, length, trial.kind)) for trial in trials]


@dataclass
class _Trial:
    """One kind while it is measured: seconds by repeat and prompt, the text of each prompt."""

    model: CompiledModel
    kind: str
    given: Mapping[str, Any]
    seconds: list[list[float]] = field(default_factory=list)
    steps: int = 0
    texts: dict[int, list[int]] = field(default_factory=dict)
    stats: SpeculationStats = field(default_factory=SpeculationStats)

    def run(self, prompt: np.ndarray, new: int) -> tuple[list[int], GenerationStats]:
        """The tokens that follow ``prompt`` ``(P,)``."""
        stats = GenerationStats()
        lengths: dict[str, Any] = {"max_new_tokens": new + 1, "eos_token_id": None, "stop_strings": None}
        result = self.model.generate(prompt, do_sample=False, stats=stats, **lengths, **self.given)
        return result[0, len(prompt) :].tolist(), stats

    def begin_repeat(self) -> None:
        self.seconds.append([])

    def sample(self, number: int, prompt: np.ndarray, new: int) -> None:
        self.texts[number], stats = self.run(prompt, new)
        self.seconds[-1].append(stats.decode_seconds)
        self.steps += stats.decode_steps
        if stats.speculation is not None:
            self.stats.add(stats.speculation)

    def timing(self, workload: Workload) -> Timing:
        return Timing(self.model.engine.name, workload, tuple(map(statistics.fmean, self.seconds)))

    def result(self, plain: _Trial, workload: Workload) -> Continued:
        timing, count = self.timing(workload), len(self.texts)
        return Continued(
            timing,
            self.stats,
            tokens_per_step=workload.tokens * count * len(self.seconds) / self.steps,
            prompts=count,
            same_text=sum(self.texts[number] == plain.texts[number] for number in range(count)),
            times_plain=timing.mean / plain.timing(workload).mean,
        )
