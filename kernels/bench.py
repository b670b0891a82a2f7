"""How fast the kernels are on this GPU, beside PyTorch, in shares of what the device was measured to do.

    python -m ryzen_compile.kernels.bench                     every operator
    python -m ryzen_compile.kernels.bench norm attention      some files' operators
    python -m ryzen_compile.kernels.bench --plot FILE.png     draws the last run in the CSV; needs no GPU

Each row is one (operator, shape, type, implementation): median milliseconds with the 20th and 80th percentile, GB/s or
TFLOP/s of the bytes or operations that the problem itself needs, their share of a plain copy's or a large product's
rate in this very run, how many times the time of our kernel it takes, the error against float64, and the peak of the
memory taken. Launches are timed by ``triton.testing.do_bench``, which empties the L2 cache before each.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import torch
import triton

from ryzen_compile.errors import UnsupportedError
from ryzen_compile.kernels import probe
from ryzen_compile.kernels.bench_cases import OURS, SUBJECTS, Case, Sizes

CSV = "kernels.csv"
COPY_BYTES = 1 << 30
PRODUCT = 8192  # rows, columns and depth
WARMUP_MS, MEASURE_MS = 20, 80
QUANTILES = (0.5, 0.2, 0.8)
FAILURES = (RuntimeError, ValueError, triton.TritonError)  # of one problem; the others go on
HEAD = (
    "| operator | shape | type | implementation | ms (20 - 80 %) | rate | of the limit | x ours | NMSE | MiB |\n"
    "|---|---|---|---|---|---:|---:|---:|---:|---:|"
)


@dataclass(frozen=True)
class Row:
    """One implementation on one problem; see the module. ``rate`` is in GB/s or TFLOP/s, ``of_limit`` a share of 1."""

    when: str
    device: str
    versions: str
    op: str
    shape: str
    dtype: str
    implementation: str
    ms: float
    ms_low: float
    ms_high: float
    rate: float
    unit: str
    of_limit: float
    times_ours: float
    nmse: float
    peak_mib: float


@dataclass(frozen=True)
class Limits:
    """What the device was measured to do: ``copy`` in GB/s (read and written), products in TFLOP/s by type."""

    copy: float
    products: dict[str, float]


def milliseconds(run: Callable[[], object]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    taken = triton.testing.do_bench(run, warmup=WARMUP_MS, rep=MEASURE_MS, quantiles=list(QUANTILES))
    return taken[0], taken[1], taken[2]


def measure_limits(device: torch.device) -> Limits:
    source = torch.empty(COPY_BYTES // 4, device=device).normal_()
    target = torch.empty_like(source)
    copy = 2 * COPY_BYTES / milliseconds(lambda: target.copy_(source))[0] / 1e6
    products = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(PRODUCT, PRODUCT, device=device).to(dtype) for _ in range(2))
        products[_short(dtype)] = 2 * PRODUCT**3 / milliseconds(lambda a=a, b=b: a @ b)[0] / 1e9  # type: ignore[misc]
    return Limits(copy, products)


def measure(case: Case, limits: Limits, facts: dict[str, str]) -> Iterator[Row | str]:
    """A row for every implementation, ours first, or what is wrong with one that does not run here."""
    ours = float("nan")
    for name, run in case.runs.items():
        try:
            error = case.error(run)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
            middle, low, high = milliseconds(run)
        except FAILURES as failure:
            yield f"{case.op} {case.shape} {name}: {type(failure).__name__}: {failure}".splitlines()[0]
            continue
        ours = middle if name == OURS else ours
        is_bytes = case.flops == 0
        rate = case.bytes / middle / 1e6 if is_bytes else case.flops / middle / 1e9
        limit = limits.copy if is_bytes else limits.products[case.dtype]
        yield Row(
            **facts, op=case.op, shape=case.shape, dtype=case.dtype, implementation=name, ms=middle, ms_low=low,
            ms_high=high, rate=rate, unit="GB/s" if is_bytes else "TFLOP/s", of_limit=rate / limit,
            times_ours=middle / ours, nmse=error, peak_mib=peak,
        )  # fmt: skip


def to_text(r: Row) -> str:
    """A line of the Markdown table that ``HEAD`` begins."""
    return (
        f"| {r.op} | {r.shape} | {r.dtype} | {r.implementation} | {r.ms:.4f} ({r.ms_low:.4f} - {r.ms_high:.4f}) | "
        f"{r.rate:.4g} {r.unit} | {100 * r.of_limit:.1f} % | {r.times_ours:.2f} | {r.nmse:.2g} | {r.peak_mib:.1f} |"
    )


def append(rows: Sequence[Row], file: Path) -> None:
    """Adds the rows to a CSV file, which gets a header if it is new."""
    is_new = not file.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [f.name for f in fields(Row)], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows({name: _rounded(value) for name, value in asdict(row).items()} for row in rows)


def plot(file: Path, picture: Path) -> None:
    """Draws the last run in a CSV file: every problem's share of the limit, ours beside the others."""
    import matplotlib.pyplot as plt

    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    rows = [row for row in rows if row["when"] == rows[-1]["when"]]
    labels = list(dict.fromkeys(f"{row['op']} {row['shape']} {row['dtype']}" for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.22 * len(labels) * len(names) ** 0.5), layout="constrained")
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        own = {
            f"{r['op']} {r['shape']} {r['dtype']}": 100 * float(r["of_limit"])
            for r in rows
            if r["implementation"] == name
        }
        places = [place + index * height for place, label in enumerate(labels) if label in own]
        axes.barh(places, [own[label] for label in labels if label in own], height, label=name)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(labels))], labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("% of what a copy or a large product reached in the same run")
    axes.legend(fontsize=7)
    axes.set_title(f"{rows[-1]['device']}, {rows[-1]['when'][:10]}", fontsize=9)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def _rounded(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", metavar="FILE", help=f"of {', '.join(SUBJECTS)}; default: all")
    parser.add_argument("--csv", type=Path, default=Path("benchmarks") / "data" / CSV, help="rows are appended to it")
    parser.add_argument("--plot", type=Path, help="draw the last run there instead of measuring")
    args = parser.parse_args()
    for subject in args.subjects:
        if subject not in SUBJECTS:
            parser.error(f"there is no {subject!r}; give some of {', '.join(SUBJECTS)}")
    if args.plot:
        plot(args.csv, args.plot)
        return
    lack, remedy = probe()
    if lack:
        raise UnsupportedError(f"kernels cannot be measured here: {lack}", hint=remedy)
    device = torch.device("cuda", torch.cuda.current_device())
    limits = measure_limits(device)
    products = ", ".join(f"{name} {rate:.0f}" for name, rate in limits.products.items())
    print(f"{torch.cuda.get_device_name()}: copy {limits.copy:.0f} GB/s; products {products} TFLOP/s\n")
    facts = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "versions": f"torch {torch.__version__}, triton {triton.__version__}",
    }
    failures: list[str] = []
    print(HEAD)
    for subject in args.subjects or SUBJECTS:
        failures += measure_subject(subject, device, limits, facts, args.csv)
    for failure in failures:
        print(f"FAILED {failure}")
    sys.exit(bool(failures))


def measure_subject(subject: str, device: torch.device, limits: Limits, facts: dict[str, str], file: Path) -> list[str]:
    """Measures, prints and keeps case by case, so that what fails or is cut off costs nothing that is done; what
    failed."""
    failures: list[str] = []
    cases = SUBJECTS[subject](device, Sizes())
    while True:
        try:
            case = next(cases, None)
        except FAILURES as failure:
            return [*failures, f"{subject}: {type(failure).__name__}: {failure}".splitlines()[0]]
        if case is None:
            return failures
        found = list(measure(case, limits, facts))
        rows = [row for row in found if isinstance(row, Row)]
        failures += [failure for failure in found if isinstance(failure, str)]
        print("\n".join(map(to_text, rows)), flush=True)
        append(rows, file)


if __name__ == "__main__":
    main()
