"""Tables whose rows are codes: each stands for ``dim`` consecutive weights, an entry of a small codebook.

    w = ((entry_1 + entry_2) * scale) * gain + offset

A second stage codes what the first left over (residual vector quantization); a scale belongs to a row or a group of its
weights, gain and offset to a channel. What is not there is left out. A few rows may be kept as they are. The value is a
law: float32, and every step of the formula rounded by itself, so that all implementations agree to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ryzen_compile.errors import UsageError
from ryzen_compile.numerics.blockwise import row_chunks

CODE_BITS = range(1, 9)
DIMS = (1, 2, 4, 8)
STAGES = (1, 2)
MOST_CHANNELS = 1 << 20  # of a row; more than any model has, and few enough for places in a row to be int32 anywhere
MOST_KEPT = torch.iinfo(torch.int16).max  # rows: their places are int16
NO_SCALES = -1  # a format's group where an argument has to be an integer
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class CodebookFormat:
    """``bits`` of a code (1 to 8), which stands for ``dim`` weights of a row (1, 2, 4 or 8), in 1 or 2 ``stages``.

    ``group`` weights of a row share a scale, a multiple of ``dim``; 0: the whole row, None: there are no scales.
    Raises ``UsageError`` for anything else.
    """

    bits: int = 8
    dim: int = 2
    stages: int = 1
    group: int | None = 0

    def __post_init__(self) -> None:
        for name, known in (("bits", CODE_BITS), ("dim", DIMS), ("stages", STAGES)):
            value = getattr(self, name)
            if not _is_count(value) or value not in known:
                *first, last = map(str, known)
                raise UsageError(f"{name} must be {', '.join(first)} or {last}, got {value!r}")
        if self.group is not None and (not _is_count(self.group) or self.group < 0 or self.group % self.dim):
            raise UsageError(
                f"group must be a multiple of dim, which is {self.dim}, got {self.group!r}",
                hint="0 gives a whole row one scale, None leaves scales out",
            )

    @property
    def entries(self) -> int:
        """Of one stage's codebook."""
        return 1 << self.bits

    @property
    def group_argument(self) -> int:
        """``group`` as an operator takes it: ``NO_SCALES`` for None."""
        return NO_SCALES if self.group is None else self.group

    @property
    def code_bits(self) -> float:
        """Of codes per weight; scales, codebooks and kept rows come on top."""
        return self.stages * self.bits / self.dim

    def check(self, width: int) -> None:
        """Raises ``UsageError`` unless rows of ``width`` weights, ``MOST_CHANNELS`` at most, can be stored so."""
        if width > MOST_CHANNELS:
            raise UsageError(f"rows of {width} weights are too long, the most are {MOST_CHANNELS}")
        for name, part in (("dim", self.dim), ("group", self.group or 1)):
            if width < 1 or width % part:
                raise UsageError(f"rows of {width} weights are not a multiple of {name}, which is {part}")

    def codes(self, width: int) -> int:
        """Codes of one stage in a row of ``width`` weights."""
        return width // self.dim

    def row_bytes(self, width: int) -> int:
        """Of a row's codes: those of all stages without gaps, filled up to whole bytes."""
        return -(-self.stages * self.codes(width) * self.bits // 8)

    def groups(self, width: int) -> int:
        """Scales of a row."""
        if self.group is None:
            return 0
        return width // self.group if self.group else 1


@dataclass(frozen=True, eq=False)
class CodebookTensor:
    """A matrix ``shape`` (V, C) of ``format``.

    ``codes`` (V, ``row_bytes``) uint8, lowest bits of a byte first; all codes of the first stage, then all of the
    second. ``codebook`` (stages, 2 ** bits, dim) float32. Optional: ``scales`` (V, ``groups``) float16, ``gain`` and
    ``offset`` (C,) float32, ``slots`` (V,) int16 with ``kept`` (n, C) float16 or float32, n from 1 to ``MOST_KEPT``:
    where a slot is not negative, the row is that one of ``kept`` and its codes mean nothing; where it is, and any
    negative number says so, the row is coded.

    Raises ``UsageError`` for shapes and integer types that do not fit together. What the tensors hold is checked by
    ``from_codes``.
    """

    format: CodebookFormat
    shape: tuple[int, int]
    codes: Tensor
    codebook: Tensor
    scales: Tensor | None = None
    gain: Tensor | None = None
    offset: Tensor | None = None
    slots: Tensor | None = None
    kept: Tensor | None = None

    def __post_init__(self) -> None:
        form, (rows, width) = self.format, self.shape
        form.check(width)
        expected: dict[str, tuple[int, ...]] = {
            "codes": (rows, form.row_bytes(width)),
            "codebook": (form.stages, form.entries, form.dim),
            "scales": (rows, form.groups(width)),
            "gain": (width,),
            "offset": (width,),
            "slots": (rows,),
            "kept": (1 if self.kept is None or self.kept.ndim == 0 else len(self.kept), width),
        }
        for name, tensor in self.tensors.items():
            _expect_shape(name, tensor, expected[name])
        if (self.scales is None) != (form.group is None):
            raise UsageError(f"{form} {'has no' if form.group is None else 'needs'} scales")
        if (self.slots is None) != (self.kept is None):
            raise UsageError("slots and kept rows go together: one of them is missing")
        if self.kept is not None and not 1 <= len(self.kept) <= MOST_KEPT:
            raise UsageError(f"kept must have 1 to {MOST_KEPT} rows, got {len(self.kept)}")
        if self.codes.dtype != torch.uint8:
            raise UsageError(f"codes must be packed in uint8, got {self.codes.dtype}")
        if self.slots is not None and self.slots.dtype != torch.int16:
            raise UsageError(f"slots must be int16, got {self.slots.dtype}")

    @classmethod
    def stored(
        cls,
        codes: Tensor,
        codebook: Tensor,
        scales: Tensor | None,
        gain: Tensor | None,
        offset: Tensor | None,
        slots: Tensor | None,
        kept: Tensor | None,
        width: int,
        bits: int,
        group: int,
    ) -> CodebookTensor:
        """From the arguments of an operator behind its ids; ``group`` may be ``NO_SCALES``.

        Raises ``UsageError`` for what does not fit together.
        """
        if codebook.ndim != 3 or codes.ndim != 2:
            raise UsageError(
                "codebook must be (stages, entries, dim) and codes (V, row bytes), "
                f"got {tuple(codebook.shape)} and {tuple(codes.shape)}"
            )
        stages, _, dim = codebook.shape
        form = CodebookFormat(bits, dim, stages, None if group == NO_SCALES else group)
        return cls(form, (codes.shape[0], width), codes, codebook, scales, gain, offset, slots, kept)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        codebook: Tensor,
        form: CodebookFormat,
        width: int,
        *,
        scales: Tensor | None = None,
        gain: Tensor | None = None,
        offset: Tensor | None = None,
        kept_ids: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> CodebookTensor:
        """``codes`` (V, stages, width / dim) of any integer type, the rest of any floating-point type.

        Scales are rounded to float16, everything else to float32, but ``kept`` (n, width), the rows ``kept_ids`` (n,),
        stays float16 where it is; no rows are the same as none. Raises ``UsageError`` when shapes do not fit, codes are
        outside of the codebook, a number is not finite as it is stored, or ids are repeated or not those of rows.
        """
        form.check(width)
        rows = len(codes)
        _expect_shape("codes", codes, (rows, form.stages, form.codes(width)))
        _expect_range("codes", codes, form.entries)
        slots = None
        if kept_ids is not None and len(kept_ids):
            slots = _slots(kept_ids, rows)
        if (0 if kept is None else len(kept)) != (0 if kept_ids is None else len(kept_ids)):
            raise UsageError("there must be one id for every kept row")
        half = kept is not None and kept.dtype == torch.float16
        return cls(
            form,
            (rows, width),
            pack_codes(codes.flatten(1), form.bits),
            _finite("codebook", codebook, torch.float32),
            None if scales is None else _finite("scales", scales, torch.float16),
            None if gain is None else _finite("gain", gain, torch.float32),
            None if offset is None else _finite("offset", offset, torch.float32),
            slots,
            None if slots is None or kept is None else _finite("kept", kept, torch.float16 if half else torch.float32),
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name, in the order in which an operator takes them."""
        names = ("codes", "codebook", "scales", "gain", "offset", "slots", "kept")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    @property
    def nbytes(self) -> int:
        """Of all tensors, padding included."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored, everything included; a table without rows has infinitely many."""
        rows, width = self.shape
        return 8 * self.nbytes / (rows * width) if rows else float("inf")

    def unpacked(self) -> Tensor:
        """The codes, (V, stages, C / dim) uint8."""
        return self._codes_of(self.codes)

    def rows(self, ids: Tensor) -> Tensor:
        """``ids`` (...) of any integer type -> (..., C) float32.

        Raises ``IndexError`` for an id that is not a row's, negative ones included, and for a slot beyond the kept
        rows; ``UsageError`` for ids that are no integers.
        """
        expect_ids(ids)
        width = self.shape[1]
        wanted = ids.reshape(-1).long()
        out = torch.empty((len(wanted), width), device=self.codes.device)
        for start, stop in row_chunks(len(wanted), width):
            out[start:stop] = self._decoded(wanted[start:stop])
        return out.reshape(*ids.shape, width)

    def decode(self) -> Tensor:
        """The whole table, (V, C) float32."""
        return self.rows(torch.arange(self.shape[0], device=self.codes.device))

    def _codes_of(self, packed: Tensor) -> Tensor:
        form, per_stage = self.format, self.format.codes(self.shape[1])
        codes = unpack_codes(packed, form.bits, form.stages * per_stage)
        return codes.reshape(len(packed), form.stages, per_stage)

    def _decoded(self, ids: Tensor) -> Tensor:
        """Rows ``ids`` (n,) int64 -> (n, C) float32. A tensor that was widened to float64 holds the same numbers."""
        shape = (len(ids), self.shape[1])
        codes = self._codes_of(self.codes.index_select(0, ids)).int()
        codebook = self.codebook.float()
        rows = codebook[0].index_select(0, codes[:, 0].reshape(-1)).reshape(shape)
        if self.format.stages == 2:
            rows = rows + codebook[1].index_select(0, codes[:, 1].reshape(-1)).reshape(shape)
        if self.scales is not None:
            scales = self.scales.index_select(0, ids).float()
            rows = (rows.unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1)
        if self.gain is not None:
            rows = rows * self.gain.float()
        if self.offset is not None:
            rows = rows + self.offset.float()
        if self.slots is not None and self.kept is not None:
            slots = self.slots.index_select(0, ids).long()
            whole = slots >= 0
            rows[whole] = self.kept.index_select(0, slots[whole]).float()
        return rows


def expect_ids(ids: Tensor) -> None:
    """Raises ``UsageError`` for ids of rows that are no integers: rounding one would look up another row."""
    if ids.dtype not in INTEGERS:
        raise UsageError(f"ids must be integers, got {ids.dtype}")


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., n) of ``bits`` (1 to 8) -> (..., ceil(n * bits / 8)) uint8: no gaps, low bits first, 0 behind."""
    count = codes.shape[-1]
    codes = codes.to(torch.uint8)
    if bits == 8:
        return codes.contiguous()
    eights = torch.nn.functional.pad(codes, (0, -count % 8)).unflatten(-1, (-1, 8))  # eight codes fill `bits` bytes
    packed = torch.zeros((*eights.shape[:-1], bits), dtype=torch.uint8, device=codes.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        packed[..., byte] |= eights[..., i] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= eights[..., i] >> (8 - shift)
    return packed.flatten(-2)[..., : -(-count * bits // 8)].contiguous()


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes of each row of ``packed`` (..., bytes), uint8."""
    if bits == 8:
        return packed[..., :count]
    runs = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
    codes = torch.empty((*runs.shape[:-1], 8), dtype=torch.uint8, device=packed.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = runs[..., byte] >> shift
        if shift + bits > 8:
            code |= runs[..., byte + 1] << (8 - shift)
        codes[..., i] = code & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :count]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _slots(ids: Tensor, rows: int) -> Tensor:
    if ids.ndim != 1 or len(ids) > MOST_KEPT:
        raise UsageError(f"the ids of kept rows must be (n,) with n at most {MOST_KEPT}, got {tuple(ids.shape)}")
    _expect_range("ids of kept rows", ids, rows)
    if len(ids.unique()) != len(ids):
        raise UsageError("the ids of kept rows must not be repeated")
    slots = torch.full((rows,), -1, dtype=torch.int16, device=ids.device)
    slots[ids.long()] = torch.arange(len(ids), dtype=torch.int16, device=ids.device)
    return slots


def _finite(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        raise UsageError(f"{name} must be floating-point numbers, got {tensor.dtype}")
    stored = tensor.to(dtype).contiguous()
    bad = int((~torch.isfinite(stored)).sum())
    if bad:
        raise UsageError(f"{bad} of {stored.numel()} numbers of {name} are NaN or infinite as {dtype}")
    return stored


def _expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise UsageError(f"{name} must be {shape}, got {tuple(tensor.shape)}")


def _expect_range(name: str, integers: Tensor, stop: int) -> None:
    if integers.dtype not in INTEGERS:
        raise UsageError(f"{name} must be integers, got {integers.dtype}")
    if integers.numel() and not (int(integers.min()) >= 0 and int(integers.max()) < stop):
        raise UsageError(f"{name} must be 0 to {stop - 1}, got {integers.min().item()} to {integers.max().item()}")
