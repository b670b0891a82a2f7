"""Where the time of a step goes, node by node: ONNX Runtime's own record of a short prompt and some decode steps.

Recording costs time, so it has a session of its own, which nobody's figures come from. ONNX Runtime's clock begins when
its session does, which it does not say on ours: its record is laid so that each of its calls lies within the step that
made it. That leaves the choice of some microseconds, what lies around the tightest call.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ryzen_compile.backends.onnxruntime import artifact
from ryzen_compile.backends.onnxruntime.engine_options import engine_options
from ryzen_compile.backends.onnxruntime.session import OrtEngine
from ryzen_compile.errors import ArtifactError
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.timeline import Timeline

PROMPT, STEPS = 64, 8  # tokens
TRACK = "profiled session"
NODES = "ONNX Runtime"
CALL = "model_run"  # ONNX Runtime's event around a whole call
Interval = tuple[int, int]  # start and end, in microseconds


def trace_nodes(
    timeline: Timeline,
    directory: Path,
    *,
    threads: int | None,
    native: Any = "auto",
    prompt: int = PROMPT,
    steps: int = STEPS,
    seed: int = 0,
) -> None:
    """Adds to ``timeline`` what each node of the artifact takes in a prompt and in ``steps`` steps of one token behind
    it: once to warm up, once more. ``threads`` and ``native`` are as for ``load``.

    A prompt too long for the model's context is cut. A form for prompts, whose nodes are others, is not opened. Raises
    what reading an artifact raises, and ``ArtifactError`` for a record that is not ONNX Runtime's.
    """
    found = artifact.read(directory, digests=False, task="generate")
    options = replace(engine_options(found, threads=threads, native=native), profile=True)
    steps = min(steps, found.spec.context - 1)
    prompt = min(prompt, found.spec.context - steps)
    with timeline.span("load", track=TRACK):
        engine = OrtEngine(found.model, found.spec, found.slots, options)
    try:
        made = _run(timeline, engine, prompt, steps, seed)
        events = _events(engine.end_profile())
    finally:
        engine.close()
    calls = sorted((int(e["ts"]), int(e["ts"]) + int(e["dur"])) for e in events if e.get("name") == CALL)
    if len(calls) != len(made):
        raise ArtifactError(f"ONNX Runtime recorded {len(calls)} calls of {directory.name}, of {len(made)}")
    timeline.add_chrome(events, track=NODES, start=_start(calls, made))


def _run(timeline: Timeline, engine: OrtEngine, prompt: int, steps: int, seed: int) -> list[Interval]:
    """Runs prompt and steps twice; when each began and ended."""
    ids = np.random.default_rng(seed).integers(0, engine.spec.vocab, (1, prompt + steps), dtype=np.int64)
    pieces = [ids[:, :prompt], *(ids[:, at : at + 1] for at in range(prompt, prompt + steps))]
    cache = KVCache(engine.slots, 1, prompt + steps, limit=engine.spec.context)
    made: list[Interval] = []
    for name in ("warm up", "measured"):
        with timeline.span(name, track=TRACK):
            cache.truncate(0)
            made += [_step(timeline, engine, cache, piece) for piece in pieces]
    return made


def _step(timeline: Timeline, engine: OrtEngine, cache: KVCache, ids: np.ndarray) -> Interval:
    held, new = int(cache.lengths[0]), ids.shape[1]
    with timeline.span("decode" if held else f"prompt of {new}", track=TRACK, tokens=new, behind=held):
        start = timeline.now()
        engine.step(ids, cache)
        end = timeline.now()
        cache.advance(new)
    return start, end


def _start(calls: Sequence[Interval], steps: Sequence[Interval]) -> int:
    """Where time 0 of the calls' clock is on the steps' clock, by which each call lies in its step."""
    earliest = max(step[0] - call[0] for call, step in zip(calls, steps, strict=True))
    latest = min(step[1] - call[1] for call, step in zip(calls, steps, strict=True))
    return (earliest + latest) // 2


def _events(trace: Path) -> list[Mapping[str, Any]]:
    """What ONNX Runtime recorded in the file ``trace``, which is removed."""
    try:
        events = json.loads(trace.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"ONNX Runtime's record is not JSON: {error}") from error
    finally:
        trace.unlink(missing_ok=True)
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        raise ArtifactError("ONNX Runtime's record is no list of events")
    return events
