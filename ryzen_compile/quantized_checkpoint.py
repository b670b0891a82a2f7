"""Checkpoints whose linears are stored as integers: GPTQ, AWQ and compressed-tensors, repacked and never rounded again.

Each of the three stores ``(code - zero) * scale`` with one scale for a group of inputs, and so does a ``BlockTensor``:
its ``dequantize`` gives the format's own values, bit for bit in float32. What differs is the order of the bits, where
the zero points stand and how they are counted. Which modules are quantized is read off the tensors, not off the lists
in ``quantization_config``: a linear that a list forgot is loaded as it is stored.

    GPTQ                qweight (K bits / 32, N), qzeros (G, N bits / 32), scales (G, N), g_idx (K,)
    AWQ, "gemm"         qweight (K, N / 8), qzeros (G, N / 8), scales (G, N)
    compressed-tensors  weight_packed (N, ceil(K bits / 32)), weight_scale (N, G), weight_shape, weight_zero_point

N outputs, K inputs, G groups; packed tensors are int32 with the low bits first. It knows neither graphs nor
transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile.errors import ModelError, UnsupportedError
from ryzen_compile.manifest import shown
from ryzen_compile.safetensors_header import TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

    from ryzen_compile.numerics.blockwise import BlockTensor

KEY = "quantization_config"
ROW = -1  # the group size of a format with one scale per output
FLOATS = ("F16", "BF16", "F32")
_PARTS = (
    *("qweight", "qzeros", "scales", "g_idx"),
    *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column, among eight, that each nibble of a word holds, low nibble first
_REPACKABLE = "save it dequantized with the library that made it, or take a GPTQ, AWQ or compressed-tensors checkpoint"
_IN_ORDER = "quantize with desc_act=False or static_groups=True (compressed-tensors: actorder null or 'weight')"


@dataclass(frozen=True)
class Layout:
    """How a linear's integers are stored: bits per code, inputs per scale (``ROW``: all), whether zeros are implied."""

    bits: int
    group: int
    symmetric: bool


@dataclass(frozen=True)
class Quantization:
    """What ``quantization_config`` declares. Of several ``layouts``, each linear is in the first that its tensors fit.

    ``zero_offset`` is added to every stored zero point. Unless ``ordered``, every linear must say by an index which
    group each of its inputs is in.
    """

    method: str
    layouts: tuple[Layout, ...]
    zero_offset: int = 0
    ordered: bool = True

    @property
    def anchor(self) -> str:
        """The tensor that every quantized linear has and no other module."""
        return "weight_packed" if self.method == "compressed-tensors" else "qweight"


# --- config.json ------------------------------------------------------------------------------------------------------


def find_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """What the weights of a model with this ``config.json`` are quantized with, None for a model in floating point.

    Raises UnsupportedError naming the setting that cannot be repacked, ModelError for a setting of the wrong type.
    """
    parts = (config, *(part for part in config.values() if isinstance(part, dict)))
    found = [part[KEY] for part in parts if part.get(KEY)]
    if not found:
        return None
    settings = found[0]
    if any(other != settings for other in found):
        raise UnsupportedError(f"config.json holds {len(found)} different {KEY}s, expected one", hint=_REPACKABLE)
    if not isinstance(settings, dict):
        raise ModelError(f"config.json: {KEY} holds a {type(settings).__name__}, expected an object")
    method = settings.get("quant_method")
    if not isinstance(method, str) or method not in _METHODS:
        raise UnsupportedError(
            f"config.json: the weights are quantized with {shown(method)}, expected one of {', '.join(_METHODS)}",
            hint=_REPACKABLE,
        )
    return _METHODS[method](settings)


def _gptq_settings(settings: Mapping[str, Any]) -> Quantization:
    """As AutoGPTQ and GPTQModel write them. ``dynamic`` maps names to other settings, names after ``-`` to none."""
    form = settings.get("checkpoint_format", settings.get("format")) or "gptq"
    if settings.get("is_marlin_format"):
        form = "marlin"
    _expect("checkpoint_format", form, ("gptq", "gptq_v2"))
    _expect("pack_dtype", settings.get("pack_dtype", "int32"), ("int32",))
    dynamic = settings.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise ModelError(f"config.json: {KEY}.dynamic holds a {type(dynamic).__name__}, expected an object")
    changes = [change for name, change in dynamic.items() if not name.startswith("-") and isinstance(change, dict)]
    layouts = [_gptq_layout({**settings, **change}) for change in ({}, *changes)]
    return Quantization(
        "gptq", tuple(dict.fromkeys(layouts)), int(form == "gptq"), ordered=not settings.get("desc_act")
    )


