"""What each part of the work gives alone, and what they give together: the whole is rarely the product."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ryzen_compile.api import export, load
from ryzen_compile.backends.onnxruntime.native import unusable
from ryzen_compile.config import KVCacheConfig, Recipe, find_recipe
from ryzen_compile.validate.inference import InferenceReport, InferenceValidator
from ryzen_compile.validate.measured import Measured
from ryzen_compile.validate.torch_threads import torch_threads
from ryzen_compile.workflow.report_schema import EndToEnd

if TYPE_CHECKING:
    from ryzen_compile.runtime.engine import Engine

ROUNDS = 5  # of each pair: four pairs are measured
TIMES = ("end_to_end", "ttft", "decode")
PASSES = "passes and runtime"


def measure_parts(
    whole: InferenceReport,
    model: Any,
    recipe: Recipe,
    prompts: np.ndarray,
    *,
    new_tokens: int,
    threads: int,
    scratch: Path | None,
    say: Callable[[str], None],
) -> EndToEnd:
    """``whole`` taken apart: the float32 artifact on stock operators against ``model``, then that artifact with the
    recipe's weights, with its cache, and with native operators, each against it.

    ``model`` is a transformers model, ``prompts`` ``(N, P)`` int64 are those of ``whole``. Artifacts are made below
    ``scratch`` for the while (None: the system's place for temporary files), without the gate: they are timed, not
    kept. Raises what exporting and loading raise.
    """
    from ryzen_compile.validate.huggingface import HuggingFaceEager

    plain = find_recipe("fp32", context=recipe.context)
    reports: dict[str, InferenceReport] = {}

    def compare(name: str, baseline: Engine, other: Engine) -> None:
        say(f"{name} alone")
        with torch_threads(threads):
            reports[name] = InferenceValidator(baseline, other, prompts, new_tokens=new_tokens, rounds=ROUNDS).measure()

    with tempfile.TemporaryDirectory(prefix=".parts-", dir=scratch) as folder:
        base = _exported(model, plain, Path(folder) / "plain")
        with _opened(base, threads, native=False) as stock:
            compare(PASSES, HuggingFaceEager(model), stock)
            for name, changed in _changes(plain, recipe).items():
                artifact = _exported(model, changed, Path(folder) / "changed")
                with _opened(artifact, threads, native=False) as engine:
                    compare(name, stock, engine)
            if not unusable("auto"):
                with _opened(base, threads, native=True) as engine:
                    compare("native operators", stock, engine)
    return EndToEnd(
        speed_up=whole.speed_ups["end_to_end"],
        prefill=whole.speed_ups["ttft"],
        decode=whole.speed_ups["decode"],
        parts={name: report.speed_ups["end_to_end"] for name, report in reports.items()},
        interaction={time: _interaction(whole, reports, time) for time in TIMES},
    )


def _changes(plain: Recipe, recipe: Recipe) -> Mapping[str, Recipe]:
    """What the recipe does to the float32 artifact, one thing at a time."""
    changes: dict[str, Recipe] = {}
    if recipe.weights is not None or recipe.ternary:
        # Timed, not kept: which codes are chosen does not matter, how many bits they have does.
        weights = recipe.weights and recipe.weights.model_copy(update={"method": "rtn"})
        stored = {"weights": weights, "ternary": recipe.ternary, "prefill": recipe.prefill}
        changes["integer weights"] = plain.model_copy(update=stored)
    if recipe.kv.dtype != "fp32":
        changes["integer cache"] = plain.model_copy(update={"kv": recipe.kv})
    elif recipe.kv != KVCacheConfig():
        changes["bounded cache"] = plain.model_copy(update={"kv": recipe.kv})
    if recipe.embedding is not None:
        table = recipe.embedding.model_copy(update={"method": "kmeans", "weighting": "frequency"})
        changes["table as codes"] = plain.model_copy(update={"embedding": table})
    if recipe.sparsity is not None:
        changes["sparse activations"] = plain.model_copy(update={"sparsity": recipe.sparsity})
    return changes


def _interaction(whole: InferenceReport, reports: Mapping[str, InferenceReport], time: str) -> float:
    parts: list[Measured] = [report.speed_ups[time] for report in reports.values()]
    return whole.speed_ups[time].value / math.prod(part.value for part in parts)


def _exported(model: Any, recipe: Recipe, out: Path) -> Path:
    export(model, out, recipe, verify=False, force=True)
    return out


@contextmanager
def _opened(artifact: Path, threads: int, *, native: Literal["auto"] | bool) -> Iterator[Engine]:
    with load(artifact, task="generate", threads=threads, native=native, digests=False) as compiled:
        yield compiled.engine
