"""What one step of ``ryzen::cached_attention`` is given, checked: both of its kernels read it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.kernels import launch
from ryzen_compile.kernels.rotary import expect_floats, expect_tables
from ryzen_compile.numerics.rows import RowFormat

WIDEST = 256  # channels of a head: more leave no room for a block of keys and values


@dataclass(frozen=True, eq=False)
class Side:
    """Keys or values in their cache (B, K, S, W), whose rows lie next to each other's elements.

    ``dim`` channels a head; ``scale`` (K, dim) float32, contiguous, where the format has fixed scales.
    """

    cache: Tensor
    form: RowFormat
    dim: int
    scale: Tensor | None

    @property
    def fixed(self) -> bool:
        """Whether codes have scales that do not lie in the rows."""
        return not self.form.floats and not self.form.group


@dataclass(frozen=True, eq=False)
class CacheStep:
    """The arguments of the operator that storing rows needs; ``q`` (B, T, >= H D), ``k`` (B, T, K D) and ``v``
    (B, T, K D') each with the elements of a token next to each other, tables and ``k_mean`` (K, D) contiguous."""

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Side
    values: Side
    lengths: Tensor
    cos: Tensor | None
    sin: Tensor | None
    k_mean: Tensor | None
    heads: int
    interleaved: bool
    turned: bool

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def tokens(self) -> int:
        return self.q.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.keys.cache.shape[1]

    @property
    def capacity(self) -> int:
        return self.keys.cache.shape[2]

    @classmethod
    def of(
        cls,
        op: str,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        k_cache: Tensor,
        v_cache: Tensor,
        lengths: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        heads: int,
        interleaved: bool,
        k_scale: Tensor | None,
        v_scale: Tensor | None,
        k_format: str,
        v_format: str,
        turned: bool,
        k_mean: Tensor | None,
    ) -> CacheStep:
        """Raises ``UsageError`` for what does not fit together, ``ConfigError`` for formats that are not known or do
        not divide a head, ``UnsupportedError`` for types and sizes that the kernels do not have."""
        if k_cache.ndim != 4 or v_cache.ndim != 4 or k_cache.shape[:3] != v_cache.shape[:3] or 0 in k_cache.shape[1:]:
            raise UsageError(
                f"{op}: caches must be (B, K, S, W) of one B, K and S, got {tuple(k_cache.shape)} and "
                f"{tuple(v_cache.shape)}"
            )
        kv_heads = k_cache.shape[1]
        if heads < 1 or heads % kv_heads:
            raise UsageError(f"{op}: heads must be a multiple of the {kv_heads} kv heads, got {heads}")
        forms = RowFormat.parse(k_format), RowFormat.parse(v_format)
        dim, value_dim = (form.channels(cache.shape[3]) for form, cache in zip(forms, (k_cache, v_cache), strict=True))
        keys = _side(op, "k", k_cache, forms[0], dim, k_scale)
        values = _side(op, "v", v_cache, forms[1], value_dim, v_scale)
        q, k, v = _split(op, q, k, v, k_cache, heads, dim, value_dim)
        tables = {"cos": cos, "sin": sin}
        if (cos is None) != (sin is None):
            raise UsageError(f"{op}: cos and sin go together")
        if cos is not None and sin is not None:
            expect_tables(op, cos, sin, dim)
        if lengths.shape != (len(q),) or lengths.is_floating_point():
            raise UsageError(f"{op}: lengths must be integers ({len(q)},), got {lengths.dtype} {tuple(lengths.shape)}")
        mean = _by_channel(op, "k_mean", k_mean, kv_heads, dim)
        expect_floats(op, q=q, k=k, v=v, **tables, k_mean=mean, k_scale=k_scale, v_scale=v_scale)
        launch.expect_device(
            op, q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache, lengths=lengths, **tables, k_scale=k_scale,
            v_scale=v_scale, k_mean=mean,
        )  # fmt: skip
        return cls(
            q,
            k,
            v,
            keys,
            values,
            lengths.contiguous(),
            None if cos is None else cos.contiguous(),
            None if sin is None else sin.contiguous(),
            mean,
            heads,
            interleaved,
            turned,
        )


def _split(
    op: str, q: Tensor, k: Tensor | None, v: Tensor | None, cache: Tensor, heads: int, dim: int, value_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the packed projections where ``k`` and ``v`` are none."""
    batch, kv_heads = cache.shape[:2]
    widths = (heads * dim, kv_heads * dim, kv_heads * value_dim)
    if (k is None) != (v is None):
        raise UsageError(f"{op}: k and v go together")
    given = (q,) if k is None or v is None else (q, k, v)
    wanted = (sum(widths),) if len(given) == 1 else widths
    for name, tensor, width in zip(("q", "k", "v"), given, wanted, strict=False):
        if tensor.ndim != 3 or tensor.shape != (batch, q.shape[1], width):
            raise UsageError(
                f"{op}: {name} must be (B, T, {width}) with B {batch} for {heads} heads of {dim} channels and "
                f"{kv_heads} kv heads of {dim} and {value_dim}, got {tuple(tensor.shape)}"
            )
    one, *others = (tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in given)
    if not others:
        return one, one[..., widths[0] : widths[0] + widths[1]], one[..., widths[0] + widths[1] :]
    return one, others[0], others[1]


def _side(op: str, name: str, cache: Tensor, form: RowFormat, dim: int, scale: Tensor | None) -> Side:
    """One of the two caches with its scales, if they are what its format says."""
    if not 1 <= dim <= WIDEST:
        raise UnsupportedError(f"{op}: heads of 1 to {WIDEST} channels, got {dim}", hint="use the reference")
    if form.width(dim) != cache.shape[3]:
        raise UsageError(f"{op}: {name}_cache has rows of {cache.shape[3]}, {form} has {form.width(dim)} for {dim}")
    if form.bits == 32:
        expect_floats(op, **{f"{name}_cache": cache})
    elif str(cache.dtype) != f"torch.{form.dtype}":
        raise UsageError(f"{op}: {name}_cache must be torch.{form.dtype} for {form}, got {cache.dtype}")
    if cache.shape[3] > 1 and cache.stride(3) != 1:
        raise UsageError(f"{op}: the elements of a row of {name}_cache must lie next to each other")
    side = Side(cache, form, dim, None)
    if not side.fixed:
        return side
    if scale is None:
        raise UsageError(f"{op}: cache format {form} needs {name}_scale")
    shaped = _by_channel(op, f"{name}_scale", scale, cache.shape[1], dim)
    return Side(cache, form, dim, None if shaped is None else shaped.float())


def _by_channel(op: str, name: str, x: Tensor | None, kv_heads: int, dim: int) -> Tensor | None:
    """(1, K, 1, D) -> (K, D) contiguous."""
    if x is None:
        return None
    if x.shape != (1, kv_heads, 1, dim):
        raise UsageError(f"{op}: {name} must be {(1, kv_heads, 1, dim)}, got {tuple(x.shape)}")
    return x.reshape(kv_heads, dim).contiguous()
