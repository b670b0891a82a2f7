"""Measuring how an artifact runs best on this machine: threads, spinning, native operators or stock ones, what a step
of several tokens costs, and whether to draft with the model's own first layers.

One session is open at a time, but for an early exit, which runs beside its model in use as well. The threads of an idle
session may keep spinning on the cores for a while, so two sessions that are open together could slow each other down,
and what is measured would be their quarrel. Candidates can therefore not take
turns step by step; they take turns by visits instead: each is opened, measured for a moment and closed, and the round
starts again, forwards and backwards in turn, so that a slower minute of the machine meets all of them.

A step's time does not depend on what the cache holds, only on how much: the context is counted, not computed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ryzen_compile.backends.onnxruntime import artifact
from ryzen_compile.backends.onnxruntime.artifact import Artifact
from ryzen_compile.backends.onnxruntime.candidates import NEW, PROMPT, Candidate, NativeCandidate, choose
from ryzen_compile.backends.onnxruntime.claim_report import KINDS
from ryzen_compile.backends.onnxruntime.native import claimed
from ryzen_compile.backends.onnxruntime.session import OrtEngine, SessionOptions
from ryzen_compile.backends.onnxruntime.tuning import MOST_THREADS_PER_CORE, NativeTuning, Tuning
from ryzen_compile.errors import UsageError
from ryzen_compile.manifest import tuned
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.speculative.exit_choice import (
    ExitChoice,
    agreement,
    candidate_layers,
    choose_exit,
    step_seconds,
)
from ryzen_compile.runtime.tokenizer import Tokenizer
from ryzen_compile.text import BUILTIN, read_text, token_windows
from ryzen_compile.validate.machine import Machine, cpu_key, read_machine

Progress = Callable[[str], None]
LONGEST = 17  # new tokens of a step on a cost curve: 16 drafted ones and the one before them
CONTEXT = 512  # tokens held while it is measured, where the model has room for them
MEASURED_PROMPT = 128  # tokens; the request's prompt is counted as several of these
LEAST_ROUNDS, MOST_ROUNDS = 3, 9
VISIT_SECONDS = 0.5  # of decode steps
LEAST_STEPS, MOST_STEPS = 3, 50
WINDOWS, WINDOW = 4, 128  # of text, and their tokens, that an early exit and its model predict
THREADS_SHARE, CHOICE_SHARE = 0.4, 0.7  # of the budget, when their choice and all choices end; the curve has the rest


def tune(
    directory: Path,
    *,
    threads: Sequence[int] | None = None,
    budget_seconds: float = 60.0,
    digests: bool = True,
    progress: Progress | None = None,
) -> Tuning:
    """Measures the artifact in ``directory`` on this machine; writes nothing.

    ``threads`` are the numbers to try (None: ``thread_candidates``). Candidates are compared by a request of ``PROMPT``
    tokens and ``NEW`` generated ones, of which a shorter prompt and some steps are measured and the rest is computed.
    Then, where there are native operators, all of them are compared with none and with all but each kind.
    ``budget_seconds`` is an aim: ``LEAST_ROUNDS`` visits of each candidate are made however long they take.

    Raises ``UsageError`` for a budget or numbers of threads that make no sense, and what reading an artifact raises.
    """
    machine = read_machine()
    counts = _checked(threads, machine) if threads is not None else thread_candidates(machine)
    if not 0 < budget_seconds < float("inf"):
        raise UsageError(f"the budget must be a number of seconds above 0, got {budget_seconds}")
    bench = _Bench(artifact.read(directory, digests=digests, task="generate"))
    start = time.perf_counter()
    ends = [start + share * budget_seconds for share in (THREADS_SHARE, CHOICE_SHARE, 1)]
    settings = [SessionOptions(count, on) for count in counts for on in ((True, False) if count > 1 else (True,))]
    names = [str(Candidate(options.threads or 1, options.spinning, ())) for options in settings]
    visits = _compare(bench, dict(zip(names, settings, strict=True)), ends[0], progress)
    candidates = tuple(Candidate(o.threads or 1, o.spinning, v) for o, v in zip(settings, visits, strict=True))
    best, reason = choose(candidates)
    options = SessionOptions(best.threads, best.spinning)
    native = _choose_native(bench, options, ends[1], progress)
    options = options if native is None else replace(options, native=native.kinds)
    _say(progress, f"measuring the cost of a step with {best}")
    with bench.opened(options) as subject:
        curves, prefill = _profile(subject, ends[2])
        early = _choose_exit(subject, curves[bench.context], progress)
    return Tuning(
        key=cpu_key(machine),
        threads=best.threads,
        spinning=best.spinning,
        reason=reason,
        context=bench.context,
        curves=curves,
        prefill=prefill,
        candidates=candidates,
        native=native,
        exit=early,
        versions={name: machine.versions[name] or "unknown" for name in ("ryzen-compile", "onnxruntime")},
    )


def read_tuning(manifest: Mapping[str, Any], key: str) -> Tuning | None:
    """What was measured on the machine ``key``, or None when the artifact was not tuned on such a machine.

    Raises ``ArtifactError`` when the record is not one that ``tune`` writes.
    """
    record = tuned(manifest).get(key)
    return None if record is None else Tuning.from_json(key, record)


def tuned_options(tuning: Tuning) -> SessionOptions:
    """The options that were found best."""
    native = KINDS if tuning.native is None else tuning.native.kinds
    return SessionOptions(tuning.threads, tuning.spinning, native=native)


def thread_candidates(machine: Machine) -> tuple[int, ...]:
    """Numbers of threads worth trying: every one up to 4, then in steps of about a half, what one last-level cache
    serves, all usable cores, and all their hardware threads."""
    cores, threads = machine.usable_cores, machine.usable_threads
    counts = {*range(1, min(4, cores) + 1), cores, threads}
    step = 6
    while step < cores:
        counts.add(step)
        step += step // 3 if step & (step - 1) else step // 2  # 6, 8, 12, 16, 24, 32 ...
    for group in machine.topology.caches:
        served = sum(1 for core in machine.topology.cores if set(core) & set(group.cpus) & set(machine.limits.affinity))
        counts.add(min(max(served, 1), cores))
    return tuple(sorted(counts))


class _Bench:
    """An artifact with what all its measurements share."""

    def __init__(self, found: Artifact) -> None:
        self.found = found
        room = found.spec.context
        self.context = max(0, min(CONTEXT, room - LONGEST) if room > LONGEST else room // 2)
        self.longest = max(1, min(LONGEST, room - self.context))
        self.contexts = tuple(sorted({self.context // 8, self.context}))
        self.prompt = min(MEASURED_PROMPT, room)

    @contextmanager
    def opened(self, options: SessionOptions) -> Iterator[_Subject]:
        """The engine with ``options``, alone: it is closed, and its threads are gone, on leaving."""
        engine = OrtEngine(self.found.model, self.found.spec, self.found.slots, options, self.found.prefill)
        try:
            yield _Subject(engine, self)
        finally:
            engine.close()


class _Subject:
    """An open engine with a cache; every method takes one sample, in seconds."""

    def __init__(self, engine: OrtEngine, bench: _Bench) -> None:
        self.engine, self.bench = engine, bench
        capacity = max(bench.context + bench.longest, bench.prompt)
        self.cache = KVCache(engine.slots, 1, capacity, limit=engine.spec.context)
        ids = np.random.default_rng(0)
        self.tokens = ids.integers(0, engine.spec.vocab, (1, capacity), dtype=np.int64)

    def verify(self, tokens: int, context: int) -> float:
        """One step of ``tokens`` new tokens behind ``context`` others, with the logits of all where they can be had.

        It follows a step of one token, as it does while generating: what ran before, a prompt perhaps, has left other
        weights and rows in the caches of the processor.
        """
        self.step(1, context)
        return self.step(tokens, context, tokens if self.engine.verifies else 1)

    def step(self, tokens: int, context: int | None = None, last: int = 1) -> float:
        """One step of ``tokens`` new tokens behind ``context`` others (None: the bench's)."""
        held = self.bench.context if context is None else context
        new = self.tokens[:, :tokens]
        self.cache.truncate(0)
        self.cache.advance(held)
        start = time.perf_counter()
        self.engine.step(new, self.cache, last)
        return time.perf_counter() - start

    def steps(self, seconds: float) -> list[float]:
        """Single-token steps for about ``seconds``, after two that only warm up."""
        self.step(1)
        once = self.step(1)
        return [self.step(1) for _ in range(_times(seconds, once, LEAST_STEPS, MOST_STEPS))]

    def prefill(self) -> float:
        """The bench's prompt in an empty cache."""
        return self.step(self.bench.prompt, 0)


def _choose_native(
    bench: _Bench, options: SessionOptions, until: float, progress: Progress | None
) -> NativeTuning | None:
    """Which kinds of native operators to use with ``options``; None where there are none, nothing for them to do, or
    they fail and sessions fall back to stock ones: what would be timed is then not what it is called."""
    have = claimed(bench.found.model).kinds
    if not have:
        return None
    with bench.opened(replace(options, native=have)) as subject:
        if subject.engine.claims.kinds != have:
            return None
    sets = list(dict.fromkeys([have, *(have - {kind} for kind in sorted(have)), frozenset[str]()]))
    ways = {str(NativeCandidate(kinds, ())): replace(options, native=kinds) for kinds in sets}
    visits = _compare(bench, ways, until, progress)
    candidates = tuple(NativeCandidate(kinds, seconds) for kinds, seconds in zip(sets, visits, strict=True))
    best, reason = choose(candidates)
    return NativeTuning(best.kinds, reason, candidates)


def _compare(
    bench: _Bench, ways: Mapping[str, SessionOptions], until: float, progress: Progress | None
) -> list[tuple[float, ...]]:
    """The seconds of a request by visits, for each of the named ways: rounds until the clock shows ``until``."""
    names, settings = list(ways), list(ways.values())
    visits: list[list[float]] = [[] for _ in settings]
    for number in range(MOST_ROUNDS):
        started = time.perf_counter()
        order = range(len(settings)) if number % 2 == 0 else reversed(range(len(settings)))
        for index in order:
            with bench.opened(settings[index]) as subject:
                visits[index].append(_request_seconds(subject))
            seconds = statistics.median(visits[index])
            _say(progress, f"round {number + 1}, {names[index]}: {seconds:.2f} s a request")
        now = time.perf_counter()
        if number + 1 >= LEAST_ROUNDS and now + (now - started) > until:
            break
    return [tuple(seconds) for seconds in visits]


def _request_seconds(subject: _Subject) -> float:
    """Seconds of ``PROMPT`` tokens and ``NEW`` generated ones, from a part of the prompt and some of the steps."""
    subject.prefill()  # the first one allocates
    prompt = subject.prefill() * PROMPT / subject.bench.prompt
    return prompt + statistics.median(subject.steps(VISIT_SECONDS)) * NEW


def _profile(subject: _Subject, end: float) -> tuple[dict[int, dict[int, float]], dict[int, float]]:
    """Cost curves by context, and prefill time, taken in turns until the clock shows ``end``."""
    bench = subject.bench
    places = [(m, context) for context in bench.contexts for m in range(1, bench.longest + 1)]
    samples: dict[tuple[int, int], list[float]] = {place: [] for place in places}
    prompts: list[float] = []
    for place in places:
        subject.verify(*place)  # the first one allocates
    subject.prefill()
    rounds = 0
    while rounds < LEAST_STEPS or (rounds < MOST_STEPS and time.perf_counter() < end):
        for place in places if rounds % 2 == 0 else reversed(places):
            samples[place].append(subject.verify(*place))
        prompts.append(subject.prefill())
        rounds += 1
    curves = {
        context: {m: statistics.median(samples[m, context]) for m in range(1, bench.longest + 1)}
        for context in bench.contexts
    }
    return curves, {bench.prompt: statistics.median(prompts)}


def _choose_exit(subject: _Subject, curve: Mapping[int, float], progress: Progress | None) -> ExitChoice | None:
    """The early exit to expect most of; None where the model cannot be left early or there is no text to try it on."""
    engine, bench = subject.engine, subject.bench
    depths = candidate_layers(engine.spec.layers, engine.exits) if engine.verifies else ()
    windows = _text(bench.found) if depths else None
    if windows is None:
        return None
    measured = []
    for layers in depths:
        early = engine.early_exit(layers)
        try:
            seconds = step_seconds(early, bench.context)
            measured.append((layers, agreement(engine, early, windows), seconds))
        finally:
            early.close()
        _say(progress, f"leaving after {layers} layers: {measured[-1][1]:.0%} of tokens alike, {1e3 * seconds:.2f} ms")
    return choose_exit(measured, curve)


def _text(found: Artifact) -> np.ndarray | None:
    """Windows ``(n, T)`` int64 of text in the model's tokens; None without a tokenizer whose ids are all its own."""
    if not (found.directory / "tokenizer.json").exists():
        return None
    encode = Tokenizer.from_directory(found.directory).encode
    length = min(WINDOW, found.spec.context)
    windows = token_windows(read_text(BUILTIN), encode, length, WINDOWS * length)
    return windows if windows.max() < found.spec.vocab else None


def _checked(threads: Sequence[int], machine: Machine) -> tuple[int, ...]:
    most = MOST_THREADS_PER_CORE * machine.usable_cores
    if not threads or not all(1 <= count <= most for count in threads):
        raise UsageError(f"threads to try must be from 1 to {most} on this machine, got {list(threads)}")
    return tuple(sorted(set(threads)))


def _times(seconds: float, once: float, least: int, most: int) -> int:
    return max(least, min(most, int(seconds / once)))


def _say(progress: Progress | None, text: str) -> None:
    if progress is not None:
        progress(text)
