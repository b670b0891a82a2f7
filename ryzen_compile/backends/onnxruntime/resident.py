"""Giving back the pages of a weights file that has been read and is not needed again (Linux).

Native operators pack their weights into memory of their own when a session opens. The file that ONNX Runtime has mapped
for them would stay resident beside the copy, as clean pages that the system takes back only when memory is short.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from pathlib import Path

SMAPS = Path("/proc/self/smaps")
DONTNEED = 4  # MADV_DONTNEED: a page that is read again comes from the page cache again


def release(paths: Iterable[Path]) -> int:
    """Gives back what this process holds of its mappings of ``paths``; returns the bytes that were held.

    Only mappings without a page of their own are touched: a private page that somebody wrote to would be lost. Where
    the system does not list mappings, nothing happens.
    """
    wanted = {str(path.resolve()) for path in paths}
    if not SMAPS.exists():
        return 0
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    held = 0
    for start, stop, name, kib in mappings(SMAPS.read_text().splitlines()):
        if name in wanted and kib["Anonymous"] == 0 and advise(start, stop - start, DONTNEED) == 0:
            held += kib["Rss"] << 10
    return held


def mappings(lines: Iterable[str]) -> Iterator[tuple[int, int, str, dict[str, int]]]:
    """(start, stop, file, facts in KiB) of every mapping in the text of ``smaps``."""
    place: tuple[int, int, str] | None = None
    facts: dict[str, int] = {}
    for line in lines:
        first, _, rest = line.partition(" ")
        if first.endswith(":"):
            value = rest.split()
            if value and value[0].isdigit():
                facts[first[:-1]] = int(value[0])
            continue
        if place is not None:
            yield (*place, facts)
        start, _, stop = first.partition("-")
        columns = line.split(maxsplit=5)
        place, facts = (int(start, 16), int(stop, 16), columns[5] if len(columns) > 5 else ""), {}
    if place is not None:
        yield (*place, facts)
