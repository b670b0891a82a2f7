"""What a cache takes, layer by layer: the figures, and the table of them."""

from __future__ import annotations

from dataclasses import dataclass

COLUMNS = ("layer", "kind", "format", "window", "allocated", "used")
_LEFT_ALIGNED = {"kind", "format"}


@dataclass(frozen=True)
class BufferMemory:
    """One layer's keys or values. ``allocated`` is all rows' bytes, ``used`` what the longest row holds of its own.

    ``window`` is 0 where every token is kept.
    """

    layer: int
    kind: str
    format: str
    window: int
    allocated: int
    used: int


@dataclass(frozen=True)
class MemoryBreakdown:
    """A cache at one moment: ``rows`` of ``capacity`` tokens, of which the longest has seen ``longest``.

    ``bytes_per_token`` is what one more token of one row takes. ``shared_rows`` is how many rows were made to share
    the pages of their common beginning until they are written; ``allocated`` counts those pages for each of them.
    """

    buffers: tuple[BufferMemory, ...]
    rows: int
    capacity: int
    longest: int
    bytes_per_token: int
    shared_rows: int

    @property
    def allocated(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.allocated for buffer in self.buffers)

    @property
    def used(self) -> int:
        """Bytes that the longest row holds in all buffers."""
        return sum(buffer.used for buffer in self.buffers)

    def to_text(self) -> str:
        """An aligned table, its totals, and what a token costs; without a final newline."""
        total = ("total", "", "", "", str(self.allocated), str(self.used))
        cells = [
            (str(b.layer), b.kind, b.format, str(b.window or "-"), str(b.allocated), str(b.used)) for b in self.buffers
        ]
        lines = [
            *_aligned([COLUMNS, *cells, total]),
            f"{self.rows} rows x {self.capacity} tokens, the longest has seen {self.longest}",
            f"{self.bytes_per_token} bytes per token",
        ]
        if self.shared_rows:
            lines.append(f"{self.shared_rows} rows share pages until they are written")
        return "\n".join(lines)


def _aligned(table: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
    return [
        "  ".join(
            cell.ljust(width) if name in _LEFT_ALIGNED else cell.rjust(width)
            for name, cell, width in zip(COLUMNS, row, widths, strict=True)
        )
        for row in table
    ]
