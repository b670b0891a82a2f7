"""What the cache's format costs and gains in time and memory, on a decoder shape with random int4 weights.

    python benchmarks/kv_speed.py --shape tinyllama-1.1b --rounds 5 --work kv-work

One artifact per cache format, the weights the same. A round opens each in a process of its own (two thread pools that
spin on the same cores slow each other) and times single steps behind several depths; steps of eight sequences behind
``--batch-depth`` tokens each, with rows of their own and sharing the pages of one prompt; a prompt of ``--prompt``
tokens; and, with ``--requests``, sixteen requests that begin with the same 400 tokens, first without and then with
prefix reuse. Every other round goes backwards. Prints medians over the rounds with their range, and ratios within
rounds; every sample is appended to ``benchmarks/data/kv_speed.csv``.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from random_artifact import prepare

import ryzen_compile
from ryzen_compile.backends.onnxruntime.artifact import slots_of
from ryzen_compile.manifest import read_manifest
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.compiled import CompiledModel
from ryzen_compile.runtime.generate import GenerationStats, read
from ryzen_compile.runtime.layout import token_bytes
from ryzen_compile.shapes import SHAPES
from ryzen_compile.validate.machine import read_machine, read_versions, stream_read_gbps

DATA = Path(__file__).resolve().parent / "data" / "kv_speed.csv"
ROWS, REQUESTS, SHARED, OWN = 8, 16, 400, 24
CHUNK, WARM_UP = 512, 2


def measured(artifact: Path, args: argparse.Namespace) -> dict[str, float]:
    """One sample of everything, in this process; milliseconds by name."""
    rng = np.random.default_rng(args.seed)
    found: dict[str, float] = {}
    with ryzen_compile.load(artifact, threads=args.threads, digests=False) as model:
        engine, spare = model.engine, args.steps + WARM_UP
        ids = rng.integers(model.spec.vocab, size=max(*args.depths, args.batch_depth, args.prompt))
        cache = KVCache(engine.slots, 1, len(ids) + spare, limit=model.spec.context)
        began = time.perf_counter()
        read(engine, cache, ids[: args.prompt].tolist(), chunk=CHUNK)
        found[f"prompt of {args.prompt}"] = 1e3 * (time.perf_counter() - began)
        read(engine, cache, ids.tolist(), known=args.prompt, chunk=CHUNK)
        for depth in sorted(args.depths, reverse=True):
            cache.truncate(depth)
            found[f"step @ {depth}"] = step_ms(model, cache, args.steps, rng)
        cache = KVCache(engine.slots, 1, args.batch_depth, limit=model.spec.context)
        read(engine, cache, ids[: args.batch_depth].tolist(), chunk=CHUNK)
        own = KVCache(engine.slots, ROWS, args.batch_depth + spare, limit=model.spec.context)
        for theirs, ours in zip((*own.keys, *own.values), (*cache.keys, *cache.values), strict=True):
            theirs[:, :, : args.batch_depth] = ours
        own.lengths[:] = args.batch_depth
        found[f"step of {ROWS} @ {args.batch_depth}"] = step_ms(model, own, args.steps, rng)
        shared = cache.fork(ROWS, room=spare)
        found[f"step of {ROWS} of one prompt @ {args.batch_depth}"] = step_ms(model, shared, args.steps, rng)
    return found | (prefixes(artifact, args, rng) if args.requests else {})


def step_ms(model: CompiledModel, cache: KVCache, steps: int, rng: np.random.Generator) -> float:
    """Median milliseconds of a step behind what ``cache`` holds."""
    seconds = []
    for _ in range(steps + WARM_UP):
        tokens = rng.integers(model.spec.vocab, size=(cache.batch, 1))
        began = time.perf_counter()
        model.engine.step(tokens, cache)
        seconds.append(time.perf_counter() - began)
        cache.advance(1)
    return 1e3 * statistics.median(seconds[WARM_UP:])


def prefixes(artifact: Path, args: argparse.Namespace, rng: np.random.Generator) -> dict[str, float]:
    """Requests that begin alike, cold and with prefix reuse, whose tokens have to be the same."""
    with ryzen_compile.load(artifact, threads=args.threads, digests=False) as model:
        ids = rng.integers(model.spec.vocab, size=SHARED)
        own = [rng.integers(model.spec.vocab, size=OWN) for _ in range(REQUESTS)]
        prompts = [np.concatenate((ids, rest)) for rest in own]
        cold, expected = requests(model, prompts)
    with ryzen_compile.load(artifact, threads=args.threads, digests=False, prefix_bytes=1 << 30) as model:
        warm, got = requests(model, prompts)
        if model.prefixes is None or any((a != b).any() for a, b in zip(expected, got, strict=True)):
            raise SystemExit("prefix reuse changed the tokens")
        stats = model.prefixes.stats
    return {
        "first token, cold": statistics.median(cold[1:]),
        "first token, shared prefix": statistics.median(warm[1:]),
        "hits, %": 100 * stats.hits / stats.lookups,
        "tokens reused, %": 100 * stats.hit_rate,
    }


def requests(model: CompiledModel, prompts: list[np.ndarray]) -> tuple[list[float], list[np.ndarray]]:
    """Milliseconds to each request's first token, and the first tokens of each."""
    times, tokens = [], []
    for prompt in prompts:
        stats = GenerationStats()
        tokens.append(model.generate(prompt[None], max_new_tokens=4, eos_token_id=None, stats=stats)[0])
        times.append(1e3 * stats.time_to_first_token)
    return times, tokens


