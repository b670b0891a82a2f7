"""BitNet checkpoints, written here with transformers' own packing, compute what transformers computes from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations.bitnet import pack_weights

import ryzen_compile
from ryzen_compile.api import export, rewrite
from ryzen_compile.backends.onnxruntime import native as operators
from ryzen_compile.bitnet_checkpoint import BitNet, find_bitnet
from ryzen_compile.config import find_recipe
from ryzen_compile.errors import ModelError, RyzenCompileError, UnsupportedError, UsageError
from ryzen_compile.numerics.ternary import unpack
from ryzen_compile.source import inspect, load_checkpoint
from ryzen_compile.ternary_linear import TernaryLinear
from tests.zoo import VOCAB

pytest.importorskip("accelerate")  # transformers asks for it

IDS = torch.randint(3, VOCAB, (48, 3), generator=torch.Generator().manual_seed(3))
ODD = {"hidden_size": 40, "intermediate_size": 52, "head_dim": 10}  # multiples of four, as rows have to be


@dataclass(frozen=True)
class Written:
    """A checkpoint as a test writes it. ``floats``: codes are stored unpacked."""

    linear_class: str = "bitlinear"
    mode: str = "offline"
    norm: bool = False
    bias: bool = False
    floats: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        made: dict[str, Any] = {"quant_method": "bitnet", "linear_class": self.linear_class}
        made |= {"quantization_mode": self.mode, "modules_to_not_convert": None}
        return made | ({"use_rms_norm": True, "rms_norm_eps": 1e-5} if self.norm else {})


FORMS = {
    "bitlinear": Written(),
    "bitlinear, norm, bias": Written(norm=True, bias=True),
    "autobitlinear": Written("autobitlinear", bias=True),
    "autobitlinear, norm": Written("autobitlinear", norm=True),
    "autobitlinear, floats": Written("autobitlinear", floats=True),
    "online": Written("autobitlinear", "online", bias=True),
    "online, norm": Written("autobitlinear", "online", norm=True),
}


def write(directory: Path, form: Written = FORMS["bitlinear"], **changes: Any) -> Path:
    """A tiny model of ``form``; ``changes`` are to its ``quantization_config``."""
    from transformers import AutoConfig

    family = "qwen2" if form.bias else "bitnet"  # the former has biases on q, k and v
    sizes = {"vocab_size": VOCAB, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **ODD, **sizes, **special, max_position_embeddings=64)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            store(state, name, module, form)
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    directory.mkdir(parents=True, exist_ok=True)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    settings = {**config.to_dict(), "architectures": [type(model).__name__], "dtype": "float32"}
    settings["quantization_config"] = {**form.settings, **changes}
    (directory / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def store(state: dict[str, Tensor], name: str, module: nn.Linear, form: Written) -> None:
    if module.bias is not None:
        state[f"{name}.bias"] = torch.randn(module.out_features) * 0.1
    if form.norm:
        state[f"{name}.rms_norm.weight"] = torch.rand(module.in_features) + 0.5
    if form.mode == "online":
        return
    scale = module.weight.detach().abs().mean()
    codes = (module.weight.detach() / scale).round().clamp(-1, 1)
    state[f"{name}.weight"] = codes if form.floats else pack_weights(codes)
    state[f"{name}.weight_scale"] = (1 / scale if form.linear_class == "bitlinear" else scale).reshape(1)


def rewritten(directory: Path, change: Mapping[str, Any]) -> None:
    """Changes tensors of a checkpoint; None takes one away."""
    path = directory / "model.safetensors"
    state = {**load_file(path), **change}
    save_file({n: t for n, t in state.items() if t is not None}, path, metadata={"format": "pt"})


def theirs(directory: Path) -> tuple[nn.Module, Tensor]:
    """transformers' model and its logits on ``IDS``."""
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        return model, model(IDS).logits


def apart(got: Tensor, want: Tensor) -> Tensor:
    """Of each sequence, root mean square."""
    return (got.double() - want.double()).square().mean((1, 2)).sqrt()


