"""Everything that needs a GPU, in one command of at most nine minutes: tests without the interpreter, then figures.

    make gpu-check                                 or: python benchmarks/gpu_check.py --out DIR

Each part runs in a process of its own under a time limit, and one that fails does not keep the others from running. CSV
files of the figures go to ``--out``; the exit status is 1 when a part failed, was cut off, or could not be run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENGINE = ("tests/backends/test_triton.py", "tests/backends/test_triton_graphs.py", "tests/train/test_module.py")
# Where the interpreter stood in for what only a GPU does: rounding to bfloat16, instructions written out, copies by
# descriptors, addresses beyond 32 bits. With --all-tests, everything.
SELECTED = ("tests/kernels/test_cached_attention.py", "tests/kernels/test_linear.py", "tests/kernels/test_attention.py",
            "tests/kernels/test_norm.py", "tests/kernels/test_loss.py")  # fmt: skip


def parts(out: Path, *, every: bool = False) -> dict[str, tuple[float, list[str]]]:
    """By name: the most seconds, and the command. Together below nine minutes, unless ``every`` test is to run."""
    here = sys.executable
    pytest = [here, "-m", "pytest", "-v", "--no-header", "--tb=short", "--maxfail=20"]
    if find_spec("xdist"):
        pytest += ["-n", str(min(os.cpu_count() or 1, 8)), "--dist", "worksteal"]
    kernels = ["tests/kernels", "--ignore=tests/kernels/cpu"] if every else [*SELECTED]
    return {
        "engine": (110, [*pytest, *ENGINE]),
        "kernels": (150, [here, "-m", "ryzen_compile.kernels.bench", "--csv", str(out / "kernels.csv")]),
        "decode": (130, [here, "benchmarks/gpu_decode.py", "--csv", str(out / "gpu_decode.csv")]),
        "tests": (1800 if every else 140, [*pytest, *kernels]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "data")
    parser.add_argument("--only", nargs="+", choices=parts(Path()), help="these parts")
    parser.add_argument("--all-tests", action="store_true", help="of the kernels: takes longer than nine minutes")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    said: dict[str, str] = {}
    for name, (limit, command) in parts(args.out.resolve(), every=args.all_tests).items():
        if args.only and name not in args.only:
            continue
        began = time.perf_counter()
        try:
            status = subprocess.run(command, cwd=ROOT, timeout=limit, check=False).returncode
            outcome = "passed" if status == 0 else f"FAILED, exit status {status}"
        except subprocess.TimeoutExpired:
            outcome = f"CUT OFF after {limit:.0f} s"
        said[name] = f"{outcome} ({time.perf_counter() - began:.0f} s)"
        print(f"\n=== {name}: {said[name]}\n", flush=True)
    for name, outcome in said.items():
        print(f"{name}: {outcome}")
    sys.exit(any(not outcome.startswith("passed") for outcome in said.values()))


if __name__ == "__main__":
    main()