def _gptq_layout(settings: Mapping[str, Any]) -> Layout:
    return Layout(_bits(settings, "bits", (2, 3, 4, 8)), _group(settings, 128), bool(settings.get("sym", True)))


def _awq_settings(settings: Mapping[str, Any]) -> Quantization:
    version = settings.get("version", settings.get("format")) or "gemm"
    _expect("version", version.lower() if isinstance(version, str) else version, ("gemm",))
    _expect("backend", settings.get("backend") or "auto", ("auto", "autoawq"))
    _expect("zero_point", settings.get("zero_point", True), (True,))
    return Quantization("awq", (Layout(_bits(settings, "bits", (4,)), _group(settings, 128), False),))


def _compressed_settings(settings: Mapping[str, Any]) -> Quantization:
    form = settings.get("format")
    if form != "mixed-precision":  # that one leaves the word to its groups
        _expect("format", form, ("pack-quantized",))
    for name in ("kv_cache_scheme", "transform_config"):
        if settings.get(name):
            raise UnsupportedError(f"config.json: {KEY}.{name} is set, expected none", hint=_REPACKABLE)
    sparsity = settings.get("sparsity_config") or {"format": "dense"}
    _expect("sparsity_config", sparsity.get("format") if isinstance(sparsity, dict) else sparsity, ("dense",))
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise ModelError(f"config.json: {KEY}.config_groups is {shown(groups)}, expected an object of groups")
    layouts = [_compressed_layout(name, group, form) for name, group in groups.items()]
    by_activation = [_weights(group).get("actorder") in ("group", "dynamic", True) for group in groups.values()]
    return Quantization("compressed-tensors", tuple(dict.fromkeys(layouts)), ordered=not any(by_activation))


def _compressed_layout(name: str, group: Mapping[str, Any], form: object) -> Layout:
    where = f"config_groups.{name}"
    for part in ("input_activations", "output_activations"):
        if group.get(part):
            raise UnsupportedError(
                f"config.json: {KEY}.{where} quantizes activations ({part}), expected weights only", hint=_REPACKABLE
            )
    _expect(f"{where}.format", group.get("format") or form, ("pack-quantized",))
    weights = _weights(group)
    _expect(f"{where}.weights.type", weights.get("type", "int"), ("int",))
    _expect(f"{where}.weights.dynamic", weights.get("dynamic", False), (False,))
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    _expect(f"{where}.weights.strategy", strategy, ("group", "channel"))
    size = _group(weights, 0) if strategy == "group" else ROW
    return Layout(_bits(weights, "num_bits", (4, 8)), size, bool(weights.get("symmetric", True)))


def _weights(group: Mapping[str, Any]) -> Mapping[str, Any]:
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise ModelError(f"config.json: a config group's weights are {shown(weights)}, expected an object")
    return weights


def _expect(name: str, value: object, known: tuple[object, ...]) -> None:
    if not any(value is one or (isinstance(value, str) and value == one) for one in known):
        expected = " or ".join(str(one) for one in known)
        raise UnsupportedError(f"config.json: {KEY}.{name} is {shown(value)}, expected {expected}", hint=_REPACKABLE)


def _bits(settings: Mapping[str, Any], name: str, known: tuple[int, ...]) -> int:
    bits = settings.get(name)
    if type(bits) is not int:
        raise ModelError(f"config.json: {KEY}.{name} is {shown(bits)}, expected a whole number")
    if bits not in known:
        listed = " or ".join(str(one) for one in known)
        raise UnsupportedError(f"config.json: {KEY}.{name} is {bits}, expected {listed}", hint=_REPACKABLE)
    return bits


def _group(settings: Mapping[str, Any], default: int) -> int:
    size = settings.get("group_size", default)
    if type(size) is not int or not (size == ROW or size > 0):
        raise ModelError(f"config.json: {KEY}.group_size is {shown(size)}, expected a positive whole number or {ROW}")
    return size


# --- tensors ----------------------------------------------------------------------------------------------------------