@pytest.mark.parametrize("name", FORMS)
def test_it_computes_what_transformers_does(tmp_path: Path, name: str) -> None:
    """The median sequence within 1e-5 of the logits' size: rounding of float32. Activations that lie between two codes
    may fall to either side, which moves their own sequence. Without rounding, every one is moved by 1e-3 and more."""
    directory = write(tmp_path / "model", FORMS[name])
    _, want = theirs(directory)
    loaded = load_checkpoint(directory)
    assert loaded.blocks == {} and not hasattr(loaded.model.config, "quantization_config")
    with torch.no_grad():
        got = loaded.model(IDS).logits
        size = float(want.square().mean().sqrt())
        assert float(apart(got, want).median()) < 1e-5 * size
        for module in loaded.model.modules():
            if isinstance(module, TernaryLinear):
                module.forward = plain(module)
        assert float(apart(loaded.model(IDS).logits, want).min()) > 1e-3 * size


def plain(module: TernaryLinear) -> Any:
    """The same layer without rounding."""

    def forward(x: Tensor) -> Tensor:
        x = x if module.norm is None else module.norm(x)
        weight = unpack(module.packed, x.shape[-1]) * module.scale
        return nn.functional.linear(x, weight, module.bias)

    return forward


def test_codes_are_those_that_are_stored(tmp_path: Path) -> None:
    directory = write(tmp_path / "model")
    model, _ = theirs(directory)
    ours = load_checkpoint(directory).model
    count = 0
    for name, module in ours.named_modules():
        if isinstance(module, TernaryLinear):
            stored = model.get_submodule(name).weight
            rows = torch.cat([(stored >> (2 * i)) & 3 for i in range(4)]).to(torch.int8) - 1
            assert torch.equal(unpack(module.packed, rows.shape[1]), rows)
            count += 1
    assert count == 14 and type(ours.lm_head) is nn.Linear


def test_a_module_that_is_not_converted_stays_a_linear(tmp_path: Path) -> None:
    directory = write(tmp_path / "model", FORMS["online"], modules_to_not_convert=["lm_head", "o_proj"])
    model = load_checkpoint(directory).model
    assert type(model.model.layers[0].self_attn.o_proj) is nn.Linear
    assert isinstance(model.model.layers[0].self_attn.q_proj, TernaryLinear)


@pytest.mark.parametrize("native", [False, True], ids=["stock operators", "native operators"])
def test_from_the_directory_to_tokens(tmp_path: Path, native: bool) -> None:
    """Through the gate, the artifact and its session; every recipe keeps the linears as they came."""
    if native and operators.library() is None:
        pytest.skip(operators.missing()[0])
    directory = write(tmp_path / "model")
    _, want = theirs(directory)
    report = export(directory, tmp_path / "artifact", "fp32", logits="all", native=native)
    assert report.hits()["merge_linear"] == 4 and report.hits()["fuse_linear"] == 2
    with ryzen_compile.load(tmp_path / "artifact", native=native) as model:
        got = torch.stack([torch.from_numpy(model(row[None].numpy()))[0] for row in IDS])
        assert float(apart(got, want).median()) < 1e-5 * float(want.square().mean().sqrt())
        if native:
            assert model.engine.claims.claimed["MatMulTernary"] == 8 and not model.engine.claims.left
            assert (tmp_path / "artifact" / "model.native.onnx").exists()
        assert model.generate(IDS[:1], max_new_tokens=3).shape == (1, 6)


def test_a_recipe_of_integers_is_about_what_is_left(tmp_path: Path) -> None:
    model = load_checkpoint(write(tmp_path / "model")).model
    program, report = rewrite(model, find_recipe("int8"), backend="eager")
    assert program.ops().count("ryzen.linear_ternary") == 8
    assert program.ops().count("ryzen.linear_nbits") == program.ops().count("ryzen.embedding_nbits") == 1
    assert report.hits()["quantize_weights"] == 2


