"""What a table takes as codes before any code is chosen, and which format meets a given size."""

from __future__ import annotations

from ryzen_compile.errors import UsageError
from ryzen_compile.numerics.codebook import CODE_BITS, DIMS, MOST_KEPT, CodebookFormat

FEWEST_KEPT = 1 / 512  # of the rows, that a chosen format leaves room for: the most frequent tokens pay for it first
HALF_BYTES, FLOAT_BYTES = 2, 4


def stored_bytes(form: CodebookFormat, rows: int, width: int, kept: int = 0) -> int:
    """Of a table (``rows``, ``width``) with gain, offset and ``kept`` float16 rows: ``CodebookTensor.nbytes``."""
    codes = rows * (form.row_bytes(width) + HALF_BYTES * form.groups(width))
    shared = FLOAT_BYTES * (form.stages * form.entries * form.dim + 2 * width)
    return codes + shared + (HALF_BYTES * (rows + kept * width) if kept else 0)


def format_for_ratio(ratio: float, rows: int, width: int) -> tuple[CodebookFormat, int]:
    """The finest format with a scale a row that is ``ratio`` times smaller than float32, and the rows that fit beside.

    Of formats with equally many bits the one of the longest vectors. Raises ``UsageError`` where none is small enough.
    """
    budget = int(FLOAT_BYTES * rows * width / ratio)
    fewest = max(1, int(rows * FEWEST_KEPT))
    formats = [CodebookFormat(bits, dim) for dim in DIMS if width % dim == 0 for bits in CODE_BITS]
    fitting = [form for form in formats if stored_bytes(form, rows, width, fewest) <= budget]
    if not fitting:
        least = min(stored_bytes(form, rows, width, fewest) for form in formats)
        raise UsageError(
            f"a table of {rows} x {width} cannot be made {ratio:g} times smaller, "
            f"{FLOAT_BYTES * rows * width / least:.4g} is the most",
            hint="scales, codebooks and kept rows count as well",
        )
    best = max(fitting, key=lambda form: (form.code_bits, form.dim))
    left = budget - stored_bytes(best, rows, width, fewest)
    return best, min(fewest + left // (HALF_BYTES * width), MOST_KEPT, rows // 2)
