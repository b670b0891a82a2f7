"""What training in the loop brings, on the shipped model and its text. Figures go to BENCHMARKS.md.

    python benchmarks/training.py speed       optimized against baseline: the same rows, in turns within one process
    python benchmarks/training.py qat         rounding to nearest, with and without training for it
    python benchmarks/training.py ternary     ternary linears against float ones, from scratch
    python benchmarks/training.py dkm         a clustered table, with and without training, at equal bytes

What the draft model gains, ``benchmarks/speculation.py text --draft examples/tiny-python-draft`` measures. Run from the
repository's root. Each prints its figures and appends them to benchmarks/data/training.csv.
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ryzen_compile.api import optimize
from ryzen_compile.train.config import TrainConfig, read_config
from ryzen_compile.validate.machine import read_machine
from ryzen_compile.validate.quality import EngineScorer, ModelScorer, Quality, score
from ryzen_compile.workflow.training import Run, open_run, prepare_text, train

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "examples" / "configs"
SHIPPED = ROOT / "examples" / "tiny-python-lm"
DATA = ROOT / "benchmarks" / "data" / "training.csv"
TURN = 5  # steps of one run before the other has its turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("speed", "qat", "ternary", "dkm"))
    parser.add_argument("--steps", type=int, help="of each run")
    args = parser.parse_args()
    measure = {"speed": speed, "qat": qat, "ternary": ternary, "dkm": dkm}[args.what]
    keep(args.what, measure(args.steps))


def speed(steps: int | None) -> list[dict[str, Any]]:
    """Both modes of the shipped model's own configuration, from the same weights on the same rows."""
    steps = steps or 120
    rates: dict[str, list[float]] = {"baseline": [], "optimized": []}
    losses = {}
    with ExitStack() as stack:
        runs = {mode: stack.enter_context(started("tiny-python-lm", mode, steps)) for mode in rates}
        for run in runs.values():
            run.trainer.advance()  # compiles; counts as a step, not as a time
        while any(run.trainer.step < steps for run in runs.values()):
            for mode, run in runs.items():
                turn = [run.trainer.advance().tokens_per_second for _ in range(min(TURN, steps - run.trainer.step))]
                rates[mode].append(statistics.median(turn))
        for mode, run in runs.items():
            losses[mode] = run.trainer.validate(exact=True).loss
    pairs = [o / b for o, b in zip(rates["optimized"], rates["baseline"], strict=True)]
    return [
        {
            "steps": steps,
            "baseline_tokens_per_second": statistics.median(rates["baseline"]),
            "optimized_tokens_per_second": statistics.median(rates["optimized"]),
            "ratio": statistics.median(pairs),
            "ratio_low": min(pairs),
            "ratio_high": max(pairs),
            "baseline_validation_loss": losses["baseline"],
            "optimized_validation_loss": losses["optimized"],
            "loss_ratio": losses["optimized"] / losses["baseline"],
        }
    ]


def qat(steps: int | None) -> list[dict[str, Any]]:
    """The shipped model rounded to nearest as it is, and after training for it towards its own predictions."""
    return against(steps, "qat-int4", "rounded", "trained for it")


def dkm(steps: int | None) -> list[dict[str, Any]]:
    """The shipped model's table clustered as it is, by k-means, and after training in the clusters; equal bytes."""
    return against(steps, "dkm", "clustered", "trained in clusters")


def against(steps: int | None, name: str, before: str, after: str) -> list[dict[str, Any]]:
    """The model exported by the recipe of the trained one, before and after; both against itself in float32."""
    # What the controller measures by leaving things out is not asked for here, and takes minutes.
    config = settings(name, ["controller.ablate=false"] + ([] if steps is None else [f"optimization.steps={steps}"]))
    windows = held_out(config)
    reference = ModelScorer(loaded(SHIPPED))
    with tempfile.TemporaryDirectory() as folder:
        run = train(placed(config, Path(folder)))
        recipe = trained_recipe(run.directory / "model")
        found = {
            before: compared(SHIPPED, recipe, reference, windows),
            after: compared(run.directory / "model", recipe, reference, windows),
        }
    lost = found[before].ratio.value - 1
    return [
        {
            "model": model,
            "tokens_trained_on": run.result.tokens if model == after else 0,
            "tokens": quality.tokens,
            "perplexity": quality.perplexity.value,
            "reference_perplexity": quality.reference_perplexity.value,
            "ratio": quality.ratio.value,
            "ratio_error": quality.ratio.error,
            "kl": quality.kl.value,
            "kl_error": quality.kl.error,
            "top1": quality.top1.value,
            "recovered": 1 - (quality.ratio.value - 1) / lost,
        }
        for model, quality in found.items()
    ]