# --- what is refused


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"linear_class": "bit"}, UnsupportedError, "linear_class is 'bit', expected bitlinear or autobitlinear"),
        ({"quantization_mode": 3}, UnsupportedError, "quantization_mode is '3', expected offline or online"),
        ({"modules_to_not_convert": "lm_head"}, ModelError, "expected a list of names"),
        ({"modules_to_not_convert": [1]}, ModelError, "expected a list of names"),
        ({"use_rms_norm": 1}, ModelError, "use_rms_norm is '1', expected true or false"),
        ({"use_rms_norm": True, "rms_norm_eps": -1.0}, ModelError, "expected a number from 0 to 1"),
        ({"use_rms_norm": True, "rms_norm_eps": "x"}, ModelError, "expected a number from 0 to 1"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], error: type[RyzenCompileError], message: str) -> None:
    with pytest.raises(error, match=message):
        find_bitnet({"quantization_config": {"quant_method": "bitnet", **settings}})


def test_settings_are_read() -> None:
    def found(**settings: Any) -> BitNet | None:
        return find_bitnet({"quantization_config": {"quant_method": "bitnet", **settings}})

    assert found() == found(quantization_mode="online") == BitNet(divides=True, online=False)
    assert found(linear_class="autobitlinear") == BitNet(divides=False, online=False)
    assert found(linear_class="autobitlinear", quantization_mode="online") == BitNet(divides=False, online=True)
    assert find_bitnet({}) is find_bitnet({"quantization_config": {"quant_method": "gptq"}}) is None


LAYER = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{LAYER}.weight": None}, "up_proj.weight.* is missing"),
        ({f"{LAYER}.weight": torch.zeros(13, 40)}, r"F32 \(13, 40\), expected U8 \(rows, K\)"),
        ({f"{LAYER}.weight": torch.zeros(12, 40, dtype=torch.uint8)}, r"1 tensor\(s\) of another shape"),
        ({f"{LAYER}.weight": torch.full((13, 40), 3, dtype=torch.uint8)}, "520 of 2080 weights other than -1, 0 and 1"),
        ({f"{LAYER}.weight_scale": torch.ones(2)}, r"weight_scale.* is F32 \(2,\), expected floats \(1,\)"),
        ({f"{LAYER}.weight_scale": torch.ones(1, dtype=torch.int32)}, "expected floats"),
        ({f"{LAYER}.weight_scale": torch.zeros(1)}, "up_proj.weight_scale.* is 0.0, expected a finite number but 0"),
        ({f"{LAYER}.weight_scale": torch.tensor([torch.nan])}, "is nan, expected a finite number"),
        ({f"{LAYER}.weight_scale": None}, r"1 tensor\(s\) missing"),
        ({"model.extra.weight": torch.ones(2)}, r"1 tensor\(s\) unknown"),
    ],
)
def test_damaged_checkpoints_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    directory = write(tmp_path / "model")
    load_checkpoint(directory)
    rewritten(directory, change)
    with pytest.raises(ModelError, match=message):
        load_checkpoint(directory)


def test_floats_are_not_taken_for_codes(tmp_path: Path) -> None:
    directory = write(tmp_path / "model", FORMS["autobitlinear, floats"])
    rewritten(directory, {f"{LAYER}.weight": torch.full((52, 40), 0.5)})
    with pytest.raises(ModelError, match="2080 of 2080 weights other than -1, 0 and 1"):
        load_checkpoint(directory)
    rewritten(directory, {f"{LAYER}.weight": torch.zeros(13, 40, dtype=torch.uint8)})
    with pytest.raises(ModelError, match="some ternary weights are stored as bytes and some as floats"):
        load_checkpoint(directory)


def test_a_config_that_says_otherwise_than_the_tensors(tmp_path: Path) -> None:
    directory = write(tmp_path / "floats", FORMS["online"], linear_class="bitlinear", quantization_mode="offline")
    with pytest.raises(ModelError, match=r"no tensor is named \*.weight_scale"):
        load_checkpoint(directory)
    directory = write(tmp_path / "codes", FORMS["autobitlinear"], quantization_mode="online")
    with pytest.raises(ModelError, match=r"rounded online, .*weight_scale.* is stored"):
        load_checkpoint(directory)
    assert inspect(directory).quantization == BitNet(divides=False, online=True)


def test_half_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="quantized weights are loaded as float32"):
        load_checkpoint(write(tmp_path / "model"), dtype="bfloat16")
