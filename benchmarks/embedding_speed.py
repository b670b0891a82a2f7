"""Lookups in codebook tables beside fp32 and int4 tables: time, and memory of a loaded session.

    python benchmarks/embedding_speed.py --rounds 5 --work embedding-work

One model for each table and form: fp32 (Gather), int4 in blocks of 32 (GatherBlockQuantized), and codebooks, named by
BITSxDIM or BITSxDIMxSTAGES, which run once in ONNX Runtime's own operators and once in ours. A round opens each in a
process of its own (two thread pools that spin on the same cores slow each other), looks up every row once, and times
lookups of random rows, other ones each time. Every other round goes backwards. Prints medians over the rounds with
their range, and ratios to fp32 within rounds; after each round its samples are appended to
``benchmarks/data/embedding_speed.csv``. The models are written anew by every run, so that they are those of this
checkout's lowering.

Resident memory is what the process gains (VmRSS) from opening the session until every row has been looked up, a few at
a time; a session of a small table of the same form is open before, so that the runtime itself does not count. A session
has about a megabyte of its own.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from ryzen_compile.backends.onnxruntime import MODEL_NAME, native
from ryzen_compile.validate.machine import read_machine, read_versions

HERE = Path(__file__).resolve().parent
DATA = HERE / "data" / "embedding_speed.csv"
TABLES = ("30522x384", "151936x896", "4096x256")
PLAIN, BLOCKS = "fp32", "int4-g32"
SMALL = "64x256"
AT_ONCE = 64  # rows, where all are looked up
WARM_UP = 3
IDS = 16  # sets of them that take turns
MIB = 1 << 20
STORED, RESIDENT = "stored MiB", "resident MiB"

Samples = dict[tuple[str, str], list[dict[str, float]]]  # by table and side, one for each round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", default=TABLES, help="ROWSxWIDTH")
    parser.add_argument("--codebooks", nargs="+", default=["8x1", "8x2", "8x4x2"], help="BITSxDIM or BITSxDIMxSTAGES")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 512, 8192], help="rows of a lookup")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="for the samples of each figure in a process")
    parser.add_argument("--work", type=Path, default=Path("embedding-work"))
    parser.add_argument("--child", nargs=2, metavar=("TABLE", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measured(*args.child, args)))
        return
    sides = [PLAIN, BLOCKS, *(f"{form} {where}" for form in args.codebooks for where in ("stock", "native"))]
    prepare(sides, args)
    pairs = list(itertools.product(args.tables, sides))
    samples: Samples = {pair: [] for pair in pairs}
    facts = facts_of_run(args)
    for number in range(args.rounds):
        for pair in pairs if number % 2 == 0 else reversed(pairs):
            samples[pair].append(in_child(*pair))
        append(samples, number, facts)
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr)
    report(samples, sides, args)


def prepare(sides: list[str], args: argparse.Namespace) -> None:
    """Writes the models, each in a child, whose memory is given back. Whatever older runs have left there goes."""
    for form in dict.fromkeys(side.split(maxsplit=1)[0] for side in sides):
        for table in dict.fromkeys((*args.tables, SMALL)):
            directory = model_of(table, form, args).parent
            shutil.rmtree(directory, ignore_errors=True)
            rows, width = table.split("x")
            subprocess.run([sys.executable, HERE / "random_table.py", form, rows, width, directory], check=True)


def model_of(table: str, side: str, args: argparse.Namespace) -> Path:
    return args.work / f"{table}-{side.split(maxsplit=1)[0]}" / MODEL_NAME


def in_child(table: str, side: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--child", table, side],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(table: str, side: str, args: argparse.Namespace) -> dict[str, float]:
    """One sample of everything, in this process: microseconds by name, and MiB where the name says so."""
    small = opened(SMALL, side, args)  # stays open
    look_up_all(small, SMALL)
    before = resident_bytes()
    session = opened(table, side, args)
    look_up_all(session, table)
    stored = sum(file.stat().st_size for file in model_of(table, side, args).parent.iterdir())
    found = {STORED: stored / MIB, RESIDENT: (resident_bytes() - before) / MIB}
    random = np.random.default_rng(0)
    for count in args.counts:
        ids = random.integers(rows_of(table), size=(IDS, count))
        found[f"{count} rows"] = median_us(session, ids, args.seconds)
    return found


def opened(table: str, side: str, args: argparse.Namespace) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = args.threads
    path = model_of(table, side, args)
    if not side.endswith("native"):
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session, claims = native.open_claimed(path, options, frozenset(["embedding"]), "auto")
    if claims.left or not claims.claimed:
        raise SystemExit(f"{path} is not native: {claims.to_text()}")
    return session


def rows_of(table: str) -> int:
    return int(table.split("x", maxsplit=1)[0])


def look_up_all(session: Any, table: str) -> None:
    for ids in np.array_split(np.arange(rows_of(table)), -(-rows_of(table) // AT_ONCE)):
        session.run(None, {"ids": ids})


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))


def median_us(session: Any, ids: np.ndarray, seconds: float) -> float:
    """Of runs that take turns with the rows of ``ids``, for so many seconds."""
    taken: list[float] = []
    turns = itertools.cycle([{"ids": row} for row in ids])
    until = time.perf_counter() + seconds
    while len(taken) <= WARM_UP or time.perf_counter() < until:
        feeds = next(turns)
        began = time.perf_counter()
        session.run(None, feeds)
        taken.append(time.perf_counter() - began)
    return 1e6 * statistics.median(taken[WARM_UP:])


def report(samples: Samples, sides: list[str], args: argparse.Namespace) -> None:
    machine, versions = read_machine(), read_versions()
    print(f"{args.threads} threads, {machine.cpu.name}; onnxruntime {versions['onnxruntime']}")
    print(f"microseconds, medians of {args.rounds} rounds (range); then the ratio to fp32 within a round")
    for table in args.tables:
        plain = samples[table, PLAIN]
        headings = [f"{count} rows" for count in args.counts]
        print(f"\n| {table} | {' | '.join(f'{name} | / fp32' for name in headings)} | {STORED} | {RESIDENT} |")
        print("|---|" + "---:|" * (2 * len(headings) + 2))
        for side in sides:
            ours = samples[table, side]
            cells = [cell for name in headings for cell in beside(plain, ours, name)]
            cells += [f"{statistics.median(sample[name] for sample in ours):.2f}" for name in (STORED, RESIDENT)]
            print(f"| {side} | {' | '.join(cells)} |")


def beside(plain: list[dict[str, float]], ours: list[dict[str, float]], name: str) -> Iterator[str]:
    yield spread([sample[name] for sample in ours], 1)
    yield spread([our[name] / fp32[name] for our, fp32 in zip(ours, plain, strict=True)], 2)


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"


def facts_of_run(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": args.threads,
        "cpu": read_machine().cpu.name,
        "onnxruntime": read_versions()["onnxruntime"],
    }


def append(samples: Samples, number: int, facts: dict[str, Any]) -> None:
    """The samples of one round, which are then safe."""
    fresh = not DATA.exists()
    with DATA.open("a", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        if fresh:
            writer.writerow([*facts, "table", "side", "round", "name", "value"])
        for (table, side), rounds in samples.items():
            for name, value in rounds[number].items():
                writer.writerow([*facts.values(), table, side, number, name, f"{value:.4g}"])


if __name__ == "__main__":
    main()
