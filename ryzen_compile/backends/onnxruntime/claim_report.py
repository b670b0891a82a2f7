"""What is claimed for our own operators, as data: the kinds of nodes, the operators, and what became of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NATIVE = "ryzen"  # the domain of our operators
OPERATORS = frozenset(
    (
        *("MatMulNBits", "GroupQueryAttention", "SkipRMSNorm", "SkipLayerNorm", "CodebookEmbedding", "MatMulTernary"),
        "SparseMatMulNBits",
    )
)
KINDS = frozenset(("matmul", "attention", "norm", "embedding", "sparse"))
_KIND_OF_OURS = {
    "CodebookEmbedding": "embedding",
    "MatMulNBits": "matmul",
    "MatMulTernary": "matmul",
    "SparseMatMulNBits": "sparse",
    "GroupQueryAttention": "attention",
    "SkipRMSNorm": "norm",
    "SkipLayerNorm": "norm",
}


@dataclass(frozen=True)
class ClaimReport:
    """What runs on our operators: ``claimed`` counts them by name, ``fused`` what they do beside the node they replace.
    ``left`` has the nodes of the same kinds that stay, each with the reason. ``reason`` says why nothing was tried.

    ``rows_alike`` is true when no step computes a row in another way because of the rows beside it."""

    claimed: Mapping[str, int] = field(default_factory=dict)
    left: tuple[tuple[str, str], ...] = ()
    fused: Mapping[str, int] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()  # kinds that occur, and of which nothing was left
    rows_alike: bool = False
    reason: str = ""

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of which at least one node was claimed."""
        return frozenset(_KIND_OF_OURS[name] for name in self.claimed)

    def to_text(self) -> str:
        """A line of what is claimed, and one for each reason to leave nodes."""
        if self.reason:
            return f"none: {self.reason}"
        parts = [f"{count} {name}" for name, count in self.claimed.items()]
        parts += [f"{count} {name} fused" for name, count in self.fused.items()]
        reasons: dict[str, list[str]] = {}
        for node, reason in self.left:
            reasons.setdefault(reason, []).append(node)
        lines = [f"{len(nodes)} left ({nodes[0]}{' ...' * (len(nodes) > 1)}): {why}" for why, nodes in reasons.items()]
        return "\n".join([", ".join(parts) or "none", *lines])

    def to_json(self) -> dict[str, Any]:
        return {
            "claimed": dict(self.claimed),
            "fused": dict(self.fused),
            "left": [{"node": node, "reason": reason} for node, reason in self.left],
            "reason": self.reason,
        }
