"""Samples to Markdown and CSV: medians, spread, shares of the machine's limits, ratios. Pure functions."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLUMNS = (
    "engine", "prefill tok/s (min - max)", "TOP/s", "decode tok/s (min - max)", "bits/weight", "MB/token", "GB/s",
    "of the plain read", "load s", "peak RSS GiB",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One engine in one round. Times in seconds, sizes in bytes, ``stream_gbps`` the plain read of that round."""

    round: int
    engine: str
    prefill_s: float
    decode_s: float
    load_s: float
    peak_rss: int
    stream_gbps: float
    load_average: float


@dataclass(frozen=True)
class Setting:
    """What all samples share. ``operations`` are those of a prompt, ``weights`` the parameters that a token passes."""

    date: str
    machine: str
    shape: str
    threads: int
    prompt: int
    new: int
    operations: int
    weights: int


@dataclass(frozen=True)
class Described:
    """What one engine is: ``bytes_per_token`` of weights, versions, and a note on how it ran."""

    name: str
    ours: bool
    bytes_per_token: int
    format: str
    versions: dict[str, str]
    note: str


def spread(values: Sequence[float], digits: int = 1) -> str:
    """``median (smallest - largest)``."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} - {max(values):,.{digits}f})"


def paired_ratios(samples: Sequence[Sample], ours: str, peer: str, kind: str) -> list[float]:
    """Our speed over the peer's in every round that both finished; ``kind`` is ``prefill_s`` or ``decode_s``."""
    times = {(sample.round, sample.engine): getattr(sample, kind) for sample in samples}
    rounds = sorted({sample.round for sample in samples})
    return [times[r, peer] / times[r, ours] for r in rounds if (r, peer) in times and (r, ours) in times]


def speed_table(samples: Sequence[Sample], engines: Sequence[Described], setting: Setting) -> str:
    """Speeds: a row an engine, with the work per second that they mean."""
    stream = statistics.median(sample.stream_gbps for sample in samples)
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for engine in engines:
        own = [sample for sample in samples if sample.engine == engine.name]
        if not own:
            continue
        prefill = [setting.prompt / sample.prefill_s for sample in own]
        decode = [setting.new / sample.decode_s for sample in own]
        tops = setting.operations / setting.prompt * statistics.median(prefill) / 1e12
        gbps = engine.bytes_per_token * statistics.median(decode) / 1e9
        name = f"**{engine.name}**" if engine.ours else engine.name
        lines.append(
            f"| {name} | {spread(prefill)} | {tops:.2f} | {spread(decode)} "
            f"| {8 * engine.bytes_per_token / setting.weights:.2f} | {engine.bytes_per_token / 1e6:,.0f} "
            f"| {gbps:.1f} | {gbps / stream:.0%} | {statistics.median(sample.load_s for sample in own):.1f} "
            f"| {max(sample.peak_rss for sample in own) / 2**30:.2f} |"
        )
    return "\n".join(lines)


def ratio_table(samples: Sequence[Sample], engines: Sequence[Described]) -> str:
    """Ours over each peer: the median of the ratios within the rounds, and their spread. Above 1 we are faster."""
    ours = [engine.name for engine in engines if engine.ours]
    head = "".join(f" | {name}: prefill | {name}: decode" for name in ours)
    lines = [f"| over{head} |", "|---" * (1 + 2 * len(ours)) + "|"]
    for peer in (engine.name for engine in engines if not engine.ours):
        cells = []
        for name in ours:
            for kind in ("prefill_s", "decode_s"):
                ratios = paired_ratios(samples, name, peer, kind)
                cells.append(spread(ratios, 2) if ratios else "")
        if any(cells):
            lines.append(f"| {peer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(
    samples: Sequence[Sample],
    engines: Sequence[Described],
    setting: Setting,
    skipped: dict[str, str],
) -> str:
    """The page: setting, speeds, ratios, how each engine ran, what was left out."""
    streams = [sample.stream_gbps for sample in samples]
    rounds = len({sample.round for sample in samples})
    title = f"### {setting.shape}, prompt {setting.prompt}, {setting.new} tokens after it, {setting.threads} threads\n"
    how = (
        f"{setting.machine}; {setting.date}; rounds: {rounds}, engines in turns, one process at a time; "
        f"plain read {spread(streams)} GB/s; load average at most "
        f"{max(sample.load_average for sample in samples):.1f} before a turn.\n"
    )
    meaning = (
        f"Prefill: {setting.prompt} tokens into an empty cache, {setting.operations / 1e12:.3f} T operations in the "
        "linear layers, the head for the last token. Decode: single tokens behind the prompt. MB/token: the weights "
        "that a token reads, scales included, the cache not.\n"
    )
    parts = [title, how, speed_table(samples, engines, setting) + "\n", meaning]
    if len({engine.ours for engine in engines}) == 2:
        parts.append(ratio_table(samples, engines) + "\n")
    parts += [
        f"- {engine.name}: {engine.format}; {engine.note}; "
        + ", ".join(f"{name} {version}" for name, version in engine.versions.items())
        for engine in engines
    ]
    parts += [f"- {name}: skipped, {reason}" for name, reason in skipped.items()]
    return "\n".join(parts) + "\n"


def append_csv(path: Path, samples: Sequence[Sample], engines: Sequence[Described], setting: Setting) -> None:
    """One row a sample, below those of earlier runs."""
    described = {engine.name: engine for engine in engines}
    rows: list[dict[str, Any]] = []
    for sample in samples:
        engine = described[sample.engine]
        rows.append(
            {
                "date": setting.date,
                "machine": setting.machine,
                "threads": setting.threads,
                "shape": setting.shape,
                "prompt": setting.prompt,
                "new": setting.new,
                "round": sample.round,
                "engine": sample.engine,
                "prefill_s": f"{sample.prefill_s:.5f}",
                "decode_s": f"{sample.decode_s:.5f}",
                "load_s": f"{sample.load_s:.2f}",
                "peak_rss": sample.peak_rss,
                "bytes_per_token": engine.bytes_per_token,
                "stream_gbps": f"{sample.stream_gbps:.2f}",
                "load_average": f"{sample.load_average:.2f}",
                "versions": json.dumps(engine.versions),
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
