"""Ternary linears beside those of 4 bits: the whole decoder, on native and on stock operators.

    python benchmarks/ternary.py --shape tinyllama-1.1b --rounds 5 --work ternary-work

Two artifacts with random weights: recipe int4 (linears of 4 bits in blocks of 128), and the same with every linear
beside the head ternary, activations rounded row by row. Both have a head of 8 bits and a float32 cache. A round opens
the four sessions one after the other, each in a process of its own (two thread pools that spin on the same cores slow
each other), and times steps of one token behind several depths and a prompt. Every other round goes backwards. Prints
medians over the rounds with their range, and ratios within rounds; every sample is appended to
``benchmarks/data/ternary.csv``.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import numpy as np
from native_speed import CHUNK, WARM_UP, median_ms, spread, step_ms
from random_artifact import prepare

import ryzen_compile
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.generate import read
from ryzen_compile.shapes import SHAPES
from ryzen_compile.validate.machine import read_machine, read_versions, stream_read_gbps

DATA = Path(__file__).resolve().parent / "data" / "ternary.csv"
WEIGHTS, OPERATORS = ("int4", "ternary"), ("stock", "native")
SIDES = tuple(" ".join(side) for side in product(OPERATORS, WEIGHTS))
READ = "plain read, GB/s"
Samples = dict[str, list[dict[str, float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--kv", choices=("fp32", "int8", "int4"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="samples of a step in a process")
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 512])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--work", type=Path, default=Path("ternary-work"))
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measured(args)))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    for weights in WEIGHTS:
        if not artifact(args, weights).exists():
            prepare(args.shape, args.kv, artifact(args, weights), ternary=weights == "ternary")
    samples: Samples = {side: [] for side in SIDES}
    for number in range(args.rounds):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            samples[side].append(in_child(side))
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr)
    report(samples, args)
    append(samples, args)


def artifact(args: argparse.Namespace, weights: str) -> Path:
    folder: Path = args.work / f"{args.shape}-{args.kv}-{weights}"
    return folder


def in_child(side: str) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--child", side]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(args: argparse.Namespace) -> dict[str, float]:
    """One sample of everything, in this process: milliseconds by name, and what the memory delivers beside them."""
    operators, weights = args.child.split()
    ids = np.random.default_rng(0).integers(SHAPES[args.shape]["vocab_size"], size=max(*args.depths, args.prompt))
    with ryzen_compile.load(
        artifact(args, weights), threads=args.threads, digests=False, native=operators == "native"
    ) as model:
        engine = model.engine
        cache = KVCache(engine.slots, 1, len(ids) + args.steps + WARM_UP, limit=model.spec.context)
        read(engine, cache, ids.tolist(), chunk=CHUNK)
        found = {
            f"step @ {depth}": step_ms(engine, cache, depth, args.steps, model.spec.vocab)
            for depth in sorted(args.depths, reverse=True)
        }

        def prompt() -> None:
            empty = KVCache(engine.slots, 1, args.prompt, limit=args.prompt)
            read(engine, empty, ids[: args.prompt].tolist(), chunk=CHUNK)

        found[f"prompt of {args.prompt}"] = median_ms(prompt, 2)
    found[READ] = stream_read_gbps(0.3, threads=args.threads)
    return found


def report(samples: Samples, args: argparse.Namespace) -> None:
    machine, versions = read_machine(), read_versions()
    named = ", ".join(f"{name} {versions[name]}" for name in ("ryzen-compile", "onnxruntime"))
    sizes = {weights: (artifact(args, weights) / "model.onnx.data").stat().st_size / 1e6 for weights in WEIGHTS}
    print(f"{args.shape}, {args.kv} cache, {args.threads} threads, {machine.cpu.name}; {named}")
    print(", ".join(f"{weights}: {size:.0f} MB on disk" for weights, size in sizes.items()))
    print(f"medians of {args.rounds} rounds (range); the ratio within a round\n")
    print("| ms | int4 | ternary | int4 / ternary |\n|---|---:|---:|---:|")
    for name, four, ternary in paired(samples):
        ratios = [f / t for f, t in zip(four, ternary, strict=True)]
        print(f"| {name} | {spread(four)} | {spread(ternary)} | {spread(ratios)} |")


def paired(samples: Samples) -> Iterator[tuple[str, list[float], list[float]]]:
    for operators in OPERATORS:
        four, ternary = (samples[f"{operators} {weights}"] for weights in WEIGHTS)
        for name in four[0]:
            yield f"{operators}: {name}", [s[name] for s in four], [s[name] for s in ternary]


def append(samples: Samples, args: argparse.Namespace) -> None:
    machine, versions = read_machine(), read_versions()
    when = datetime.now(UTC).isoformat(timespec="seconds")
    facts = [when, args.shape, args.kv, args.threads, machine.cpu.name, versions["onnxruntime"]]
    fresh = not DATA.exists()
    with DATA.open("a", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        if fresh:
            writer.writerow(["when", "shape", "kv", "threads", "cpu", "onnxruntime", "side", "round", "name", "value"])
        for side, rounds in samples.items():
            for number, values in enumerate(rounds):
                for name, value in values.items():
                    writer.writerow([*facts, side, number, name, f"{value:.4g}"])


if __name__ == "__main__":
    main()