def read_weights(
    quantization: Quantization, files: Sequence[Path], entries: Mapping[str, TensorEntry]
) -> tuple[dict[str, Tensor], dict[str, BlockTensor]]:
    """Every weight of a checkpoint in float32 by name, and those that are quantized as integer blocks under that name.

    ``x.qweight`` and its companions become ``x.weight`` (N, K). ``entries`` are what the headers of ``files`` list. One
    linear is unpacked at a time; what remains is the float32 model and the integers. Raises ModelError for tensors that
    are missing, of another shape or type, not finite, or stored twice, UnsupportedError for what no block can express.
    """
    from safetensors import safe_open

    weights: dict[str, Tensor] = {}
    blocks: dict[str, BlockTensor] = {}
    with ExitStack() as stack:
        handles = [stack.enter_context(safe_open(path, framework="pt")) for path in files]
        home = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118 - it is no mapping

        def fetch(name: str) -> Tensor:
            return home[name].get_tensor(name)

        parts = set()
        for linear in _linears(quantization, entries, fetch):
            parts |= linear.parts
            blocks[linear.weight] = _READERS[quantization.method](linear, quantization)
            weights[linear.weight] = blocks[linear.weight].dequantize()
        for name in sorted(entries.keys() - parts):
            tensor = fetch(name)
            weights[name] = tensor.float() if tensor.is_floating_point() else tensor
    return weights, blocks


@dataclass(frozen=True)
class _Linear:
    """One quantized module: what the headers say of its tensors, and how to read them."""

    name: str
    entries: Mapping[str, TensorEntry]
    fetch: Callable[[str], Tensor]

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"

    @property
    def parts(self) -> set[str]:
        """The names of the tensors that together are the weight."""
        return {self.full(part) for part in _PARTS if self.has(part)}

    def full(self, part: str) -> str:
        return f"{self.name}.{part}"

    def has(self, part: str) -> bool:
        return self.full(part) in self.entries

    def sizes(self, part: str, dims: int) -> tuple[int, ...]:
        """The shape of a tensor that must be there with ``dims`` dimensions."""
        entry = self.entries.get(self.full(part))
        if entry is None:
            raise ModelError(
                f"tensor {shown(self.full(part))} is missing, {shown(self.name)} is quantized",
                hint="the checkpoint is incomplete or of another format than its config.json says",
            )
        if len(entry.shape) != dims or 0 in entry.shape:
            raise ModelError(f"tensor {shown(self.full(part))} is {entry.shape}, expected {dims} dimension(s) above 0")
        return entry.shape

    def read(self, part: str, dtypes: tuple[str, ...], *shape: int) -> Tensor:
        """The tensor, if the header lists it with one of ``dtypes`` and this ``shape``."""
        self.sizes(part, len(shape))
        entry = self.entries[self.full(part)]
        if entry.shape != shape or entry.dtype not in dtypes:
            raise ModelError(
                f"tensor {shown(self.full(part))} is {entry.dtype} {entry.shape}, "
                f"expected {' or '.join(dtypes)} {shape}",
                hint="the checkpoint is damaged or quantized otherwise than its config.json says",
            )
        return self.fetch(self.full(part))

    def read_scales(self, part: str, *shape: int) -> Tensor:
        """The same in float32, all finite."""
        scales = self.read(part, FLOATS, *shape).float()
        if bad := int((~scales.isfinite()).sum()):
            raise ModelError(
                f"tensor {shown(self.full(part))} holds {bad} NaN or infinite value(s)",
                hint="the checkpoint is damaged",
            )
        return scales


def _linears(
    quantization: Quantization, entries: Mapping[str, TensorEntry], fetch: Callable[[str], Tensor]
) -> Iterator[_Linear]:
    end = f".{quantization.anchor}"
    names = sorted(name.removesuffix(end) for name in entries if name.endswith(end))
    if not names:
        raise ModelError(
            f"config.json says that the weights are quantized with {quantization.method}, no tensor is named *{end}",
            hint=f"if the weights are in floating point, delete {KEY} from config.json",
        )
    for name in names:
        linear = _Linear(name, entries, fetch)
        if linear.has("weight"):
            raise ModelError(f"{shown(name)} is stored twice: as {shown(linear.weight)} and as {shown(name + end)}")
        yield linear


