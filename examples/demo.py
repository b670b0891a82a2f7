"""The whole path on the shipped model: capture, passes, export, the same tokens as Hugging Face, and how much faster.

    python examples/demo.py

Every number is measured while you watch; the two engines take turns, so that a slow minute meets both.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import ryzen_compile
from ryzen_compile.api import export
from ryzen_compile.cli.narrate import narrated
from ryzen_compile.config import find_recipe
from ryzen_compile.pipeline import default_passes
from ryzen_compile.validate.machine import read_machine

MODEL = Path(__file__).resolve().parent / "tiny-python-lm"
PROMPT = '''def clamp(value, low, high):
    """Return value, or the nearest of low and high if it is outside of them."""
'''
NEW_TOKENS = 96
ROUNDS = 7

console = Console(highlight=False)


def main() -> None:
    machine = read_machine()
    torch.set_num_threads(machine.usable_cores)
    console.print(
        f"[bold]1. Capture, rewrite, export[/]  {MODEL.name} on {machine.cpu.name}, {machine.usable_cores} threads"
    )
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "artifact"
        recipe = find_recipe("fp32")
        with narrated(len(default_passes(recipe))) as progress:
            report = export(MODEL, artifact, recipe, progress=progress)
        show_passes(report)
        compare(artifact, machine.usable_cores)


def show_passes(report) -> None:
    table = Table(box=None, pad_edge=False)
    for name, side in (
        ("pass", "left"),
        ("places", "right"),
        ("operators", "right"),
        ("ms", "right"),
        ("max error", "right"),
    ):
        table.add_column(name, justify=side)
    for record in report.records:
        error = "" if record.max_error is None else f"{record.max_error:.1e}"
        change = f"{record.nodes_before} > {record.nodes_after}" if record.hits else ""
        table.add_row(record.name, str(len(record.hits) or ""), change, f"{record.seconds * 1e3:.0f}", error)
    console.print(table)
    console.print(
        f"errors are against the captured model in float32, whose own distance from float64 is {report.reference_rmse:.1e}\n"
    )


def compare(artifact: Path, threads: int) -> None:
    console.print("[bold]2. Generate with both engines[/]")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    baseline = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with ryzen_compile.load(artifact, threads=threads) as model:
        runs = {
            "Hugging Face, eager fp32": lambda: baseline.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False),
            "ryzen_compile, fp32": lambda: model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False),
        }
        texts = [run() for run in runs.values()]
        same = torch.equal(*texts)
        console.print(tokenizer.decode(texts[1][0], skip_special_tokens=True), markup=False, style="cyan")
        console.print(
            f"\nthe {texts[1].shape[1] - ids.shape[1]} new tokens of both engines are {'the same' if same else 'DIFFERENT'}"
        )
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                started = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started)
    console.print(f"\n[bold]3. How fast, how large[/]  median of {ROUNDS} interleaved runs (smallest - largest)")
    slow, fast = (statistics.median(s) for s in seconds.values())
    new = texts[1].shape[1] - ids.shape[1]
    for name, samples in seconds.items():
        middle = statistics.median(samples)
        console.print(
            f"  {name:<26}{new / middle:8.1f} tok/s   {middle:.3f} s ({min(samples):.3f} - {max(samples):.3f})"
        )
    stored = sum(p.stat().st_size for p in artifact.iterdir())
    source = sum(p.stat().st_size for p in MODEL.glob("*.safetensors"))
    console.print(
        f"  speed-up {slow / fast:.1f} x;  artifact {stored / 2**20:.1f} MiB of fp32, from {source / 2**20:.1f} MiB of fp16\n"
    )
    if not same:
        raise SystemExit("the engines disagree: this is a bug, please report it")


if __name__ == "__main__":
    main()
