"""How fast an artifact's operators are beside PyTorch's own, in float32, at the artifact's own sizes.

All products of the model run as one graph, all attentions, and all norms; a table's lookup, which costs a decode step
next to nothing, is left out. The same computations run in PyTorch, eagerly. What each side's time includes:

* ours: one call of the session, as the engine makes it, with inputs and outputs bound to buffers that stay: ONNX
  Runtime's way from node to node belongs to it. Products round their activations, which in the model a norm before them
  may do for several at once; nothing behind them is fused in.
* PyTorch's: one loop over all operators in ``inference_mode``, a call of a function for each product, one or two for a
  norm, several for an attention: dispatching each belongs to eager PyTorch. A product that the passes merged from
  several (Q, K and V; gate and up) is one call, too: what merging gains is the passes', not the kernel's.

Both have the same number of threads and take turns, with a pause between them in which the other's threads fall asleep:
each has a pool that waits busily for a moment.

A product of one row takes the time in which its weights are read. A sample runs all products of the model in turn, as
a decode step does: where PyTorch's weights do not fit a cache that ours fit, that is most of the ratio, and it grows on
a machine whose cache and memory others are using meanwhile.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from ryzen_compile.backends.onnxruntime import artifact
from ryzen_compile.backends.onnxruntime.engine_options import engine_options
from ryzen_compile.backends.onnxruntime.operator_sites import Kind
from ryzen_compile.backends.onnxruntime.operator_subjects import Subject, prepare
from ryzen_compile.errors import UsageError
from ryzen_compile.fields import Fields
from ryzen_compile.validate.measured import Measured, Spread, speed_up
from ryzen_compile.validate.torch_threads import torch_threads

SAMPLE_SECONDS = 0.02  # that a sample takes, where one call does not take longer
MOST_CALLS = 1000  # in a sample
PAUSE = 0.02  # seconds: ONNX Runtime's threads spin for 0.2 ms behind a call, those of OpenMP for some more
Seconds = list[float]  # of all of a kind's nodes once, by round


class OperatorSpeed(Fields):
    """One kind. Times are of all its ``nodes`` once; ``ratio`` is PyTorch's over ours."""

    kind: Kind
    nodes: int = Field(ge=1)
    native: bool = Field(description="all of them run on our own operators")
    ours_ms: Spread
    torch_ms: Spread
    ratio: Measured
    shapes: dict[str, int] = Field(
        description="nodes by size: rows x K x N of a product, rows x channels of a norm, "
        "tokens x heads / kv heads x channels of an attention"
    )


class OperatorSpeeds(Fields):
    """``total`` is the ratio of all kinds' sums, round by round; none where no kind has a row. ``reasons`` say of a
    kind why it has none, or which of its nodes are not in it."""

    rows: tuple[OperatorSpeed, ...]
    total: Measured | None
    context: int = Field(ge=0, description="tokens behind which the new ones stand")
    tokens: int = Field(ge=1, description="new tokens: 1 for a decode step")
    threads: int = Field(ge=1, description="of each side")
    reasons: dict[str, str] = Field(default_factory=dict)


def measure_operators(
    artifact_dir: str | os.PathLike[str],
    *,
    context: int,
    tokens: int = 1,
    rounds: int = 9,
    threads: int | None = None,
    native: Literal["auto"] | bool = "auto",
) -> OperatorSpeeds:
    """Measures the operators of the artifact in ``artifact_dir`` for ``tokens`` new tokens of one row behind
    ``context`` others: a decode step, or a prompt.

    ``threads`` None means as many as ``tune`` found best, or one per usable core; ``native`` is as for ``load``. Takes
    memory for the products' weights in float32, beside the artifact's own. Raises ``UsageError`` for numbers out of
    range, ``MemoryLimitError`` where those weights do not fit, ``UnsupportedError`` where native operators are insisted
    on and cannot be had, and what reading an artifact raises.
    """
    if rounds < 1:
        raise UsageError(f"rounds must be at least 1, got {rounds}")
    found = artifact.read(Path(artifact_dir), digests=False, task="generate")
    options = engine_options(found, threads=threads, native=native)
    used = options.threads or 1
    subjects, reasons = prepare(found, options, context=context, tokens=tokens)
    with torch_threads(used), torch.inference_mode():
        samples = _sampled(subjects, rounds)
    rows = tuple(_row(kind, subject, *samples[kind]) for kind, subject in subjects.items())
    return OperatorSpeeds(
        rows=rows, total=_total(samples), context=context, tokens=tokens, threads=used, reasons=reasons
    )


def _row(kind: Kind, subject: Subject, ours: Seconds, theirs: Seconds) -> OperatorSpeed:
    sites = subject.graph.sites
    return OperatorSpeed(
        kind=kind,
        nodes=len(sites),
        native=subject.native,
        ours_ms=Spread.of([1e3 * seconds for seconds in ours], "ms"),
        torch_ms=Spread.of([1e3 * seconds for seconds in theirs], "ms"),
        ratio=speed_up(theirs, ours),
        shapes=dict(Counter(site.text for site in sites)),
    )


def _total(samples: Mapping[Kind, tuple[Seconds, Seconds]]) -> Measured | None:
    """Of the sums over all kinds within each round."""
    if not samples:
        return None
    ours, theirs = ([sum(one) for one in zip(*sides, strict=True)] for sides in zip(*samples.values(), strict=True))
    return speed_up(theirs, ours)


def _sampled(subjects: Mapping[Kind, Subject], rounds: int) -> dict[Kind, tuple[Seconds, Seconds]]:
    """(ours, PyTorch's) of every kind: all of them in every round, forwards and backwards in turn."""
    samples: dict[Kind, tuple[Seconds, Seconds]] = {}
    turns: list[tuple[Seconds, Callable[[], object], int]] = []
    for kind, subject in subjects.items():
        ours, theirs = samples[kind] = [], []
        turns.append((ours, subject.ours, _calls(subject.ours)))
        turns.append((theirs, subject.theirs, _calls(subject.theirs)))
    for number in range(rounds):
        for seconds, run, calls in turns if number % 2 == 0 else reversed(turns):
            seconds.append(_sample(run, calls))
    return samples


def _calls(run: Callable[[], object]) -> int:
    """How many calls make up a sample."""
    time.sleep(PAUSE)
    run()
    once = _seconds(run, 2) / 2
    return max(1, min(MOST_CALLS, math.ceil(SAMPLE_SECONDS / max(once, 1e-9))))


def _sample(run: Callable[[], object], calls: int) -> float:
    """Seconds of one call, the mean of ``calls`` behind some that are not counted: they wake threads, fill caches."""
    time.sleep(PAUSE)
    for _ in range(max(1, calls // 4)):
        run()
    return _seconds(run, calls) / calls


def _seconds(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - start
