"""Several paths from one prompt: how fast beside one after the other, and what they are worth where code can be run.

    python benchmarks/paths.py speed --model tiny --sides native stock       3 paths beside 3 calls of generate
    python benchmarks/paths.py speed --model tinyllama-1.1b --rounds 5
    python benchmarks/paths.py worth                                         pass rates of the best of n, and stopping

``speed``: prompts of 256 tokens, 64 and 128 new ones each, sampled. The paths are one ``generate_paths``; beside it,
in turns and in the same process, as many calls of ``generate`` with the paths' seeds, each of which reads the prompt,
as separate calls do, and the same without what the prompt takes, so that both parts are seen. The tokens are the same
on native operators, which is checked. Each kind of session has a process of its own.

``worth``: the shipped model completes a line in a small class or function; the code is then run, with asserts, in the
sandbox. Families of tasks are made by program from names (``TASKS``). 16 paths for each task are sampled once; the best
of n is the best of the first n of them, so all n are compared on the same paths. Then the same search with
``stop="first"``, and again with votes: majorities of 16 and of as many as ``stop="confident"`` takes.

Rows are appended to ``benchmarks/data/paths_speed.csv`` and ``paths_worth.csv``.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from random_artifact import prepare

import ryzen_compile
from ryzen_compile.api import export
from ryzen_compile.config import find_recipe
from ryzen_compile.runtime.compiled import CompiledModel
from ryzen_compile.runtime.generate import GenerationStats
from ryzen_compile.runtime.paths.program import UnitTests
from ryzen_compile.runtime.paths.sandbox import Limits
from ryzen_compile.runtime.paths.settings import path_seed
from ryzen_compile.runtime.paths.verdict import Verdict
from ryzen_compile.shapes import SHAPES
from ryzen_compile.validate.machine import read_machine, read_versions

DATA = Path(__file__).resolve().parent / "data"
SHIPPED = Path(__file__).resolve().parent.parent / "examples" / "tiny-python-lm"
SIDES = ("native", "stock")
PROMPT = 256
COUNTS = (1, 2, 4, 8, 16)
LIMITS = Limits(seconds=20, cpu_seconds=2)


# --- speed ------------------------------------------------------------------------------------------------------------
def speed(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds of the paths and of the calls, for each number of new tokens and each round."""
    (side,) = args.sides
    with ryzen_compile.load(artifact(args), threads=args.threads, native=side == "native", digests=False) as model:
        rng = np.random.default_rng(0)
        prompt = rng.integers(3, model.spec.vocab, PROMPT)
        for new in args.new:
            for turn in range(args.rounds + 1):  # the first one warms up
                sides = (together, one_by_one) if turn % 2 else (one_by_one, together)
                found = {run.__name__: run(model, prompt, new, args.paths, turn) for run in sides}
                paths, calls = found["together"], found["one_by_one"]
                if side == "native" and paths["tokens"] != calls["tokens"]:
                    sys.exit("a path differs from the same one alone")
                if turn:
                    yield {
                        "model": args.model,
                        "side": side,
                        "paths": args.paths,
                        "new": new,
                        "turn": turn,
                        "together_s": paths["seconds"],
                        "one_by_one_s": calls["seconds"],
                        "together_decode_s": paths["decode"],
                        "one_by_one_decode_s": calls["decode"],
                        "ratio": calls["seconds"] / paths["seconds"],
                        "decode_ratio": calls["decode"] / paths["decode"],
                        "same": paths["tokens"] == calls["tokens"],
                    }


def together(model: CompiledModel, prompt: np.ndarray, new: int, count: int, seed: int) -> dict[str, Any]:
    began = time.perf_counter()
    result = model.generate_paths(prompt, count, seed=seed, vote="best", max_new_tokens=new, eos_token_id=None)
    seconds = time.perf_counter() - began
    tokens = [list(path.tokens) for path in result.paths]
    return {"seconds": seconds, "decode": seconds - result.totals.prefill_seconds, "tokens": tokens}


