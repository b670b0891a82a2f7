"""Bad input, each with its exit status and one line, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import ryzen_compile
from ryzen_compile import cli, errors
from ryzen_compile.manifest import MANIFEST_NAME, write_manifest
from ryzen_compile.publish import Staging
from tests.model_directory import TOKENS, listing, shared_artifact, shared_model
from tests.zoo import BASE, CONTEXT

COMMAND = [sys.executable, "-c", "import sys; from ryzen_compile.cli import main; sys.exit(main())"]
LONG = "x" * (CONTEXT + 1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_model(tmp_path_factory)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_artifact(tmp_path_factory)


@pytest.fixture
def model(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


@pytest.fixture
def artifact(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "artifact"))


@pytest.fixture
def fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that must fail with ``status`` and ``code``; returns its one line, less the beginning.

    Nothing below ``tmp_path`` may have appeared, gone or changed its size, hidden files included.
    """

    def call(status: int, code: str, *arguments: object) -> str:
        before = listing(tmp_path)
        found = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        start = f"ryzen-compile: error[{code}]: "
        assert (found, err[: len(start)]) == (status, start), err
        assert err.count("\n") == 1 and err.endswith("\n"), err
        assert out == ""
        assert listing(tmp_path) == before
        return err[len(start) :].rstrip("\n")

    return call


