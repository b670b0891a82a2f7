"""A decoder shape in float32: Hugging Face eager, our generate, and a bare session loop, sampled in turns in one run.

    python benchmarks/fp32_decoder.py --shape tinyllama-1.1b --prompt 512 --new 64 --rounds 5

Prints medians with their spread and the ratios, and appends every sample to ``benchmarks/data/fp32_decoder.csv``. The
export runs in a child process first, whose peak resident set is compared with the bytes of the float32 weights.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.validate.machine import read_machine, read_versions, stream_read_gbps

DATA = Path(__file__).resolve().parent / "data" / "fp32_decoder.csv"


def export_in_child(shape: str, out: Path) -> dict[str, float]:
    """Exports in a fresh process, so that its peak is the export's own."""
    code = (
        "import sys, json, time\n"
        "from ryzen_compile.shapes import random_model\n"
        "from ryzen_compile.validate.memory import peak_rss_bytes, current_rss_bytes\n"
        "from ryzen_compile.api import export\n"
        "model = random_model(sys.argv[1])\n"
        "held, started = current_rss_bytes(), time.perf_counter()\n"
        "export(model, sys.argv[2], 'fp32')\n"
        "weights = sum(p.numel() * p.element_size() for p in {p.data_ptr(): p for p in model.parameters()}.values())\n"
        "seconds = time.perf_counter() - started\n"
        "print(json.dumps(dict(seconds=seconds, held=held, peak=peak_rss_bytes(), weights=weights)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, shape, str(out)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


class Subjects:
    """The three ways of generating, each split into the prompt and the tokens after it."""

    def __init__(self, shape: str, artifact: Path, ids: np.ndarray, new: int, threads: int) -> None:
        import torch

        import ryzen_compile
        from ryzen_compile.shapes import random_model
        from ryzen_compile.validate.huggingface import HuggingFaceEager

        torch.set_num_threads(threads)
        self.ids, self.new = ids, new
        self.huggingface = HuggingFaceEager(random_model(shape))
        self.compiled = ryzen_compile.load(artifact, threads=threads, digests=False)

    def eager(self) -> tuple[float, float, list[int]]:
        return self._loop(self.huggingface)

    def bare(self) -> tuple[float, float, list[int]]:
        return self._loop(self.compiled.engine)

    def generate(self) -> tuple[float, float, list[int]]:
        from ryzen_compile.runtime.generate import GenerationStats

        stats = GenerationStats()
        out = self.compiled.generate(self.ids, max_new_tokens=self.new, do_sample=False, eos_token_id=None, stats=stats)
        return stats.prefill_seconds, stats.decode_seconds, out[0, self.ids.shape[1] :].tolist()

    def _loop(self, engine) -> tuple[float, float, list[int]]:
        """Nothing but steps and argmax over a cache that is there already."""
        cache = KVCache(engine.slots, 1, self.ids.shape[1] + self.new, limit=engine.spec.context)
        started = time.perf_counter()
        logits = engine.step(self.ids, cache)
        cache.advance(self.ids.shape[1])
        prefill = time.perf_counter() - started
        tokens = [int(logits[0, -1].argmax())]
        token = np.empty((1, 1), np.int64)
        started = time.perf_counter()
        for _ in range(self.new - 1):
            token[0, 0] = tokens[-1]
            logits = engine.step(token, cache)
            cache.advance(1)
            tokens.append(int(logits[0, -1].argmax()))
        return prefill, time.perf_counter() - started, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="tinyllama-1.1b")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=read_machine().usable_cores)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "artifact"
        exported = export_in_child(args.shape, artifact)
        print(
            f"export: {exported['seconds']:.0f} s, peak {exported['peak'] / 2**30:.2f} GiB = "
            f"{exported['peak'] / exported['weights']:.2f} x the fp32 weights ({exported['weights'] / 2**30:.2f} GiB)"
        )
        ids = np.random.default_rng(0).integers(0, 1000, (1, args.prompt), dtype=np.int64)
        subjects = Subjects(args.shape, artifact, ids, args.new, args.threads)
        samples = sample(
            {"huggingface eager": subjects.eager, "generate": subjects.generate, "bare loop": subjects.bare},
            args.rounds,
        )
    report(samples, args, exported)


def sample(
    runs: dict[str, Callable[[], tuple[float, float, list[int]]]], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    texts = {name: run()[2] for name, run in runs.items()}
    same = len({tuple(text) for text in texts.values()}) == 1
    print(f"tokens of {', '.join(texts)}: {'identical' if same else f'DIFFERENT {texts}'}")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs) if turn % 2 == 0 else reversed(list(runs)):
            prefill, decode, _ = runs[name]()
            found[name].append((prefill, decode))
    return found


def report(samples: dict[str, list[tuple[float, float]]], args: argparse.Namespace, exported: dict[str, float]) -> None:
    machine, stream = read_machine(), stream_read_gbps(threads=args.threads)
    print(f"{machine.cpu.name}, {args.threads} threads, plain read {stream:.1f} GB/s")
    medians = {}
    for name, pairs in samples.items():
        prefill, decode = ([pair[i] for pair in pairs] for i in (0, 1))
        medians[name] = statistics.median(prefill), statistics.median(decode)
        rate = (args.new - 1) / medians[name][1]
        print(
            f"{name:<18} prefill {args.prompt / medians[name][0]:8.1f} tok/s "
            f"({min(prefill):.2f} - {max(prefill):.2f} s)   "
            f"decode {rate:6.2f} tok/s ({min(decode):.2f} - {max(decode):.2f} s), "
            f"{exported['weights'] * rate / 1e9:.1f} GB/s of weights"
        )
    hf, ours, bare = medians["huggingface eager"], medians["generate"], medians["bare loop"]
    print(f"generate over eager: prefill {hf[0] / ours[0]:.2f} x, decode {hf[1] / ours[1]:.2f} x")
    print(f"generate over the bare loop: prefill {ours[0] / bare[0]:.3f}, decode {ours[1] / bare[1]:.3f} of its time")
    DATA.parent.mkdir(exist_ok=True)
    is_new = not DATA.exists()
    with DATA.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(
                ["date", "machine", "threads", "shape", "prompt", "new", "engine", "prefill_s", "decode_s", "versions"]
            )
        for name, pairs in samples.items():
            for prefill, decode in pairs:
                row = [
                    datetime.now(UTC).date(),
                    machine.cpu.name,
                    args.threads,
                    args.shape,
                    args.prompt,
                    args.new,
                    name,
                ]
                writer.writerow([*row, f"{prefill:.5f}", f"{decode:.5f}", json.dumps(read_versions())])


if __name__ == "__main__":
    main()
