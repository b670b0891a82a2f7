"""BitNet checkpoints of transformers: linears of -1, 0 and +1 whose activations are rounded to 8 bits, as they are.

transformers has two layers for them, which differ in what is stored and in what the scale is:

    bitlinear              weight uint8 (N / 4, K), weight_scale (1,), by which results are divided
    autobitlinear offline  weight the same, or floats -1, 0, 1 (N, K); weight_scale (1,), a factor, of the bias as well
    autobitlinear online   weight floats (N, K), rounded anew at each call: scale mean |w|

A byte holds the codes 0, 1 and 2 of four rows, N / 4 apart, the first in its low bits. transformers itself decides
which modules are such layers, and loads them; here each becomes a ``TernaryLinear``, so that the captured graph says
what the model computes: a row's activations are rounded over its largest magnitude. One difference is left:
transformers counts a row with nothing above 1e-5 as if that were its largest, here its own is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ryzen_compile.errors import ModelError, UnsupportedError
from ryzen_compile.manifest import shown
from ryzen_compile.quantized_checkpoint import FLOATS, KEY
from ryzen_compile.safetensors_header import TensorEntry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ryzen_compile.ternary_linear import TernaryLinear

METHOD = "bitnet"
SCALE = ".weight_scale"
ROWS_PER_BYTE = 4
SMALLEST_SCALE = 1e-5  # of weights that are rounded anew, as in transformers
_CHOICES = {"linear_class": ("bitlinear", "autobitlinear"), "quantization_mode": ("offline", "online")}


@dataclass(frozen=True)
class BitNet:
    """``divides``: the stored scale is the inverse of a weight's. ``online``: there are floats and no scale."""

    divides: bool
    online: bool


def find_bitnet(config: Mapping[str, Any]) -> BitNet | None:
    """What a ``config.json`` says of ternary linears, None where it does not.

    Raises ModelError for a setting of the wrong type, UnsupportedError for a choice that is not known.
    """
    settings = config.get(KEY)
    if not isinstance(settings, dict) or settings.get("quant_method") != METHOD:
        return None
    chosen = {name: settings.get(name, known[0]) for name, known in _CHOICES.items()}
    for name, known in _CHOICES.items():
        if chosen[name] not in known:
            raise UnsupportedError(f"config.json: {KEY}.{name} is {shown(chosen[name])}, expected {' or '.join(known)}")
    kept = settings.get("modules_to_not_convert")
    if kept is not None and not (isinstance(kept, list) and all(isinstance(name, str) for name in kept)):
        raise ModelError(f"config.json: {KEY}.modules_to_not_convert is {shown(kept)}, expected a list of names")
    norm, eps = settings.get("use_rms_norm", False), settings.get("rms_norm_eps", 1e-6)
    if not isinstance(norm, bool):
        raise ModelError(f"config.json: {KEY}.use_rms_norm is {shown(norm)}, expected true or false")
    if norm and not (isinstance(eps, float) and 0 <= eps <= 1):
        raise ModelError(f"config.json: {KEY}.rms_norm_eps is {shown(eps)}, expected a number from 0 to 1")
    divides = chosen["linear_class"] == "bitlinear"
    return BitNet(divides, not divides and chosen["quantization_mode"] == "online")


def is_packed(bitnet: BitNet, entries: Mapping[str, TensorEntry]) -> bool:
    """Whether four rows share a byte. ``entries`` are what the headers list.

    Raises ModelError for scales without weights, or of another shape or type, and where there are none at all.
    """
    scaled = sorted(name.removesuffix(SCALE) for name in entries if name.endswith(SCALE))
    if bitnet.online:
        if scaled:
            raise ModelError(f"config.json says that weights are rounded online, {shown(scaled[0] + SCALE)} is stored")
        return False
    if not scaled:
        raise ModelError(
            f"config.json says that the weights are quantized with {METHOD}, no tensor is named *{SCALE}",
            hint=f"if the weights are in floating point, delete {KEY} from config.json",
        )
    kinds = {_stored_packed(name, bitnet, entries) for name in scaled}
    if len(kinds) > 1:
        raise ModelError("some ternary weights are stored as bytes and some as floats, expected one form")
    return kinds.pop()


