"""What a tuning run found out about an artifact on one machine: the record that the manifest keeps.

A manifest comes with the artifact, from anywhere, so a record read from one is checked as any other untrusted input.
How the figures are measured is ``tune``'s business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, overload

from ryzen_compile.backends.onnxruntime.candidates import Candidate, NativeCandidate
from ryzen_compile.backends.onnxruntime.claim_report import KINDS
from ryzen_compile.errors import ArtifactError
from ryzen_compile.manifest import shown
from ryzen_compile.runtime.speculative.exit_choice import ExitChoice

LONGEST_STEP = 64  # new tokens of a step that a cost curve may hold
MOST_SECONDS = 1e5
MOST_TOKENS = 1 << 24
MOST_CANDIDATES = 1_000
MOST_VISITS = 1_000
MOST_THREADS_PER_CORE = 8
MOST_CURVES = 8
MOST_LAYERS = 10_000
MOST_GAIN = 100
UNSTEADY = 1.5
_KEY = re.compile(r"[A-Za-z0-9_.+]{1,60}-(?P<cores>[1-9][0-9]{0,3})c(-[0-9.]{1,10}M)?")
_VERSION = re.compile(r"[A-Za-z0-9._+!-]{1,60}")
Value = TypeVar("Value")


@dataclass(frozen=True)
class NativeTuning:
    """Which kinds of native operators are worth it, and by how much."""

    kinds: frozenset[str]
    reason: str
    candidates: tuple[NativeCandidate, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "kinds": sorted(self.kinds),
            "reason": self.reason,
            "candidates": [{"kinds": sorted(c.kinds), "visits": list(c.visits)} for c in self.candidates],
        }


@dataclass(frozen=True)
class Tuning:
    """``curves`` has the seconds of one step of M new tokens with the logits of all, by M, behind each of some
    contexts, of which ``context`` is the longest; ``prefill`` those of a prompt of some tokens in an empty cache:
    medians, all with the chosen ``threads``, ``spinning`` and operators. ``native`` and ``exit``, the early exit to
    expect most of, are None where there were none to try."""

    key: str
    threads: int
    spinning: bool
    reason: str
    context: int
    curves: dict[int, dict[int, float]]
    prefill: dict[int, float]
    candidates: tuple[Candidate, ...]
    versions: dict[str, str]
    native: NativeTuning | None = None
    exit: ExitChoice | None = None

    @property
    def steady(self) -> bool:
        """False when a step took ``UNSTEADY`` times as long as one of more tokens: something else was running."""
        lines = [[curve[m] for m in sorted(curve)] for curve in self.curves.values()]
        return all(cost <= UNSTEADY * min(costs[i:]) for costs in lines for i, cost in enumerate(costs))

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` reads; the key is not in it, it is what the record is found by."""
        return {
            "threads": self.threads,
            "spinning": self.spinning,
            "reason": self.reason,
            "context": self.context,
            "curves": {str(context): _with_text_keys(curve) for context, curve in self.curves.items()},
            "prefill": _with_text_keys(self.prefill),
            "candidates": [
                {"threads": c.threads, "spinning": c.spinning, "visits": list(c.visits)} for c in self.candidates
            ],
            "versions": dict(self.versions),
            **({} if self.native is None else {"native": self.native.to_json()}),
            **({} if self.exit is None else {"exit": asdict(self.exit)}),
        }

    @classmethod
    def from_json(cls, key: str, record: object) -> Tuning:
        """The record kept under ``key``; every number finite, positive and within bounds.

        Raises ``ArtifactError`` that names the field. A record cannot ask for more than ``MOST_THREADS_PER_CORE``
        threads on each of the cores in its key.
        """
        found = _KEY.fullmatch(key)
        if found is None:
            raise _refused(key, "its name is not of the form zen4-2c-32M")
        fields = _Fields(key, record)
        most = MOST_THREADS_PER_CORE * int(found["cores"])
        tuning = cls(
            key=key,
            threads=fields.read("threads", lambda value: _count(value, 1, most)),
            spinning=fields.read("spinning", _flag),
            reason=fields.read("reason", _text),
            context=fields.read("context", lambda value: _count(value, 0, MOST_TOKENS)),
            curves=fields.read("curves", _curves),
            prefill=fields.read("prefill", lambda value: _seconds_by_count(value, MOST_TOKENS)),
            candidates=fields.read("candidates", lambda value: _candidates(value, most)),
            versions=fields.read("versions", _versions),
            native=fields.read("native", _native, optional=True),
            exit=fields.read("exit", _exit, optional=True),
        )
        fields.require_end()
        if max(tuning.curves) != tuning.context:
            raise _refused(key, f"curves end behind {max(tuning.curves)} tokens, its context is {tuning.context}")
        return tuning


class _Fields:
    """The fields of a record, taken one by one; what is missing, wrong or left over is refused by name."""

    def __init__(self, key: str, record: object) -> None:
        if not isinstance(record, Mapping):
            raise _refused(key, f"it is a {type(record).__name__}, expected an object")
        self._key = key
        self._left = dict(record)

    @overload
    def read(self, name: str, check: Callable[[object], Value]) -> Value: ...

    @overload
    def read(self, name: str, check: Callable[[object], Value], *, optional: bool) -> Value | None: ...

    def read(self, name: str, check: Callable[[object], Value], *, optional: bool = False) -> Value | None:
        if name not in self._left and optional:
            return None
        if name not in self._left:
            raise _refused(self._key, f"{name} is missing")
        try:
            return check(self._left.pop(name))
        except ValueError as error:
            raise _refused(self._key, f"{name} {error}") from error

    def require_end(self) -> None:
        if self._left:
            raise _refused(self._key, f"{shown(next(iter(self._left)))} is not a field of it")


