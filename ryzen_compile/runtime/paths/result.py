"""What comes back: every path with what it cost and why it ended, the winner, the votes, and the sums."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ryzen_compile.runtime.paths.verdict import Verdict
from ryzen_compile.runtime.paths.votes import Vote

# By an EOS token, a stop string or criterion, its limit of tokens; worse than its siblings at a boundary; not needed
# any more; out of tokens or time.
Ended = Literal["eos", "stop", "length", "pruned", "cancelled", "budget"]
COMPLETE = ("eos", "stop", "length")


@dataclass(frozen=True)
class Cost:
    """``tokens`` that the path sampled itself, and its share of the ``seconds`` of the steps that it took part in."""

    tokens: int
    seconds: float


@dataclass(frozen=True)
class Path:
    """One path. ``tokens`` and ``text`` follow the prompt, those of the path that it was forked from included.

    ``index`` counts paths as they were started, ``seed`` is ``path_seed`` of it. A forked path has a ``parent`` and
    shares its first ``branched_at`` tokens; ``depth`` is the number of boundaries that it passed.
    ``log_probability`` is the mean of its tokens' under the model itself, in nats, whatever they were sampled with.
    ``verdict`` is None where there is no verifier or it was not asked, or not waited for. ``answer`` is what it votes
    for; only ``counted`` paths did.
    """

    index: int
    seed: int
    tokens: tuple[int, ...]
    text: str
    ended: Ended
    log_probability: float
    cost: Cost
    verdict: Verdict | None = None
    answer: Hashable | None = None
    counted: bool = False
    parent: int | None = None
    branched_at: int = 0
    depth: int = 0

    @property
    def score(self) -> float:
        """The verdict's score, or the mean log probability where there is no verdict."""
        return self.log_probability if self.verdict is None else self.verdict.score

    @property
    def rank(self) -> tuple[float, float]:
        """By which paths are compared: the verdict's score, then the mean log probability."""
        return (0.0 if self.verdict is None else self.verdict.score, self.log_probability)


@dataclass(frozen=True)
class Totals:
    """Sums over one prompt: ``paths`` started, ``tokens`` sampled, ``prompt_tokens`` (of which ``reused_tokens`` were
    known), ``steps`` that rows of it took part in, ``seconds`` of those (a share where other prompts' rows did, too),
    of the prefill and of the verifier's calls. Stopping early ``spared`` that many paths of those asked for, and
    ``cancelled`` paths on their way."""

    paths: int
    tokens: int
    prompt_tokens: int
    reused_tokens: int
    steps: int
    seconds: float
    prefill_seconds: float
    verify_seconds: float
    spared: int
    cancelled: int


@dataclass(frozen=True)
class PathsResult:
    """``winner`` is None where no path has anything to win with: none ended in time, or none gave an answer.

    ``votes`` is the table of answers, the most first. ``confidence`` is how sure it is that more paths would not change
    the winner: a majority's posterior (``votes.leader_probability``), 1 for a best path that passed with the whole
    score, None where nothing can be said.
    """

    seed: int
    paths: tuple[Path, ...]
    winner: Path | None
    votes: tuple[Vote, ...]
    confidence: float | None
    totals: Totals

    @property
    def text(self) -> str:
        """The winner's text, empty without one."""
        return "" if self.winner is None else self.winner.text

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "seed": self.seed,
            "winner": None if self.winner is None else self.winner.index,
            "text": self.text,
            "confidence": self.confidence,
            "paths": [{**asdict(path), "tokens": list(path.tokens), "score": path.score} for path in self.paths],
            "votes": [asdict(vote) for vote in self.votes],
            "totals": asdict(self.totals),
        }

    def to_text(self) -> str:
        """A line for each path, the winner marked, and one for the sums."""
        lines = [_line(path, path is self.winner) for path in self.paths]
        sums = self.totals
        saved = f", {sums.spared} paths spared" if sums.spared else ""
        sure = "" if self.confidence is None else f", confidence {self.confidence:.3f}"
        lines.append(f"{sums.paths} paths, {sums.tokens} tokens in {sums.steps} steps{saved}{sure}")
        return "\n".join(lines)


def _line(path: Path, is_winner: bool) -> str:
    origin = "" if path.parent is None else f" from {path.parent} at {path.branched_at}"
    verdict = ""
    if path.verdict is not None:
        said = "passed" if path.verdict.passed else f"failed ({path.verdict.detail})"
        verdict = f", {path.verdict.score:.2f} {said}"
    return (
        f"{'*' if is_winner else ' '} {path.index}{origin}: {len(path.tokens)} tokens, {path.ended}, "
        f"log p {path.log_probability:.3f}{verdict}"
    )


def winner_by_rank(paths: Sequence[Path]) -> Path:
    """The best of some paths, the first started among equals."""
    return max(paths, key=lambda path: (path.rank, -path.index))
