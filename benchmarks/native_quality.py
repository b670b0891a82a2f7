"""What native operators change of the shipped model's output, against ONNX Runtime's own on the same artifact.

    python benchmarks/native_quality.py --kv fp32,int8

The 4-bit artifact of the shipped model is opened with and without native operators. 200 held-out prompts are continued
by 64 tokens each with both, and where they part is listed with how far apart the stock session's logits of the two
tokens were; and each with itself, its prompts read at once and token by token. Then both are scored on held-out windows
of the model's full context: perplexity of the one over the other's. Results are appended to
``benchmarks/data/native_quality.csv``.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from quality import MODEL, held_out_text, shown, spread_windows

import ryzen_compile
from ryzen_compile.api import export
from ryzen_compile.runtime.compiled import CompiledModel
from ryzen_compile.validate.machine import read_machine, read_versions
from ryzen_compile.validate.quality import EngineScorer, score

DATA = Path(__file__).resolve().parent / "data" / "native_quality.csv"


def greedy(stock: CompiledModel, ours: CompiledModel, args: argparse.Namespace) -> tuple[float, float, float]:
    """Shares of prompts whose continuations are the same to the last token: of both; of stock operators that read the
    prompt at once and token by token; and of native ones that do."""
    prompts = spread_windows(held_out_text(), args.prompt, args.prompts * args.prompt)
    same = np.zeros(3)
    for index, prompt in enumerate(prompts):
        wanted, got = (continued(model, prompt, args.new) for model in (stock, ours))
        slowly = [continued(model, prompt, args.new, prefill_chunk_size=1) for model in (stock, ours)]
        same += [(a == b).all() for a, b in ((got, wanted), (slowly[0], wanted), (slowly[1], got))]
        if (got != wanted).any():
            at = int((got != wanted).argmax())
            logits = stock(wanted[None, :at])[0, -1]
            gap = float(logits[wanted[at]] - logits[got[at]])
            print(f"  prompt {index}: token {at - args.prompt} of {args.new}, stock logits {gap:.5f} apart")
    both, own, native = same / len(prompts)
    return float(both), float(own), float(native)


def continued(model: CompiledModel, prompt: np.ndarray, new: int, **settings: Any) -> np.ndarray:
    ids: np.ndarray = model.generate(
        prompt[None], np.ones_like(prompt[None]), max_new_tokens=new, eos_token_id=None, **settings
    )[0]
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kv", default="fp32,int8")
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument(
        "--threads", type=int, default=1, help="more would spin against each other: two models are open"
    )
    args = parser.parse_args()
    windows = spread_windows(held_out_text(), args.length, args.tokens)
    rows = []
    for kv in args.kv.split(","):
        with tempfile.TemporaryDirectory() as folder:
            last, every = Path(folder) / "last", Path(folder) / "all"
            export(MODEL, last, "int4", kv=kv)
            export(MODEL, every, "int4", kv=kv, logits="all", verify=False)
            with (
                ryzen_compile.load(last, threads=args.threads, native=False) as stock,
                ryzen_compile.load(last, threads=args.threads, native=True) as ours,
            ):
                same = greedy(stock, ours, args)
            with (
                ryzen_compile.load(every, threads=args.threads, native=False) as stock,
                ryzen_compile.load(every, threads=args.threads, native=True) as ours,
            ):
                found = score(EngineScorer(ours.engine), EngineScorer(stock.engine), windows, batch=4)
        print(
            f"{kv} cache: {100 * same[0]:.1f} % of {args.prompts} prompts x {args.new} tokens the same; prompts at "
            f"once or token by token: stock {100 * same[1]:.1f} %, native {100 * same[2]:.1f} %; perplexity ratio "
            f"{shown(found.ratio, '.6f')}, mean KL {shown(found.kl, '.2g')}, top-1 {shown(found.top1, '.3f', 100)} % "
            f"over {found.tokens:,} tokens",
            flush=True,
        )
        rows.append(
            [
                kv,
                *(f"{share:.4f}" for share in same),
                found.tokens,
                *(f"{getattr(found, n).value:.8g}" for n in ("ratio", "kl")),
            ]
        )
    append(rows, args.threads)


def append(rows: list[list[Any]], threads: int) -> None:
    shared = [datetime.now(UTC).date(), read_machine().cpu.name, threads, json.dumps(read_versions())]
    fresh = not DATA.exists()
    with DATA.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        if fresh:
            writer.writerow(
                [
                    "date",
                    "machine",
                    "threads",
                    "versions",
                    "kv",
                    "same",
                    "stock_itself",
                    "native_itself",
                    "tokens",
                    "ratio",
                    "kl",
                ]
            )
        writer.writerows([*shared, *row] for row in rows)


if __name__ == "__main__":
    main()
