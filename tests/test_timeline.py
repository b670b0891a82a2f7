"""Timelines: the trace-event format to the letter, spans that nest, other traces merged, and whole files or none."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ryzen_compile.errors import ResourceError, UsageError
from ryzen_compile.timeline import Timeline

# What each kind of event has to have, and may have, in the trace-event format.
COMMON = {"name", "ph", "ts", "pid", "tid", "args"}
OWN = {"X": {"dur"}, "i": {"s"}, "C": set(), "M": set()}


def checked(trace: Any) -> list[dict[str, Any]]:
    """The events of a trace that is one by the letter: fields, types, nesting on every track."""
    assert set(trace) == {"traceEvents", "displayTimeUnit"} and trace["displayTimeUnit"] == "ms"
    json.loads(json.dumps(trace, allow_nan=False))
    events = trace["traceEvents"]
    for event in events:
        kind = event["ph"]
        assert COMMON | OWN[kind] <= set(event) <= COMMON | OWN[kind] | {"cat"}, event
        assert all(type(event[name]) is int for name in ("ts", "pid", "tid")), event
        assert type(event["name"]) is str and event["name"] and type(event["args"]) is dict
        assert kind != "X" or (type(event["dur"]) is int and event["dur"] >= 0)
        assert kind != "i" or event["s"] == "t"
        assert kind != "C" or all(type(value) in (int, float) for value in event["args"].values())
    names = {e["tid"]: e["args"]["name"] for e in events if (e["ph"], e["name"]) == ("M", "thread_name")}
    assert {e["tid"] for e in events if e["ph"] in "Xi"} <= names.keys()
    assert {e["pid"] for e in events} == {os.getpid()}
    for track in names:
        open_ends: list[int] = []
        for event in (e for e in events if e["ph"] == "X" and e["tid"] == track):
            while open_ends and open_ends[-1] <= event["ts"]:
                open_ends.pop()
            assert not open_ends or event["ts"] + event["dur"] <= open_ends[-1], event
            open_ends.append(event["ts"] + event["dur"])
    return events


def tracks(events: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Names of tracks -> names of what is on them, in the order of the file."""
    names = {e["tid"]: e["args"]["name"] for e in events if (e["ph"], e["name"]) == ("M", "thread_name")}
    found: dict[str, list[str]] = {name: [] for name in names.values()}
    for event in events:
        if event["ph"] in "Xi":
            found[names[event["tid"]]].append(event["name"])
    return found


