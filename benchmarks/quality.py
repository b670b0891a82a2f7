"""What each recipe keeps of the shipped model's quality, on the standard-library modules held out from its training.

    python benchmarks/quality.py --recipes int8,int4,fp32
    python benchmarks/quality.py --recipes int4 --methods rtn,mse,gptq

Exports ``examples/tiny-python-lm`` once per recipe (and per method, in place of the recipe's own) and scores the
artifact, as it generates, against the model in float32 on the same windows. Prints a Markdown table; each value stands
beside its standard error, windows being the samples. Appends them to ``benchmarks/data/quality.csv``.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

import ryzen_compile
from ryzen_compile.api import export, read_source
from ryzen_compile.config import RECIPES, Recipe, find_recipe
from ryzen_compile.runtime.tokenizer import Tokenizer
from ryzen_compile.text import digest, token_windows
from ryzen_compile.train.config import read_config
from ryzen_compile.train.documents import read_corpus
from ryzen_compile.validate.machine import read_machine, read_versions
from ryzen_compile.validate.quality import EngineScorer, Estimate, ModelScorer, Quality, score

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny-python-lm"
TRAINING = ROOT / "examples" / "configs" / "tiny-python-lm.yaml"
DATA = Path(__file__).resolve().parent / "data" / "quality.csv"
END = "<|endoftext|>"  # between modules, as in training


@dataclass(frozen=True)
class Result:
    """``size`` is the graph and its weights on disk; ``bits`` that per parameter, a tied table counted once."""

    recipe: str
    method: str
    size: int
    bits: float
    quality: Quality


def held_out_text() -> str:
    """The modules that the training held out, of the Python that runs this."""
    corpus = read_corpus(read_config(TRAINING).data)
    return END.join(document.text for document in sorted(corpus.validation, key=lambda document: document.name))


def spread_windows(text: str, length: int, tokens: int) -> np.ndarray:
    """``(n, length)`` windows that hold ``tokens`` tokens, taken evenly from the whole text: from every module."""
    ids = Tokenizer.from_directory(MODEL).encode(text)
    windows = token_windows(text, lambda _: ids, length, len(ids) // length * length)
    wanted = min(len(windows), -(-tokens // length))
    return windows[np.arange(wanted) * len(windows) // wanted]


def chosen(recipes: list[str], methods: list[str]) -> list[Recipe]:
    """Every recipe with each method; one that keeps float weights, which no method concerns, once."""
    found = []
    for recipe in map(find_recipe, recipes):
        found += [find_recipe(recipe, method=method) for method in methods if recipe.weights] or [recipe]
    return found


def measured(recipes: list[Recipe], windows: np.ndarray, threads: int, batch: int) -> Iterator[Result]:
    import torch

    torch.set_num_threads(threads)
    reference = ModelScorer(read_source(MODEL).model)
    with tempfile.TemporaryDirectory() as folder:
        for index, recipe in enumerate(recipes):
            method = recipe.weights.method if recipe.weights else "-"
            out = Path(folder) / str(index)
            export(MODEL, out, recipe)
            size = sum(path.stat().st_size for path in out.glob("model.onnx*"))
            with ryzen_compile.load(out, threads=threads) as model:
                quality = score(EngineScorer(model.engine), reference, windows, batch=batch)
                yield Result(recipe.name, method, size, 8 * size / model.spec.parameters, quality)


def table(results: list[Result]) -> str:
    lines = [
        "| recipe | method | bytes | bits per weight | mean KL, nats per token | top-1, % | perplexity ratio |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        q = result.quality
        values = shown(q.kl, ".3g"), shown(q.top1, ".2f", 100), shown(q.ratio, ".5f")
        lines.append(
            f"| `{result.recipe}` | {result.method} | {result.size:,} | {result.bits:.2f} | {' | '.join(values)} |"
        )
    return "\n".join(lines)


def shown(estimate: Estimate, form: str, factor: int = 1) -> str:
    return f"{factor * estimate.value:{form}} ± {factor * estimate.error:{form}}"


def append(results: list[Result], args: argparse.Namespace, text: str) -> None:
    fields = {
        "date": datetime.now(UTC).date(),
        "machine": read_machine().cpu.name,
        "threads": args.threads,
        "length": args.length,
        "text_sha256": digest(text),
    }
    rows = []
    for result in results:
        q = result.quality
        row = {**fields, "recipe": result.recipe, "method": result.method, "bytes": result.size}
        row |= {"bits_per_weight": f"{result.bits:.4f}", "tokens": q.tokens, "windows": q.windows}
        for name in ("kl", "top1", "ratio", "perplexity", "reference_perplexity"):
            estimate = getattr(q, name)
            row |= {name: f"{estimate.value:.8g}", f"{name}_se": f"{estimate.error:.4g}"}
        rows.append({**row, "versions": json.dumps(read_versions())})
    DATA.parent.mkdir(exist_ok=True)
    is_new = not DATA.exists()
    with DATA.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", default=",".join(recipe.name for recipe in RECIPES), help="names, by commas")
    parser.add_argument("--methods", default="", help="names, by commas, in place of the recipes' own")
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=read_machine().usable_cores)
    args = parser.parse_args()
    text = held_out_text()
    windows = spread_windows(text, args.length, args.tokens)
    recipes = chosen(args.recipes.split(","), [name for name in args.methods.split(",") if name])
    results = list(measured(recipes, windows, args.threads, args.batch))
    print(f"{results[0].quality.tokens:,} held-out tokens in {len(windows)} windows of {args.length}\n")
    print(table(results))
    append(results, args, text)


if __name__ == "__main__":
    main()