def one_by_one(model: CompiledModel, prompt: np.ndarray, new: int, count: int, seed: int) -> dict[str, Any]:
    tokens, prefill = [], 0.0
    began = time.perf_counter()
    for index in range(count):
        stats = GenerationStats()
        given = {"max_new_tokens": new, "eos_token_id": None, "do_sample": True, "seed": path_seed(seed, index)}
        tokens.append(model.generate(prompt[None], stats=stats, **given)[0, len(prompt) :].tolist())
        prefill += stats.prefill_seconds
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "decode": seconds - prefill, "tokens": tokens}


def report_speed(rows: list[dict[str, Any]]) -> None:
    print("\n| session | new tokens | together, s | one by one, s | faster (range) | behind the prompt | same tokens |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    groups = defaultdict(list)
    for row in rows:
        groups[row["side"], row["new"]].append(row)
    for (side, new), own in groups.items():
        median = {
            name: statistics.median(row[name] for row in own) for name in own[0] if isinstance(own[0][name], float)
        }
        ratios = [row["ratio"] for row in own]
        print(
            f"| {side} | {new} | {median['together_s']:.3f} | {median['one_by_one_s']:.3f} | "
            f"{median['ratio']:.2f} ({min(ratios):.2f} - {max(ratios):.2f}) | {median['decode_ratio']:.2f} | "
            f"{sum(row['same'] for row in own)} / {len(own)} |"
        )


# --- worth ------------------------------------------------------------------------------------------------------------
NOUNS = ["name", "value", "path", "size", "title", "level", "key", "mode"]
NOUNS += ["count", "width", "height", "color", "state", "label", "index", "node"]
CLASSES = ["Point", "Entry", "Record", "Item", "Token", "Frame", "Header", "Section", "Option", "Block"]


def class_of(kind: str, *fields: str) -> str:
    lines = "".join(f"        self.{field} = {field}\n" for field in fields)
    return f"class {kind}:\n\n    def __init__(self, {', '.join(fields)}):\n{lines}\n"


def holder(kind: str, field: str, empty: str, rest: str) -> str:
    return f"class {kind}:\n\n    def __init__(self):\n        self.{field} = {empty}\n\n{rest}"


def task(family: str, kind: str, a: str, b: str) -> tuple[str, str]:
    """A prompt to complete with a line, and tests of the result."""
    made = f"one = {kind}()\n"
    return {
        "getter": (
            f"{class_of(kind, a, b)}    def get_{b}(self):\n        return",
            f"assert {kind}(1, 2).get_{b}() == 2\nassert {kind}(3, 4).get_{b}() == 4",
        ),
        "setter": (
            f"{class_of(kind, a, b)}    def set_{b}(self, {b}):\n       ",
            f"one = {kind}(1, 2)\none.set_{b}(7)\nassert (one.{a}, one.{b}) == (1, 7)",
        ),
        "property": (
            f"{class_of(kind, a, b)}    @property\n    def first(self):\n        return",
            f"assert {kind}(1, 2).first == 1\nassert {kind}(3, 4).first == 3",
        ),
        "length": (
            holder(kind, f"{a}s", "[]", f"    def append(self, {a}):\n        self.{a}s.append({a})\n\n")
            + "    def __len__(self):\n        return",
            f"{made}assert len(one) == 0\none.append(3)\nassert len(one) == 1",
        ),
        "item": (
            holder(kind, f"{a}s", "{}", f"    def __setitem__(self, key, value):\n        self.{a}s[key] = value\n\n")
            + "    def __getitem__(self, key):\n        return",
            f"{made}one[1] = 5\none[2] = 6\nassert (one[1], one[2]) == (5, 6)",
        ),
        "append": (
            holder(kind, f"{a}s", "[]", f"    def add_{a}(self, {a}):\n        self.{a}s."),
            f"{made}one.add_{a}(4)\none.add_{a}(5)\nassert one.{a}s == [4, 5]",
        ),
        "clear": (
            holder(kind, f"{a}s", "[1]", f"    def clear(self):\n        self.{a}s"),
            f"{made}one.clear()\nassert not one.{a}s",
        ),
        "join": (f"def joined({a}s):\n    return ', '.", "assert joined(['a', 'b']) == 'a, b'"),
        "equal": (
            f"{class_of(kind, a)}    def __eq__(self, other):\n        return",
            f"assert {kind}(1) == {kind}(1)\nassert not {kind}(1) == {kind}(2)",
        ),
    }[family]


FAMILIES = ("getter", "setter", "property", "length", "item", "append", "clear", "join", "equal")


class Remembered:
    """A verifier that runs equal texts once: a small model writes the same line often."""

    waits = True

    def __init__(self, verifier: UnitTests) -> None:
        self.verify = cache(verifier.verify)


def worth(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each task: which of the paths pass, and what the searches that stop took and found."""
    rng = random.Random(args.seed)
    tasks = [(family, *rng.sample(NOUNS, 2), rng.choice(CLASSES)) for family in FAMILIES for _ in range(args.tasks)]
    given = {"max_new_tokens": 20, "temperature": args.temperature, "top_k": 0, "stop_strings": ["\n"]}
    with ryzen_compile.load(artifact(args), threads=args.threads, digests=False) as model:
        for number, (family, a, b, kind) in enumerate(tasks):
            prompt, tests = task(family, kind, a, b)
            verifier = Remembered(UnitTests(tests, before=prompt, limits=LIMITS))
            search = {"n": max(COUNTS), "seed": number, "vote": "best", "verifier": verifier, **given}
            whole = model.generate_paths(prompt, **search)
            first = model.generate_paths(prompt, stop="first", wave=args.wave, **search)
            votes = {"n": max(COUNTS), "seed": number, **given}
            majority = model.generate_paths(prompt, **votes)
            confident = model.generate_paths(prompt, stop="confident", wave=args.wave, **votes)
            likely = model.generate_paths(prompt, **{**votes, "vote": "best"})
            yield {
                "family": family,
                "task": number,
                "passed": "".join(str(int(path.verdict is not None and path.verdict.passed)) for path in whole.paths),
                "first_paths": first.totals.paths,
                "first_tokens": first.totals.tokens,
                "whole_tokens": whole.totals.tokens,
                "first_passed": int(passes(first.winner and first.winner.verdict)),
                "majority_passed": int(passes(verifier.verify(majority.text))),
                "confident_passed": int(passes(verifier.verify(confident.text))),
                "confident_paths": confident.totals.paths,
                "likely_passed": int(passes(verifier.verify(likely.text))),
            }


def passes(verdict: Verdict | None) -> bool:
    return verdict is not None and verdict.passed


def report_worth(rows: list[dict[str, Any]]) -> None:
    print("\n| family | one path passes |", *(f"best of {n} |" for n in COUNTS))
    print("|---|---:|", *("---:|" for _ in COUNTS))
    for family in (*FAMILIES, "all"):
        own = [row for row in rows if family in (row["family"], "all")]
        if not own:
            continue
        single = statistics.mean(int(one) for row in own for one in row["passed"])
        found = [sum("1" in row["passed"][:n] for row in own) for n in COUNTS]
        shown = (f"{100 * k / len(own):.0f} % ({wilson(k, len(own))}) |" for k in found)
        print(f"| {family}, {len(own)} tasks | {100 * single:.0f} % |", *shown)
    total, most = len(rows), max(COUNTS)
    whole = sum("1" in row["passed"] for row in rows)
    for name, passed, paths in (
        (f"best of {most}, all sampled", whole, most * total),
        ('stop="first"', sum(row["first_passed"] for row in rows), sum(row["first_paths"] for row in rows)),
        (f"majority of {most}, nothing run", sum(row["majority_passed"] for row in rows), most * total),
        ('stop="confident"', sum(row["confident_passed"] for row in rows), sum(row["confident_paths"] for row in rows)),
        (f"likeliest of {most}, nothing run", sum(row["likely_passed"] for row in rows), most * total),
    ):
        share = paths / (most * total)
        print(f"{name}: {passed} of {total} pass ({wilson(passed, total)}), {100 * share:.0f} % of the samples")
    tokens = sum(row["first_tokens"] for row in rows) / sum(row["whole_tokens"] for row in rows)
    differ = sum(row["first_passed"] != int("1" in row["passed"]) for row in rows)
    apart = sum(row["majority_passed"] != row["confident_passed"] for row in rows)
    print(f'stop="first" sampled {100 * tokens:.0f} % of the tokens; tasks whose result differs: {differ};')
    print(f'tasks where stop="confident" passes and the whole majority does not, or the other way: {apart}')


def wilson(passed: int, total: int, z: float = 1.96) -> str:
    """The 95 % interval of a rate, in per cent."""
    rate, spread = passed / total, z * z / total
    middle = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / total + spread / total / 4) / (1 + spread)
    return f"{100 * (middle - half):.0f} - {100 * (middle + half):.0f}"


# --- processes --------------------------------------------------------------------------------------------------------
def artifact(args: argparse.Namespace) -> Path:
    """Made where it is not there yet."""
    place: Path = args.artifact or args.work / args.model
    if not place.exists():
        args.work.mkdir(exist_ok=True)
        if args.model == "tiny":
            export(SHIPPED, place, find_recipe("int4"), verify=False)
        else:
            prepare(args.model, args.kv, place)
    return place


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for run in (speed, worth):
        command = commands.add_parser(run.__name__, help=(run.__doc__ or "").strip())
        command.add_argument("--model", choices=("tiny", *SHAPES), default="tiny")
        command.add_argument("--artifact", type=Path, help="to use in place of an exported one")
        command.add_argument("--kv", choices=("fp32", "int8"), default="fp32", help="the larger shape's cache")
        command.add_argument("--work", type=Path, default=Path("paths-work"), help="artifacts, kept and reused")
        command.add_argument("--threads", type=int, default=read_machine().usable_cores)
        command.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    of = commands.choices
    of["speed"].add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    of["speed"].add_argument("--paths", type=int, default=3)
    of["speed"].add_argument("--new", type=int, nargs="+", default=[64, 128])
    of["speed"].add_argument("--rounds", type=int, default=5)
    of["worth"].add_argument("--tasks", type=int, default=12, help="of each family")
    of["worth"].add_argument("--temperature", type=float, default=0.8)
    of["worth"].add_argument("--wave", type=int, default=4)
    of["worth"].add_argument("--seed", type=int, default=0, help="of the tasks' names")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.child:
        for row in speed(args):
            print(json.dumps(row), flush=True)
        return
    if args.command == "worth":
        rows = []
        for row in worth(args):
            rows.append(row)
            print(f"{row['task']} {row['family']}: {row['passed']}", file=sys.stderr)
        report_worth(rows)
    else:
        artifact(args)
        rows = [row for side in args.sides for row in in_child(side)]
        report_speed(rows)
    append(args.command, rows)


def in_child(side: str) -> list[dict[str, Any]]:
    """The rows of one kind of session, from a process of its own: two pools that spin slow each other."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", "--sides", side]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return list(map(json.loads, done.stdout.splitlines()))


def append(command: str, rows: Sequence[dict[str, Any]]) -> None:
    versions = read_versions()
    facts = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": read_machine().cpu.name,
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("ryzen-compile", "onnxruntime", "numpy")),
    }
    data = DATA / f"paths_{command}.csv"
    is_new = not data.exists()
    with data.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*facts, *rows[0]], lineterminator="\n")
        if is_new:
            writer.writeheader()
        for row in rows:
            numbers = {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in row.items()}
            writer.writerow(facts | numbers)


if __name__ == "__main__":
    main()
