"""Speculative decoding: that it leaves the text alone, what it gains, and what it costs where it cannot gain.

    python benchmarks/speculation.py exact     every drafter, length and format
    python benchmarks/speculation.py text      held-out code: completed, edited, repeated
    python benchmarks/speculation.py random    random prompts: never slower
    python benchmarks/speculation.py replay    a drafter that is right 3 times in 4

``exact`` compares greedy texts token by token; where two differ it gives the gap between the two best logits there,
which tells rounding from a mistake. The others time the decoding behind the first token, ways of drafting in turn for
every prompt within one process, forwards and backwards by turns (a replay needs the plain text first); a speed-up is
the ratio of two times of one turn. Stock and native sessions have a process each. Artifacts that are not given are
exported to ``--work`` and tuned there, once. ``text`` and ``random`` ask the model for ``speculation="auto"`` as anyone
would; single drafters run on a cost curve that the same process has measured. Prints tables; sums of every turn, with
all speed-ups and differences, are appended to ``benchmarks/data/speculation.csv``.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import speculative_text
from random_artifact import prepare
from speculative_text import MODEL

import ryzen_compile
from ryzen_compile.manifest import read_manifest, tuned
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.compiled import CompiledModel
from ryzen_compile.runtime.engine import Engine
from ryzen_compile.runtime.generate import GenerationStats, generate, read
from ryzen_compile.runtime.sampling import SamplingParams
from ryzen_compile.runtime.speculative.drafter import Draft, Drafter
from ryzen_compile.runtime.speculative.lookup import PromptLookup
from ryzen_compile.runtime.speculative.model_drafter import ModelDrafter
from ryzen_compile.runtime.speculative.settings import Speculation
from ryzen_compile.runtime.speculative.speculator import Experience, Speculator
from ryzen_compile.runtime.speculative.suffix import Corpus, SuffixDrafter
from ryzen_compile.runtime.tokenizer import Tokenizer
from ryzen_compile.shapes import SHAPES
from ryzen_compile.validate.machine import cpu_key, read_machine, read_versions

DATA = Path(__file__).resolve().parent / "data" / "speculation.csv"
SIDES = ("native", "stock")
PLAIN = "plain"
NEW = {"exact": 64, "text": 128, "random": 128, "replay": 128}
LENGTHS = (1, 2, 4, 8, 16)
SHORTEST, LONGEST = 5, 300  # tokens of a prompt whose text is compared
# Recipe, cache and recipe of the draft model of what is compared; the first one on native operators with all prompts.
CASES = {
    "int4": ("int4", "fp32", "int3-mixed"),
    "int4-int8": ("int4", "int8", "int3-mixed"),
    "fp32": ("fp32", "fp32", "int4"),
}
RIGHT = 0.75
TEMPERATURE = 0.8
STEPS = 17  # the longest step of a cost curve
Way = Callable[[], Speculator | None]


@dataclass
class Sample:
    """One generation. Times are milliseconds: of decoding, of what of it the target's steps and the drafters took.

    ``steps`` gave ``tokens`` tokens behind the first; ``drafted`` of them were proposed, in ``drafts`` drafts, and
    ``accepted`` taken. ``same`` says whether the text is the plain one, ``differs`` where it first is not (-1), ``gap``
    the distance there of the two best plain logits, ``noise`` how far these move when the same text is read in steps of
    several tokens.
    """

    tokens: int = 0
    steps: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    decode_ms: float = 0.0
    step_ms: float = 0.0
    draft_ms: float = 0.0
    same: int = 1
    differs: int = -1
    gap: float = 0.0
    noise: float = 0.0


@dataclass
class Row:
    """A sample and what it is a sample of."""

    side: str
    test: str
    drafter: str
    turn: int
    prompt: str
    sample: Sample


class Replay:
    """Knows the text and says it, with probability ``right`` for every token; else a token that is wrong."""

    name = "replay"
    cost: Literal["free", "steps"] = "free"

    def __init__(self, text: np.ndarray, vocab: int, right: float, seed: int = 0) -> None:
        self._text, self._vocab, self._right = text, vocab, right
        self._random = np.random.default_rng(seed)

    def begin(self, sampling: SamplingParams, generator: np.random.Generator | None, row: KVCache) -> None:
        """Nothing to prepare."""

    def draft(self, context: np.ndarray, most: int) -> Draft | None:
        known = self._text[len(context) : len(context) + most]
        wrong = self._random.random(len(known)) >= self._right
        return Draft(((known + wrong) % self._vocab).tolist(), 3) if len(known) else None

    def observe(self, accepted: int) -> None:
        """Nothing to learn."""

    def end(self) -> None:
        """Nothing to give back."""


class Guess(Replay):
    """Any tokens."""

    name = "random"

    def draft(self, context: np.ndarray, most: int) -> Draft | None:  # noqa: ARG002 - Drafter's
        return Draft(self._random.integers(self._vocab, size=most).tolist(), 3)


class Stopwatch:
    """Notes the seconds of every step of an engine."""

    def __init__(self, engine: Engine) -> None:
        self._step = engine.step
        self.seconds: list[float] = []
        engine.step = self.step  # type: ignore[method-assign]

    def step(self, tokens: np.ndarray, cache: KVCache, last: int = 1) -> np.ndarray:
        began = time.perf_counter()
        logits = self._step(tokens, cache, last)
        self.seconds.append(time.perf_counter() - began)
        return logits


class Bench:
    """A model, and generations on it."""

    def __init__(self, model: CompiledModel, new: int) -> None:
        self.model, self.engine, self.new = model, model.engine, new
        self.watch = Stopwatch(model.engine)

    def run(self, ids: Sequence[int], speculator: Speculator | None, **sampling: Any) -> tuple[np.ndarray, Sample]:
        """Text, prompt included, and sample of a generation with drafters of our own, or plain."""
        stats = GenerationStats()
        return self._measured(stats, lambda: generate(
            self.engine, [list(ids)], max_new_tokens=self.new, eos_token_id=None, pool=self.model.pool,
            speculator=speculator, stats=stats, **sampling,
        ))  # fmt: skip

    def ask(self, ids: Sequence[int], speculation: object, **sampling: Any) -> tuple[np.ndarray, Sample]:
        """The same by way of the model's own ``generate``; a mask, because random ids may be padding's."""
        stats = GenerationStats()
        return self._measured(stats, lambda: self.model.generate(
            [list(ids)], [[1] * len(ids)], max_new_tokens=self.new, eos_token_id=None, speculation=speculation,
            stats=stats, **sampling,
        ))  # fmt: skip

    def _measured(self, stats: GenerationStats, run: Callable[[], Any]) -> tuple[np.ndarray, Sample]:
        self.watch.seconds.clear()
        text = run()[0]
        inside = self.watch.seconds[-stats.decode_steps :]  # the others read the prompt
        sample = Sample(stats.decode_tokens, stats.decode_steps)
        sample.decode_ms, sample.step_ms = 1e3 * stats.decode_seconds, 1e3 * sum(inside)
        if stats.speculation is not None:
            told = stats.speculation
            if told.dropped or told.idle:
                raise SystemExit(f"drafting failed: {told.dropped} {told.idle}")
            sample.drafts, sample.drafted, sample.accepted = told.drafts, told.drafted, told.accepted
            sample.draft_ms = 1e3 * told.draft_seconds
        return text, sample

    def speculator(
        self, drafters: list[Drafter], experience: Experience, most: int = 16, fixed: bool = False
    ) -> Speculator:
        return Speculator(drafters, experience, vocab=self.model.spec.vocab, most=most, fixed=fixed)


def compared(engine: Engine, prompt: Sequence[int], plain: np.ndarray, text: np.ndarray, sample: Sample) -> None:
    """Tells ``sample`` whether ``text`` is ``plain``, and how close a choice it was if not."""
    places = np.flatnonzero(plain != text)
    if places.size:
        known = plain[: places[0]]
        sample.same, sample.differs = 0, len(known) - len(prompt)
        sample.gap, sample.noise = closeness(engine, tuple(prompt), known.tobytes())


@lru_cache
def closeness(engine: Engine, prompt: tuple[int, ...], known: bytes) -> tuple[float, float]:
    """How far the two best logits behind the tokens ``known`` are apart, and how far steps of several move them."""
    text = np.frombuffer(known, np.int64)
    logits = logits_behind(engine, prompt, text, 1)
    best = np.argsort(logits)[-2:]
    others = [logits_behind(engine, prompt, text, 1 + length) for length in LENGTHS]
    noise = max(float(np.abs(logits - other)[best].sum()) for other in others)
    return float(logits[best[1]] - logits[best[0]]), noise


def logits_behind(engine: Engine, prompt: Sequence[int], text: np.ndarray, count: int) -> np.ndarray:
    """What follows ``text``, which begins with ``prompt`` and is read ``count`` tokens a step behind it."""
    cache = KVCache(engine.slots, 1, len(text), limit=engine.spec.context)
    logits = read(engine, cache, prompt)
    for start in range(len(prompt), len(text), count):
        part = text[None, start : start + count]
        logits = engine.step(part, cache, part.shape[1])[0, -1].copy()
        cache.advance(part.shape[1])
    return logits


def measured_curves(engine: Engine, context: int, samples: int) -> dict[int, dict[int, float]]:
    """Median seconds of a step of M tokens with the logits of all, behind an eighth of ``context`` and behind it."""
    cache = KVCache(engine.slots, 1, context + STEPS, limit=engine.spec.context)
    tokens = np.random.default_rng(0).integers(engine.spec.vocab, size=(1, STEPS))
    found = {}
    for held in (context // 8, context):
        taken: dict[int, list[float]] = {count: [] for count in range(1, STEPS + 1)}
        cache.truncate(0)
        cache.advance(held)
        for _ in range(samples + 1):
            for count, seconds in taken.items():
                engine.step(tokens[:, :1], cache)  # verification follows plain steps more often than a prompt
                began = time.perf_counter()
                engine.step(tokens[:, :count], cache, count)
                seconds.append(time.perf_counter() - began)
        found[held] = {count: statistics.median(seconds[1:]) for count, seconds in taken.items()}
    return found


# --- exact ------------------------------------------------------------------------------------------------------------
def exact(side: str, args: argparse.Namespace) -> Iterator[Row]:
    """Every prompt, drafter and length, on each artifact."""
    encode = Tokenizer.from_directory(MODEL).encode
    corpus = Corpus(speculative_text.corpus_documents(encode, args.corpus_tokens))
    for case in args.cases:
        recipe, kv, assistant = CASES[case]
        whole, began = case == "int4" and side == "native", time.perf_counter()
        prompts = speculative_text.pieces(encode, args.prompts if whole else args.fewer, SHORTEST, LONGEST)
        with ExitStack() as stack:
            model = stack.enter_context(opened(tiny(args, recipe, kv), side, args))
            draft = stack.enter_context(opened(tiny(args, assistant), side, args))
            early = model.engine.early_exit(args.exit_layers)  # type: ignore[attr-defined]
            stack.callback(early.close)
            bench = Bench(model, args.new)
            vocab = model.spec.vocab
            for index, prompt in enumerate(prompts):
                plain, _ = bench.run(prompt, None)
                drafters: dict[str, Drafter] = {
                    "lookup": PromptLookup(),
                    "suffix": SuffixDrafter(None),
                    "suffix + corpus": SuffixDrafter(corpus),
                    f"exit after {args.exit_layers}": ModelDrafter.early_exit(early),
                    f"draft model {assistant}": ModelDrafter.draft_model(draft.engine, draft.pool),
                    "replay, right": Replay(plain, vocab, 1.0),
                    f"replay, {RIGHT}": Replay(plain, vocab, RIGHT, index),
                    "replay, wrong": Replay(plain, vocab, 0.0),
                    "random": Guess(plain, vocab, 0.0, index),
                }
                for name, drafter in drafters.items():
                    for length in LENGTHS:
                        speculator = bench.speculator([drafter], Experience(), length, fixed=True)
                        text, sample = bench.run(prompt, speculator)
                        compared(bench.engine, prompt, plain, text, sample)
                        yield Row(side, f"{recipe}, {kv} cache", f"{name}, K={length}", 0, str(index), sample)
        print(f"{side}, {recipe}, {kv} cache: {time.perf_counter() - began:.0f} s", file=sys.stderr)


def report_exact(rows: list[Row]) -> None:
    for side, test in unique((row.side, row.test) for row in rows):
        own = [row for row in rows if (row.side, row.test) == (side, test)]
        prompts = len({row.prompt for row in own})
        print(f"\n{side}, {test}: texts of {prompts} prompts that equal the plain greedy one\n")
        print("| drafter | " + " | ".join(f"K = {length}" for length in LENGTHS) + " | accepted |")
        print("|---|" + "---:|" * (len(LENGTHS) + 1))
        for name in unique(row.drafter.rpartition(", ")[0] for row in own):
            cells = []
            of_name = [row.sample for row in own if row.drafter.rpartition(", ")[0] == name]
            for length in LENGTHS:
                found = [row.sample.same for row in own if row.drafter == f"{name}, K={length}"]
                cells.append(f"{sum(found)} / {len(found)}")
            print(f"| {name} | {' | '.join(cells)} | {share(of_name)} |")
        wrong = sorted((row for row in own if not row.sample.same), key=lambda row: -row.sample.gap)
        places = unique((row.prompt, row.sample.differs) for row in wrong)
        print(f"\n{len(wrong)} of {len(own)} texts differ, from {len(places)} places of {prompts} texts on")
        for row in wrong[:5]:
            s = row.sample
            print(
                f"  {row.drafter}, prompt {row.prompt}, token {s.differs}: the two best logits are {s.gap:.2g} apart; "
                f"steps of several tokens move them by {s.noise:.2g}"
            )


# --- text -------------------------------------------------------------------------------------------------------------
def text(side: str, args: argparse.Namespace) -> Iterator[Row]:
    """Completing and editing held-out code, greedily and sampled."""
    with ExitStack() as stack:
        model = stack.enter_context(opened(args.artifact or tiny(args, "int4"), side, args))
        encode = model.tokenizer.encode  # type: ignore[union-attr]
        prompts = speculative_text.prompts(encode, args.prompts)
        corpus = Corpus(speculative_text.corpus_documents(encode, args.corpus_tokens))
        early = model.engine.early_exit(args.exit_layers)  # type: ignore[attr-defined]
        stack.callback(early.close)
        bench = Bench(model, args.new)
        curves = measured_curves(model.engine, 512, 15)
        say_curves(side, curves)
        ways = text_ways(bench, curves, corpus, early, args.exit_layers)
        if args.draft is not None:
            draft = stack.enter_context(opened(drafting(args), side, args))
            ways |= draft_ways(bench, curves, draft)
        (other,) = speculative_text.pieces(encode, 1, 300, 300)
        for greedy in (True, False):
            for way in ways.values():  # the first ones allocate and warm up
                run_way(bench, way, other, greedy, 0)
            for turn in range(args.rounds if greedy else args.sampled_rounds):
                for index, prompt in enumerate(prompts):
                    order = list(ways) if (turn + index) % 2 == 0 else list(reversed(ways))
                    got = {name: run_way(bench, ways[name], prompt.ids, greedy, index) for name in order}
                    plain = got[PLAIN][0]
                    test = f"{prompt.kind}, {'greedy' if greedy else f'temperature {TEMPERATURE}'}"
                    for name, (ids, sample) in got.items():
                        if greedy:
                            compared(bench.engine, prompt.ids, plain, ids, sample)
                        else:
                            sample.same = int((plain == ids).all())
                        yield Row(side, test, name, turn, prompt.name, sample)


def text_ways(
    bench: Bench, curves: dict[int, dict[int, float]], corpus: Corpus, early: Engine, layers: int
) -> dict[str, Way | object]:
    """By name: what makes a speculator, of which each learns for itself, or what ``generate`` is asked for."""

    def alone(make: Callable[[], Drafter]) -> Way:
        experience = Experience(curves)
        return lambda: bench.speculator([make()], experience)

    return {
        PLAIN: lambda: None,
        "auto": "auto",
        "auto + corpus": Speculation(corpus=corpus, required=False),
        "lookup": alone(PromptLookup),
        "suffix": alone(lambda: SuffixDrafter(None)),
        "suffix + corpus": alone(lambda: SuffixDrafter(corpus)),
        f"exit after {layers}": alone(lambda: ModelDrafter.early_exit(early)),
    }


def draft_ways(bench: Bench, curves: dict[int, dict[int, float]], draft: CompiledModel) -> dict[str, Way | object]:
    """A trained draft model: as far as it pays; four tokens at a time, whether it pays or not; behind a lookup."""

    def drafter() -> Drafter:
        return ModelDrafter.draft_model(draft.engine, draft.pool)

    own, fixed, both = Experience(curves), Experience(), Experience(curves)
    return {
        "draft model": lambda: bench.speculator([drafter()], own),
        "draft model, K=4": lambda: bench.speculator([drafter()], fixed, 4, fixed=True),
        "lookup, draft model": lambda: bench.speculator([PromptLookup(), drafter()], both),
    }


def run_way(bench: Bench, way: Any, ids: Sequence[int], greedy: bool, seed: int) -> tuple[np.ndarray, Sample]:
    sampling = {} if greedy else {"do_sample": True, "temperature": TEMPERATURE, "seed": seed}
    return bench.run(ids, way(), **sampling) if callable(way) else bench.ask(ids, way, **sampling)


# --- random -----------------------------------------------------------------------------------------------------------
def random(side: str, args: argparse.Namespace) -> Iterator[Row]:
    """Prompts that mean nothing, plain and ``auto`` in turns: the shipped model, then a larger shape."""
    larger = shaped(args)
    for path, pairs in ((tiny(args, "int4"), args.pairs), (larger, args.larger_pairs)):
        with opened(path, side, args) as model:
            new = args.new if path != larger else args.new // 4
            bench = Bench(model, new)
            rng = np.random.default_rng(0)
            tests = ["tokens, greedy", "tokens, sampled"] + ["text, greedy"] * (model.tokenizer is not None)
            for turn in range(pairs + 1):  # the first ones warm up
                for test in tests:
                    ids = rng.integers(model.spec.vocab, size=64).tolist()
                    if test.startswith("text"):
                        ids = model.tokenizer.encode("".join(map(chr, rng.integers(32, 127, size=128))))  # type: ignore[union-attr]
                    sampling = {"do_sample": True, "seed": turn} if "sampled" in test else {}
                    order = (PLAIN, "auto") if turn % 2 == 0 else ("auto", PLAIN)
                    got = {name: bench.ask(ids, None if name == PLAIN else name, **sampling) for name in order}
                    for name, (found, sample) in got.items():
                        sample.same = int(len(found) == len(got[PLAIN][0]) and (found == got[PLAIN][0]).all())
                        if turn:
                            yield Row(side, f"{model.spec.parameters / 1e6:.0f} M, {test}", name, 0, str(turn), sample)


# --- replay -----------------------------------------------------------------------------------------------------------
def replay(side: str, args: argparse.Namespace) -> Iterator[Row]:
    """A drafter that is right with a known probability, on a larger shape."""
    with opened(shaped(args), side, args) as model:
        bench = Bench(model, args.new)
        curves = measured_curves(model.engine, 128, 5)
        say_curves(side, curves)
        rng = np.random.default_rng(0)
        for turn in range(args.rounds + 1):  # the first one warms up
            prompt = rng.integers(model.spec.vocab, size=64).tolist()
            ways: dict[str, tuple[Experience, int, bool]] = {
                f"{RIGHT}, tuned": (Experience(curves), 16, False),
                f"{RIGHT}, untuned": (Experience(), 16, False),
                **{f"{RIGHT}, K={length}": (Experience(), length, True) for length in args.fixed},
            }
            plain, sample = bench.run(prompt, None)
            if turn:
                yield Row(side, "replay", PLAIN, turn, str(turn), sample)
            for name in ways if turn % 2 == 0 else reversed(ways):
                experience, most, fixed = ways[name]
                drafter = Replay(plain, model.spec.vocab, RIGHT, turn)
                ids, sample = bench.run(prompt, bench.speculator([drafter], experience, most, fixed))
                compared(bench.engine, prompt, plain, ids, sample)
                if turn:
                    yield Row(side, "replay", name, turn, str(turn), sample)


# --- artifacts --------------------------------------------------------------------------------------------------------
def tiny(args: argparse.Namespace, recipe: str, kv: str = "fp32") -> Path:
    """Where the shipped model lies, exported so."""
    return Path(args.work / f"tiny-{recipe}-{kv}")


def drafting(args: argparse.Namespace) -> Path:
    """Where the draft model lies, exported."""
    return Path(args.work / "draft-int8")


def shaped(args: argparse.Namespace) -> Path:
    """The artifact of a larger shape; for ``replay`` one whose every token has a clear successor."""
    return Path(args.artifact or args.work / (args.shape + "-decided" * (args.command == "replay")))


def provide(args: argparse.Namespace) -> None:
    """Exports and tunes what the command needs and is not there yet, in processes of their own."""
    args.work.mkdir(parents=True, exist_ok=True)
    wanted = {
        "exact": [(recipe, kv) for recipe, kv, _ in CASES.values()] + [(other, "fp32") for *_, other in CASES.values()],
        "text": [("int4", "fp32")] * (args.artifact is None),
        "random": [("int4", "fp32")],
        "replay": [],
    }[args.command]
    for recipe, kv in unique(wanted):
        if not tiny(args, recipe, kv).exists():
            cli("export", str(MODEL), str(tiny(args, recipe, kv)), "--recipe", recipe, "--kv", kv, "--no-verify")
    if args.command == "text" and args.draft is not None and not drafting(args).exists():
        cli("export", str(args.draft), str(drafting(args)), "--recipe", "int8", "--no-verify")
    if args.command in ("random", "replay") and args.artifact is None and not shaped(args).exists():
        prepare(args.shape, "int8", shaped(args), decided=args.command == "replay")
    if args.command in ("text", "random") and args.artifact is None and args.tune:
        for path in (tiny(args, "int4"), shaped(args)) if args.command == "random" else (tiny(args, "int4"),):
            if cpu_key(read_machine()) not in tuned(read_manifest(path)):
                cli("tune", str(path), "--threads", str(args.threads), "--seconds", str(args.tune))


def cli(*arguments: str) -> None:
    code = "from ryzen_compile.cli import main; main()"
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=sys.stderr)


def opened(path: Path, side: str, args: argparse.Namespace) -> CompiledModel:
    return ryzen_compile.load(path, threads=args.threads, native=side == "native", digests=False)


def say_curves(side: str, curves: dict[int, dict[int, float]]) -> None:
    for context, curve in curves.items():
        figures = ", ".join(f"{count}: {1e3 * curve[count]:.3g}" for count in (1, 2, 3, 5, 9, 17))
        print(f"{side}, ms of a step of M tokens behind {context}: {figures}", file=sys.stderr)


# --- reports ----------------------------------------------------------------------------------------------------------
def report(rows: list[Row]) -> None:
    """A table of speeds for each session and test; a speed-up is the ratio of two times of one prompt in one turn."""
    for side, test in unique((row.side, row.test) for row in rows):
        own = [row for row in rows if (row.side, row.test) == (side, test)]
        prompts, turns = len({row.prompt for row in own}), len({row.turn for row in own})
        print(f"\n{side}, {test}: {prompts} prompts, {turns} turns\n")
        print("| | speed-up (quartiles) | of sums | accepted | tokens a step | outside of steps | drafting | same |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|")
        for name in unique(row.drafter for row in own):
            samples = [row.sample for row in own if row.drafter == name]
            ratios = speed_ups([row for row in own if row.drafter == name], own)
            whole = total(own, PLAIN).decode_ms / total(own, name).decode_ms
            s = total(own, name)
            print(
                f"| {name} | {quartiles(ratios)} | {whole:.3f} | {share(samples)} | {s.tokens / s.steps:.2f} | "
                f"{100 * (s.decode_ms / s.step_ms - 1):.1f} % | {100 * s.draft_ms / s.step_ms:.1f} % | "
                f"{s.same} / {len(samples)} |"
            )
    print(
        "\nThe speed-up is the median over prompts and turns, of sums that of all time. Outside of steps is what"
        "\ndecoding takes beside the model's steps, drafting its part in that, in % of the steps' time. Same counts the"
        "\ntexts that are the plain one."
    )


def speed_ups(rows: list[Row], among: list[Row]) -> list[float]:
    """Of ``rows`` over the plain generation of the same prompt and turn ``among`` them."""
    plain = {(row.side, row.test, row.turn, row.prompt): row.sample for row in among if row.drafter == PLAIN}
    pairs = ((plain.get((row.side, row.test, row.turn, row.prompt)), row.sample) for row in rows)
    return [base.decode_ms / sample.decode_ms for base, sample in pairs if base is not None]


def total(rows: list[Row], drafter: str) -> Sample:
    """The sums of the samples of ``drafter``."""
    samples = [row.sample for row in rows if row.drafter == drafter]
    return Sample(**{f.name: sum(getattr(sample, f.name) for sample in samples) for f in fields(Sample)})


def quartiles(values: list[float]) -> str:
    if len(values) < 2:
        return ", ".join(f"{value:.3f}" for value in values)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3f} ({low:.3f} - {high:.3f})"


def share(samples: list[Sample]) -> str:
    """Accepted of drafted tokens."""
    drafted = sum(sample.drafted for sample in samples)
    return f"{100 * sum(sample.accepted for sample in samples) / drafted:.0f} %" if drafted else "-"


def unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def append(rows: list[Row], args: argparse.Namespace) -> None:
    """A line for each session, test, drafter and turn, with sums, every speed-up and every difference."""
    versions = read_versions()
    facts = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": read_machine().cpu.name,
        "threads": args.threads,
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("ryzen-compile", "onnxruntime", "numpy")),
        "command": args.command,
    }
    lines = []
    for side, test, drafter, turn in unique((row.side, row.test, row.drafter, row.turn) for row in rows):
        own = [row for row in rows if (row.side, row.test, row.drafter, row.turn) == (side, test, drafter, turn)]
        s = total(own, drafter)
        apart = [(row.prompt, row.sample) for row in own if not row.sample.same]
        lines.append(
            facts
            | {"side": side, "test": test, "drafter": drafter, "turn": turn, "texts": len(own), "same": s.same}
            | {name: getattr(s, name) for name in ("tokens", "steps", "drafts", "drafted", "accepted")}
            | {name: f"{getattr(s, name):.5g}" for name in ("decode_ms", "step_ms", "draft_ms")}
            | {"speed_ups": " ".join(f"{ratio:.3f}" for ratio in speed_ups(own, rows))}
            | {"differences": " ".join(f"{prompt}@{sample.differs}:{sample.gap:.2g}" for prompt, sample in apart)}
        )
    is_new = not DATA.exists()
    with DATA.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(lines)


# --- processes --------------------------------------------------------------------------------------------------------
COMMANDS: dict[str, Callable[[str, argparse.Namespace], Iterator[Row]]] = {
    "exact": exact,
    "text": text,
    "random": random,
    "replay": replay,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of = {name: commands.add_parser(name, help=(run.__doc__ or "").strip()) for name, run in COMMANDS.items()}
    for name, command in of.items():
        command.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
        command.add_argument("--new", type=int, default=NEW[name], help="tokens of a generation")
        command.add_argument("--threads", type=int, default=read_machine().usable_cores)
        command.add_argument("--work", type=Path, default=Path("speculation-work"), help="artifacts, kept and reused")
        command.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
        if name == "exact":
            command.set_defaults(artifact=None)
        else:
            command.add_argument("--artifact", type=Path, help="to use in place of an exported one")
            command.add_argument("--tune", type=float, default=30, help="seconds, for what is exported; 0: not tuned")
        if name in ("exact", "text"):
            command.add_argument("--exit-layers", type=int, default=2)
            command.add_argument("--corpus-tokens", type=int, default=500_000, help="of the files of the training")
        if name in ("random", "replay"):
            command.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b", help="of the larger model")
    of["exact"].add_argument("--prompts", type=int, default=200, help="for the first recipe on native operators")
    of["exact"].add_argument("--fewer", type=int, default=10, help="prompts, for all others")
    of["exact"].add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="recipes and caches")
    of["text"].add_argument("--prompts", type=int, default=32, help="of each kind")
    of["text"].add_argument("--draft", type=Path, help="a draft model's directory, as examples/tiny-python-draft")
    of["text"].add_argument("--rounds", type=int, default=2)
    of["text"].add_argument("--sampled-rounds", type=int, default=1)
    of["random"].add_argument("--pairs", type=int, default=100)
    of["random"].add_argument("--larger-pairs", type=int, default=12, help="of the larger model, with new / 4 tokens")
    of["replay"].add_argument("--rounds", type=int, default=5)
    of["replay"].add_argument("--fixed", type=int, nargs="*", default=[2, 4, 8], help="lengths that are not adapted")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.child:
        for row in COMMANDS[args.command](args.child, args):
            print(json.dumps(asdict(row)), flush=True)
        return
    provide(args)
    rows = []
    for side in args.sides:
        began = time.perf_counter()
        rows += in_child(side)
        print(f"{side}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    report_exact(rows) if args.command == "exact" else report(rows)
    append(rows, args)


def in_child(side: str) -> list[Row]:
    """The samples of one kind of session, from a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", side]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = map(json.loads, done.stdout.splitlines())
    return [Row(**{**values, "sample": Sample(**values["sample"])}) for values in found]


if __name__ == "__main__":
    main()
