"""How small can a table of tokens be? Bytes against divergence, for integers, k-means and trained codes.

    pip install -e '.[report]'
    python examples/dkm_embedding.py                              # the model that ships with this repository
    python examples/dkm_embedding.py --model DIR --steps 100

Stores the table of a model in each of these forms, lets its lookups read the decoded table, and measures how far its
predictions move on text: mean KL divergence to the model itself, nats per token. Prints a table and draws the curve,
``dkm_embedding.png`` and ``.svg``. The shipped model is measured on modules of the standard library that it was not
trained on, others on the end of the built-in text, whose beginning the codes are trained on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ryzen_compile.api import read_source
from ryzen_compile.calibration import read_calibration
from ryzen_compile.capture import capture
from ryzen_compile.config import EmbeddingCompression, find_recipe
from ryzen_compile.numerics.blockwise import BlockFormat
from ryzen_compile.numerics.divergence import mean_divergence
from ryzen_compile.numerics.search import quantize_with
from ryzen_compile.passes.canonicalize import Canonicalize
from ryzen_compile.passes.compress_embedding import EmbeddingCompressor, find_lookups
from ryzen_compile.text import token_windows
from ryzen_compile.train.config import read_config
from ryzen_compile.train.dkm_finetune import FinetuneSettings, dkm_finetune
from ryzen_compile.train.documents import read_corpus
from ryzen_compile.train.lookup import SubstitutedLookup, evaluating, find_table, logits

HERE = Path(__file__).resolve().parent
TRAINING = HERE / "configs" / "tiny-python-lm.yaml"
SHIPPED = HERE / "tiny-python-lm"
# Bits of a code and weights that it stands for: 8 to 1.5 bits a weight.
CODES = ((8, 1), (6, 1), (5, 1), (8, 2), (7, 2), (6, 2), (5, 2), (8, 4), (6, 4))
INTEGERS = (("int8", 8, 128), ("int4", 4, 128), ("int4-g32", 4, 32))  # name, bits, block
COLORS = {"float16": "0.5", "integers": "tab:orange", "k-means": "tab:blue", "DKM": "tab:green"}


@dataclass(frozen=True)
class Point:
    """One way to store the table; ``kl`` in nats per token."""

    family: str
    label: str
    nbytes: float
    kl: float


@dataclass(frozen=True)
class Subject:
    """A model, the parameter ``name`` that is its table, text to train on and text to measure on, (n, T) int64, and
    the tokens whose rows are kept first."""

    model: nn.Module
    name: str
    train: Tensor
    held: Tensor
    special: tuple[int, ...]

    @property
    def parameter(self) -> nn.Parameter:
        return find_table(self.model, self.name)

    @property
    def table(self) -> Tensor:
        return self.parameter.detach()

    @torch.no_grad()
    def divergence(self, table: Tensor) -> float:
        """From the model itself when its lookups read ``table`` (V, C)."""
        total = 0.0
        for ids in self.held.split(4):
            with evaluating(self.model), SubstitutedLookup(self.parameter, ids, lambda given: table[given]):
                moved = logits(self.model, ids)
            total += mean_divergence(logits(self.model, ids), moved)[0] * len(ids)
        return total / len(self.held)


def read_subject(directory: Path, windows: int) -> Subject:
    source = read_source(directory)
    calibration = read_calibration(source.tokenizer, find_recipe("fp32", embedding={}))
    if calibration is None or calibration.long is None:
        raise SystemExit(f"{directory} has no tokenizer, and codes are chosen on text")
    lookups, _ = find_lookups(Canonicalize().run(capture(source.model)).program)
    train, held = calibration.long[:-windows], calibration.long[-windows:]
    if directory.resolve() == SHIPPED:
        train, held = calibration.long, held_out(source.tokenizer, windows, calibration.long.shape[1])
    return Subject(source.model.eval(), lookups[0].name, train, held, calibration.special)


def held_out(tokenizer: object, windows: int, length: int) -> Tensor:
    """Windows spread over the documents that the training held out."""
    corpus = read_corpus(read_config(TRAINING).data)
    text = "<|endoftext|>".join(document.text for document in corpus.validation)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    found = torch.from_numpy(token_windows(text, lambda _: ids, length, len(ids) // length * length))
    return found[torch.arange(windows) * len(found) // windows]


def points(subject: Subject, steps: int) -> Iterator[Point]:
    """float16 and integers in blocks with float16 scales, then codes, as k-means leaves them and trained."""
    table = subject.table
    yield Point("float16", "float16", 2 * table.numel(), subject.divergence(table.half().float()))
    for name, bits, block in INTEGERS:
        tensor = quantize_with("mse", table, BlockFormat(bits, block))
        decoded = replace(tensor, scales=tensor.scales.half().float()).dequantize()
        yield Point("integers", name, table.numel() * (bits / 8 + 2 / block), subject.divergence(decoded))
    for bits, dim in CODES:
        found = {
            method: EmbeddingCompressor(
                EmbeddingCompression(method=method, bits=bits, cluster_dim=dim),
                text=subject.train,
                special=subject.special,
            ).compress(table)
            for method in ("kmeans", "dkm")
        }
        label = f"{bits / dim:g} bits"
        yield Point("k-means", label, found["kmeans"].nbytes, subject.divergence(found["kmeans"].decode()))
        trained = dkm_finetune(subject.model, subject.name, found["dkm"], subject.train, FinetuneSettings(steps)).table
        yield Point("DKM", label, trained.nbytes, subject.divergence(trained.decode()))


def draw(found: list[Point], weights: int, target: Path) -> None:
    """The curve as ``target`` with the suffixes .png and .svg."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for family, color in COLORS.items():
        chosen = sorted((p for p in found if p.family == family and p.kl > 0), key=lambda p: p.nbytes)
        if not chosen:  # a checkpoint in float16 loses nothing, and a logarithm has no place for that
            continue
        axes.plot(
            [8 * p.nbytes / weights for p in chosen],
            [p.kl for p in chosen],
            marker="o",
            linestyle="-" if family in ("k-means", "DKM") else "none",
            color=color,
            label=family,
        )
        for point in chosen:
            if family in ("float16", "integers"):
                axes.annotate(
                    point.label, (8 * point.nbytes / weights, point.kl), xytext=(6, 5), textcoords="offset points"
                )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="bits per weight of the table, everything counted",
        ylabel="mean KL divergence, nats per token",
    )
    axes.set_xticks([1.5, 2, 3, 4, 5, 6, 8, 16], labels=["1.5", "2", "3", "4", "5", "6", "8", "16"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    for suffix in (".png", ".svg"):
        figure.savefig(target.with_name(target.name + suffix), dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--output", type=Path, default=Path("dkm_embedding"))
    parser.add_argument("--steps", type=int, default=300, help="of training at each size")
    parser.add_argument("--windows", type=int, default=40, help="of 256 tokens to measure on")
    args = parser.parse_args()
    subject = read_subject(args.model, args.windows)
    weights = subject.table.numel()
    found = []
    print(f"table {tuple(subject.table.shape)}, {subject.held.numel():,} tokens")
    print("| stored as | bytes | bits per weight | KL, nats per token |\n|---|---:|---:|---:|")
    for point in points(subject, args.steps):
        found.append(point)
        name = point.label if point.family in ("float16", "integers") else f"{point.family}, {point.label}"
        print(f"| {name} | {point.nbytes:,.0f} | {8 * point.nbytes / weights:.2f} | {point.kl:.5f} |", flush=True)
    draw(found, weights, args.output)
    print(f"drawn: {args.output}.png, {args.output}.svg")


if __name__ == "__main__":
    main()
