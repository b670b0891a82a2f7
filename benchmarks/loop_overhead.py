"""What Python costs per token: the time of generate outside ONNX Runtime's run, greedy, batch 1.

python benchmarks/loop_overhead.py --rounds 9 --new 256
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

import ryzen_compile
from ryzen_compile.runtime.generate import GenerationStats
from ryzen_compile.validate.machine import read_machine

MODEL = Path(__file__).resolve().parent.parent / "examples" / "tiny-python-lm"


class TimedSession:
    """A session whose runs are added up."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.inside = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any) -> None:
        started = time.perf_counter()
        self._session.run_with_iobinding(binding)
        self.inside += time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--new", type=int, default=256)
    args = parser.parse_args()
    with ryzen_compile.optimize(MODEL, "fp32", verify=False, threads=read_machine().usable_cores) as model:
        bound = model.engine._main
        timed = bound._session = TimedSession(bound._session)
        ids = np.arange(1, 33, dtype=np.int64)[None]
        outside = []
        for _ in range(args.rounds + 1):  # the first one warms up
            timed.inside, stats = 0.0, GenerationStats()
            started = time.perf_counter()
            model.generate(ids, max_new_tokens=args.new, do_sample=False, eos_token_id=None, stats=stats)
            outside.append((time.perf_counter() - started - timed.inside) / stats.new_tokens)
    samples = [seconds * 1e6 for seconds in outside[1:]]
    print(
        f"{read_machine().cpu.name}: {statistics.median(samples):.0f} us per token outside the session "
        f"({min(samples):.0f} - {max(samples):.0f} over {args.rounds} runs of {args.new} tokens)"
    )


if __name__ == "__main__":
    main()
