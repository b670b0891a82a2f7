"""What ran when, as a trace that ui.perfetto.dev and chrome://tracing open: spans, instants and counters on tracks.

The file is JSON in Chrome's trace-event format. Times are whole microseconds of a monotonic clock, counted from when
the timeline was made; start and end are rounded down alike, so that what nests in truth nests in the file, too.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from ryzen_compile.errors import ResourceError, UsageError

Event = dict[str, Any]
MAIN = "main"
NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
ROUNDING = 1  # microsecond that a span may reach beyond the one around it, where starts and lengths are rounded apart


class Timeline:
    """Collects events of one process. Any thread may add to it; each has tracks of its own, under the same names."""

    def __init__(self, name: str = "ryzen-compile") -> None:
        self.name = name
        self._began = time.monotonic_ns()
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._names: list[str] = []  # of tracks; a track's number is its place and one more
        self._tracks: dict[tuple[str, int], int] = {}
        self._open: dict[int, list[Event]] = {}  # spans by track, the innermost last

    def now(self) -> int:
        """Microseconds since the timeline was made."""
        return (time.monotonic_ns() - self._began) // 1000

    @contextmanager
    def span(self, name: str, *, track: str = MAIN, **args: Any) -> Iterator[None]:
        """What runs in the block, which may raise: the span then has the error's class among its ``args``.

        Spans of one track nest. Raises ``UsageError`` for one that ends before a span that began in it.
        """
        tid = self._track(track)
        spans = self._open.setdefault(tid, [])
        event = self._add("X", name, self.now(), tid, args, dur=None)
        spans.append(event)
        try:
            yield
        except BaseException as error:
            event["args"]["error"] = type(error).__name__
            raise
        else:
            if spans[-1] is not event:
                raise UsageError(
                    f"the span {name!r} on track {track!r} ends before one that began in it",
                    hint="end spans in reverse order, or put them on tracks of their own",
                )
        finally:
            event["dur"] = self.now() - event["ts"]
            spans[:] = [one for one in spans if one is not event]

    def instant(self, name: str, *, track: str = MAIN, **args: Any) -> None:
        """Something that took no time."""
        self._add("i", name, self.now(), self._track(track), args, s="t")

    def counter(self, name: str, **values: float) -> None:
        """Values from now on, one series for each; raises ``UsageError`` for none, or for one that is not finite."""
        if not values or not all(map(_is_finite, values.values())):
            raise UsageError(f"the counter {name!r} needs one or more finite numbers, got {values!r}")
        self._add("C", name, self.now(), 0, values)

    def in_turn(
        self, parts: Iterable[tuple[str, float, Mapping[str, Any]]], *, track: str, start: int | None = None
    ) -> None:
        """Spans of which only the lengths are known: (name, seconds, args), laid end to end from ``start``, which is in
        microseconds of ``now`` (None: now). What passed between them is not shown; say so where they are looked at.

        Raises ``UsageError`` for seconds that are negative or not finite.
        """
        tid, at, passed = self._fresh_track(track), self.now() if start is None else start, 0.0
        for name, seconds, args in parts:
            if not 0 <= seconds < math.inf:
                raise UsageError(f"{name!r} on track {track!r} takes {seconds} seconds, expected at least 0")
            begin, passed = at + int(passed * 1e6), passed + seconds
            self._add("X", name, begin, tid, args, dur=at + int(passed * 1e6) - begin)

    def add_chrome(self, events: Sequence[Mapping[str, Any]], *, track: str, start: int = 0) -> None:
        """Merges events of another trace of this format, whose time 0 is at ``start`` microseconds of ``now``.

        Each of its threads becomes a track; more than one where its spans do not nest. Spans (X), instants (i, I) and
        counters (C) are taken, its names of threads (M) are not. Raises ``UsageError`` for anything else.
        """
        threads: dict[tuple[Any, Any], list[Event]] = {}
        for event in events:
            if event.get("ph") != "M":
                threads.setdefault((event.get("pid"), event.get("tid")), []).append(_checked(event, start))
        for found in threads.values():
            spans = [event for event in found if event["ph"] == "X"]
            others = [event for event in found if event["ph"] != "X"]
            for number, lane in enumerate(_lanes(spans) or [[]]):
                tid = self._fresh_track(track)
                for event in (*lane, *(others if number == 0 else ())):
                    self._add(tid=tid, **event)

    def to_json(self) -> dict[str, Any]:
        """The trace; spans that have not ended are not in it."""
        with self._lock:
            names = list(self._names)
            events = [event for event in self._events if event.get("dur", 0) is not None]
        about = [self._about("process_name", 0, name=self.name)]
        for number, name in enumerate(names, 1):
            about.append(self._about("thread_name", number, name=name))
            about.append(self._about("thread_sort_index", number, sort_index=number))
        # What begins first comes first, and what lies around other spans before them: it was also added before them.
        ordered = sorted(events, key=lambda event: (event["ts"], -event.get("dur", 0)))
        return {"traceEvents": [*about, *ordered], "displayTimeUnit": "ms"}

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Writes the trace to ``path``: whole, or not at all. Raises ``ResourceError`` where it cannot."""
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
        text = json.dumps(self.to_json(), allow_nan=False, separators=(",", ":"))
        try:
            with temporary.open("x", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(target)
        except BaseException as error:
            with suppress(OSError):
                temporary.unlink()
            if isinstance(error, OSError):
                raise ResourceError(f"cannot write the trace {target}: {error.strerror}") from error
            raise
        return target

    def _track(self, name: str) -> int:
        """The number of this thread's track of that name."""
        key = name, threading.get_ident()
        with self._lock:
            if key not in self._tracks:
                self._names.append(name)
                self._tracks[key] = len(self._names)
            return self._tracks[key]

    def _fresh_track(self, name: str) -> int:
        with self._lock:
            self._names.append(name)
            return len(self._names)

    def _add(self, ph: str, name: str, ts: int, tid: int, args: Mapping[str, Any], **more: Any) -> Event:
        event: Event = {"name": name, "ph": ph, "ts": ts, "pid": self._pid, "tid": tid, **more, "args": _plain(args)}
        with self._lock:
            self._events.append(event)
        return event

    def _about(self, what: str, tid: int, **args: Any) -> Event:
        return {"name": what, "ph": "M", "ts": 0, "pid": self._pid, "tid": tid, "args": args}


def _checked(event: Mapping[str, Any], start: int) -> Event:
    """``_add``'s arguments for an event of another trace, but for the track."""
    kind, args = event.get("ph"), event.get("args", {})
    if kind not in ("X", "i", "I", "C") or not isinstance(event.get("name"), str) or not isinstance(args, Mapping):
        raise UsageError(f"{str(dict(event))[:200]} is no event that can be merged: spans, instants and counters are")
    ts, kind = _microseconds(event, "ts"), "i" if kind == "I" else kind
    found: Event = {"ph": kind, "name": event["name"], "ts": start + math.floor(ts), "args": args}
    if isinstance(event.get("cat"), str):
        found["cat"] = event["cat"]
    if kind == "X":
        dur = _microseconds(event, "dur")
        if dur < 0:
            raise UsageError(f"dur of the event {event['name']!r} is {dur!r}, expected at least 0 microseconds")
        found["dur"] = math.floor(ts + dur) - math.floor(ts)
    elif kind == "i":
        found["s"] = "t"
    return found


def _microseconds(event: Mapping[str, Any], what: str) -> float:
    value = event.get(what)
    if isinstance(value, (bool, str)) or not _is_finite(value):
        raise UsageError(f"{what} of the event {event['name']!r} is {value!r}, expected microseconds")
    return float(value)  # type: ignore[arg-type]


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _lanes(spans: Sequence[Event]) -> list[list[Event]]:
    """``spans`` dealt to as few tracks as the first that fits allows, so that those of each nest.

    A span that reaches no more than ``ROUNDING`` beyond the one around it is shortened to fit.
    """
    lanes: list[list[Event]] = []
    open_ends: list[list[int]] = []  # of each lane, the innermost last
    # Events are written down as they end: of two with the same times, the later one lies around the other.
    for _, event in sorted(enumerate(spans), key=lambda one: (one[1]["ts"], -one[1]["dur"], -one[0])):
        start, end = event["ts"], event["ts"] + event["dur"]
        place = 0
        while place < len(lanes):
            ends = open_ends[place]
            while ends and ends[-1] <= start:
                ends.pop()
            if not ends or end - ends[-1] <= ROUNDING:
                break
            place += 1
        else:
            lanes.append([])
            open_ends.append([])
        end = min([end, *open_ends[place][-1:]])
        lanes[place].append({**event, "dur": end - start})
        open_ends[place].append(end)
    return lanes


def _plain(value: Any) -> Any:
    """As JSON has it: what it lacks becomes text, numbers that are not finite by the names that reports use."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else NOT_FINITE[str(float(value))]
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(part) for part in value]
    return str(value)
