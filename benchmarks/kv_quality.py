"""What quantized and bounded caches keep of the shipped model's quality.

    python benchmarks/kv_quality.py ratios --kv fp32,int8,int4,auto,int4-g32
    python benchmarks/kv_quality.py greedy --kv int8
    python benchmarks/kv_quality.py stream --kv fp32,int8

``ratios`` scores each cache on held-out windows of the model's full context against the model in float32, with the
bytes that a token takes. ``greedy`` continues 200 held-out prompts by 64 tokens with a float32 cache and another one,
and lists where they part and how far apart the float32 logits of the two tokens were. ``stream`` reads 20,000 held-out
tokens through a window, counts the cache's bytes, and compares the perplexity of every 1,000 tokens with that of the
model itself reading what a window holds anew for every few tokens. Results are appended to
``benchmarks/data/kv_quality.csv``. Formats with a group run on the eager backend, the others on ONNX Runtime.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from quality import MODEL, held_out_text, shown, spread_windows

import ryzen_compile
from ryzen_compile.api import export, optimize, read_source
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.compiled import CompiledModel
from ryzen_compile.runtime.layout import token_bytes
from ryzen_compile.runtime.tokenizer import Tokenizer
from ryzen_compile.validate.machine import read_machine, read_versions
from ryzen_compile.validate.quality import EngineScorer, Estimate, ModelScorer, score

DATA = Path(__file__).resolve().parent / "data" / "kv_quality.csv"
SINKS = 4


@contextmanager
def compiled(kv: str, threads: int, **settings: Any) -> Iterator[CompiledModel]:
    """The shipped model in float32 with such a cache."""
    if "-g" in kv or kv == "k8v4":
        with optimize(MODEL, "fp32", kv=kv, backend="eager", **settings) as model:
            yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "artifact"
        export(MODEL, out, "fp32", kv=kv, **settings)
        with ryzen_compile.load(out, threads=threads) as model:
            yield model


def ratios(args: argparse.Namespace) -> list[dict[str, Any]]:
    windows = spread_windows(held_out_text(), args.length, args.tokens)
    reference = ModelScorer(read_source(MODEL).model)
    print(f"{windows.size:,} held-out tokens in {len(windows)} windows of {args.length}\n")
    print("| cache | bytes per token | saved, % | mean KL, nats per token | top-1, % | perplexity ratio |")
    print("|---|---:|---:|---:|---:|---:|")
    rows = []
    whole = None
    for kv in args.kv.split(","):
        with compiled(kv, args.threads, logits="all") as model:
            taken = token_bytes(model.engine.slots)
            quality = score(EngineScorer(model.engine), reference, windows, batch=4)
            whole = whole or sum(4 * s.kv_heads * (s.head_dim + s.value_dim) for s in model.engine.slots)
        saved = 100 * (1 - taken / whole)
        cells = shown(quality.kl, ".2g"), shown(quality.top1, ".2f", 100), shown(quality.ratio, ".5f")
        print(f"| `{kv}` | {taken:,} | {saved:.1f} | {' | '.join(cells)} |", flush=True)
        row = {"test": "ratios", "kv": kv, "tokens": quality.tokens, "bytes_per_token": taken}
        for name in ("kl", "top1", "ratio"):
            estimate: Estimate = getattr(quality, name)
            row |= {name: f"{estimate.value:.8g}", f"{name}_se": f"{estimate.error:.4g}"}
        rows.append(row)
    return rows


def greedy(args: argparse.Namespace) -> list[dict[str, Any]]:
    prompts = spread_windows(held_out_text(), args.prompt, args.prompts * args.prompt)
    with compiled("fp32", args.threads) as plain:
        expected = [
            plain.generate(p[None], np.ones_like(p[None]), max_new_tokens=args.new, eos_token_id=None)[0]
            for p in prompts
        ]
        rows = []
        for kv in args.kv.split(","):
            parted = []
            with compiled(kv, args.threads) as other:
                for index, (prompt, wanted) in enumerate(zip(prompts, expected, strict=True)):
                    got = other.generate(
                        prompt[None], np.ones_like(prompt[None]), max_new_tokens=args.new, eos_token_id=None
                    )[0]
                    if (got != wanted).any():
                        parted.append((index, int((got != wanted).argmax()), got))
            same = 1 - len(parted) / len(prompts)
            print(f"{kv}: {100 * same:.1f} % of {len(prompts)} prompts x {args.new} tokens are the float32 cache's")
            for index, at, got in parted:
                logits = plain(expected[index][None, :at])[0, -1]
                gap = float(logits[expected[index][at]] - logits[got[at]])
                print(f"  prompt {index}: token {at - args.prompt} of {args.new}, float32 logits {gap:.4f} apart")
            rows.append({"test": "greedy", "kv": kv, "tokens": len(prompts) * args.new, "same": f"{same:.4f}"})
    return rows


def stream(args: argparse.Namespace) -> list[dict[str, Any]]:
    ids = np.array(Tokenizer.from_directory(MODEL).encode(held_out_text())[: args.tokens], dtype=np.int64)
    anew = recomputed(ids, args.window, args.stride)
    rows = []
    for kv in args.kv.split(","):
        with compiled(kv, args.threads, logits="last", window=args.window, sinks=SINKS) as model:
            own, sizes = streamed(model, ids)
        ratio = thousands(own) - thousands(anew)
        slope, error = trend(ratio)
        print(f"\n{kv}: {len(ids):,} tokens, window {args.window}, {SINKS} sinks; cache bytes {sorted(sizes)}")
        print(
            "perplexity over the recomputed window's, per 1,000 tokens: "
            + " ".join(f"{math.exp(r):.3f}" for r in ratio)
        )
        print(f"all: {math.exp(ratio.mean()):.4f}; log ratio's trend per 1,000 tokens: {slope:+.5f} ± {error:.5f}")
        rows.append(
            {
                "test": "stream",
                "kv": kv,
                "tokens": len(ids),
                "cache_bytes": max(sizes),
                "ratio": f"{math.exp(ratio.mean()):.6f}",
                "trend": f"{slope:.6f}",
                "trend_se": f"{error:.6f}",
            }
        )
    return rows


def streamed(model: CompiledModel, ids: np.ndarray) -> tuple[np.ndarray, set[int]]:
    """Negative log-likelihood of every token but the first, and every size that the cache had."""
    policy = model.stream
    if policy is None:
        raise SystemExit("the model was made without a window")
    cache = KVCache(model.engine.slots, 1, policy.capacity, limit=model.spec.context)
    found = np.empty(len(ids) - 1)
    sizes = set()
    for at in range(len(ids) - 1):
        policy.make_room(cache, 1)
        logits = model.engine.step(ids[None, at : at + 1], cache)[0, -1].astype(np.float64)
        cache.advance(1)
        sizes.add(cache.bytes)
        top = logits.max()
        found[at] = top + math.log(np.exp(logits - top).sum()) - logits[ids[at + 1]]
    return found, sizes


def recomputed(ids: np.ndarray, window: int, stride: int) -> np.ndarray:
    """The same of the model itself, which reads at least ``window`` tokens anew for every ``stride`` of them."""
    scorer = ModelScorer(read_source(MODEL).model)
    found = np.empty(len(ids) - 1)
    for begin in range(0, len(ids) - 1, stride):
        first = max(0, begin - window)
        targets = ids[begin + 1 : begin + 1 + stride]
        logits = scorer.logits(ids[None, first : begin + len(targets)])[0, begin - first :].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found[begin : begin + len(targets)] = -log[np.arange(len(targets)), targets]
    return found


def thousands(nll: np.ndarray) -> np.ndarray:
    whole = len(nll) // 1000 * 1000
    means: np.ndarray = nll[:whole].reshape(-1, 1000).mean(axis=1)
    return means


def trend(values: np.ndarray) -> tuple[float, float]:
    """Least-squares slope and its standard error."""
    x = np.arange(len(values)) - (len(values) - 1) / 2
    slope = float(x @ values / (x @ x))
    rest = values - values.mean() - slope * x
    return slope, float(np.sqrt(rest @ rest / (len(values) - 2) / (x @ x)))


def append(rows: list[dict[str, Any]], threads: int) -> None:
    fields = ["date", "machine", "threads", "test", "kv", "tokens", "bytes_per_token", "kl", "kl_se", "top1", "top1_se",
              "ratio", "ratio_se", "same", "cache_bytes", "trend", "trend_se", "versions"]  # fmt: skip
    shared = {
        "date": datetime.now(UTC).date(),
        "machine": read_machine().cpu.name,
        "threads": threads,
        "versions": json.dumps(read_versions()),
    }
    is_new = not DATA.exists()
    with DATA.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows({**shared, **row} for row in rows)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("test", choices=["ratios", "greedy", "stream"])
    parser.add_argument("--kv", default="fp32,int8,int4,auto,k8v4,int8-g32,int4-g32,int4-g64")
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument("--threads", type=int, default=read_machine().usable_cores)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    append({"ratios": ratios, "greedy": greedy, "stream": stream}[args.test](args), args.threads)


if __name__ == "__main__":
    main()
