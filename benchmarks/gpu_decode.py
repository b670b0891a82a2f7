"""A whole decoder on a GPU: the Triton backend in bf16 and with 4-bit weights, beside Hugging Face eager in bf16.

    python benchmarks/gpu_decode.py                      TinyLlama-1.1B's shape, random weights, batch 1

Engines are sampled in turns within one process, as ``bench`` does. GB/s are the weights that a token reads times tokens
per second; their share is of a plain copy on this GPU in the same run. The first tokens of the texts are compared with
those of Hugging Face in float32. Prints a table; samples are appended to ``benchmarks/data/gpu_decode.csv``.
"""

from __future__ import annotations

import argparse
import csv
import gc
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ryzen_compile.api import rewrite
from ryzen_compile.backends.triton import TritonBackend
from ryzen_compile.config import find_recipe
from ryzen_compile.errors import UnsupportedError
from ryzen_compile.kernels import probe
from ryzen_compile.runtime.engine import Engine
from ryzen_compile.runtime.generate import generate
from ryzen_compile.shapes import SHAPES, random_model
from ryzen_compile.validate.huggingface import HuggingFaceEager
from ryzen_compile.validate.latency import Workload, measure
from ryzen_compile.validate.machine import read_versions

DATA = Path(__file__).resolve().parent / "data" / "gpu_decode.csv"
RECIPES = {
    "triton bf16": ("fp32", "fp32"),
    "triton int4": ("int4", "fp32"),
    "triton int4, int8 cache": ("int4", "int8"),
}
BASELINE = "huggingface"
SAME = 16  # tokens of a text that are compared
HEAD = (
    "\n| test | engine | tok/s, median (min - max) | GB/s of weights | of the copy | x Hugging Face |\n"
    "|---|---|---|---:|---:|---:|"
)


def weight_bytes(model: Any, recipe: str) -> float:
    """That one token reads: all but the table of tokens; 4 bits and a float32 scale for each 128, 8 in the head."""
    table, top = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    head = top.numel()
    body = sum(p.numel() for p in model.parameters()) - table.numel() - (head if top is not table else 0)
    return 2.0 * (body + head) if recipe == "fp32" else body * (0.5 + 4 / 128) + head * (1 + 4 / 128)


def named(engine: Engine, name: str) -> Engine:
    engine.name = name
    return engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--depths", type=int, nargs="+", default=[16, 512, 1900])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path, default=DATA)
    args = parser.parse_args()
    lack, remedy = probe()
    if lack:
        raise UnsupportedError(f"the Triton backend cannot be measured here: {lack}", hint=remedy)
    from ryzen_compile.kernels.bench import measure_limits

    device = torch.device("cuda", torch.cuda.current_device())
    copy = measure_limits(device).copy
    print(f"{torch.cuda.get_device_name()}; plain copy {copy:.0f} GB/s")
    model = random_model(args.shape)
    failures: list[str] = []
    engines: dict[str, Engine] = {}
    for name in RECIPES:
        try:
            engines[name] = made(model, name)
        except (RuntimeError, ValueError) as error:
            failures.append(f"{name}: {error}".splitlines()[0])
        gc.collect()
    exact = first_tokens(HuggingFaceEager(model.to(device)))
    engines[BASELINE] = named(HuggingFaceEager(model.to(torch.bfloat16)), BASELINE)
    for name, engine in list(engines.items()):
        try:
            same = int((first_tokens(engine) == exact).cumprod().sum())
            print(f"{name}: the first {same} of {len(exact)} tokens are those of Hugging Face in float32")
        except (RuntimeError, ValueError) as error:
            failures.append(f"{name}: {error}".splitlines()[0])
            del engines[name]
    sizes = {name: weight_bytes(model, RECIPES.get(name, ("fp32", ""))[0]) for name in engines}
    print(HEAD)
    for workload in [*(Workload("tg", args.tokens, depth) for depth in args.depths), Workload("pp", 512)]:
        timings = measure(list(engines.values()), [workload], args.repeats)
        report(timings, sizes, copy)  # what is measured is kept, whatever comes after it
        append(timings, sizes, copy, args.csv)
    for failure in failures:
        print(f"FAILED {failure}")
    sys.exit(bool(failures))


def made(model: Any, name: str) -> Engine:
    recipe, kv = RECIPES[name]
    settings = {"kv": kv} | ({"method": "rtn"} if recipe != "fp32" else {})
    program, _ = rewrite(model, find_recipe(recipe, **settings), backend="triton", verify=False)
    return named(TritonBackend().compile(program, "bf16"), name)


def first_tokens(engine: Engine) -> Any:
    """What follows a short prompt, greedily."""
    return generate(engine, [[5, 17, 42]], max_new_tokens=SAME, eos_token_id=None)[0, 3:]


def report(timings: list[Any], sizes: dict[str, float], copy: float) -> None:
    for timing in timings:
        rates = timing.rates
        middle = statistics.median(rates)
        base = next(t for t in timings if t.engine == BASELINE and t.workload == timing.workload)
        is_decode = timing.workload.kind == "tg"
        speed = middle * sizes[timing.engine] / 1e9 if is_decode else 0.0
        print(
            f"| {timing.workload.name} | {timing.engine} | {middle:.1f} ({min(rates):.1f} - {max(rates):.1f}) | "
            f"{f'{speed:.0f} | {100 * speed / copy:.1f} %' if is_decode else '- | -'} | "
            f"{middle / statistics.median(base.rates):.2f} |",
            flush=True,
        )


def append(timings: list[Any], sizes: dict[str, float], copy: float, file: Path) -> None:
    versions = read_versions()
    facts = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "ryzen-compile")),
        "copy_gbps": f"{copy:.6g}",
    }
    lines = [
        facts
        | {"engine": t.engine, "test": t.workload.name, "weight_bytes": f"{sizes[t.engine]:.6g}"}
        | {"tokens_per_s": " ".join(f"{rate:.6g}" for rate in t.rates)}
        for t in timings
    ]
    is_new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(lines[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