def _stored_packed(name: str, bitnet: BitNet, entries: Mapping[str, TensorEntry]) -> bool:
    weight, scale = entries.get(f"{name}.weight"), entries[name + SCALE]
    if weight is None:
        raise ModelError(f"tensor {shown(name + '.weight')} is missing, {shown(name + SCALE)} is stored")
    if scale.shape != (1,) or scale.dtype not in FLOATS:
        raise ModelError(f"tensor {shown(name + SCALE)} is {scale.dtype} {scale.shape}, expected floats (1,)")
    known = ("U8",) if bitnet.divides else ("U8", *FLOATS)
    if weight.dtype not in known or len(weight.shape) != 2:
        raise ModelError(
            f"tensor {shown(name + '.weight')} is {weight.dtype} {weight.shape}, "
            f"expected {' or '.join(known)} (rows, K)"
        )
    return weight.dtype == "U8"


def make_ternary(model: nn.Module, bitnet: BitNet) -> int:
    """Puts a ``TernaryLinear`` in the place of every ternary layer of transformers in ``model``; returns how many.

    Raises ModelError for codes that stand for nothing, scales that are none, and where there is no such layer.
    """
    from transformers.integrations.bitnet import AutoBitLinear, BitLinear

    found = [(n, m) for n, m in model.named_modules() if isinstance(m, (AutoBitLinear, BitLinear))]
    if not found:
        raise ModelError(f"config.json says that the weights are quantized with {METHOD}, no linear is")
    for name, module in found:
        model.set_submodule(name, _converted(name, module, bitnet))
    return len(found)


def _converted(name: str, module: Any, bitnet: BitNet) -> TernaryLinear:
    """``module`` is a BitLinear or an AutoBitLinear with its weights in place."""
    import torch

    from ryzen_compile.numerics.ternary import pack
    from ryzen_compile.ternary_linear import TernaryLinear

    weight = module.weight.detach()
    bias = None if module.bias is None else module.bias.detach().float()
    with torch.no_grad():
        if bitnet.online:
            codes, scale = _rounded(weight.float())
        else:
            codes = _unpacked(name, weight) if weight.dtype == torch.uint8 else weight
            scale = module.weight_scale.detach().float().reshape(())
            if not scale.isfinite() or scale == 0:
                raise ModelError(f"tensor {shown(name + SCALE)} is {float(scale)}, expected a finite number but 0")
            bias = bias if bias is None or bitnet.divides else bias * scale
            scale = 1 / scale if bitnet.divides else scale
    if codes.shape != (module.out_features, module.in_features):
        expected = (module.out_features, module.in_features)
        raise ModelError(f"{shown(name)} has codes for {tuple(codes.shape)} weights, expected {expected}")
    if odd := int(((codes != -1) & (codes != 0) & (codes != 1)).sum()):
        raise ModelError(
            f"tensor {shown(name + '.weight')} stands for {odd} of {codes.numel()} weights other than -1, 0 and 1",
            hint="the checkpoint is damaged",
        )
    return TernaryLinear(pack(codes), scale, bias, module.rms_norm)


def _unpacked(name: str, packed: Tensor) -> Tensor:
    """uint8 (N / 4, K) -> int8 (N, K), -1 to 2."""
    import torch

    if packed.ndim != 2:
        raise ModelError(f"tensor {shown(name + '.weight')} has {packed.ndim} dimensions, expected 2")
    return torch.cat([(packed >> (2 * i)) & 3 for i in range(ROWS_PER_BYTE)]).to(torch.int8) - 1


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scale of float weights, with the arithmetic of transformers: times the inverse of the scale."""
    inverse = 1 / weight.abs().mean().clamp(min=SMALLEST_SCALE)
    return (weight * inverse).round().clamp(-1, 1), 1 / inverse
