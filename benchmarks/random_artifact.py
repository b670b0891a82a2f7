"""Artifacts of well-known shapes with random int4 weights, for the benchmarks that ask for time and not for text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

LOUD = 400.0  # times the embedding's own size: then it outweighs what the layers add to it


def prepare(shape: str, kv: str, out: Path, *, decided: bool = False) -> None:
    """Exports in a child, whose memory is given back; unverified, for random weights' logits mean nothing.

    Of a model that is ``decided``, every token has one successor, far ahead of all others: its text does not hang on
    roundings, as that of flat random logits does.
    """
    subprocess.run([sys.executable, __file__, shape, kv, str(out), *["decided"] * decided], check=True)


def decide(model: Any) -> None:
    """Lets a causal LM with a head of its own predict the next token of one cycle through the vocabulary."""
    import torch

    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table *= LOUD
        cycle = torch.randperm(len(table))
        head = model.get_output_embeddings().weight
        head[cycle.roll(-1)] = table[cycle] / LOUD  # the row of a successor is its predecessor's embedding


if __name__ == "__main__":
    from ryzen_compile.api import export
    from ryzen_compile.config import find_recipe
    from ryzen_compile.shapes import random_model

    shape, kv, out, *how = sys.argv[1:]
    model = random_model(shape)
    if how:
        decide(model)
    export(model, out, find_recipe("int4", kv=kv, method="rtn"), verify=False)