def test_every_kind_of_event_is_by_the_letter(tmp_path: Path) -> None:
    timeline = Timeline("a run")
    with timeline.span("outer", count=3):
        with timeline.span("inner", path=tmp_path):
            timeline.instant("moment", why="because")
        timeline.counter("memory", rss=1.5, cache=2)
    with timeline.span("other", track="passes"):
        pass
    events = checked(json.loads(timeline.write(tmp_path / "trace.json").read_text(encoding="utf-8")))
    about = [(e["name"], e["args"]) for e in events if e["ph"] == "M"]
    assert ("process_name", {"name": "a run"}) in about
    assert tracks(events) == {"main": ["outer", "inner", "moment"], "passes": ["other"]}
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    assert spans["outer"]["args"] == {"count": 3} and spans["inner"]["args"] == {"path": str(tmp_path)}
    assert next(e for e in events if e["ph"] == "C")["args"] == {"rss": 1.5, "cache": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_spans_last_as_long_as_what_they_hold() -> None:
    timeline = Timeline()
    before = timeline.now()
    with timeline.span("sleep"):
        time.sleep(0.02)
    span = next(e for e in timeline.to_json()["traceEvents"] if e["ph"] == "X")
    assert before <= span["ts"] and span["dur"] >= 20_000 and span["ts"] + span["dur"] <= timeline.now()


def test_an_error_ends_its_spans_and_is_named() -> None:
    timeline = Timeline()
    with pytest.raises(KeyError), timeline.span("outer"), timeline.span("inner"):
        raise KeyError("x")
    spans = [e for e in checked(timeline.to_json()) if e["ph"] == "X"]
    assert [(e["name"], e["args"]) for e in spans] == [
        ("outer", {"error": "KeyError"}),
        ("inner", {"error": "KeyError"}),
    ]
    with timeline.span("next"):
        pass
    assert len(checked(timeline.to_json())) > len(spans)


def test_what_has_not_ended_is_not_in_it() -> None:
    timeline = Timeline()
    with timeline.span("outer"):
        with timeline.span("inner"):
            pass
        assert tracks(checked(timeline.to_json())) == {"main": ["inner"]}


def test_of_equal_times_the_outer_span_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = Timeline()
    monkeypatch.setattr(timeline, "now", lambda: 7)
    with timeline.span("outer"), timeline.span("middle"), timeline.span("inner"):
        pass
    assert tracks(checked(timeline.to_json())) == {"main": ["outer", "middle", "inner"]}


def test_spans_that_cross_are_refused() -> None:
    timeline, first, second = Timeline(), ExitStack(), ExitStack()
    first.enter_context(timeline.span("first"))
    second.enter_context(timeline.span("second"))
    with pytest.raises(UsageError, match="the span 'first' on track 'main' ends before one that began in it"):
        first.close()
    other = Timeline()
    first.enter_context(other.span("first", track="a"))
    second.enter_context(other.span("second", track="b"))
    first.close()
    assert tracks(checked(other.to_json())) == {"a": ["first"], "b": []}


def test_threads_have_tracks_of_their_own() -> None:
    timeline, barrier = Timeline(), threading.Barrier(3)

    def work() -> None:
        barrier.wait()  # all of them are open at once
        with timeline.span("outer"):
            barrier.wait()
            for _ in range(50):
                with timeline.span("inner"):
                    timeline.instant("moment")

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    events = checked(timeline.to_json())
    assert sum(e["ph"] == "X" for e in events) == 3 * 51
    assert len({e["tid"] for e in events if e["ph"] == "X"}) == 3


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (math.nan, "NaN"),
        (-math.inf, "-Infinity"),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (True, True),
        (None, None),
        ({1: (2, {"a": math.inf})}, {"1": [2, {"a": "Infinity"}]}),
        (frozenset({"x"}), ["x"]),
        (b"raw", "b'raw'"),
    ],
)
def test_arguments_become_json(value: object, written: object) -> None:
    timeline = Timeline()
    timeline.instant("moment", value=value)
    found = next(e for e in checked(timeline.to_json()) if e["ph"] == "i")["args"]["value"]
    assert found == written and type(found) is type(written)


@pytest.mark.parametrize("values", [{}, {"x": math.nan}, {"x": "1"}])
def test_counters_are_finite_numbers(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="the counter 'memory' needs one or more finite numbers"):
        Timeline().counter("memory", **values)


def test_lengths_alone_are_laid_end_to_end() -> None:
    timeline = Timeline()
    parts = [("a", 0.1234567, {"hits": 2}), ("b", 0.0, {}), ("c", 1 / 3, {})]
    timeline.in_turn(parts, track="passes", start=11)
    timeline.in_turn(parts[:1], track="passes", start=0)  # again: another track of that name
    events = [e for e in checked(timeline.to_json()) if e["ph"] == "X"]
    found = {e["name"]: e for e in events if e["tid"] == 1}
    assert {name: e["args"] for name, e in found.items()} == {"a": {"hits": 2}, "b": {}, "c": {}}
    assert found["a"]["ts"] == 11 and found["a"]["dur"] == 123_456
    ends = {name: e["ts"] + e["dur"] for name, e in found.items()}
    assert ends["a"] == found["b"]["ts"] == ends["b"] == found["c"]["ts"]
    assert ends["c"] == 11 + int((0.1234567 + 1 / 3) * 1e6)  # what was rounded down does not add up
    assert [e["tid"] for e in events if e["ts"] == 0] == [2]
    for seconds in (-1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="'a' on track 'passes' takes"):
            timeline.in_turn([("a", seconds, {})], track="passes")


# --- traces of others


def event(name: str, ts: float, dur: float, **more: Any) -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "pid": 41, "tid": 7, "cat": "Node", **more}