def _refused(key: str, why: str) -> ArtifactError:
    return ArtifactError(f"the tuning record {shown(key)}: {why}", hint="run ryzen-compile tune again")


def _count(value: object, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"must be a whole number from {least} to {most}, got {shown(value)}")
    return value


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MOST_SECONDS:
        raise ValueError(f"must be seconds above 0 and up to {MOST_SECONDS:g}, got {shown(value)}")
    return float(value)


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, got {shown(value)}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > 1_000:
        raise ValueError(f"must be a text of at most 1000 characters, got {shown(value)}")
    return value


def _curves(value: object) -> dict[int, dict[int, float]]:
    """``{"512": {"1": 0.02}}`` -> ``{512: {1: 0.02}}``; every curve has a figure for a lone token."""
    return _by_count(value, "curves", MOST_CURVES, 0, MOST_TOKENS, _curve)


def _curve(value: object) -> dict[int, float]:
    curve = _seconds_by_count(value, LONGEST_STEP)
    if 1 not in curve:
        raise ValueError("has no figure for 1 token")
    return curve


def _seconds_by_count(value: object, most: int) -> dict[int, float]:
    """``{"1": 0.02}`` -> ``{1: 0.02}``."""
    return _by_count(value, "figures", LONGEST_STEP, 1, most, _seconds)


def _by_count(
    value: object, what: str, longest: int, least: int, most: int, check: Callable[[object], Value]
) -> dict[int, Value]:
    """An object of at most ``longest`` entries by numbers of tokens from ``least`` to ``most``, in their order."""
    if not isinstance(value, Mapping) or not value or len(value) > longest:
        raise ValueError(f"must be an object of 1 to {longest} {what}, got {shown(value)}")
    result: dict[int, Value] = {}
    for name, entry in value.items():
        if not isinstance(name, str) or not re.fullmatch(r"0|[1-9][0-9]{0,8}", name):
            raise ValueError(f"has {shown(name)} for a number of tokens")
        result[_count(int(name), least, most)] = check(entry)
    return dict(sorted(result.items()))


def _candidates(value: object, most_threads: int) -> tuple[Candidate, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_CANDIDATES:
        raise ValueError(f"must be a list of 1 to {MOST_CANDIDATES}, got {shown(value)}")
    return tuple(_candidate(entry, most_threads) for entry in value)


def _candidate(entry: object, most_threads: int) -> Candidate:
    if not isinstance(entry, Mapping) or set(entry) != {"threads", "spinning", "visits"}:
        raise ValueError(f"must have threads, spinning and visits each, got {shown(entry)}")
    threads = _count(entry["threads"], 1, most_threads)
    return Candidate(threads, _flag(entry["spinning"]), _visits(entry["visits"]))


def _visits(visits: object) -> tuple[float, ...]:
    if not isinstance(visits, list) or not 1 <= len(visits) <= MOST_VISITS:
        raise ValueError(f"must have 1 to {MOST_VISITS} visits each, got {shown(visits)}")
    return tuple(_seconds(seconds) for seconds in visits)


def _native(value: object) -> NativeTuning:
    if not isinstance(value, Mapping) or set(value) != {"kinds", "reason", "candidates"}:
        raise ValueError(f"must have kinds, reason and candidates, got {shown(value)}")
    entries = value["candidates"]
    if not isinstance(entries, list) or not 1 <= len(entries) <= 2 ** len(KINDS):
        raise ValueError(f"must have 1 to {2 ** len(KINDS)} candidates, got {shown(entries)}")
    for entry in entries:
        if not isinstance(entry, Mapping) or set(entry) != {"kinds", "visits"}:
            raise ValueError(f"must have kinds and visits for each candidate, got {shown(entry)}")
    candidates = tuple(NativeCandidate(_kinds(entry["kinds"]), _visits(entry["visits"])) for entry in entries)
    return NativeTuning(_kinds(value["kinds"]), _text(value["reason"]), candidates)


def _exit(value: object) -> ExitChoice:
    if not isinstance(value, Mapping) or set(value) != {"layers", "agreement", "seconds", "gain"}:
        raise ValueError(f"must have layers, agreement, seconds and gain, got {shown(value)}")
    return ExitChoice(
        _count(value["layers"], 1, MOST_LAYERS),
        _number(value["agreement"], 1),
        _seconds(value["seconds"]),
        _number(value["gain"], MOST_GAIN),
    )


def _number(value: object, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise ValueError(f"must be numbers from 0 to {most:g}, got {shown(value)}")
    return float(value)


def _kinds(value: object) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(kind, str) and kind in KINDS for kind in value):
        raise ValueError(f"must name kinds of native operators, {', '.join(sorted(KINDS))}, got {shown(value)}")
    return frozenset(value)


def _versions(value: object) -> dict[str, str]:
    if not isinstance(value, Mapping) or len(value) > 20:
        raise ValueError(f"must be an object of at most 20 versions, got {shown(value)}")
    for name, version in value.items():
        if not all(isinstance(text, str) and _VERSION.fullmatch(text) for text in (name, version)):
            raise ValueError(f"has the version {shown(version)} of {shown(name)}")
    return dict(value)


def _with_text_keys(figures: Mapping[int, float]) -> dict[str, float]:
    return {str(count): seconds for count, seconds in figures.items()}
