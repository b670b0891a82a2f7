"""Recipes beside each other: bytes, speed and what is left of the quality, on the same text in the same run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ryzen_compile.api import export, load
from ryzen_compile.config import Recipe, find_recipe
from ryzen_compile.validate.latency import Timing, Workload, measure
from ryzen_compile.validate.machine import read_machine
from ryzen_compile.validate.measured import median_of
from ryzen_compile.validate.quality import EngineScorer, ModelScorer, Quality, fitting_batch, interval, score
from ryzen_compile.validate.torch_threads import torch_threads
from ryzen_compile.workflow.report_schema import Point

if TYPE_CHECKING:
    from ryzen_compile.runtime.compiled import CompiledModel

STEPS, ROUNDS = 32, 5  # of decoding, behind as many tokens where they fit


def measure_recipes(
    names: Sequence[str],
    source: Any,
    model: Any,
    chosen: Recipe,
    artifact: Path,
    windows: np.ndarray,
    *,
    threads: int,
    calibration: str,
    scratch: Path | None,
    say: Callable[[str], None],
) -> tuple[Point, ...]:
    """The artifact of the ``chosen`` recipe, and one of each other name, with the same cache and ``calibration`` text,
    made below ``scratch`` (None: the system's place for temporary files).

    ``source`` is what is exported, ``model`` the transformers model that all are held to on ``windows`` ``(n, L)``.
    Decoding is timed in turns. Raises what exporting raises.
    """
    recipes: dict[str, Recipe | None] = {chosen.name: None}
    for name in names:
        recipes.setdefault(name, find_recipe(name, context=chosen.context, kv=chosen.kv))
    qualities: dict[str, Quality] = {}
    vocab = model.config.get_text_config().vocab_size
    batch = fitting_batch(8, windows.shape[1], vocab, read_machine().usable_memory // 4)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".recipes-", dir=scratch)))
        opened: dict[str, CompiledModel] = {}
        for name, recipe in recipes.items():
            path = artifact
            if recipe is not None:
                say(f"recipe {name}")
                path = folder / name
                export(source, path, recipe, calibration=calibration)
            opened[name] = stack.enter_context(load(path, task="generate", threads=threads, digests=False))
            with torch_threads(threads):
                scorer = EngineScorer(opened[name].engine)
                qualities[name] = score(scorer, ModelScorer(model), windows, batch=batch)
        say("decoding with each recipe, in turns")
        shortest = min(one.spec.context for one in opened.values())
        steps = min(STEPS, shortest)
        test = Workload("tg", steps, min(STEPS, shortest - steps))
        timings = measure([one.engine for one in opened.values()], [test], ROUNDS)
        sizes = {name: _bytes(artifact if recipe is None else folder / name) for name, recipe in recipes.items()}
    rates = dict(zip(opened, timings, strict=True))
    return tuple(_point(name, sizes[name], qualities[name], rates[name], name == chosen.name) for name in recipes)


def _point(name: str, size: int, quality: Quality, timing: Timing, chosen: bool) -> Point:
    return Point(
        recipe=name,
        bytes=size,
        kl=interval(quality.kl, quality.windows, "nats"),
        accuracy_loss=interval(quality.accuracy_loss, quality.windows, "share"),
        tokens_per_second=median_of(timing.rates, "tok/s"),
        chosen=chosen,
    )


def _bytes(artifact: Path) -> int:
    """Of the weights."""
    return sum(path.stat().st_size for path in artifact.glob("*.onnx.data"))
