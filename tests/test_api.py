"""The front door: optimize, load, save_pretrained, the user's own passes, and what is refused by name."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ryzen_compile
from ryzen_compile import CompiledModel, Recipe, default_passes, errors
from ryzen_compile.api import export
from ryzen_compile.config import find_recipe
from ryzen_compile.manifest import MANIFEST_NAME, read_manifest
from tests.model_directory import case_named, listing, shared_artifact, shared_model
from tests.zoo import CONTEXT, VOCAB, NanoDecoder, build, randomize

PROMPT = torch.tensor([[5, 17, 80, 3, 41]])
NEW = 17
# Times and what is derived from them: all else is the same bytes in every export of one model.
TIMED = {"report.json", "report.md", "report.html"}


def small(name: str = "llama", **settings: Any) -> nn.Module:
    """One layer: most of what is tested here does not depend on the number."""
    return build(case_named(name, num_hidden_layers=1, **settings))


def greedy(model: Any, new: int = NEW) -> list[list[int]]:
    return model.generate(PROMPT, max_new_tokens=new, do_sample=False).tolist()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small()


@pytest.fixture(scope="module")
def compiled(model: nn.Module) -> Iterator[CompiledModel]:
    with ryzen_compile.optimize(model, "fp32") as found:
        yield found


@pytest.fixture(scope="module")
def saved(compiled: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "artifact"
    compiled.save_pretrained(out)
    return out


# --- optimize ---------------------------------------------------------------------------------------------------------
def test_a_model_in_memory_gives_the_models_tokens(model: nn.Module, compiled: CompiledModel) -> None:
    assert greedy(compiled) == greedy(model)
    assert compiled.spec.vocab == VOCAB
    assert compiled.config["model_type"] == "llama"
    assert compiled.generation_config is model.generation_config
    assert compiled.tokenizer is None
    assert all(record.max_error is not None for record in compiled.report.records if record.status == "applied")


def test_arrays_come_back_as_they_went_in(compiled: CompiledModel) -> None:
    out = compiled.generate(PROMPT, max_new_tokens=3)
    assert isinstance(out, torch.Tensor) and out.dtype == torch.int64 and out.shape == (1, 8)
    assert isinstance(compiled(PROMPT), torch.Tensor)
    for given in (PROMPT.numpy(), PROMPT.tolist(), PROMPT.numpy().astype(np.int32)):
        found = compiled.generate(given, max_new_tokens=3)
        assert isinstance(found, np.ndarray) and found.tolist() == out.tolist()
        assert isinstance(compiled(given), np.ndarray)


def test_logits_are_those_of_the_model(model: nn.Module, compiled: CompiledModel) -> None:
    with torch.no_grad():
        expected = model(PROMPT).logits[:, -1:]
    torch.testing.assert_close(compiled(PROMPT), expected, rtol=1e-4, atol=1e-5)


def test_a_directory_brings_its_tokenizer_and_config(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = shared_model(tmp_path_factory)
    before = listing(directory)
    steps: list[Any] = []
    with ryzen_compile.optimize(directory, "fp32", progress=steps.append) as found:
        text = "def add(first"
        ids = np.array([found.tokenizer.encode(text)])
        with ryzen_compile.load(shared_artifact(tmp_path_factory)) as loaded:
            assert loaded.tokenizer.encode(text) == ids[0].tolist()
            assert (loaded.generate(ids, max_new_tokens=NEW) == found.generate(ids, max_new_tokens=NEW)).all()
            assert loaded.report["records"][0]["name"] == found.report.records[0].name
    said = [step for step in steps if isinstance(step, str)]
    assert said == ["load", "capture", "reference", "compile"]
    assert [step.name for step in steps if not isinstance(step, str)] == [p.name for p in default_passes(Recipe())]
    assert listing(directory) == before


SHORT = 16


@dataclass(frozen=True)
class Unusual:
    """A model in training mode, compiled for all logits and a short context, and what it was before."""

    model: nn.Module
    before: dict[str, Any]
    compiled: CompiledModel


def state_of(model: nn.Module) -> dict[str, Any]:
    """All of a model that capturing it could disturb."""
    return {
        "training": [module.training for module in model.modules()],
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": model.config._attn_implementation,
        "parameters": {
            name: (p.data_ptr(), p.requires_grad, p.grad, hashlib.sha256(p.detach().numpy().tobytes()).hexdigest())
            for name, p in model.named_parameters()
        },
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "forward": type(model).forward,
        "attributes": sorted(vars(model)),
    }


@pytest.fixture(scope="module")
def unusual() -> Iterator[Unusual]:
    model = small().train()
    before = state_of(model)
    recipe = Recipe(name="short", context=SHORT, logits="all")
    with ryzen_compile.optimize(model, recipe, verify=False) as found:
        yield Unusual(model, before, found)


def test_the_model_is_left_as_it_was(unusual: Unusual) -> None:
    assert state_of(unusual.model) == unusual.before


def test_a_failed_capture_leaves_the_model_as_it_was() -> None:
    model = small()
    before = model.config._attn_implementation

    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float(x.sum())  # a value where there is only a shape

    model.model.norm = Broken()
    with pytest.raises(errors.CaptureError, match=r"torch\.export could not trace LlamaForCausalLM"):
        ryzen_compile.optimize(model.train())
    assert model.training and model.config._attn_implementation == before


@pytest.fixture(scope="module")
def unchecked(model: nn.Module) -> Iterator[CompiledModel]:
    with ryzen_compile.optimize(model, "fp32", verify=False) as found:
        yield found


def test_without_the_gate_the_result_is_the_same(unchecked: CompiledModel, compiled: CompiledModel) -> None:
    assert unchecked.report.reference_rmse is None
    assert all(record.max_error is None for record in unchecked.report.records)
    assert unchecked.report.hits() == compiled.report.hits()
    assert torch.equal(unchecked(PROMPT), compiled(PROMPT))
    assert compiled.report.reference_rmse is not None


def test_the_eager_backend_generates_but_saves_nothing(
    model: nn.Module, compiled: CompiledModel, tmp_path: Path
) -> None:
    with ryzen_compile.optimize(model, "fp32", backend="eager", verify=False) as eager:
        assert eager.engine.name == "eager"
        assert greedy(eager) == greedy(compiled)
        with pytest.raises(errors.UsageError, match=r"'eager' engine, has nothing to save; .*onnxruntime backend"):
            eager.save_pretrained(tmp_path / "out")
    assert listing(tmp_path) == {}


def test_logits_of_all_tokens(unusual: Unusual, compiled: CompiledModel) -> None:
    with torch.no_grad():
        expected = unusual.model(PROMPT).logits
    torch.testing.assert_close(unusual.compiled(PROMPT), expected, rtol=1e-4, atol=1e-5)
    assert unusual.compiled.engine.all_logits and not compiled.engine.all_logits
    assert "prune_logits" not in unusual.compiled.report.hits()
    assert compiled.report.hits()["prune_logits"] == 1


def test_a_context_shortens_the_models_own(unusual: Unusual) -> None:
    assert unusual.compiled.spec.context == SHORT
    assert greedy(unusual.compiled, SHORT - 5) == greedy(unusual.model, SHORT - 5)
    with pytest.raises(errors.PromptError, match="5 tokens plus 12 new tokens exceeds the model's context of 16"):
        greedy(unusual.compiled, SHORT - 4)


def test_a_plain_module_needs_a_context_only_if_it_does_not_say(tmp_path: Path) -> None:
    torch.manual_seed(0)
    nano = NanoDecoder(width=32, heads=2, layers=1).eval()
    randomize(nano)
    with ryzen_compile.optimize(nano, "fp32", verify=False) as found:
        assert found.spec.context == CONTEXT
        ids, expected = PROMPT, PROMPT
        for _ in range(NEW):
            expected = torch.cat([expected, nano(expected)[:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(found.generate(ids, max_new_tokens=NEW), expected)
        found.save_pretrained(tmp_path / "artifact")
    with ryzen_compile.load(tmp_path / "artifact") as loaded:
        assert loaded.generate(PROMPT, max_new_tokens=NEW).tolist() == expected.tolist()
    del nano.block_size
    with pytest.raises(errors.ConfigError, match="NanoDecoder does not say how many positions it has; pass context=N"):
        ryzen_compile.optimize(nano)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"recipe": "fp23"}, errors.ConfigError, "there is no recipe 'fp23'; did you mean 'fp32'?"),
        ({"recipe": "zstd"}, errors.ConfigError, "there is no recipe 'zstd'; recipes are int4, int8, .*fp32"),
        ({"logits": "lst"}, errors.ConfigError, "logits: Input should be 'last' or 'all', got 'lst'"),
        ({"context": 0}, errors.ConfigError, "context: Input should be greater than or equal to 1, got 0"),
        ({"context": "many"}, errors.ConfigError, "context: Input should be a valid integer.*got 'many'"),
        ({"context": CONTEXT + 1}, errors.ConfigError, f"context {CONTEXT + 1} exceeds the {CONTEXT} positions"),
        ({"backend": "tensorrt"}, errors.UsageError, "no backend 'tensorrt'; use one of eager, onnxruntime"),
        ({"threads": 0}, errors.UsageError, "threads must be at least 1, got 0"),
    ],
)
def test_what_is_asked_for_is_checked(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.replace("?", r"\?")):
        ryzen_compile.optimize(small(), **arguments)


def test_an_unknown_setting_of_a_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match="contxt"):
        Recipe(contxt=16)
    with pytest.raises(ValueError, match="frozen"):
        Recipe().context = 16


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5:7] = float("nan")
    message = r"'model\.layers\.0\.mlp\.up_proj\.weight' holds 2 NaN or infinite value\(s\); 1 tensor\(s\) are affected"
    for call in (ryzen_compile.optimize, lambda m: export(m, tmp_path / "out")):
        with pytest.raises(errors.ModelError, match=message):
            call(model)
    assert listing(tmp_path) == {}


# --- the user's own passes --------------------------------------------------------------------------------------------
class SquaredRelu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x)
        return y * y


@pytest.fixture(scope="module")
def documented(repository: Path) -> tuple[ModuleType, str]:
    """The pass that docs/writing_a_pass.md shows, as a module, and the lines that run it."""
    text = (repository / "docs" / "writing_a_pass.md").read_text(encoding="utf-8")
    definition, usage = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    module = ModuleType("documented_pass")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(definition, "writing_a_pass.md", "exec"), module.__dict__)  # noqa: S102 - our own page
    return module, usage


@pytest.fixture(scope="module")
def decoder() -> nn.Module:
    model = small()
    model.model.layers[0].mlp.act_fn = SquaredRelu()
    return model


def test_the_documented_pass_fires_before_the_recipes_own(
    documented: tuple[ModuleType, str], decoder: nn.Module
) -> None:
    passes = [documented[0].FuseSquaredRelu(), *default_passes(Recipe())]
    with ryzen_compile.optimize(decoder, "fp32", passes=passes) as found:
        first = found.report.records[0]
        assert (first.name, first.status, len(first.hits), first.misses) == ("fuse_squared_relu", "applied", 1, ())
        assert first.ops["ryzen.activation"] == 1 and "aten.relu" not in first.ops
        assert found.report.hits()["recognize_activation"] == 0
        assert greedy(found) == greedy(decoder)


def test_the_documented_usage_runs_as_printed(
    documented: tuple[ModuleType, str], decoder: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    module, usage = documented
    names = {**module.__dict__, "decoder": decoder}
    exec(compile(usage, "writing_a_pass.md", "exec"), names)  # noqa: S102 - our own page
    with names["model"] as found:
        assert "fuse_squared_relu" in found.report.hits()
        assert greedy(found) == greedy(decoder)
    assert "fuse_squared_relu" in capsys.readouterr().out


def test_a_pass_that_moves_the_logits_is_rolled_back(decoder: nn.Module) -> None:
    from ryzen_compile import RewritePass

    class DropRelu(RewritePass):
        name = "drop_relu"
        anchors = (torch.ops.aten.relu,)

        def match(self, node: torch.fx.Node, program: Any) -> torch.fx.Node:
            return node

        def rewrite(self, edit: Any, m: torch.fx.Node) -> None:
            edit.replace(m, m.args[0])

    with ryzen_compile.optimize(decoder, "fp32", passes=[DropRelu(), *default_passes(Recipe())]) as found:
        first = found.report.records[0]
        assert first.status == "rolled back" and not first.hits
        assert re.search(r"logits moved by [\d.e+-]+ .*first in model\.layers\.0\.mlp", first.detail)
        assert greedy(found) == greedy(decoder)


def test_passes_without_a_cache_cannot_generate(decoder: nn.Module) -> None:
    with pytest.raises(errors.UsageError, match="has no key/value cache; run insert_kv_cache"):
        ryzen_compile.optimize(decoder, passes=[], verify=False)


# --- save and load ----------------------------------------------------------------------------------------------------
def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def test_what_was_saved_loads_and_gives_the_same(compiled: CompiledModel, saved: Path) -> None:
    with ryzen_compile.load(saved) as loaded:
        assert greedy(loaded) == greedy(compiled)
        assert torch.equal(loaded(PROMPT), compiled(PROMPT))
        assert loaded.spec == compiled.spec
        assert loaded.config == {**json.loads(json.dumps(compiled.config)), **loaded.config}
        assert loaded.report == json.loads(json.dumps(compiled.report.to_json(), default=str))


def test_two_exports_differ_in_their_times_only(unchecked: CompiledModel, saved: Path, tmp_path: Path) -> None:
    """Captured, rewritten and written anew: the weights, the graph and every configuration are the same bytes."""
    unchecked.save_pretrained(tmp_path / "again")
    one, other = digests(saved), digests(tmp_path / "again")
    assert one.keys() == other.keys()
    assert {name for name in one if one[name] != other[name]} <= {*TIMED, MANIFEST_NAME}
    stable = [{**read_manifest(path), "files": None} for path in (saved, tmp_path / "again")]
    assert stable[0] == stable[1]


def test_loading_and_saving_copies_every_byte(saved: Path, tmp_path: Path) -> None:
    with ryzen_compile.load(saved) as loaded:
        loaded.save_pretrained(tmp_path / "copy")
        assert digests(tmp_path / "copy") == digests(saved)
        with pytest.raises(errors.ArtifactError, match="is not empty"):
            loaded.save_pretrained(tmp_path / "copy")
        loaded.save_pretrained(tmp_path / "copy", force=True)
    assert digests(tmp_path / "copy") == digests(saved)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_an_artifact_can_replace_the_one_it_was_loaded_from(saved: Path, tmp_path: Path) -> None:
    with ryzen_compile.load(saved) as loaded:
        loaded.save_pretrained(tmp_path / "copy")
    before = digests(tmp_path / "copy")
    with ryzen_compile.load(tmp_path / "copy") as own:
        own.save_pretrained(tmp_path / "copy", force=True)
        assert greedy(own)
    assert digests(tmp_path / "copy") == before


def test_a_failed_save_keeps_the_model_usable(compiled: CompiledModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(errors.UsageError, match="is a file"):
        compiled.save_pretrained(tmp_path / "file")
    assert listing(tmp_path) == {"file": 1}
    assert greedy(compiled)


LOAD_WITHOUT_TORCH = """
import sys
import ryzen_compile
with ryzen_compile.load(sys.argv[1], threads=1) as model:
    out = model.generate([[5, 17, 80, 3, 41]], max_new_tokens=17)
