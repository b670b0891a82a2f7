"""An encoder from a directory or memory to vectors, to an artifact and back; and what is refused on the way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ryzen_compile
from ryzen_compile.api import export
from ryzen_compile.compile_encoder import RANGE_TEXTS, WIDENED, compiled_encoder, range_texts
from ryzen_compile.config import Recipe
from ryzen_compile.encoder_source import LoadedEncoder
from ryzen_compile.errors import ArtifactError, ConfigError, TamperedError, UnsupportedError, UsageError
from ryzen_compile.manifest import MANIFEST_NAME, read_manifest, write_manifest
from ryzen_compile.recipe_file import DIMS_NAME, dims_text
from ryzen_compile.runtime.encoder import CompiledEncoder, EncodingStats
from ryzen_compile.sentence_layout import LAYOUT_NAMES
from ryzen_compile.spec import EncoderSettings, Pooling
from tests.model_directory import listing, shared_artifact
from tests.tiny_encoder import CONTEXT, HIDDEN, WORDS, TorchEncoder, bert, change, tokenizer, write_directory

TEXTS = ["the cat sat on the mat", "", "a", "dogs, running under trees!", "€ 🐈", "the big red dog " * 9]
SETTINGS = EncoderSettings(Pooling("cls"), 12, prompts={"query": "find the "}, similarity="dot", dims=10)
CLOSE = {"rtol": 0, "atol": 1e-5}  # float32 sums of 24 to 37 products, in another order


def expected(texts: list[str], pooling: Pooling, context: int = CONTEXT) -> np.ndarray:
    """By transformers alone, each text by itself."""
    engine, found = TorchEncoder(bert(), pooling), []
    for text in texts:
        batch = tokenizer()([text], truncation=True, max_length=context, return_tensors="np")
        found.append(engine.embed(batch["input_ids"].astype(np.int64), batch["attention_mask"].astype(np.int64))[0])
    return np.stack(found)


def encode(model: CompiledEncoder, texts: list[str], **arguments: Any) -> np.ndarray:
    return model.encode(texts, stats=EncodingStats(), **arguments)  # who counts is not warned of cuts


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("encoder") / "plain")


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("encoder") / "laid out", SETTINGS)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, laid_out: Path) -> Path:
    """Not to be changed."""
    out = tmp_path_factory.mktemp("artifacts") / "encoder"
    export(laid_out, out)
    return out


# --- optimize ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_a_directory_becomes_an_encoder(plain: Path, backend: str) -> None:
    with ryzen_compile.optimize(plain, backend=backend) as model:
        assert isinstance(model, CompiledEncoder) and model.spec.pooling == Pooling("mean", normalize=True)
        assert (model.context, model.dims, model.spec.hidden, model.calibrated) == (CONTEXT, HIDDEN, HIDDEN, True)
        np.testing.assert_allclose(encode(model, TEXTS), expected(TEXTS, Pooling()), **CLOSE)
        assert model.config["model_type"] == "bert" and "add_layer_norm" in model.report.to_text()


def test_a_layout_settles_pooling_context_and_dimensions(laid_out: Path) -> None:
    with ryzen_compile.optimize(laid_out) as model:
        assert (model.context, model.dims, model.settings.similarity) == (12, 10, "dot")
        wanted = expected(TEXTS, Pooling("cls"), 12)
        np.testing.assert_allclose(encode(model, TEXTS, dims=HIDDEN), wanted, **CLOSE)
        short = wanted[:, :10] / np.linalg.norm(wanted[:, :10], axis=1, keepdims=True)
        np.testing.assert_allclose(encode(model, TEXTS), short, **CLOSE)
        query = expected(["find the cat"], Pooling("cls"), 12)[0]
        np.testing.assert_allclose(model.encode_query("cat", dims=HIDDEN), query, **CLOSE)


def test_what_is_asked_for_is_in_the_place_of_the_layouts(laid_out: Path) -> None:
    wish = Pooling("max", normalize=False)
    with ryzen_compile.optimize(laid_out, pooling=wish, context=30, backend="eager") as model:
        assert model.context == 30
        np.testing.assert_allclose(encode(model, TEXTS, dims=HIDDEN), expected(TEXTS, wish, 30), rtol=1e-5, atol=1e-5)
    with ryzen_compile.optimize(laid_out, pooling="last", backend="eager") as model:
        assert model.spec.pooling == Pooling("last", normalize=True)


def test_a_model_in_memory(plain: Path) -> None:
    own = bert()
    with ryzen_compile.optimize(own, tokenizer=tokenizer(), backend="eager") as model:
        np.testing.assert_allclose(encode(model, TEXTS), expected(TEXTS, Pooling()), **CLOSE)
    with ryzen_compile.optimize(own, backend="eager") as model:
        assert model.tokenizer is None and not model.calibrated
        assert model.engine.embed(np.array([[2, 5, 3]]), np.ones((1, 3), np.int64)).shape == (1, HIDDEN)


def test_a_sentence_transformer_in_memory(laid_out: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    theirs = library.SentenceTransformer(str(laid_out), device="cpu", local_files_only=True)
    with ryzen_compile.optimize(theirs, backend="eager") as model:
        assert model.settings.prompts["query"] == "find the " and (model.context, model.dims) == (12, 10)
        np.testing.assert_allclose(
            encode(model, TEXTS, dims=HIDDEN), theirs.encode(TEXTS, truncate_dim=HIDDEN), **CLOSE
        )


def test_text_that_is_lowered_first(tmp_path: Path) -> None:
    write_directory(tmp_path / "model", EncoderSettings(lower_case=True))
    with ryzen_compile.optimize(tmp_path / "model") as model:
        model.save_pretrained(tmp_path / "out")
        np.testing.assert_allclose(model.encode("The CAT"), model.encode("the cat"), **CLOSE)
    with ryzen_compile.load(tmp_path / "out") as loaded:
        np.testing.assert_allclose(loaded.encode("The CAT"), expected(["the cat"], Pooling())[0], **CLOSE)


def test_int8_weights_stay_close(plain: Path) -> None:
    with ryzen_compile.optimize(plain, "int8") as model:
        cosines = (encode(model, TEXTS) * expected(TEXTS, Pooling())).sum(axis=1)
        assert cosines.min() > 0.99  # the recipe's own budget is a mean of 0.995
        record = next(record for record in model.report.records if record.name == "quantize_weights")
        assert record.status == "applied" and record.cosine is not None and record.cosine < 0.005


# --- int8 ranges ------------------------------------------------------------------------------------------------------
def sentences(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join([*rng.choice(WORDS, 5), f"n{number}"]) for number in range(count)]


@pytest.mark.parametrize(
    ("text", "calibrated"),
    [
        ("the cat sat on the mat", False),
        ("\n\n".join(["the cat sat", "on the mat"] * 100), False),
        ("\n\n".join(sentences(15)), False),
        ("\n\n".join(sentences(64)), True),
        ("\r\n\r\n".join(sentences(64)), True),
        (" ".join(sentences(400)), True),
    ],
    ids=["one text", "two texts", "fifteen", "enough", "carriage returns", "one long paragraph"],
)
def test_ranges_are_found_on_enough_text_that_differs(plain: Path, tmp_path: Path, text: str, calibrated: bool) -> None:
    (tmp_path / "text.txt").write_bytes(text.encode())
    with ryzen_compile.optimize(plain, calibration=tmp_path / "text.txt", backend="eager") as model:
        assert model.calibrated is calibrated
        texts = range_texts(text) if calibrated else TEXTS
        vectors, decoded = encode(model, texts), model.decode(encode(model, texts, precision="int8"))
    # Half a step is 0.01 of the widest dimension's spread, or 1/254; where all codes decode alike it is all of it.
    assert np.abs(decoded - vectors).max() < 0.1 * np.abs(vectors - vectors.mean(axis=0)).max()


def test_a_model_of_one_vector_is_not_calibrated() -> None:
    own = bert()
    norm = own.encoder.layer[-1].output.LayerNorm
    norm.weight.data.zero_()
    norm.bias.data.copy_(torch.arange(1.0, HIDDEN + 1))
    with ryzen_compile.optimize(own, tokenizer=tokenizer(), pooling="cls", backend="eager") as model:
        assert np.ptp(encode(model, TEXTS), axis=0).max() == 0 and not model.calibrated


@pytest.mark.parametrize("count", [1, 255, 256, 257, 511, 512, 5000])
def test_pieces_are_spread_over_the_whole_text(count: int) -> None:
    numbers = [int(piece.split()[1]) for piece in range_texts("\n\n".join(f"number {n}" for n in range(count)))]
    steps = np.diff([*numbers, count])
    assert numbers[0] == 0 and len(numbers) == min(count, RANGE_TEXTS) and np.ptp(steps) <= 1


def test_pieces_are_of_paragraphs() -> None:
    text = "one\r\n\r\ntwo\r\nlines\n\n\n\n" + "x" * 300 + "\n\n  \n\none"
    assert range_texts(text) == ["one", "two\nlines", "x" * 256, "x" * 44]
    assert range_texts(" \n\n") == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, UsageError])
def test_an_engine_that_becomes_no_model_is_closed(error: type[BaseException]) -> None:
    def stop(event: str) -> None:
        raise error(event)

    engine = TorchEncoder(bert())
    source = LoadedEncoder(engine.model, tokenizer(), EncoderSettings())
    with pytest.raises(error, match="calibration"):
        compiled_encoder(engine, source, report=None, config={}, text="builtin", write=None, progress=stop)
    assert engine.closed == 1


# --- what is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ({"kv": "int8"}, ConfigError, "kv int8 is for models that generate"),
        ({"window": 64}, ConfigError, "kv .* is for models that generate"),
        ({"logits": "all"}, ConfigError, "logits all is for models that generate"),
        ({"recipe": "int8", "prefill": "int8"}, ConfigError, "prefill int8 is for models that generate"),
        ({"embedding": {"method": "kmeans"}}, ConfigError, "embedding .* is for models that generate"),
        ({"recipe": "int8", "sparsity": 0.5}, ConfigError, "sparsity .* is for models that generate"),
        ({"recipe": Recipe(ternary=True)}, ConfigError, "ternary True is for models that generate"),
        ({"cache_budget_bytes": 1}, UsageError, "cache_budget_bytes is for models that generate"),
        ({"prefix_bytes": 1}, UsageError, "prefix_bytes is for models that generate"),
        ({"pooling": "median"}, UsageError, "no pooling 'median'; use one of mean, cls, max, last"),
        ({"task": "translate"}, UsageError, "no task 'translate'; use embed or generate"),
        ({"backend": "triton"}, UnsupportedError, "'triton' runs no encoders"),
        ({"context": CONTEXT + 1}, ConfigError, "context 41"),
    ],
)
def test_what_is_the_decoders_is_refused(plain: Path, arguments: dict[str, Any], kind: Any, said: str) -> None:
    with pytest.raises(kind, match=said):
        ryzen_compile.optimize(plain, **arguments)


def test_pooling_is_refused_for_decoders(tiny_python_lm: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pooling 'cls' is for encoders"):
        ryzen_compile.optimize(tiny_python_lm, pooling="cls")
    with pytest.raises(UsageError, match="pooling 'cls' is for encoders"):
        export(tiny_python_lm, tmp_path / "out", pooling="cls")


def test_native_files_are_for_another_runtime(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="onnxruntime-genai, which runs no encoders"):
        export(plain, tmp_path / "out", native=True)


# --- the artifact -----------------------------------------------------------------------------------------------------
def test_an_artifact_holds_the_layout_and_gives_the_same_vectors(artifact: Path, laid_out: Path) -> None:
    names = set(listing(artifact))
    assert {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json", "report.json", *LAYOUT_NAMES} <= names
    assert {"2_Normalize/config.json", "int8_ranges.json"} <= names and "genai_config.json" not in names
    manifest = read_manifest(artifact)
    assert manifest["spec"]["pooling"] == {"mode": "cls", "normalize": True} and manifest["slots"] == []
    assert manifest["recipe"]["name"] == "fp32" and names - {*manifest["files"], MANIFEST_NAME} == {
        "1_Pooling",
        "2_Normalize",
    }
    with ryzen_compile.load(artifact, task="embed") as model, ryzen_compile.optimize(laid_out) as fresh:
        assert model.settings == fresh.settings and model.calibrated and model.spec == fresh.spec
        for precision in ("float32", "int8", "binary"):
            ours, theirs = (encode(one, TEXTS, precision=precision) for one in (model, fresh))
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(model.int8_range.step, fresh.int8_range.step)
        assert (model.int8_range.step < WIDENED * 0.1).all()


def test_loading_imports_neither_torch_nor_transformers(artifact: Path) -> None:
    code = f"""