def ternary(steps: int | None) -> list[dict[str, Any]]:
    """The configuration with and without ternary linears; the loss curve shows whether it trains stably."""
    changes = ["controller.ablate=false"]
    if steps is not None:
        changes += [f"optimization.steps={steps}", "optimization.tokens=null"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, more in (("ternary", []), ("float", ["passes.ternary=null"])):
            run = train(placed(settings("ternary", [*changes, *more]), Path(folder) / name))
            lines = (run.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            anomalies = sum('"kind":"anomaly"' in line for line in lines)
            rows.append(
                {
                    "model": name,
                    "steps": run.result.steps,
                    "validation_loss": run.result.validation.loss,
                    "train_loss": run.result.train_loss,
                    "tokens_per_second": run.result.tokens_per_second,
                    "anomalies": anomalies,
                }
            )
    return rows


# --- pieces -----------------------------------------------------------------------------------------------------------
def settings(name: str, changes: list[str]) -> TrainConfig:
    return read_config(CONFIGS / f"{name}.yaml", changes)


def placed(config: TrainConfig, output: Path) -> TrainConfig:
    return config.model_copy(update={"output": str(output)})


@contextmanager
def started(name: str, mode: Any, steps: int) -> Iterator[Run]:
    """A run of which nothing is kept."""
    changes = [f"optimization.steps={steps}", "optimization.tokens=null", "controller.enabled=false"]
    with tempfile.TemporaryDirectory() as folder, open_run(placed(settings(name, changes), Path(folder)), mode) as run:
        yield run


def loaded(directory: Path) -> Any:
    from ryzen_compile.source import load_model

    return load_model(directory)[0]


def trained_recipe(directory: Path) -> Any:
    from ryzen_compile.recipe_file import read_recipe

    return read_recipe(directory)


def held_out(config: TrainConfig) -> np.ndarray:
    """(n, T) int64: the validation text of a configuration."""
    rows: np.ndarray = prepare_text(config).rows.validation[:, :-1].contiguous().numpy()
    return rows


def compared(directory: Path, recipe: Any, reference: ModelScorer, windows: np.ndarray) -> Quality:
    """The export of the model in ``directory``, in ONNX Runtime, beside the shipped model in float32."""
    compiled = optimize(directory, recipe, logits="all", verify=False)
    try:
        return score(EngineScorer(compiled.engine), reference, windows)
    finally:
        compiled.close()


def keep(what: str, rows: list[Mapping[str, Any]] | list[dict[str, Any]]) -> None:
    """Prints the rows and appends them, one figure a line, with the machine and the versions."""
    machine = read_machine()
    facts = [
        datetime.now(UTC).date().isoformat(),
        machine.cpu.microarchitecture,
        torch.get_num_threads(),
        platform.python_version(),
        torch.__version__,
    ]
    fresh = not DATA.exists()
    with DATA.open("a", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream)
        if fresh:
            table.writerow(("date", "cpu", "threads", "python", "torch", "benchmark", "row", "figure", "value"))
        for index, row in enumerate(rows):
            label = str(row.get("model", index))
            print(label)
            for name, value in row.items():
                if isinstance(value, (int, float)):
                    text = f"{value:.6g}" if math.isfinite(value) else str(value)
                    print(f"  {name:<32}{text}")
                    table.writerow((*facts, what, label, name, text))


if __name__ == "__main__":
    main()
