"""How much memory this process holds now, and the most it held: the figures behind every peak-RSS claim.

On Linux the kernel keeps the high-water mark (``VmHWM``) and lets a process reset its own; elsewhere only the peak
since the process started is known, and the result says so instead of passing for more.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
ROLLUP = Path("/proc/self/smaps_rollup")
_RESET_PEAK = "5"  # proc(5): resets the high-water mark to the current resident set

_open: list[PeakRss] = []


@dataclass
class PeakRss:
    """``peak_bytes`` is set on leaving the block. ``exact`` is False where the peak may be from before the block."""

    start_bytes: int
    exact: bool
    peak_bytes: int = 0

    @property
    def growth_bytes(self) -> int:
        """What the block added at its highest to what was resident when it began."""
        return max(0, self.peak_bytes - self.start_bytes)


@dataclass(frozen=True)
class ResidentSet:
    """Bytes resident now. ``anonymous`` memory is this process's alone; ``mapped`` pages of files are shared with every
    process that maps them, and the system may drop and read them again. Both are None where they are not told apart."""

    total: int
    anonymous: int | None = None
    mapped: int | None = None

    def __str__(self) -> str:
        text = f"{self.total / 2**20:.0f} MiB"
        if self.anonymous is None or self.mapped is None:
            return text
        return f"{text} ({self.anonymous / 2**20:.0f} MiB of its own, {self.mapped / 2**20:.0f} MiB of mapped files)"


def resident_set(rollup: Path | None = None) -> ResidentSet:
    """What is resident, by kind (Linux: exact, from ``smaps_rollup``; it takes a millisecond per GiB)."""
    try:
        text = (rollup or ROLLUP).read_text()
    except OSError:
        return ResidentSet(current_rss_bytes())
    sizes = {name: int(kib) * 1024 for name, kib in re.findall(r"^(Rss|Anonymous):\s+(\d+) kB", text, re.MULTILINE)}
    if len(sizes) < 2:
        return ResidentSet(current_rss_bytes())
    return ResidentSet(sizes["Rss"], sizes["Anonymous"], sizes["Rss"] - sizes["Anonymous"])


def current_rss_bytes() -> int:
    """Bytes resident now, file-mapped pages included."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """The most bytes resident since the process started or the mark was last reset."""
    if platform.system() == "Linux":
        found = re.search(r"^VmHWM:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    if platform.system() == "Windows":
        return int(psutil.Process().memory_info().peak_wset)
    return _rusage_peak_bytes()


def reset_peak_rss() -> bool:
    """Set the high-water mark back to what is resident now. False where the system has no such thing or forbids it."""
    try:
        CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


@contextmanager
def peak_rss() -> Iterator[PeakRss]:
    """Measure the highest resident set inside the block; blocks may be nested, in one thread.

    >>> with peak_rss() as peak:
    ...     export()
    >>> peak.peak_bytes, peak.exact
    """
    # Resetting the mark would take away what an enclosing block has seen so far.
    _note_peak()
    peak = PeakRss(start_bytes=current_rss_bytes(), exact=reset_peak_rss())
    _open.append(peak)
    try:
        yield peak
    finally:
        _note_peak()
        _open.pop()


def _note_peak() -> None:
    highest = peak_rss_bytes()
    for peak in _open:
        peak.peak_bytes = max(peak.peak_bytes, highest)


def _rusage_peak_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024  # kilobytes everywhere but on macOS