import sys, ryzen_compile
with ryzen_compile.load({str(artifact)!r}) as model:
    print(model.encode(["a cat"]).shape)
print([name for name in ("torch", "transformers", "sentence_transformers", "rich") if name in sys.modules])
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines() == ["(1, 10)", "[]"]


def test_a_loaded_artifact_is_saved_as_it_is(artifact: Path, tmp_path: Path) -> None:
    with ryzen_compile.load(artifact) as model:
        model.save_pretrained(tmp_path / "copy")
        with pytest.raises(ArtifactError, match="not empty"):
            model.save_pretrained(tmp_path / "copy")
        model.save_pretrained(tmp_path / "copy", force=True)
    assert listing(tmp_path / "copy") == listing(artifact)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_the_tokenizer_file_cuts_and_does_not_pad(artifact: Path) -> None:
    written = json.loads((artifact / "tokenizer.json").read_text())
    assert written["truncation"]["max_length"] == 12 and written["padding"] is None


def test_sentence_transformers_reads_all_but_the_weights(artifact: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling as TheirPooling
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(artifact, local_files_only=True)("the cat sat on the mat")["input_ids"]
    assert ids == tokenizer()("the cat sat on the mat")["input_ids"]
    pooling = TheirPooling.load(str(artifact), subfolder="1_Pooling")
    assert pooling.pooling_mode == "cls" and pooling.embedding_dimension == HIDDEN
    assert Normalize.load(str(artifact), subfolder="2_Normalize").module_input_name == "sentence_embedding"
    with pytest.raises(OSError, match=r"model\.safetensors"):  # the weights are in model.onnx.data
        library.SentenceTransformer(str(artifact), device="cpu", local_files_only=True)


def test_plain_onnx_runtime_runs_it(artifact: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(artifact / "model.onnx"), providers=["CPUExecutionProvider"])
    batch = tokenizer()(["the cat sat", "a"], padding=True, return_tensors="np")
    feeds = {name: batch[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    (vectors,) = session.run(["sentence_embedding"], feeds)
    np.testing.assert_allclose(vectors, expected(["the cat sat", "a"], Pooling("cls")), **CLOSE)


def test_an_artifact_is_for_its_own_task(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(UsageError, match="is made to embed, not to generate"):
        ryzen_compile.load(artifact, task="generate")
    with pytest.raises(UsageError, match="is made to generate, not to embed"):
        ryzen_compile.load(shared_artifact(tmp_path_factory), task="embed")
    with pytest.raises(UsageError, match="cache_budget_bytes is for models that generate"):
        ryzen_compile.load(artifact, cache_budget_bytes=1)


def test_a_changed_setting_is_tampered_with(artifact: Path, tmp_path: Path) -> None:
    copy = duplicate(artifact, tmp_path)
    change(copy / "1_Pooling/config.json", pooling_mode_cls_token=False, pooling_mode_mean_tokens=True)
    with pytest.raises(TamperedError, match=r"1_Pooling/config\.json"):
        ryzen_compile.load(copy)


def duplicate(artifact: Path, tmp_path: Path) -> Path:
    with ryzen_compile.load(artifact) as model:
        model.save_pretrained(tmp_path / "copy")
    return tmp_path / "copy"


def seal(directory: Path, **facts: Any) -> Path:
    """Writes the manifest over whatever is there now, as a hostile writer would; None removes a fact."""
    kept = {
        key: value
        for key, value in read_manifest(directory).items()
        if key not in ("schema_version", "made_by", "files")
    }
    (directory / MANIFEST_NAME).unlink()
    write_manifest(directory, {key: value for key, value in (kept | facts).items() if value is not None})
    return directory


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pooling": {"mode": "mean", "normalize": True}}, "modules are not of the manifest's"),
        ({"pooling": {"mode": "cls", "normalize": False}}, "modules are not of the manifest's"),
        ({"pooling": {"mode": "median", "normalize": True}}, "copy: the manifest does not describe an encoder"),
        ({"pooling": {"mode": "cls", "normalize": "yes"}}, "does not describe an encoder"),
        ({"pooling": {"mode": "cls", "weights": 5}}, "does not describe the model"),
        ({"pooling": 5}, "does not describe the model"),
        ({"pooling": None}, "logits"),
        ({"hidden": HIDDEN + 1}, "'sentence_embedding' of an encoder"),
        ({"hidden": "24"}, "does not describe an encoder"),
        ({"vocab": -1}, "does not describe an encoder"),
        ({"context": 5}, "settings do not fit the model"),
    ],
)
def test_a_manifest_that_says_something_else(
    artifact: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    copy = duplicate(artifact, tmp_path)
    seal(copy, spec=read_manifest(copy)["spec"] | changes)
    with pytest.raises(ArtifactError, match=said):
        ryzen_compile.load(copy)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        '{"middle": [0], "step": [1]}',
        '{"middle": null, "step": null}',
        "x",
        '{"middle": [[0]], "step": [1]}',
    ]
    + [json.dumps({"middle": [0.0] * HIDDEN, "step": [step] * HIDDEN}) for step in (0.0, -1.0, 1e39, "a")],
)
def test_ranges_that_are_none(artifact: Path, tmp_path: Path, text: str) -> None:
    copy = duplicate(artifact, tmp_path)
    (copy / "int8_ranges.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"int8_ranges\.json"):
        ryzen_compile.load(seal(copy))


def test_ranges_may_be_missing_and_then_are_of_vectors_of_length_one(artifact: Path, tmp_path: Path) -> None:
    copy = duplicate(artifact, tmp_path)
    (copy / "int8_ranges.json").unlink()
    with ryzen_compile.load(seal(copy)) as model:
        assert not model.calibrated and (model.int8_range.step == np.float32(1 / 127)).all()


def test_what_it_was_trained_to_be_cut_to_goes_along(laid_out: Path, tmp_path: Path) -> None:
    trained = shutil.copytree(laid_out, tmp_path / "trained")
    (trained / DIMS_NAME).write_text(dims_text((HIDDEN, HIDDEN // 2)))
    export(trained, tmp_path / "out", "fp32")
    with ryzen_compile.load(tmp_path / "out") as model, ryzen_compile.load(tmp_path / "out") as again:
        assert model.settings.depths == (HIDDEN, HIDDEN // 2)
        again.save_pretrained(tmp_path / "copy")
    with ryzen_compile.load(tmp_path / "copy") as model:
        assert model.settings.depths == (HIDDEN, HIDDEN // 2)
    (tmp_path / "out" / DIMS_NAME).write_text(dims_text((2 * HIDDEN, HIDDEN)))
    with pytest.raises(ArtifactError, match="its settings do not fit the model"):
        ryzen_compile.load(seal(tmp_path / "out"))


@pytest.mark.parametrize("name", LAYOUT_NAMES)
def test_a_part_of_the_layout_is_missing(artifact: Path, tmp_path: Path, name: str) -> None:
    copy = duplicate(artifact, tmp_path)
    (copy / name).unlink()
    with pytest.raises(ArtifactError, match=f"lists no {name}"):
        ryzen_compile.load(seal(copy))


@pytest.mark.filterwarnings("ignore:.*unlisted file")
def test_a_layout_that_is_not_listed_is_not_read(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with ryzen_compile.load(shared_artifact(tmp_path_factory)) as model:
        model.save_pretrained(tmp_path / "decoder")
    (tmp_path / "decoder/modules.json").write_text("[5]")
    with ryzen_compile.load(tmp_path / "decoder", task="generate") as model:
        assert model.generate(np.array([[5]]), max_new_tokens=1).shape == (1, 2)


def test_a_graph_that_reads_or_returns_something_else(artifact: Path, tmp_path: Path) -> None:
    import onnx

    copy = duplicate(artifact, tmp_path)
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    model.graph.input[0].name = "tokens"
    for node in model.graph.node:
        node.input[:] = ["tokens" if name == "input_ids" else name for name in node.input]
    onnx.save(model, copy / "model.onnx")
    with pytest.raises(ArtifactError, match="'input_ids' of an encoder: expected type and sizes"):
        ryzen_compile.load(seal(copy))


def test_the_model_is_left_as_it_was() -> None:
    own = bert().train()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    with ryzen_compile.optimize(own, backend="eager"):
        pass
    assert own.training and all(torch.equal(before[name], value) for name, value in own.state_dict().items())
