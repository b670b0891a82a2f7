"""Artifacts of well-known shapes with random int4 or ternary weights, for benchmarks that ask for time alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

LOUD = 400.0  # times the embedding's own size: then it outweighs what the layers add to it


def prepare(shape: str, kv: str, out: Path, *, decided: bool = False, ternary: bool = False) -> None:
    """Exports in a child, whose memory is given back; unverified, for random weights' logits mean nothing.

    With ``ternary`` all linears beside the head are, and the rest is as of the others: a head of 8 bits. Of a model
    that is ``decided``, every token has one successor, far ahead of all others: its text does not hang on roundings, as
    that of flat random logits does.
    """
    how = [*["decided"] * decided, *["ternary"] * ternary]
    subprocess.run([sys.executable, __file__, shape, kv, str(out), *how], check=True)


def decide(model: Any) -> None:
    """Lets a causal LM with a head of its own predict the next token of one cycle through the vocabulary."""
    import torch

    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table *= LOUD
        cycle = torch.randperm(len(table))
        head = model.get_output_embeddings().weight
        head[cycle.roll(-1)] = table[cycle] / LOUD  # the row of a successor is its predecessor's embedding


def make_ternary(model: Any) -> None:
    """Every linear beside the head becomes its scale times -1, 0 and +1."""
    import torch

    from ryzen_compile.train.ternary import ternarize

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
                codes, scale = ternarize(module.weight)
                module.weight.copy_(codes * scale)


if __name__ == "__main__":
    from ryzen_compile.api import export
    from ryzen_compile.config import find_recipe
    from ryzen_compile.shapes import random_model

    shape, kv, out, *how = sys.argv[1:]
    model = random_model(shape)
    recipe = find_recipe("int4", kv=kv, method="rtn")
    if "decided" in how:
        decide(model)
    if "ternary" in how:
        make_ternary(model)
        recipe = find_recipe(recipe, ternary=True)
    export(model, out, recipe, verify=False)
