"""The artifact runs unchanged elsewhere: in onnxruntime-genai, and in a bare ONNX Runtime session fed with numpy.

Compared on stock operators, which are what runs there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import transformers

import ryzen_compile
from ryzen_compile.api import export
from ryzen_compile.backends.onnxruntime import artifact as artifacts
from ryzen_compile.backends.onnxruntime.genai import known_tokenizer_class
from ryzen_compile.config import find_recipe
from ryzen_compile.manifest import MANIFEST_NAME
from tests.model_directory import TOKENS, shared_artifact, shared_model, tokenizer
from tests.zoo import WINDOW

genai = pytest.importorskip("onnxruntime_genai")

NEW = 24
PROMPTS = {length: np.random.default_rng(5).integers(3, TOKENS, (1, length)) for length in (1, 5, 23)}
# No NUL: genai's interface takes C strings.
TEXTS = ("def add(first, second):\n    return", "", "x", "größer ± 模型 é", "a\t\tb\r\n" * 7, "</s> literally <s>")
# Untied, because wide tied weights make a model repeat its last token, which any broken cache would do as well.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"tie_word_embeddings": False},  # soft cap, windows
    "gpt2": {},  # position_ids is an input
    "qwen3": {"num_hidden_layers": 1},  # normalised queries and keys
    "phi": {"num_hidden_layers": 1},  # partial rotary
}


@pytest.fixture(scope="module", params=MODELS)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_artifact(tmp_path_factory, request.param, **MODELS[request.param])


@pytest.fixture(scope="module")
def expected(artifact: Path) -> dict[int, list[int]]:
    """Our own greedy tokens, by the prompt's length."""
    with ryzen_compile.load(artifact, native=False) as model:
        found = {
            length: model.generate(ids, max_new_tokens=NEW)[0, length:].tolist() for length, ids in PROMPTS.items()
        }
    assert len(set(found[23])) > 5  # a model that says one thing for ever would show nothing
    assert not any(2 in tokens for tokens in found.values())  # genai always stops at an end token
    return found


def bounded(dimension: str) -> int:
    """Rows that a past starts with: none, or at least the window of a layer that keeps no more, as its name says."""
    return int(dimension.split("_")[1]) if dimension.startswith("window_") else 0


def genai_tokens(model: Any, ids: np.ndarray) -> list[int]:
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=ids.shape[1] + NEW)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    found = []
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    return found


def test_genai_gives_the_same_tokens(artifact: Path, expected: dict[int, list[int]]) -> None:
    assert min(PROMPTS) < WINDOW < max(PROMPTS)
    model = genai.Model(str(artifact))
    for length, ids in PROMPTS.items():
        assert genai_tokens(model, ids) == expected[length], length


def test_a_bare_session_gives_the_same_tokens(artifact: Path, expected: dict[int, list[int]]) -> None:
    session = onnxruntime.InferenceSession(str(artifact / "model.onnx"), providers=["CPUExecutionProvider"])
    inputs = {value.name: value.shape for value in session.get_inputs()}
    outputs = [value.name for value in session.get_outputs()]
    for length, ids in PROMPTS.items():
        past = {
            name: np.zeros((1, size[1], bounded(size[2]), size[3]), np.float32)
            for name, size in inputs.items()
            if name.startswith("past")
        }
        tokens, seen, found = ids.astype(np.int64), 0, []
        for _ in range(NEW):
            total = seen + tokens.shape[1]
            feeds = {"input_ids": tokens, "attention_mask": np.ones((1, total), np.int64), **past}
            if "position_ids" in inputs:
                feeds["position_ids"] = np.arange(seen, total)[None]
            results = dict(zip(outputs, session.run(None, feeds), strict=True))
            found.append(int(results["logits"][0, -1].argmax()))
            past = {name: results[name.replace("past_key_values", "present")] for name in past}
            tokens, seen = np.array([found[-1:]]), total
        assert found == expected[length], length


