"""What speculation did: how much was drafted and kept, by whom, what it took, and what it would have taken without."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from typing import Any

BAR = 40  # characters of the longest bar
_TIMES = ("draft_seconds", "verify_seconds", "step_seconds", "plain_seconds")


@dataclass
class DrafterStats:
    """Of one drafter. ``asked`` counts calls, ``drafts`` those of its drafts that were verified."""

    asked: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0

    @property
    def acceptance_rate(self) -> float:
        """The share of its tokens that were accepted; 0 before the first."""
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass
class SpeculationStats:
    """Of one generation, or of all that were added up.

    ``steps`` of the target gave ``tokens`` tokens behind the first; ``drafts`` of the steps verified a draft. Times are
    wall seconds: ``draft_seconds`` of all drafters, ``verify_seconds`` of the steps with a draft, ``step_seconds`` of
    all, ``plain_seconds`` what as many tokens are estimated to take in steps without drafts. ``lengths`` counts drafts
    by the number of tokens that were accepted. ``dropped`` has, by name, why a drafter was not asked any more, and
    ``idle`` why nothing was drafted at all.
    """

    tokens: int = 0
    steps: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    step_seconds: float = 0.0
    plain_seconds: float = 0.0
    lengths: Counter[int] = field(default_factory=Counter)
    drafters: dict[str, DrafterStats] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    idle: str = ""

    @property
    def acceptance_rate(self) -> float:
        """The share of drafted tokens that were accepted; 0 before the first."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def mean_accepted(self) -> float:
        """Tokens accepted of a draft; 0 before the first."""
        return self.accepted / self.drafts if self.drafts else 0.0

    @property
    def steps_saved(self) -> int:
        """Steps that as many tokens would have taken more without drafts."""
        return self.tokens - self.steps

    @property
    def speed_up(self) -> float:
        """The estimate without drafts over what drafting and stepping took; 1 before the first step."""
        took = self.draft_seconds + self.step_seconds
        return self.plain_seconds / took if took and self.plain_seconds else 1.0

    def of(self, name: str) -> DrafterStats:
        return self.drafters.setdefault(name, DrafterStats())

    def add(self, other: SpeculationStats) -> None:
        """Count ``other``, too."""
        for name in ("tokens", "steps", "drafts", "drafted", "accepted", *_TIMES):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.lengths.update(other.lengths)
        for name, theirs in other.drafters.items():
            own = self.of(name)
            for counted in fields(theirs):
                setattr(own, counted.name, getattr(own, counted.name) + getattr(theirs, counted.name))
        self.dropped |= other.dropped
        self.idle = "" if self.drafts else other.idle

    def to_json(self) -> dict[str, Any]:
        counts = ("tokens", "steps", "steps_saved", "drafts", "drafted", "accepted")
        figures = ("acceptance_rate", "mean_accepted", "speed_up", *_TIMES)
        return {
            **{name: getattr(self, name) for name in (*counts, *figures)},
            "accepted_per_draft": {str(length): self.lengths[length] for length in sorted(self.lengths)},
            "drafters": {
                name: asdict(drafter) | {"acceptance_rate": drafter.acceptance_rate}
                for name, drafter in self.drafters.items()
            },
            "dropped": dict(self.dropped),
            "idle": self.idle,
        }

    def to_text(self) -> str:
        """A few lines for people: what it came to, each drafter, and how many tokens of a draft were accepted."""
        if self.idle and not self.drafts:
            return f"speculation: nothing drafted: {self.idle}"
        lines = [
            f"speculation: {self.tokens} tokens in {self.steps} steps, {self.speed_up:.2f} x the estimate without",
            *(
                f"  {name}: {d.drafts} drafts, {d.accepted} of {d.drafted} tokens accepted "
                f"({100 * d.acceptance_rate:.0f} %), {1e3 * d.seconds:.1f} ms"
                for name, d in self.drafters.items()
            ),
            *(f"  {name} was dropped: {reason}" for name, reason in self.dropped.items()),
        ]
        if self.lengths:
            lines.append("  accepted of a draft:")
            most = max(self.lengths.values())
            for length in range(max(self.lengths) + 1):
                count = self.lengths[length]
                lines.append(f"  {length:>4} {'#' * -(-BAR * count // most)} {count}".rstrip())
        return "\n".join(lines)
