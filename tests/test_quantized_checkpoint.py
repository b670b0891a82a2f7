"""Quantized checkpoints are repacked exactly: small models written here bit by bit, from the formats' definitions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ryzen_compile import source
from ryzen_compile.errors import ModelError, RyzenCompileError, UnsupportedError, UsageError
from ryzen_compile.numerics.blockwise import BlockTensor
from ryzen_compile.quantized_checkpoint import find_quantization, read_weights
from ryzen_compile.safetensors_header import check_safetensors
from ryzen_compile.source import inspect, load_checkpoint, load_model
from tests.model_directory import TOKENS, case_named, tokenizer
from tests.zoo import build

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Written:
    """A format as a test writes it. ``group`` -1: one scale per output; ``version`` is GPTQ's own, 1 or 2."""

    method: str
    bits: int = 4
    group: int = 32
    symmetric: bool = True
    version: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        """The ``quantization_config`` that goes with it."""
        if self.method == "gptq":
            form = "gptq" if self.version == 1 else "gptq_v2"
            sizes = {"bits": self.bits, "group_size": self.group, "sym": self.symmetric}
            return {"quant_method": "gptq", **sizes, "desc_act": False, "checkpoint_format": form}
        if self.method == "awq":
            sizes = {"bits": self.bits, "group_size": self.group}
            return {"quant_method": "awq", **sizes, "zero_point": True, "version": "gemm"}
        groups = {"group_0": {"targets": ["Linear"], "weights": self.weights, "input_activations": None}}
        base = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
        return base | {"ignore": ["lm_head"], "kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {}}

    @property
    def weights(self) -> dict[str, Any]:
        """compressed-tensors' word for the same."""
        strategy = "channel" if self.group == -1 else "group"
        size = None if self.group == -1 else self.group
        sizes = {"num_bits": self.bits, "group_size": size, "strategy": strategy, "symmetric": self.symmetric}
        return {**sizes, "type": "int", "dynamic": False, "actorder": None}


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Rows of codes as one string of bits each, low bits first, cut into int32 and filled up with zeros."""
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 32)))
    string = np.unpackbits(codes.astype(np.uint8)[..., None], axis=-1, bitorder="little")[..., :bits]
    return np.packbits(string.reshape(len(codes), -1), axis=-1, bitorder="little").view("<i4")


def packed(codes: np.ndarray, bits: int) -> torch.Tensor:
    """``words`` without those that hold nothing."""
    return torch.from_numpy(words(codes, bits)[:, : -(-codes.shape[1] * bits // 32)].copy())


def awq_packed(codes: np.ndarray) -> torch.Tensor:
    """Each word holds eight columns, the even ones in its lower half."""
    shuffled = codes.reshape(len(codes), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
    return torch.from_numpy(words(shuffled.reshape(codes.shape), 4)[:, : codes.shape[1] // 8].copy())


def encode(form: Written, outputs: int, inputs: int, rng: np.random.Generator) -> tuple[Tensors, torch.Tensor]:
    """Random integers of one linear: its tensors as the format stores them, and the (N, K) float32 that they mean."""
    group = inputs if form.group == -1 else form.group
    groups, half = inputs // group, 1 << (form.bits - 1)
    codes = rng.integers(0, 2 * half, (outputs, inputs))
    codes[0, :2] = 0, 2 * half - 1  # the extremes, whatever was drawn
    scales = torch.from_numpy(rng.uniform(1, 3, (outputs, groups)) / half / inputs**0.5)
    scales = scales.bfloat16() if form.bits == 8 else scales.half()
    low = 1 if form.method == "gptq" and form.version == 1 else 0  # that one cannot say 0
    zeros = np.full((outputs, groups), half) if form.symmetric else rng.integers(low, 2 * half, (outputs, groups))
    number = np.repeat(np.arange(groups), group)  # of each input
    meant = (codes - zeros[:, number]).astype(np.float32) * scales[:, number].float().numpy()
    stored = _STORE[form.method](form, codes, scales, zeros, number)
    return {name: tensor.contiguous() for name, tensor in stored.items()}, torch.from_numpy(meant)


def store_gptq(
    form: Written, codes: np.ndarray, scales: torch.Tensor, zeros: np.ndarray, number: np.ndarray
) -> Tensors:
    counted = zeros - 1 if form.version == 1 else zeros
    return {
        "qweight": packed(codes, form.bits).T,
        "qzeros": packed(counted.T, form.bits),
        "scales": scales.T,
        "g_idx": torch.from_numpy(number.astype(np.int32)),
    }


def store_awq(form: Written, codes: np.ndarray, scales: torch.Tensor, zeros: np.ndarray, number: np.ndarray) -> Tensors:
    return {"qweight": awq_packed(codes.T), "qzeros": awq_packed(zeros.T), "scales": scales.T}


def store_compressed(
    form: Written, codes: np.ndarray, scales: torch.Tensor, zeros: np.ndarray, number: np.ndarray
) -> Tensors:
    stored = {
        "weight_packed": packed(codes, form.bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape),
    }
    return stored if form.symmetric else stored | {"weight_zero_point": packed(zeros.T, form.bits).T}


_STORE: dict[str, Callable[..., Tensors]] = {
    "gptq": store_gptq,
    "awq": store_awq,
    "compressed-tensors": store_compressed,
}

FORMS = {
    "gptq v1": Written("gptq"),
    "gptq v1 asymmetric": Written("gptq", group=128, symmetric=False),
    "gptq v1 rows": Written("gptq", group=-1),
    "gptq v1 2 bits": Written("gptq", bits=2, group=16, symmetric=False),
    "gptq v1 3 bits": Written("gptq", bits=3),
    "gptq v2": Written("gptq", group=128, version=2),
    "gptq v2 asymmetric": Written("gptq", symmetric=False, version=2),
    "gptq v2 3 bits": Written("gptq", bits=3, symmetric=False, version=2),
    "gptq v2 8 bits": Written("gptq", bits=8, group=-1, symmetric=False, version=2),
    "gptq v1 8 bits": Written("gptq", bits=8, group=128),
    "awq": Written("awq", group=128, symmetric=False),
    "awq 32": Written("awq", symmetric=False),
    "awq rows": Written("awq", group=-1, symmetric=False),
    "compressed": Written("compressed-tensors", group=128),
    "compressed asymmetric": Written("compressed-tensors", symmetric=False),
    "compressed rows": Written("compressed-tensors", group=-1),
    "compressed 8 bits": Written("compressed-tensors", bits=8, group=-1),
    "compressed 8 bits asymmetric": Written("compressed-tensors", bits=8, group=128, symmetric=False),
}
RNG = np.random.default_rng(11)  # where the numbers do not matter
by_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


# --- one linear -------------------------------------------------------------------------------------------------------


def repack(directory: Path, tensors: Tensors, settings: dict[str, Any]) -> tuple[Tensors, dict[str, BlockTensor]]:
    """What ``read_weights`` makes of a file with these tensors, declared with these settings."""
    path = directory / "model.safetensors"
    save_file(tensors, path)
    quantization = find_quantization({"model_type": "llama", "quantization_config": settings})
    assert quantization is not None
    return read_weights(quantization, [path], check_safetensors(path))


def named(tensors: Tensors, name: str = "a.b") -> Tensors:
    return {f"{name}.{part}": tensor for part, tensor in tensors.items()}


@by_form
def test_dequantizes_to_what_the_format_means(form: Written, tmp_path: Path) -> None:
    tensors, meant = encode(form, 96, 256, np.random.default_rng(0))
    bias = torch.arange(96).half()
    weights, blocks = repack(tmp_path, named(tensors) | {"a.b.bias": bias, "norm": torch.ones(3)}, form.settings)
    assert weights.keys() == {"a.b.weight", "a.b.bias", "norm"} and blocks.keys() == {"a.b.weight"}
    block = blocks["a.b.weight"]
    assert torch.equal(block.dequantize(), meant) and torch.equal(weights["a.b.weight"], meant)
    assert torch.equal(weights["a.b.bias"], bias.float())
    assert (block.format.bits, block.format.symmetric) == (form.bits, form.symmetric)
    assert block.format.block == (256 if form.group == -1 else form.group)


@pytest.mark.parametrize(
    ("group", "inputs", "block"),
    [(16, 48, 16), (96, 192, 32), (512, 1024, 256), (-1, 64, 64), (-1, 96, 32), (-1, 40, 16), (-1, 8, 16)],
)
@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_groups_become_blocks_that_divide_them(
    method: str, group: int, inputs: int, block: int, tmp_path: Path
) -> None:
    form = Written(method, group=group, symmetric=False, version=2)
    tensors, meant = encode(form, 8, inputs, np.random.default_rng(1))
    weight = repack(tmp_path, named(tensors), form.settings)[1]["a.b.weight"]
    assert weight.format.block == block and weight.shape == (8, inputs)
    assert torch.equal(weight.dequantize(), meant)
    if inputs % block:  # what fills the last block up means zero
        assert torch.equal(weight.codes()[:, -1, inputs % block :].unique(dim=1), weight.zero_points()[:, -1:])


def test_rows_and_columns_that_words_do_not_divide(tmp_path: Path) -> None:
    """compressed-tensors fills both up: 13 zero points along the outputs, 36 codes along the inputs."""
    form = Written("compressed-tensors", group=-1, symmetric=False)
    tensors, meant = encode(form, 13, 36, np.random.default_rng(2))
    assert tensors["weight_packed"].shape == (13, 5) and tensors["weight_zero_point"].shape == (2, 1)
    assert torch.equal(repack(tmp_path, named(tensors), form.settings)[0]["a.b.weight"], meant)


def test_zero_points_as_signed_bytes(tmp_path: Path) -> None:
    form = Written("compressed-tensors", symmetric=False)
    tensors, _ = encode(form, 8, 64, np.random.default_rng(3))
    signed = torch.randint(-8, 8, (8, 2), dtype=torch.int8)
    tensors["weight_zero_point"] = signed
    weight = repack(tmp_path, named(tensors), form.settings)[1]["a.b.weight"]
    assert torch.equal(weight.zero_points().short(), signed.short() + 8)
    with pytest.raises(ModelError, match=r"zero_point' holds zero points outside -8\.\.7"):
        repack(tmp_path, named(tensors | {"weight_zero_point": signed + 8}), form.settings)


def test_scales_of_either_sign_and_zero(tmp_path: Path) -> None:
    form = Written("gptq")
    tensors, meant = encode(form, 8, 64, np.random.default_rng(4))
    steps = (meant / tensors["scales"].float().T.repeat_interleave(32, dim=1)).round()
    tensors["scales"][0, :3] = torch.tensor([-1.0, 0.0, 6e-8])  # the last is subnormal in float16
    weight = repack(tmp_path, named(tensors), form.settings)[1]["a.b.weight"]
    assert torch.equal(weight.dequantize()[:3, :32], steps[:3, :32] * tensors["scales"][0, :3, None].float())


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
def test_layouts_may_differ_by_module(method: str, tmp_path: Path) -> None:
    rng, wide = np.random.default_rng(5), Written(method, bits=8, group=64, symmetric=method == "gptq")
    narrow = replace(wide, bits=4, group=32, symmetric=True)
    (a, a_meant), (b, b_meant) = encode(narrow, 32, 128, rng), encode(wide, 32, 128, rng)
    if method == "gptq":
        dynamic = {"-:.*head": {}, "+:.*b": {"bits": 8, "group_size": 64}}
        settings = narrow.settings | {"dynamic": dynamic}
    else:
        groups = {"one": {"weights": narrow.weights}, "two": {"weights": wide.weights, "format": "pack-quantized"}}
        settings = narrow.settings | {"config_groups": groups}
    _, blocks = repack(tmp_path, named(a, "a") | named(b, "b"), settings)
    assert torch.equal(blocks["a.weight"].dequantize(), a_meant) and blocks["a.weight"].format.bits == 4
    assert torch.equal(blocks["b.weight"].dequantize(), b_meant) and blocks["b.weight"].format.bits == 8


def test_an_asymmetric_tensor_stays_one_by_declaration(tmp_path: Path) -> None:
    """Weights that are merged later share a format, even where one happens to have every zero point in the middle."""
    tensors, meant = encode(Written("gptq"), 32, 64, np.random.default_rng(6))
    weight = repack(tmp_path, named(tensors), Written("gptq", symmetric=False).settings)[1]["a.b.weight"]
    assert not weight.format.symmetric and torch.equal(weight.dequantize(), meant)


def test_a_symmetric_declaration_does_not_hide_zero_points(tmp_path: Path) -> None:
    form = Written("gptq", symmetric=False)
    tensors, meant = encode(form, 32, 64, np.random.default_rng(7))
    weight = repack(tmp_path, named(tensors), Written("gptq").settings)[1]["a.b.weight"]
    assert not weight.format.symmetric and torch.equal(weight.dequantize(), meant)


def test_an_index_in_order_and_none_at_all(tmp_path: Path) -> None:
    form = Written("gptq")
    tensors, meant = encode(form, 32, 64, np.random.default_rng(8))
    weights, _ = repack(tmp_path, named(tensors), form.settings | {"desc_act": True, "static_groups": True})
    assert torch.equal(weights["a.b.weight"], meant)
    del tensors["g_idx"]
    assert torch.equal(repack(tmp_path, named(tensors), form.settings)[0]["a.b.weight"], meant)
    with pytest.raises(ModelError, match=r"tensor 'a\.b\.g_idx' is missing"):
        repack(tmp_path, named(tensors), form.settings | {"desc_act": True})


def nan_in(part: str) -> Callable[[Tensors], None]:
    return lambda t: t[part].view(-1)[1:3].fill_(float("nan"))


def cut(part: str, dim: int = 0) -> Callable[[Tensors], None]:
    return lambda t: t.update({part: t[part].narrow(dim, 1, t[part].shape[dim] - 1).contiguous()})


def shuffle(part: str) -> Callable[[Tensors], None]:
    return lambda t: t.update({part: t[part].flip(0)})


GPTQ, AWQ = Written("gptq", symmetric=False), Written("awq", symmetric=False)
PACKED, SHIFTED = Written("compressed-tensors"), Written("compressed-tensors", symmetric=False)
LIES: list[tuple[Written, Callable[[Tensors], Any], type[RyzenCompileError], str]] = [
    (GPTQ, cut("qweight"), ModelError, r"'a\.b\.qweight' is I32 \(11, 32\), expected I32 \(12, 32\)"),
    (GPTQ, cut("qweight", 1), ModelError, r"'a\.b\.qweight' is I32 \(12, 31\), expected I32 \(12, 32\)"),
    (GPTQ, cut("qzeros"), ModelError, r"'a\.b\.qzeros' is I32 \(2, 4\), expected I32 \(3, 4\)"),
    (GPTQ, cut("scales"), ModelError, r"'a\.b\.scales' is F16 \(2, 32\), expected F16 or BF16 or F32 \(3, 32\)"),
    (GPTQ, cut("scales", 1), ModelError, r"is \(31, 96\), which 4-bit codes cannot fill"),
    (GPTQ, lambda t: t.update(scales=t["scales"][0].clone()), ModelError, r"scales' is \(32,\), expected 2 dim"),
    (GPTQ, lambda t: t.update(scales=t["scales"][:0].clone()), ModelError, r"scales' is \(0, 32\), expected 2 dim"),
    (GPTQ, lambda t: t.update(scales=t["scales"].int()), ModelError, r"scales' is I32 \(3, 32\), expected F16"),
    (GPTQ, lambda t: t.update(qweight=t["qweight"].float()), ModelError, r"qweight' is F32 .* expected I32"),
    (GPTQ, lambda t: t.pop("qzeros"), ModelError, r"'a\.b\.qzeros' is missing, 'a\.b' is quantized"),
    (GPTQ, lambda t: t.pop("scales"), ModelError, r"'a\.b\.scales' is missing"),
    (GPTQ, nan_in("scales"), ModelError, r"'a\.b\.scales' holds 2 NaN or infinite"),
    (GPTQ, lambda t: t["scales"][0, 0].fill_(float("inf")), ModelError, "holds 1 NaN or infinite"),
    (GPTQ, shuffle("g_idx"), UnsupportedError, r"'a\.b\.g_idx' is not in order.*desc_act=False"),
    (GPTQ, cut("g_idx"), ModelError, r"group size 32 does not divide the 95 inputs of 'a\.b'"),
    (GPTQ, lambda t: t["g_idx"].add_(1), ModelError, r"g_idx' names groups 1\.\.3 of 3"),
    (GPTQ, lambda t: t["g_idx"][30:34].fill_(0), ModelError, "makes groups of another size than 32"),
    (GPTQ, lambda t: t["qzeros"][0, 0].fill_(-1), UnsupportedError, r"qzeros' holds 8 zero point\(s\) stored as 15"),
    (GPTQ, lambda t: t.update(weight=torch.ones(32, 96)), ModelError, r"'a\.b' is stored twice.*'a\.b\.qweight'"),
    (AWQ, cut("qweight"), ModelError, r"group size 32 does not divide the 95 inputs of 'a\.b'"),
    (AWQ, cut("qweight", 1), ModelError, r"'a\.b\.qzeros' is I32 \(3, 4\), expected I32 \(3, 3\)"),
    (AWQ, cut("scales", 1), ModelError, r"'a\.b\.scales' is F16 \(3, 31\), expected F16 or BF16 or F32 \(3, 32\)"),
    (AWQ, lambda t: t.pop("qzeros"), ModelError, r"'a\.b\.qzeros' is missing"),
    (AWQ, nan_in("scales"), ModelError, "holds 2 NaN"),
    (PACKED, cut("weight_packed", 1), ModelError, r"weight_packed' is I32 \(32, 11\), expected I32 \(32, 12\)"),
    (PACKED, cut("weight_scale", 1), ModelError, r"weight_scale' is F16 \(32, 2\), expected F16 or .* \(32, 3\)"),
    (PACKED, lambda t: t.pop("weight_shape"), ModelError, r"'a\.b\.weight_shape' is missing"),
    (PACKED, lambda t: t["weight_shape"].copy_(torch.tensor([32, 90])), ModelError, "32 does not divide the 90 inputs"),
    (PACKED, lambda t: t["weight_shape"].copy_(torch.tensor([-1, -32])), ModelError, r"weight_packed' is I32"),
    (PACKED, lambda t: t["weight_shape"].copy_(torch.tensor([2**62, 2**62])), ModelError, r"weight_packed' is I32"),
    (PACKED, nan_in("weight_scale"), ModelError, r"weight_scale' holds 2 NaN"),
    (SHIFTED, lambda t: t.pop("weight_zero_point"), ModelError, r"'a\.b\.weight_zero_point' is missing"),
    (SHIFTED, cut("weight_zero_point"), ModelError, r"zero_point' is I32 \(3, 3\), expected I32 \(4, 3\)"),
    (
        PACKED,
        lambda t: t.update(weight_g_idx=torch.arange(96).int().flip(0) // 32),
        UnsupportedError,
        r"'a\.b\.weight_g_idx' is not in order.*actorder",
    ),
]


@pytest.mark.parametrize(("form", "lie", "error", "message"), LIES)
def test_tensors_that_lie(
    form: Written, lie: Callable[[Tensors], Any], error: type[RyzenCompileError], message: str, tmp_path: Path
) -> None:
    tensors, _ = encode(form, 32, 96, np.random.default_rng(9))
    lie(tensors)
    with pytest.raises(error, match=message) as caught:
        repack(tmp_path, named(tensors), form.settings)
    assert caught.type is error


@pytest.mark.parametrize("form", [GPTQ, AWQ, PACKED])
def test_group_sizes_that_do_not_fit(form: Written, tmp_path: Path) -> None:
    tensors, _ = encode(form, 32, 96, RNG)
    for group, message in ((36, "group size 36 does not divide the 96"), (64, "group size 64 does not divide the 96")):
        with pytest.raises(ModelError, match=message):
            repack(tmp_path, named(tensors), replace(form, group=group).settings)
    odd = replace(form, group=40)
    tensors, _ = encode(odd, 32, 80, RNG)
    with pytest.raises(UnsupportedError, match=r"'a\.b' has groups of 40 inputs, which no block of 16 to 256 divides"):
        repack(tmp_path, named(tensors), odd.settings)


# --- config.json ------------------------------------------------------------------------------------------------------


def with_weights(**changes: object) -> dict[str, Any]:
    return {"config_groups": {"g": {"weights": PACKED.weights | changes}}}


REFUSED: list[tuple[Written, dict[str, Any], type[RyzenCompileError], str]] = [
    (GPTQ, {"quant_method": "perpetuum"}, UnsupportedError, "quantized with 'perpetuum', expected one of gptq, awq"),
    (GPTQ, {"quant_method": "fp8"}, UnsupportedError, "quantized with 'fp8'.*save it dequantized"),
    (GPTQ, {"quant_method": None}, UnsupportedError, "quantized with 'None'"),
    (GPTQ, {"quant_method": ["gptq"]}, UnsupportedError, r"quantized with \"\['gptq'\]\""),
    (GPTQ, {"bits": 5}, UnsupportedError, r"quantization_config\.bits is 5, expected 2 or 3 or 4 or 8"),
    (GPTQ, {"bits": "4"}, ModelError, r"bits is '4', expected a whole number"),
    (GPTQ, {"bits": True}, ModelError, "bits is 'True', expected a whole number"),
    (GPTQ, {"group_size": 0}, ModelError, r"group_size is '0', expected a positive whole number or -1"),
    (GPTQ, {"group_size": 12.5}, ModelError, r"group_size is '12\.5'"),
    (GPTQ, {"checkpoint_format": "marlin"}, UnsupportedError, "is 'marlin', expected gptq or gptq_v2"),
    (GPTQ, {"is_marlin_format": True}, UnsupportedError, "is 'marlin', expected gptq or gptq_v2"),
    (GPTQ, {"pack_dtype": "int16"}, UnsupportedError, "pack_dtype is 'int16', expected int32"),
    (GPTQ, {"dynamic": [1]}, ModelError, "dynamic holds a list, expected an object"),
    (GPTQ, {"dynamic": {"x": {"bits": 6}}}, UnsupportedError, "bits is 6"),
    (AWQ, {"version": "gemv"}, UnsupportedError, "version is 'gemv', expected gemm"),
    (AWQ, {"version": "marlin"}, UnsupportedError, "version is 'marlin', expected gemm"),
    (AWQ, {"backend": "llm-awq"}, UnsupportedError, "backend is 'llm-awq'"),
    (AWQ, {"zero_point": False}, UnsupportedError, "zero_point is 'False', expected True"),
    (AWQ, {"bits": 8}, UnsupportedError, "bits is 8, expected 4"),
    (PACKED, {"format": "int-quantized"}, UnsupportedError, "format is 'int-quantized', expected pack-quantized"),
    (PACKED, {"format": "marlin-24"}, UnsupportedError, "format is 'marlin-24'"),
    (PACKED, {"format": None}, UnsupportedError, "format is 'None'"),
    (PACKED, {"kv_cache_scheme": {"num_bits": 8}}, UnsupportedError, "kv_cache_scheme is set"),
    (PACKED, {"transform_config": {"config_groups": {"R1": {}}}}, UnsupportedError, "transform_config is set"),
    (PACKED, {"sparsity_config": {"format": "sparse-24-bitmask"}}, UnsupportedError, "is 'sparse-24-bitmask'"),
    (PACKED, {"sparsity_config": 3}, UnsupportedError, "sparsity_config is '3'"),
    (PACKED, {"config_groups": {}}, ModelError, "config_groups is '{}'"),
    (PACKED, {"config_groups": {"g": {"weights": None}}}, ModelError, "weights are 'None'"),
    (PACKED, with_weights(num_bits=3), UnsupportedError, "num_bits is 3, expected 4 or 8"),
    (PACKED, with_weights(type="float"), UnsupportedError, r"config_groups\.g\.weights\.type is 'float', expected int"),
    (PACKED, with_weights(strategy="block"), UnsupportedError, "strategy is 'block', expected group or channel"),
    (PACKED, with_weights(strategy="tensor"), UnsupportedError, "strategy is 'tensor'"),
    (PACKED, with_weights(group_size=None), ModelError, "group_size is 'None'"),
    (PACKED, with_weights(dynamic=True), UnsupportedError, "dynamic is 'True', expected False"),
    (
        PACKED,
        {"config_groups": {"w8a8": {"weights": PACKED.weights, "input_activations": {"num_bits": 8}}}},
        UnsupportedError,
        r"config_groups\.w8a8 quantizes activations \(input_activations\), expected weights only",
    ),
    (
        PACKED,
        {"config_groups": {"g": {"weights": PACKED.weights, "format": "nvfp4-pack-quantized"}}},
        UnsupportedError,
        r"config_groups\.g\.format is 'nvfp4-pack-quantized'",
    ),
]


@pytest.mark.parametrize(("form", "change", "error", "message"), REFUSED)
def test_settings_that_are_refused(
    form: Written, change: dict[str, Any], error: type[RyzenCompileError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        find_quantization({"quantization_config": form.settings | change})
    assert caught.type is error and caught.value.exit_code == 3


def test_settings_that_say_the_same() -> None:
    """Spelled as AutoAWQ, GPTQModel and older releases do."""
    for form, change in (
        (AWQ, {"version": "GEMM", "modules_to_not_convert": ["lm_head"], "backend": "autoawq"}),
        (GPTQ, {"checkpoint_format": None, "dynamic": None, "meta": {"quantizer": "x"}, "pack_dtype": "int32"}),
        (PACKED, {"format": "mixed-precision"} | {"config_groups": {"g": {"weights": PACKED.weights}}}),
    ):
        settings = form.settings | change
        if settings.get("format") == "mixed-precision":
            settings["config_groups"]["g"]["format"] = "pack-quantized"
        assert find_quantization({"quantization_config": settings}) == find_quantization(
            {"quantization_config": form.settings}
        )


def test_where_the_settings_stand() -> None:
    assert find_quantization({"model_type": "llama"}) is None
    assert find_quantization({"quantization_config": None, "text_config": {}}) is None
    nested = find_quantization({"text_config": {"quantization_config": AWQ.settings}})
    assert nested is not None and nested.method == "awq"
    both = {"quantization_config": AWQ.settings, "text_config": {"quantization_config": GPTQ.settings}}
    with pytest.raises(UnsupportedError, match="holds 2 different quantization_configs"):
        find_quantization(both)
    with pytest.raises(ModelError, match="holds a list"):
        find_quantization({"quantization_config": [1]})


# --- whole models -----------------------------------------------------------------------------------------------------


def model_of(name: str, **settings: Any) -> nn.Module:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": TOKENS}
    return build(case_named(name, **(sizes | settings)))


def write_quantized(
    directory: Path, form: Written, model: nn.Module, kinds: tuple[type, ...] = (nn.Linear,), skip: str = "lm_head"
) -> Tensors:
    """Saves ``model`` with its linears quantized and gives them what they now mean; returns that by name.

    The checkpoint's own names are kept, which need not be the parameters' names.
    """
    model.save_pretrained(directory)
    rng = np.random.default_rng(12)
    tensors = {name: tensor.half() for name, tensor in load_file(directory / "model.safetensors").items()}
    meant = {}
    for name, module in model.named_modules():
        if not isinstance(module, kinds) or name.endswith(skip):
            continue
        stored, meant[f"{name}.weight"] = encode(form, *module.weight.shape, rng)
        del tensors[f"{name}.weight"]
        tensors |= named(stored, name)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    declare(directory, form.settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(meant.get(name, parameter.half()))
    return meant


def declare(directory: Path, settings: dict[str, Any]) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def edit_weights(directory: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def check_loaded(directory: Path, model: nn.Module, meant: Tensors) -> None:
    """The loaded model computes what ``model`` does, bit by bit, and its blocks are the parameters of these names."""
    loaded = load_checkpoint(directory)
    loaded.model.config._attn_implementation = "eager"  # as the zoo builds its models
    assert torch.equal(logits(loaded.model), logits(model))
    assert loaded.blocks.keys() == meant.keys()
    parameters = dict(loaded.model.named_parameters(remove_duplicate=False))
    for name, block in loaded.blocks.items():
        assert torch.equal(block.dequantize(), parameters[name]) and torch.equal(parameters[name], meant[name])


@pytest.mark.parametrize("form", [Written("gptq"), AWQ, Written("compressed-tensors", bits=8, group=-1)])
def test_a_loaded_model_computes_with_the_dequantized_weights(form: Written, tmp_path: Path) -> None:
    model = model_of("llama")
    check_loaded(tmp_path, model, write_quantized(tmp_path, form, model))


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    write_quantized(tmp_path, Written("gptq"), model_of("llama"))
    tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_what_comes_with_the_model(quantized: Path) -> None:
    loaded = load_checkpoint(quantized)
    model, tokenizer, generation = load_model(quantized)
    assert not hasattr(loaded.model.config, "quantization_config")
    assert "quantization_config" not in json.dumps(loaded.model.config.to_dict())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32} and not model.training
    assert tokenizer is not None and generation == loaded.generation_config
    model.save_pretrained(quantized)  # no trace of it there either
    assert "quantization_config" not in (quantized / "config.json").read_text()
    floats = load_checkpoint(quantized)
    assert floats.blocks == {}
    assert floats.generation_config.to_dict() == generation.to_dict()
    assert {**floats.model.config.to_dict(), "_name_or_path": ""} == {**model.config.to_dict(), "_name_or_path": ""}
    assert torch.equal(logits(floats.model), logits(model))


def test_inspect_names_the_format(quantized: Path) -> None:
    quantization = inspect(quantized).quantization
    assert quantization is not None and quantization.method == "gptq"
    declare(quantized, {"quant_method": "perpetuum"})
    with pytest.raises(UnsupportedError, match="'perpetuum'"):
        inspect(quantized)


def test_several_files(quantized: Path) -> None:
    want = logits(load_checkpoint(quantized).model)
    tensors = load_file(quantized / "model.safetensors")
    (quantized / "model.safetensors").unlink()
    table = {name: f"{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}  # a linear's parts are torn apart
    for shard in set(table.values()):
        save_file({name: tensors[name] for name in table if table[name] == shard}, quantized / shard)
    (quantized / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    assert torch.equal(logits(load_checkpoint(quantized).model), want)


def test_a_quantized_head(tmp_path: Path) -> None:
    model = model_of("llama", vocab_size=320, tie_word_embeddings=False)
    meant = write_quantized(tmp_path, Written("gptq"), model, skip="nothing")
    assert "lm_head.weight" in meant
    check_loaded(tmp_path, model, meant)


def test_a_quantized_table_shared_with_the_head(tmp_path: Path) -> None:
    model = model_of("llama", tie_word_embeddings=True)
    meant = write_quantized(tmp_path, PACKED, model, kinds=(nn.Embedding,))
    check_loaded(tmp_path, model, meant | {"lm_head.weight": meant["model.embed_tokens.weight"]})


def test_biases_are_kept(tmp_path: Path) -> None:
    model = model_of("qwen2")
    check_loaded(tmp_path, model, write_quantized(tmp_path, AWQ, model))


def test_experts_that_are_joined_stay_in_float(tmp_path: Path) -> None:
    """transformers stacks a layer's experts into one tensor; the checkpoint has them apart."""
    form, rng, model = Written("gptq"), np.random.default_rng(13), model_of("mixtral", num_local_experts=2)
    meant = write_quantized(tmp_path, form, model)
    expert = "model.layers.0.block_sparse_moe.experts.{}.{}"
    names = [expert.format(i, part) for i in range(2) for part in ("w1", "w2", "w3")]

    def quantize_experts(tensors: Tensors) -> None:
        for name in names:
            stored, values[name] = encode(form, *tensors.pop(f"{name}.weight").shape, rng)
            tensors.update(named(stored, name))

    values: Tensors = {}
    edit_weights(tmp_path, quantize_experts)
    with torch.no_grad():
        experts = model.model.layers[0].mlp.experts
        for i in range(2):
            one, two, three = (values[expert.format(i, part)] for part in ("w1", "w2", "w3"))
            experts.gate_up_proj[i] = torch.cat((one, three))
            experts.down_proj[i] = two
    with pytest.warns(UserWarning, match=r"6 quantized tensor\(s\) were joined into parameters that are no linears"):
        check_loaded(tmp_path, model, meant)


@pytest.mark.parametrize("join", [lambda a, b: torch.cat((a, b)), lambda a, b: a[:32]], ids=["joined", "split"])
def test_a_linear_made_of_quantized_tensors_is_refused(join: Callable[..., torch.Tensor], tmp_path: Path) -> None:
    """It has no blocks of its own, and quantizing it again would round twice."""
    tensors = named(encode(GPTQ, 64, 96, RNG)[0], "a") | named(encode(GPTQ, 64, 96, RNG)[0], "b")
    weights, blocks = repack(tmp_path, tensors, GPTQ.settings)
    model = nn.Sequential(nn.Linear(96, 128))
    model[0].weight = nn.Parameter(join(weights["a.weight"], weights["b.weight"]))
    with pytest.raises(
        UnsupportedError, match=r"'0\.weight' is put together .* 2 are quantized: 'a\.weight', 'b\.weight'"
    ):
        source._placed(model, weights, blocks)


def test_a_transposed_linear_is_refused(tmp_path: Path) -> None:
    """GPT-2's Conv1D holds (inputs, outputs): square ones would load, and be wrong."""
    from transformers.pytorch_utils import Conv1D

    model = model_of("gpt2", n_embd=64, n_layer=1)
    write_quantized(tmp_path, GPTQ, model, kinds=(nn.Linear,))
    square = "transformer.h.0.attn.c_proj"
    assert isinstance(model.get_submodule(square), Conv1D)
    stored, _ = encode(GPTQ, 64, 64, RNG)
    edit_weights(tmp_path, lambda t: (t.pop(f"{square}.weight"), t.update(named(stored, square))))
    with pytest.raises(UnsupportedError, match=rf"'{square}\.weight' is quantized and belongs to a Conv1D"):
        load_checkpoint(tmp_path)


def test_zeros_stored_as_a_bias_that_the_model_lacks(quantized: Path) -> None:
    name = "model.layers.0.mlp.up_proj.bias"
    edit_weights(quantized, lambda t: t.update({name: torch.zeros(256)}))
    load_checkpoint(quantized)
    edit_weights(quantized, lambda t: t.update({name: torch.ones(256)}))
    with pytest.raises(ModelError, match=rf"1 tensor\(s\) unknown: '{name}'"):
        load_checkpoint(quantized)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [t.pop(name) for name in list(t) if name.startswith(Q)], rf"1 tensor\(s\) missing: '{Q}\.weight'"),
        (lambda t: t.pop(f"{Q}.qweight"), rf"missing: '{Q}\.weight'; 3 tensor\(s\) unknown: '{Q}\.g_idx'"),
        (lambda t: t.update(named(encode(GPTQ, 64, 64, RNG)[0], "model.extra")), "unknown: 'model.extra.weight'"),
        (
            lambda t: t.update(named(encode(GPTQ, 96, 128, RNG)[0], Q)),
            rf"another shape: '{Q}\.weight' is \(96, 128\), expected \(128, 128\)",
        ),
        (lambda t: t["model.norm.weight"][3:5].fill_(float("nan")), "'model.norm.weight' holds 2 NaN"),
        (lambda t: t[f"{Q}.scales"][0, 0].fill_(float("nan")), rf"'{Q}\.scales' holds 1 NaN"),
        (lambda t: t.update({"lm_head.weight": torch.ones(1, 1)}), r"another shape: 'lm_head\.weight' is \(1, 1\)"),
        (
            lambda t: [t.pop(name) for name in list(t) if name.endswith("qweight")],
            r"quantized with gptq, no tensor is named \*\.qweight.*delete quantization_config",
        ),
    ],
)
def test_checkpoints_that_do_not_fit(quantized: Path, change: Callable[[Tensors], Any], message: str) -> None:
    edit_weights(quantized, change)
    with pytest.raises(ModelError, match=message):
        load_checkpoint(quantized)


def test_half_precision_cannot_hold_the_weights(quantized: Path) -> None:
    with pytest.raises(UsageError, match="'bfloat16': quantized weights are loaded as float32"):
        load_checkpoint(quantized, dtype="bfloat16")