heavy = sorted({"torch", "transformers", "onnxscript", "onnx_ir"} & set(sys.modules))
print(out.tolist(), heavy)
"""


def test_loading_needs_neither_torch_nor_transformers(compiled: CompiledModel, saved: Path, repository: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOAD_WITHOUT_TORCH, str(saved)],
        cwd=repository, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert child.stderr == ""
    assert child.stdout.strip() == f"{greedy(compiled)} []"


# --- integer weights --------------------------------------------------------------------------------------------------
TEXT = "".join(f"def add_{i}(first, second):\n    return first + second * {i}\n" for i in range(900))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than enough to calibrate on: about a character a token."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT)
    return path


def notes(report: Any) -> dict[str, str]:
    """What the quantizing pass says of each weight, by its label."""
    record = next(r for r in report.records if r.name == "quantize_weights")
    return dict(hit.note.split(": ", 1) for hit in record.hits)


def test_by_default_weights_are_four_bits_and_a_model_in_memory_is_not_calibrated(model: nn.Module) -> None:
    before = state_of(model)
    with ryzen_compile.optimize(model) as found:
        assert found.report.facts["recipe"] == "int4" and "calibration" not in found.report.facts
        said = notes(found.report)
        assert len(said) == 4 + 2  # a layer, the table and the head
        assert said.pop("lm_head") == "8 bits, blocks of 64, mse"
        assert all(re.fullmatch(r"4 bits, blocks of (32|64), mse", note) for note in said.values()), said
        assert greedy(found)
    assert state_of(model) == before


@pytest.fixture(scope="module")
def integer(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Iterator[CompiledModel]:
    """Every option at once."""
    directory = shared_model(tmp_path_factory)
    with ryzen_compile.optimize(
        directory,
        recipe=Recipe(**{**find_recipe("int4", bits=2, max_kl=20.0).model_dump(), "name": "own"}),
        target_bits=5.0,
        overrides={"lm_head": {"bits": 8}, r"layers\.1\.mlp\.down": {"float": True}},
        prefill="int8",
        calibration=text,
        threads=1,
        native=False,  # native products would leave the form for prompts unused
    ) as found:
        yield found


def test_options_reach_the_weights(integer: CompiledModel, text: Path) -> None:
    said = notes(integer.report)
    assert said["lm_head"].startswith("8 bits, blocks of 64, gptq")
    assert "model.layers.1.mlp.down_proj" not in said and len(said) == 2 * 4 + 2 - 1
    assert {note[:6] for label, note in said.items() if label != "lm_head"} == {"2 bits", "4 bits"}
    facts = integer.report.facts["calibration"]
    assert facts["text"] == text.name and facts["tokens"] == 64 * CONTEXT  # windows of 256, cut to the context
    assert facts["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()


@pytest.fixture(scope="module")
def twofold(integer: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("twofold") / "artifact"
    integer.save_pretrained(out)
    return out


LONG_PROMPT = np.random.default_rng(4).integers(3, VOCAB, (1, 40))


def test_an_artifact_with_a_second_form_loads_and_uses_it_for_prompts(
    integer: CompiledModel, twofold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = read_manifest(twofold)["files"]
    assert {"model.onnx", "model.onnx.data", "prefill.onnx", "prefill.onnx.data"} <= set(files)
    assert read_manifest(twofold)["recipe"]["prefill"] == "int8"
    with ryzen_compile.load(twofold, threads=1, native=False) as loaded:
        engine: Any = loaded.engine
        used = {"main": [], "prefill": []}
        for name, bound in (("main", engine._main), ("prefill", engine._prefill)):

            def counted(tokens: Any, cache: Any, last: int, run: Any = bound.run, seen: list[int] = used[name]) -> Any:
                seen.append(tokens.shape[1])
                return run(tokens, cache, last)

            monkeypatch.setattr(bound, "run", counted)
        out = loaded.generate(LONG_PROMPT, max_new_tokens=NEW)
        assert used == {"main": [1] * (NEW - 1), "prefill": [40]}
        assert (out == integer.generate(LONG_PROMPT, max_new_tokens=NEW)).all()
        loaded.generate(LONG_PROMPT[:, :15], max_new_tokens=1)
        assert used["main"][-1] == 15  # short prompts stay with the first form
    with ryzen_compile.load(twofold, threads=1, native=False) as loaded:
        rows = loaded(LONG_PROMPT).astype(np.float64)
        loaded.engine._prefill = None
        blocks = loaded(LONG_PROMPT).astype(np.float64)
    noise = np.square(rows - blocks).sum()
    assert 0 < noise < 1e-2 * np.square(blocks).sum()  # 20 dB: another rounding of the same weights


def test_an_artifact_with_a_second_form_is_copied_whole(twofold: Path, tmp_path: Path) -> None:
    with ryzen_compile.load(twofold) as loaded:
        loaded.save_pretrained(tmp_path / "copy")
    assert digests(tmp_path / "copy") == digests(twofold)


@pytest.mark.parametrize("name", ["prefill.onnx", "prefill.onnx.data"])
def test_a_second_form_is_checked(twofold: Path, tmp_path: Path, name: str) -> None:
    copy_ = Path(shutil.copytree(twofold, tmp_path / "artifact"))
    data = bytearray((copy_ / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy_ / name).write_bytes(data)
    with pytest.raises(errors.TamperedError, match=rf"'{re.escape(name)}': expected SHA-256"):
        ryzen_compile.load(copy_)
    (copy_ / name).unlink()
    with pytest.raises(errors.TamperedError, match=rf"'{re.escape(name)}' is missing"):
        ryzen_compile.load(copy_)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": {"lm_hed": {"bits": 8}}}, "override 'lm_hed' matches no weight; the nearest is 'lm_head"),
        ({"overrides": {"q_proj": {"bits": 8}}}, "which are merged into one weight"),
        ({"target_bits": 3.0}, r"target_bits 3\.0: with these formats the weights take 5\.\d+ to 8\.\d+ bits each"),
        ({"recipe": "fp32", "target_bits": 5.0}, "recipe 'fp32' keeps float32 weights, it has no target_bits"),
    ],
)
def test_what_cannot_be_quantized_so(model: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        ryzen_compile.optimize(model, verify=False, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no text at"),
        ("too short", r"the text has \d+ tokens, 17408 are needed"),
        (" \n", "holds no text"),
    ],
)
def test_calibration_text_that_cannot_be_used(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "text.txt").write_text(content)
    with pytest.raises(errors.UsageError, match=message):
        export(shared_model(tmp_path_factory), tmp_path / "out", calibration=tmp_path / "text.txt")
    assert not (tmp_path / "out").exists()


def test_float_recipes_read_no_calibration_text(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    report = export(
        shared_model(tmp_path_factory), tmp_path / "out", "fp32", calibration=tmp_path / "absent", verify=False
    )
    assert "calibration" not in report.facts