# --- arguments --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "m", "o", "--contxt", "5"], "--context"),
        (["export", "m", "o", "--offlne"], "--offline"),
        (["generate", "a", "p", "--max-new-token", "5"], "--max-new-tokens"),
        (["bench", "--shap", "x"], "--shape"),
        (["explain", "m", "--no-verfy"], "--no-verify"),
        (["passes", "--recpe", "fp32"], "--recipe"),
        (["recipes", "--jsn"], "--json"),
        (["exprt", "m", "o"], "export"),
        (["export"], "Missing argument 'model'"),
        (["export", "m"], "Missing argument 'out'"),
        (["generate"], "Missing argument 'artifact'"),
        (["export", "m", "o", "--context", "0"], "'--context': Input should be greater than or equal to 1"),
        (["export", "m", "o", "--context", "-3"], "'--context': Input should be greater than or equal to 1"),
        (["export", "m", "o", "--context", "many"], "'--context': Input should be a valid integer"),
        (["generate", "a", "p", "-n", "7.5"], "'--max-new-tokens': Input should be a valid integer"),
        (["generate", "a", "p", "--threads", "0"], "'--threads': Input should be greater than or equal to 1"),
        (["generate", "a", "p", "--temperature", "warm"], "'--temperature': Input should be a valid number"),
        (["bench", "a", "-r", "0"], "'-r': Input should be greater than or equal to 1"),
        (["export", "m", "o", "--target-bits", "few"], "'--target-bits': Input should be a valid number"),
        (["export", "m", "o", "--overide", "a=8"], "--override"),
        (["export", "m", "o", "--calibraton", "a"], "--calibration"),
        (["bench"], "give either TARGET or --shape"),
        (["bench", "a", "--shape", "tinyllama-1.1b"], "give either TARGET or --shape"),
        (["bench", "a", "--engine", "tensorrt"], "unknown engine 'tensorrt'; engines are onnxruntime, hf and eager"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_line_that_cannot_be_meant(fails: Any, arguments: list[str], said: str) -> None:
    assert said in fails(2, "usage", *arguments)


def test_an_unknown_shape_names_the_nearest(fails: Any) -> None:
    assert re.search(r"tinylama-1\.1b.*tinyllama-1\.1b", fails(2, "usage", "bench", "--shape", "tinylama-1.1b"))


def test_an_unknown_recipe_is_refused_before_the_model_is_read(fails: Any, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    for arguments in (["export", absent, tmp_path / "out"], ["explain", absent], ["passes"]):
        said = fails(3, "config", *arguments, "--recipe", "fp23")
        assert said == "there is no recipe 'fp23'; did you mean 'fp32'?"
    for option, value, said in (
        ("--override", "lm_head", "override 'lm_head': expected REGEX=SETTING; for example lm_head=8,block=32"),
        ("--override", "a(=8", "recipe 'int4': weights.overrides: Value error, 'a(' is not a regular expression"),
        ("--prefill", "int4", "recipe 'int4': prefill: Input should be 'shared' or 'int8', got 'int4'"),
        ("--target-bits", 1, "recipe 'int4': weights.target_bits: Input should be greater than 2, got 1.0"),
    ):
        assert fails(3, "config", "export", absent, tmp_path / "out", option, value).startswith(said)
    said = fails(3, "config", "export", absent, tmp_path / "out", "--logits", "some")
    assert said == "recipe 'int4': logits: Input should be 'last' or 'all', got 'some'"


# --- where to write ---------------------------------------------------------------------------------------------------
def test_calibration_text_that_is_not_there(fails: Any, model: Path, tmp_path: Path) -> None:
    said = fails(2, "usage", "export", model, tmp_path / "out", "-q", "--calibration", tmp_path / "absent.txt")
    assert said.startswith(f"there is no text at '{tmp_path / 'absent.txt'}'")


def test_an_output_directory_that_is_not_empty(fails: Any, model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    said = fails(3, "artifact", "export", model, tmp_path / "out", "-q")
    assert (
        said == f"output directory {tmp_path / 'out'} is not empty; --force replaces it if it holds an artifact of ours"
    )
    assert "is not empty" in fails(3, "artifact", "export", model, tmp_path / "out", "-q", "--force")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


def test_an_artifact_is_not_replaced_unasked(fails: Any, model: Path, artifact: Path) -> None:
    assert "is not empty" in fails(3, "artifact", "export", model, artifact, "-q")
    ryzen_compile.load(artifact).close()


@pytest.mark.parametrize("inside", ["", "out", "a/../out"])
def test_an_output_inside_the_model(fails: Any, model: Path, inside: str) -> None:
    (model / "a").mkdir()
    assert "is inside the model directory" in fails(2, "usage", "export", model, model / inside, "-q")


def test_an_output_that_is_a_file_or_has_no_parent(fails: Any, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert fails(2, "usage", "export", model, tmp_path / "file", "-q").endswith(
        "file is a file; name a directory that does not exist yet"
    )
    assert "absent does not exist" in fails(2, "usage", "export", model, tmp_path / "absent" / "out", "-q")


# --- models -----------------------------------------------------------------------------------------------------------
def test_a_missing_model(fails: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = fails(3, "model", "export", tmp_path / "absent", out, "-q")
    assert said == f"model directory '{tmp_path / 'absent'}' does not exist; check the path"
    assert "neither a local directory nor in the hub cache" in fails(3, "model", "export", "nobody/no-model", out, "-q")
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in fails(3, "model", "export", tmp_path / "empty", out, "-q")
    assert "does not exist" in fails(3, "model", "explain", tmp_path / "absent", "-q")
    assert "does not exist" in fails(3, "model", "bench", tmp_path / "absent")


def nan_weights(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def truncated_weights(directory: Path) -> None:
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[:-1])


def truncated_header(directory: Path) -> None:
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[:100])


def one_tensor_less(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def pickle_only(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.ones(64)}, directory / "pytorch_model.bin")


def remote_code(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "modeling_evil.py").write_text("raise SystemExit('ran')")


def broken_config(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": ')


def unknown_architecture(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "no\x1bsuch\nthing"}))


def foreign_tokenizer(directory: Path) -> None:
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["zzz"] = TOKENS
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "status", "code", "said"),
    [
        (nan_weights, 3, "model", r"'model\.layers\.1\.mlp\.down_proj\.weight' holds 1 NaN or infinite value\(s\)"),
        (truncated_weights, 3, "model", r"'model\.safetensors': tensor '.*' lies at bytes \d+\.\.\d+, outside"),
        (truncated_header, 3, "model", r"'model\.safetensors': not a safetensors header: it claims \d+ bytes"),
        (one_tensor_less, 3, "model", r"1 tensor\(s\) missing: 'model\.norm\.weight'"),
        (pickle_only, 4, "unsafe", r"holds only pickled weights, .*'pytorch_model\.bin'; convert them to safetensors"),
        (remote_code, 4, "unsafe", "config.json asks to run code of its own: key 'auto_map'; pass trust_remote_code"),
        (broken_config, 3, "model", "config.json is not JSON"),
        (unknown_architecture, 3, "model", "transformers cannot load the configuration"),
        (foreign_tokenizer, 3, "model", rf"tokenizer knows {TOKENS + 1} tokens, the model's vocabulary has {TOKENS}"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_damaged_or_unsafe_model(
    fails: Any, model: Path, tmp_path: Path, damage: Callable[[Path], None], status: int, code: str, said: str
) -> None:
    damage(model)
    assert re.search(said, fails(status, code, "export", model, tmp_path / "out", "-q"))


def test_a_context_beyond_the_models(fails: Any, model: Path, tmp_path: Path) -> None:
    said = fails(3, "config", "export", model, tmp_path / "out", "-q", "--context", CONTEXT + 1)
    assert said.startswith(f"context {CONTEXT + 1} exceeds the {CONTEXT} positions of LlamaForCausalLM")


def unsupported(directory: Path, name: str, **settings: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(name, **{**BASE, **settings})
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("name", "settings", "code", "said"),
    [
        (
            "mpt",  # ALiBi: a bias by distance inside the scores
            {"d_model": 64, "n_heads": 4, "n_layers": 1},
            "unsupported",
            r"insert_kv_cache cannot rewrite node \w+ in transformer\.blocks\.0\.attn: mixes tokens outside",
        ),
        ("mamba", {"state_size": 4, "num_hidden_layers": 1}, "capture", r"could not trace MambaForCausalLM: .*tokens"),
    ],
)
def test_what_cannot_be_carried_is_named(
    fails: Any, tmp_path: Path, name: str, settings: dict[str, Any], code: str, said: str
) -> None:
    directory = unsupported(tmp_path / name, name, **settings)
    assert re.search(said, fails(3, code, "export", directory, tmp_path / "out", "-q"))


def test_the_line_is_the_only_one_in_a_process_of_its_own(tmp_path: Path, repository: Path) -> None:
    """Nothing that torch or transformers have to say about our own calls reaches the user."""
    directory = unsupported(tmp_path / "mpt", "mpt", d_model=64, n_heads=4, n_layers=1)
    quiet = {"TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"}
    environment = {name: value for name, value in os.environ.items() if name not in quiet}
    child = subprocess.run(
        [*COMMAND, "export", str(directory), str(tmp_path / "out"), "-q"], cwd=repository, capture_output=True,
        env=environment, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert child.returncode == 3 and child.stdout == ""
    assert re.fullmatch(r"ryzen-compile: error\[unsupported\]: [^\n]+\n", child.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["mpt"]


# --- artifacts --------------------------------------------------------------------------------------------------------
def altered(directory: Path) -> None:
    data = bytearray((directory / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (directory / "model.onnx.data").write_bytes(data)


def truncated(directory: Path) -> None:
    data = (directory / "model.onnx.data").read_bytes()
    (directory / "model.onnx.data").write_bytes(data[:-1])


def missing(directory: Path) -> None:
    (directory / "model.onnx").unlink()


def newer(directory: Path) -> None:
    manifest = json.loads((directory / MANIFEST_NAME).read_text())
    (directory / MANIFEST_NAME).write_text(json.dumps({**manifest, "schema_version": 3, "made_by": "a later one"}))


def linked(directory: Path) -> None:
    (directory / "model.onnx.data").rename(directory.parent / "elsewhere")
    (directory / "model.onnx.data").symlink_to(directory.parent / "elsewhere")


def no_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    relist(directory)


def relist(directory: Path) -> None:
    facts = json.loads((directory / MANIFEST_NAME).read_text())
    write_manifest(directory, {k: v for k, v in facts.items() if k not in ("schema_version", "made_by", "files")})


@pytest.mark.parametrize(
    ("damage", "status", "code", "said"),
    [
        (
            altered,
            4,
            "tampered",
            r"'model\.onnx\.data': expected SHA-256 \w+, got \w+; the file was altered; export it",
        ),
        (truncated, 4, "tampered", r"'model\.onnx\.data': expected \d+ bytes, got \d+; export it again"),
        (missing, 4, "tampered", r"'model\.onnx' is missing from .*; export it again"),
        (
            newer,
            3,
            "artifact",
            r"has the newer schema 3: made by 'a later one', this is ryzen_compile .* with schema 2",
        ),
        (linked, 4, "unsafe", r"model\.onnx\.data' is a symbolic link, expected a plain file"),
        (no_tokenizer, 3, "artifact", r"holds no tokenizer\.json; generate from ids through the Python API"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_bad_artifact(
    fails: Any, artifact: Path, damage: Callable[[Path], None], status: int, code: str, said: str
) -> None:
    damage(artifact)
    assert re.search(said, fails(status, code, "generate", artifact, "x", "-n", 3))


def test_an_altered_artifact_is_not_benched_or_explained(fails: Any, artifact: Path) -> None:
    truncated(artifact)
    assert "model.onnx.data" in fails(4, "tampered", "explain", artifact)
    assert "model.onnx.data" in fails(4, "tampered", "bench", artifact, "-p", 3, "-n", 0, "-r", 1)


def test_what_is_no_artifact(fails: Any, model: Path, tmp_path: Path) -> None:
    for directory in (model, tmp_path / "absent"):
        said = fails(3, "artifact", "generate", directory, "x")
        assert said.endswith(f"holds no {MANIFEST_NAME}; expected a directory made by ryzen-compile export")


# --- prompts ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([LONG, "-n", 1], f"prompt of {CONTEXT + 1} tokens plus 1 new tokens exceeds the model's context of {CONTEXT}"),
        (
            ["x", "-n", CONTEXT],
            f"prompt of 1 tokens plus {CONTEXT} new tokens exceeds the model's context of {CONTEXT}",
        ),
        (["x", "-n", 0], "max_new_tokens must be an integer >= 1, got 0"),
        (["x", "-n", -1], "max_new_tokens must be an integer >= 1, got -1"),
        (["x", "--temperature", "nan"], "temperature"),
        (["x", "--temperature", -1], "temperature"),
        (["x", "--temperature", 1, "--top-p", 1.1], "top_p"),
        (["x", "--temperature", 1, "--top-k", -1], "top_k"),
        (["x", "--temperature", 1, "--min-p", 2], "min_p"),
        (["x", "--repetition-penalty", 0], "repetition_penalty"),
        (["x", "--stop", ""], "stop"),
        (["x\udcff"], "the prompt is not valid Unicode at character 1"),
    ],
    ids=lambda value: None if isinstance(value, str) else ascii(" ".join(map(str, value)))[:40],
)
def test_a_prompt_or_setting_out_of_range(fails: Any, original: Path, arguments: list[Any], said: str) -> None:
    assert said in fails(3, "prompt", "generate", original, *arguments)


def test_the_whole_context_can_be_used(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One token less than what is refused above."""
    assert cli.main(["generate", str(original), "x", "-n", str(CONTEXT - 1), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] == CONTEXT - 1


def test_an_empty_prompt_without_bos(fails: Any, artifact: Path) -> None:
    path = artifact / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token_id": None}))
    relist(artifact)
    said = fails(3, "prompt", "generate", artifact, "", "-n", 3)
    assert said == "the prompt is empty and no BOS token is defined; give a prompt or a bos_token_id"


def test_a_token_outside_the_vocabulary(fails: Any, artifact: Path, original: Path) -> None:
    path = artifact / "tokenizer.json"
    content = json.loads(path.read_text())
    image = {**content["added_tokens"][0], "id": TOKENS, "content": "<image>"}
    path.write_text(json.dumps({**content, "added_tokens": [*content["added_tokens"], image]}))
    relist(artifact)
    said = fails(3, "prompt", "generate", artifact, "x<image>", "-n", 3)
    assert said == f"input_ids[0, 1] is {TOKENS}, expected 0 <= id < {TOKENS} (vocabulary size)"
    with ryzen_compile.load(original) as model:
        for ids in ([[5, -1]], [[5, TOKENS]], [[5, 2**40]]):
            with pytest.raises(errors.PromptError, match=r"input_ids\[0, 1\] is"):
                model.generate(ids)


# --- two at once, and death -------------------------------------------------------------------------------------------
def test_two_exports_to_one_directory(fails: Any, model: Path, tmp_path: Path) -> None:
    with Staging(tmp_path / "out"):
        began = time.monotonic()
        said = fails(6, "busy", "export", model, tmp_path / "out", "-q")
        assert time.monotonic() - began < 1  # before the model is read
        assert re.match(rf"process '{os.getpid()}' on '.+' is writing '.*out'; wait for it", said)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_killed_in_the_middle(
    model: Path, tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``kill -9`` leaves hidden siblings at most, no output, and the next run sweeps them."""
    out = tmp_path / "out"
    arguments = ["export", str(model), str(out), "-q", "--no-verify", "--recipe", "fp32"]
    child = subprocess.Popen([*COMMAND, *arguments], cwd=repository, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    staging: list[Path] = []
    while not staging and child.poll() is None and time.monotonic() < deadline:
        staging = list(tmp_path.glob(".out.tmp-*"))
        time.sleep(0.002)
    assert staging, child.communicate()[1]
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=30)
    assert child.returncode == -signal.SIGKILL
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"model", ".out.lock", staging[0].name}
    assert cli.main(arguments) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}
    capsys.readouterr()
    ryzen_compile.load(out).close()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_in_the_middle(source: Path, tmp_path: Path, repository: Path, number: int, status: int) -> None:
    """A signal that can be caught leaves nothing at all."""
    child = subprocess.Popen(
        [*COMMAND, "export", str(source), str(tmp_path / "out"), "-q", "--no-verify", "--recipe", "fp32"],
        cwd=repository, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.tmp-*")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == status, err
    assert re.fullmatch(r"ryzen-compile: error\[(terminated|interrupted)\]: [^\n]+\n", err)
    assert list(tmp_path.iterdir()) == []
