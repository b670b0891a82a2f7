"""What a backend promises: a name, the operators it takes, an honest answer whether it can run here, and an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ryzen_compile.runtime.engine import EncoderEngine, Engine

if TYPE_CHECKING:  # a Program needs torch, which opening an artifact does not
    from ryzen_compile.program import Program


@dataclass(frozen=True)
class Capability:
    """``reason`` says what was found (a version, or what is missing); ``hint`` what to do about a lack, else empty."""

    available: bool
    reason: str
    hint: str = ""


class Backend(Protocol):
    """``supported_ops`` names operators of the dialect as ``ryzen::rms_norm``; core ATen is taken for granted.

    ``cache_formats`` are the names of ``KVCacheConfig`` that it can keep, None for all. ``evicts`` says whether its
    engines drop by themselves what lies behind a layer's window; else such layers keep every token.
    """

    name: str
    supported_ops: frozenset[str]
    cache_formats: frozenset[str] | None
    evicts: bool

    def probe(self) -> Capability:
        """Whether this backend can run on this machine; imports its libraries, raises nothing."""
        ...

    def compile(self, program: Program) -> Engine | EncoderEngine:
        """An engine that runs ``program``: an ``EncoderEngine`` where ``program.spec.pooling`` says that it is an
        encoder, else an ``Engine`` over its cache slots, which are filled in.

        Raises ``UsageError`` for a decoder without a cache and ``UnsupportedError``, by node and module path, for an
        operator that it cannot carry.
        """
        ...