def test_another_trace_is_moved_to_its_place_and_its_threads_become_tracks() -> None:
    timeline = Timeline()
    timeline.add_chrome(
        [
            {"ph": "M", "name": "thread_name", "pid": 41, "tid": 7, "args": {"name": "theirs"}},
            event("child", 5, 4),
            event("parent", 3, 90, args={"op_name": "MatMul", "shapes": [{"float": [1, 3]}]}),
            {"ph": "I", "name": "moment", "ts": 9, "pid": 41, "tid": 7, "s": "p"},
            event("elsewhere", 0, 1, tid=8),
        ],
        track="nodes",
        start=1000,
    )
    events = checked(timeline.to_json())
    assert [e["args"]["name"] for e in events if e["name"] == "thread_name"] == ["nodes", "nodes"]
    found = {e["name"]: e for e in events if e["ph"] != "M"}
    assert {name: e["ts"] for name, e in found.items()} == {
        "parent": 1003,
        "child": 1005,
        "moment": 1009,
        "elsewhere": 1000,
    }
    assert found["parent"]["args"] == {"op_name": "MatMul", "shapes": [{"float": [1, 3]}]}
    assert found["parent"]["cat"] == "Node"
    assert found["parent"]["tid"] == found["child"]["tid"] == found["moment"]["tid"] != found["elsewhere"]["tid"]


def test_what_is_rounded_apart_is_made_to_nest_and_what_crosses_gets_another_track() -> None:
    """A parent 0.9 .. 10.8 and its child 5.0 .. 10.5, start and length rounded down each: 0 .. 9 and 5 .. 10."""
    timeline = Timeline()
    timeline.add_chrome([event("child", 5, 5), event("parent", 0, 9), event("crossing", 4, 10)], track="nodes")
    found = {e["name"]: e for e in checked(timeline.to_json()) if e["ph"] == "X"}
    assert (found["child"]["dur"], found["parent"]["dur"], found["crossing"]["dur"]) == (4, 9, 10)
    assert found["child"]["tid"] == found["parent"]["tid"] != found["crossing"]["tid"]


def test_spans_of_equal_times_keep_their_order_of_ending() -> None:
    timeline = Timeline()
    timeline.add_chrome([event("inner", 2, 3), event("outer", 2, 3)], track="nodes")
    assert tracks(checked(timeline.to_json())) == {"nodes": ["outer", "inner"]}


def test_fractions_of_microseconds_are_rounded_down_at_both_ends() -> None:
    timeline = Timeline()
    timeline.add_chrome([event("a", 0.6, 0.6), event("b", -0.5, 0.25)], track="nodes")
    found = {e["name"]: (e["ts"], e["dur"]) for e in checked(timeline.to_json()) if e["ph"] == "X"}
    assert found == {"a": (0, 1), "b": (-1, 0)}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({**event("a", 0, 1), "ph": "B"}, "is no event that can be merged"),
        ({"name": "a", "ts": 0}, "is no event that can be merged"),
        ({**event("a", 0, 1), "name": 3}, "is no event that can be merged"),
        (event("a", 0, 1, args=[1]), "is no event that can be merged"),
        (event("a", "0", 1), "ts of the event 'a' is '0', expected microseconds"),  # type: ignore[arg-type]
        (event("a", math.nan, 1), "ts of the event 'a' is nan"),
        (event("a", 0, -1), "dur of the event 'a' is -1"),
        ({"ph": "X", "name": "a", "ts": 0}, "dur of the event 'a' is None"),
    ],
)
def test_what_is_no_event_is_refused_whole(bad: dict[str, Any], said: str) -> None:
    timeline = Timeline()
    with pytest.raises(UsageError, match=said):
        timeline.add_chrome([event("good", 0, 1), bad], track="nodes")
    assert tracks(checked(timeline.to_json())) == {}


# --- files


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = Timeline()
    for path in (tmp_path / "absent" / "trace.json", tmp_path):
        with pytest.raises(ResourceError, match="cannot write the trace"):
            timeline.write(path)
    (tmp_path / "trace.json").write_text("before")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"trace\.json: No space left on device"):
        timeline.write(tmp_path / "trace.json")
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
    assert (tmp_path / "trace.json").read_text() == "before"


def test_it_is_light() -> None:
    code = (
        "import ryzen_compile.timeline, sys; print([n for n in ('numpy', 'torch', 'onnxruntime') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