def memory(artifact: Path, tokens: int) -> int:
    """Bytes of one sequence of ``tokens`` tokens, and of the scales that read it."""
    slots = slots_of(read_manifest(artifact))
    fixed = sum(4 * s.kv_heads * (s.head_dim + s.value_dim) for s in slots if s.key_format in ("int8", "int4"))
    return tokens * token_bytes(slots) + fixed


def report(samples: dict[str, list[dict[str, float]]], artifacts: dict[str, Path], say: Callable[[str], None]) -> None:
    first = next(iter(samples))
    say("| | " + " | ".join(samples) + " |")
    say("|---|" + "---:|" * len(samples))
    whole = memory(artifacts[first], 2048)
    cells = [
        f"{memory(path, 2048) / 1e6:.1f} ({100 * (memory(path, 2048) / whole - 1):+.1f} %)"
        for path in artifacts.values()
    ]
    say("| MB at 2,048 tokens, scales included | " + " | ".join(cells) + " |")
    for name in samples[first][0]:
        cells = []
        for taken in samples.values():
            values = [sample[name] for sample in taken]
            cell = f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"
            if taken is not samples[first] and "%" not in name:
                ratios = [a[name] / b[name] for a, b in zip(samples[first], taken, strict=True)]
                cell += f", {statistics.median(ratios):.2f} x"
            cells.append(cell)
        say(f"| {name} | " + " | ".join(cells) + " |")
    for kv, taken in samples.items() if "first token, cold" in samples[first][0] else ():
        ratios = [s["first token, cold"] / s["first token, shared prefix"] for s in taken]
        spread = f"{min(ratios):.1f}-{max(ratios):.1f}"
        say(f"\n{kv}: the first token behind a shared prefix {statistics.median(ratios):.1f} x ({spread}) sooner")


def append(samples: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> None:
    shared = {
        "date": datetime.now(UTC).date(),
        "machine": read_machine().cpu.name,
        "threads": args.threads,
        "shape": args.shape,
        "stream_gbps": f"{stream_read_gbps(threads=args.threads):.1f}",
        "versions": json.dumps(read_versions()),
    }
    rows = [
        {**shared, "kv": kv, "round": index, "test": name, "value": f"{value:.5g}"}
        for kv, taken in samples.items()
        for index, sample in enumerate(taken)
        for name, value in sample.items()
    ]
    is_new = not DATA.exists()
    with DATA.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="tinyllama-1.1b", choices=SHAPES)
    parser.add_argument("--kv", nargs="+", default=["fp32", "int8", "int4"])
    parser.add_argument("--depths", nargs="+", type=int, default=[0, 512, 1024, 1984])
    parser.add_argument("--batch-depth", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--requests", action="store_true", help="also requests that share a prefix")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=read_machine().usable_cores)
    parser.add_argument("--work", type=Path, default=Path("kv-work"), help="artifacts, kept and reused")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.child is not None:
        print(json.dumps(measured(args.child, args)))
        return
    artifacts: dict[str, Path] = {kv: args.work / args.shape / kv for kv in args.kv}
    for kv, path in artifacts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            print(f"exporting {kv}", file=sys.stderr)
            prepare(args.shape, kv, path)
    samples: dict[str, list[dict[str, Any]]] = {kv: [] for kv in args.kv}
    for index in range(args.rounds):
        for kv in args.kv if index % 2 == 0 else reversed(args.kv):
            command = [sys.executable, __file__, *sys.argv[1:], "--child", str(artifacts[kv])]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            samples[kv].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {index + 1}, {kv}", file=sys.stderr)
    report(samples, artifacts, print)
    append(samples, args)


if __name__ == "__main__":
    main()