def _read_gptq(linear: _Linear, quantization: Quantization) -> BlockTensor:
    words, _ = linear.sizes("qweight", 2)
    groups, outputs = linear.sizes("scales", 2)
    indexed = linear.sizes("g_idx", 1)[0] if linear.has("g_idx") or not quantization.ordered else None

    def fits(layout: Layout) -> bool:
        inputs = words * 32 // layout.bits
        return indexed in (None, inputs) and groups == (1 if layout.group == ROW else inputs // layout.group)

    layout = next(filter(fits, quantization.layouts), quantization.layouts[0])
    bits = layout.bits
    inputs = words * 32 // bits if indexed is None else indexed
    group, groups = _groups(linear, inputs, layout)
    if outputs * bits % 32 or inputs * bits % 32:
        raise ModelError(
            f"{shown(linear.name)} is ({outputs}, {inputs}), which {bits}-bit codes cannot fill whole words"
        )
    qweight = linear.read("qweight", ("I32",), inputs * bits // 32, outputs)
    qzeros = linear.read("qzeros", ("I32",), groups, outputs * bits // 32)
    scales = linear.read_scales("scales", groups, outputs)
    if indexed is not None:
        _check_order(linear, "g_idx", inputs, group)
    zeros = _unpack(qzeros, bits).T
    if quantization.zero_offset:
        _check_zeros(linear, zeros, (1 << bits) - 1)
        zeros = zeros + quantization.zero_offset
    implied = layout.symmetric and bool((zeros == 1 << (bits - 1)).all())
    return _to_blocks(linear, _unpack(qweight.T, bits), scales.T, None if implied else zeros, bits, group)


def _read_awq(linear: _Linear, quantization: Quantization) -> BlockTensor:
    layout = quantization.layouts[0]
    inputs, words = linear.sizes("qweight", 2)
    outputs = words * 8
    group, groups = _groups(linear, inputs, layout)
    qweight = linear.read("qweight", ("I32",), inputs, words)
    qzeros = linear.read("qzeros", ("I32",), groups, words)
    scales = linear.read_scales("scales", groups, outputs)
    codes, zeros = (_unpack(words, layout.bits, AWQ_ORDER).T for words in (qweight, qzeros))
    return _to_blocks(linear, codes, scales.T, zeros, layout.bits, group)


def _read_compressed(linear: _Linear, quantization: Quantization) -> BlockTensor:
    _, words = linear.sizes("weight_packed", 2)
    outputs, inputs = (int(size) for size in linear.read("weight_shape", ("I64", "I32"), 2))
    groups = linear.sizes("weight_scale", 2)[1]

    def fits(layout: Layout) -> bool:
        same = layout.symmetric is not linear.has("weight_zero_point") and words == -(-inputs * layout.bits // 32)
        return same and groups == (1 if layout.group == ROW else inputs // layout.group)

    layout = next(filter(fits, quantization.layouts), quantization.layouts[0])
    bits = layout.bits
    group, groups = _groups(linear, inputs, layout)
    packed = linear.read("weight_packed", ("I32",), outputs, -(-inputs * bits // 32))
    scales = linear.read_scales("weight_scale", outputs, groups)
    zeros = None if layout.symmetric else _compressed_zeros(linear, outputs, groups, bits)
    if linear.has("weight_g_idx") or not quantization.ordered:
        _check_order(linear, "weight_g_idx", inputs, group)
    return _to_blocks(linear, _unpack(packed, bits)[:, :inputs], scales, zeros, bits, group)


def _compressed_zeros(linear: _Linear, outputs: int, groups: int, bits: int) -> Tensor:
    """(N, G) uint8. Packed along the outputs, or as signed bytes, which early releases wrote."""
    import torch

    part, half = "weight_zero_point", 1 << (bits - 1)
    if linear.has(part) and linear.entries[linear.full(part)].dtype == "I8":
        zeros = linear.read(part, ("I8",), outputs, groups).short() + half
        if int(zeros.min()) < 0 or int(zeros.max()) >= 2 * half:
            raise ModelError(f"tensor {shown(linear.full(part))} holds zero points outside {-half}..{half - 1}")
        return zeros.to(torch.uint8)
    packed = linear.read(part, ("I32",), -(-outputs * bits // 32), groups)
    return _unpack(packed.T, bits)[:, :outputs].T


_METHODS: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {
    "gptq": _gptq_settings,
    "awq": _awq_settings,
    "compressed-tensors": _compressed_settings,
}
_READERS: dict[str, Callable[[_Linear, Quantization], BlockTensor]] = {
    "gptq": _read_gptq,
    "awq": _read_awq,
    "compressed-tensors": _read_compressed,
}


def _groups(linear: _Linear, inputs: int, layout: Layout) -> tuple[int, int]:
    """(inputs per group, number of groups)."""
    group = inputs if layout.group == ROW else layout.group
    if not inputs or inputs % group:
        raise ModelError(
            f"group size {group} does not divide the {inputs} inputs of {shown(linear.name)}",
            hint="the checkpoint is damaged or quantized otherwise than its config.json says",
        )
    return group, inputs // group


def _check_order(linear: _Linear, part: str, inputs: int, group: int) -> None:
    """Raises unless input ``i`` is in group ``i // group``: a block holds neighbours."""
    import torch

    index = linear.read(part, ("I32", "I64"), inputs).long()
    if torch.equal(index, torch.arange(inputs) // group):
        return
    name = shown(linear.full(part))
    if int(index.min()) < 0 or int(index.max()) >= inputs // group:
        raise ModelError(f"tensor {name} names groups {int(index.min())}..{int(index.max())} of {inputs // group}")
    if bool((index.diff() < 0).any()):
        raise UnsupportedError(
            f"{name} is not in order: the inputs were sorted by activation before they were grouped", hint=_IN_ORDER
        )
    raise ModelError(f"tensor {name} makes groups of another size than {group}")


def _check_zeros(linear: _Linear, stored: Tensor, most: int) -> None:
    """The first GPTQ format stores a zero point minus one; of the largest code it cannot be said what it was."""
    if count := int((stored == most).sum()):
        raise UnsupportedError(
            f"tensor {shown(linear.full('qzeros'))} holds {count} zero point(s) stored as {most}, which "
            f"some programs read as {most + 1} and others as 0",
            hint="save the model in checkpoint_format gptq_v2",
        )


def _unpack(words: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """int32 ``words`` (R, W) -> codes (R, W * 32 / bits) uint8, in the order of the bits, low first.

    Codes of 3 bits run across the words, 32 in 3. ``order`` gives the place of each code within its word instead.
    """
    import torch

    span = 3 if bits == 3 else 1  # words after which codes and words begin together again
    count = 32 * span // bits
    words = words.reshape(words.shape[0], -1, span)
    codes = torch.empty(*words.shape[:2], count, dtype=torch.uint8)
    for i, place in enumerate(order or range(count)):
        word, shift = divmod(i * bits, 32)
        part = words[..., word] >> shift
        held = 32 - shift  # bits of the code that this word can hold, the rest starts the next
        if held < bits:
            part = (part & ((1 << held) - 1)) | (words[..., word + 1] << held)
        codes[..., place] = (part & ((1 << bits) - 1)).to(torch.uint8)
    return codes.flatten(1)


def _to_blocks(
    linear: _Linear, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int
) -> BlockTensor:
    """``codes`` (N, K), ``scales`` and ``zeros`` (N, G), none for codes around the middle: the same numbers in blocks.

    A group wider than a block becomes several blocks with one scale.
    """
    import torch

    from ryzen_compile.numerics.blockwise import BlockFormat, BlockTensor

    outputs, inputs = codes.shape
    form = BlockFormat(bits, _block_of(linear, group, inputs), zeros is None)
    count = -(-inputs // form.block)
    owner = torch.arange(count) * form.block // group
    if zeros is None:
        codes = codes + (form.zero_code - (1 << (bits - 1)))  # 3 bits stand in the middle of 4
    else:
        zeros = zeros[:, owner]
    cut = torch.nn.functional.pad(codes, (0, -inputs % form.block)).reshape(outputs, count, form.block)
    return BlockTensor.from_codes(cut, scales[:, owner], zeros, form, (outputs, inputs))


def _block_of(linear: _Linear, group: int, inputs: int) -> int:
    """The largest block that divides ``group``; a row with one scale may also end in a block that is not full."""
    from ryzen_compile.numerics.blockwise import BLOCKS

    dividing = [block for block in BLOCKS if group % block == 0]
    if not dividing and group != inputs:
        raise UnsupportedError(
            f"{shown(linear.name)} has groups of {group} inputs, which no block of {BLOCKS[0]} to {BLOCKS[-1]} divides",
            hint="quantize with a group size that is a power of two",
        )
    return max(dividing, default=BLOCKS[0])