@pytest.mark.parametrize("kv", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_an_integer_cache_runs_unchanged(
    kv: str, name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path / kv
    recipe = find_recipe("fp32", kv={"dtype": kv, "max_kl": 20.0})
    export(shared_model(tmp_path_factory, name, **MODELS[name]), out, recipe)
    theirs = genai.Model(str(out))
    with ryzen_compile.load(out, native=False) as model:
        assert {slot.key_format for slot in model.engine.slots} == {kv}
        for length, ids in PROMPTS.items():
            ours = model.generate(ids, max_new_tokens=NEW)[0, length:].tolist()
            assert 2 not in ours and len(set(ours)) > 3
            assert genai_tokens(theirs, ids) == ours, length


def test_integer_weights_run_unchanged(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Both run the same graph with activations of 8 bits, so the tokens are the same to the last."""
    out = tmp_path / "int4"
    export(shared_model(tmp_path_factory, "llama"), out, find_recipe("int4", method="mse", max_kl=20.0))
    assert json.loads((out / MANIFEST_NAME).read_text())["recipe"]["weights"]["accuracy_level"] == 4
    theirs = genai.Model(str(out))
    with ryzen_compile.load(out, native=False) as model:
        for length, ids in PROMPTS.items():
            ours = model.generate(ids, max_new_tokens=NEW)[0, length:].tolist()
            assert 2 not in ours and len(set(ours)) > 3
            assert genai_tokens(theirs, ids) == ours, length


@pytest.mark.parametrize("bits", [8, 6])
def test_a_table_of_codes_runs_unchanged(bits: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Codes of whole bytes and across bytes: standard operators decode the rows that are looked up."""
    out = tmp_path / "codes"
    settings = {"method": "kmeans", "bits": bits, "keep": 0.05, "max_kl": 20.0}
    export(shared_model(tmp_path_factory, "llama"), out, find_recipe("fp32", embedding=settings))
    theirs = genai.Model(str(out))
    with ryzen_compile.load(out, native=False) as model:
        for length, ids in PROMPTS.items():
            ours = model.generate(ids, max_new_tokens=NEW)[0, length:].tolist()
            assert 2 not in ours and len(set(ours)) > 3
            assert genai_tokens(theirs, ids) == ours, length


def test_positions_are_an_input_only_where_they_are_read(artifact: Path) -> None:
    declared = json.loads((artifact / "genai_config.json").read_text())["model"]["decoder"]["inputs"]
    session = onnxruntime.InferenceSession(str(artifact / "model.onnx"), providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    assert ("position_ids" in declared) == ("position_ids" in names) == (artifact.name == "gpt2")


def test_the_tokenizer_of_genai_reads_as_ours(artifact: Path) -> None:
    model = ryzen_compile.load(artifact)
    theirs = genai.Tokenizer(genai.Model(str(artifact)))
    for text in TEXTS:
        ids = model.tokenizer.encode(text)
        assert ids == tokenizer().encode(text)
        assert [int(one) for one in theirs.encode(text)] == ids, text
        assert model.tokenizer.decode(ids) == text
    model.close()


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("TokenizersBackend", "TokenizersBackend"),
        ("Qwen2Tokenizer", "Qwen2Tokenizer"),
        ("GPT2TokenizerFast", "GPT2TokenizerFast"),
        ("CohereTokenizer", "PreTrainedTokenizerFast"),
        ("MyOwnTokenizer", "PreTrainedTokenizerFast"),
        (None, "PreTrainedTokenizerFast"),
    ],
)
def test_a_tokenizer_class_that_genai_refuses_is_generalised(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, given: str | None, written: str
) -> None:
    """Class names are many; what the tokenizer does stands in ``tokenizer.json``."""
    origin = shared_artifact(tmp_path_factory)
    assert known_tokenizer_class(given) == written
    assert known_tokenizer_class(written) == written

    def save(directory: Path) -> None:
        tokenizer().save_pretrained(directory)
        path = directory / "tokenizer_config.json"
        settings = {**json.loads(path.read_text()), "tokenizer_class": given}
        path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))

    def copy(directory: Path) -> None:
        for name in ("model.onnx", "model.onnx.data"):
            (directory / name).write_bytes((origin / name).read_bytes())

    found = artifacts.read(origin)
    out = artifacts.write(
        tmp_path / "out", copy, spec=found.spec, slots=found.slots, facts={},
        companions=artifacts.Companions(config=found.config, save_tokenizer=save),
    )  # fmt: skip
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == written
    theirs = genai.Tokenizer(genai.Model(str(out)))
    for text in TEXTS:
        assert [int(one) for one in theirs.encode(text)] == tokenizer().encode(text)
    if written in ("TokenizersBackend", "PreTrainedTokenizerFast"):  # the others would build another tokenizer
        again = transformers.AutoTokenizer.from_pretrained(out)
        assert [again.encode(text) for text in TEXTS] == [tokenizer().encode(text) for text in TEXTS]
