"""The artifact directory: what lies in it, what it says of itself, and that nothing altered is ever opened."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy

import ryzen_compile
from ryzen_compile.backends.onnxruntime import artifact as artifacts
from ryzen_compile.errors import ArtifactError, ResourceError, TamperedError, UnsafeError
from ryzen_compile.manifest import MANIFEST_NAME, read_manifest, write_manifest
from tests.model_directory import TOKENS, listing, shared_artifact, shared_model
from tests.zoo import CONTEXT, LAYERS

FILES = {
    "model.onnx",
    "model.onnx.data",
    "cache.safetensors",
    "genai_config.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "report.json",
    "report.md",
    "report.html",
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_artifact(tmp_path_factory)


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def relist(directory: Path, **changes: Any) -> None:
    """Writes the manifest anew, as the author of a bad artifact would: digests agree, facts change or (None) go."""
    facts = {**read_json(directory / MANIFEST_NAME), **changes}
    for name in ("schema_version", "made_by", "files"):
        facts.pop(name)
    write_manifest(directory, {name: value for name, value in facts.items() if value is not None})


def test_every_file_is_there_and_listed(original: Path) -> None:
    assert {path.name for path in original.iterdir()} == {*FILES, MANIFEST_NAME}
    manifest = read_manifest(original)
    assert set(manifest["files"]) == FILES
    for name, entry in manifest["files"].items():
        data = (original / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_what_the_manifest_says(original: Path) -> None:
    manifest = read_manifest(original)
    report = read_json(original / "report.json")
    assert manifest["schema_version"] == 2
    assert manifest["made_by"].startswith("ryzen_compile ")
    assert manifest["source"]["name"] == "llama"
    assert manifest["source"]["class"] == "LlamaForCausalLM"
    assert len(manifest["source"]["config_sha256"]) == 64
    assert manifest["recipe"] == {**manifest["recipe"], "name": "fp32", "logits": "last", "context": None}
    assert manifest["passes"] == {record["name"]: len(record["hits"]) for record in report["records"]}
    assert manifest["passes"]["insert_kv_cache"] == LAYERS
    assert {"torch", "transformers", "onnxruntime", "onnx"} <= {name for name, found in manifest["versions"].items()}
    assert (manifest["spec"]["vocab"], manifest["spec"]["context"]) == (TOKENS, CONTEXT)
    assert [slot["layer"] for slot in manifest["slots"]] == list(range(LAYERS))


def test_the_other_files_agree_with_it(original: Path) -> None:
    genai = read_json(original / "genai_config.json")["model"]
    assert (genai["vocab_size"], genai["context_length"]) == (TOKENS, CONTEXT)
    assert genai["decoder"]["num_hidden_layers"] == LAYERS
    assert read_json(original / "config.json")["model_type"] == "llama"
    assert read_json(original / "generation_config.json")["bos_token_id"] == 1
    names = [record["name"] for record in read_json(original / "report.json")["records"]]
    for report in ("report.md", "report.html"):
        text = (original / report).read_text(encoding="utf-8")
        assert all(name in text for name in names), report
    assert "<script" not in text and "http" not in text


def test_nothing_tells_where_it_was_made(original: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for path in original.iterdir():
        assert os.fsencode(tmp_path_factory.getbasetemp()) not in path.read_bytes(), path.name


def test_every_weight_lies_in_the_data_file_once(original: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = onnx.load(original / "model.onnx", load_external_data=False)
    external = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert external
    weights = safetensors.numpy.load_file(shared_model(tmp_path_factory) / "model.safetensors")
    matrices = sum(value.nbytes for value in weights.values() if value.ndim == 2)
    assert matrices <= (original / "model.onnx.data").stat().st_size < 1.25 * matrices  # + rotary tables, alignment
    assert (original / "model.onnx").stat().st_size < 100_000


@pytest.mark.parametrize("name", sorted(FILES))
def test_one_altered_byte_is_found(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(TamperedError, match=f"'{name}': expected SHA-256 [0-9a-f]{{64}}, got [0-9a-f]{{64}}"):
        ryzen_compile.load(copy)


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("keep", [0, -1], ids=["empty", "one byte short"])
@pytest.mark.parametrize("digests", [True, False])
def test_a_truncated_file_is_found(copy: Path, name: str, keep: int, digests: bool) -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:keep])
    with pytest.raises(TamperedError, match=f"'{name}': expected {len(data)} bytes, got {len(data[:keep])}"):
        ryzen_compile.load(copy, digests=digests)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(TamperedError, match=f"'{name}' is missing"):
        ryzen_compile.load(copy, digests=False)


@pytest.mark.parametrize("name", ["model.onnx.data", "tokenizer.json", MANIFEST_NAME])
@pytest.mark.parametrize("kind", ["symbolic link", "hard link"])
def test_links_are_refused(copy: Path, tmp_path: Path, name: str, kind: str) -> None:
    elsewhere = (copy / name).rename(tmp_path / "elsewhere")
    make = (copy / name).symlink_to if kind == "symbolic link" else (copy / name).hardlink_to
    make(elsewhere)
    with pytest.raises(UnsafeError, match=f"{name}' is a {kind}"):
        ryzen_compile.load(copy)


def test_without_digests_only_sizes_are_compared(copy: Path) -> None:
    path = copy / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    ryzen_compile.load(copy, digests=False).close()
    with pytest.raises(TamperedError, match=r"model\.onnx\.data"):
        ryzen_compile.load(copy)


def test_an_unlisted_file_is_a_warning(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    with pytest.warns(UserWarning, match=r"1 unlisted file\(s\), not loaded: 'notes.txt'"):
        ryzen_compile.load(copy).close()


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (3, "has the newer schema 3: made by 'ryzen_compile .*', this is ryzen_compile .* with schema 2; .*upgrade"),
        (1, "has the older schema 1: made by 'ryzen_compile .*', this is .* with schema 2; re-export the model$"),
        (0, "has the older schema 0: .*re-export the model$"),
        (None, "states no schema_version"),
        ("1", "states no schema_version"),
        (True, "states no schema_version"),
    ],
)
def test_another_schema_is_refused(copy: Path, schema: Any, message: str) -> None:
    manifest = {**read_json(copy / MANIFEST_NAME), "schema_version": schema}
    (copy / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=message):
        ryzen_compile.load(copy)


def no_manifest(directory: Path) -> None:
    (directory / MANIFEST_NAME).unlink()


def broken_manifest(directory: Path) -> None:
    (directory / MANIFEST_NAME).write_text('{"files": ')


def no_spec(directory: Path) -> None:
    relist(directory, spec=None)


def odd_slots(directory: Path) -> None:
    relist(directory, slots=[{"layer": 0}])


def broken_config(directory: Path) -> None:
    (directory / "config.json").write_text("[1, 2]")
    relist(directory)


def garbage_model(directory: Path) -> None:
    (directory / "model.onnx").write_bytes(b"\xff" * 100)
    relist(directory)


def broken_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{}")
    relist(directory)


def broken_tokenizer_settings(directory: Path) -> None:
    (directory / "tokenizer_config.json").write_text("{")
    relist(directory)


def other_vocabulary(directory: Path) -> None:
    relist(directory, spec={**read_json(directory / MANIFEST_NAME)["spec"], "vocab": TOKENS - 1})


def other_heads(directory: Path) -> None:
    slots = read_json(directory / MANIFEST_NAME)["slots"]
    relist(directory, slots=[{**slot, "kv_heads": slot["kv_heads"] + 1} for slot in slots])


def one_slot_less(directory: Path) -> None:
    relist(directory, slots=read_json(directory / MANIFEST_NAME)["slots"][:-1])


def one_slot_more(directory: Path) -> None:
    slots = read_json(directory / MANIFEST_NAME)["slots"]
    relist(directory, slots=[*slots, slots[0]])


def slots_changed(**changes: Any) -> Callable[[Path], None]:
    """The manifest's slots say something else than the graph, each of them."""

    def damage(directory: Path) -> None:
        relist(directory, slots=[slot | changes for slot in read_json(directory / MANIFEST_NAME)["slots"]])

    return damage


def graph_changed(**changes: int) -> Callable[[Path], None]:
    """The graph's attentions say something else than the manifest."""

    def damage(directory: Path) -> None:
        model = onnx.load(directory / "model.onnx", load_external_data=False)
        for node in model.graph.node:
            if node.op_type == "GroupQueryAttention":
                node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in changes.items())
        onnx.save(model, directory / "model.onnx")
        relist(directory)

    return damage


def attention_of_nothing(directory: Path) -> None:
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "GroupQueryAttention")
    node.input[3] = node.input[0]
    onnx.save(model, directory / "model.onnx")
    relist(directory)


def too_long_data(directory: Path) -> None:
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    entry = next(e for t in model.graph.initializer for e in t.external_data if e.key == "offset")
    entry.value = str((directory / "model.onnx.data").stat().st_size)
    onnx.save(model, directory / "model.onnx")
    relist(directory)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (no_manifest, ArtifactError, f"holds no {MANIFEST_NAME}; expected a directory made by ryzen-compile export"),
        (broken_manifest, ArtifactError, f"{MANIFEST_NAME} is not JSON"),
        (no_spec, ArtifactError, "copy: the manifest does not describe the model: 'spec'"),
        (odd_slots, ArtifactError, "does not describe the model: .*missing"),
        (broken_config, ArtifactError, "config.json holds a list, expected an object"),
        (garbage_model, ArtifactError, "'model.onnx' is not an ONNX model"),
        (broken_tokenizer, ArtifactError, "tokenizer.json cannot be read"),
        (broken_tokenizer_settings, ArtifactError, "tokenizer_config.json is not JSON"),
        (too_long_data, TamperedError, r"external tensor '.*': bytes \d+\.\.\d+ lie outside 'model.onnx.data'"),
        (
            other_vocabulary,
            ArtifactError,
            rf"logits should have \[{TOKENS - 1}\] of type 1 by .*, the graph has .*{TOKENS}\] of type 1",
        ),
        (
            other_heads,
            ArtifactError,
            r"past_key_values\.0\.key should have \[3, 16\] of type 1 by .*\[0, 2, 0, 16\] of type 1",
        ),
        (slots_changed(window=16), ArtifactError, "layer 0 keeps a window of 0 tokens in the graph, of 16 by the man"),
        (slots_changed(key_format="int8"), ArtifactError, r"0\.key should have \[2, 16\] of type 3 by .* of type 1"),
        (slots_changed(value_format="int4"), ArtifactError, r"0\.value should have \[2, 8\] of type 2 by .* of type 1"),
        (
            slots_changed(key_format="int8-g16"),
            ArtifactError,
            r"0\.key should have \[2, 18\] of type 2 by .* of type 1",
        ),
        (slots_changed(key_format="fp16"), ArtifactError, "does not describe the model: 'fp16' is no cache format"),
        (slots_changed(value_format="int8-g" + "9" * 5000), ArtifactError, "does not describe the model"),
        (slots_changed(key_format="int8-g12"), ArtifactError, "int8-g12 does not divide a head of 16 channels"),
        (slots_changed(key_format=8), ArtifactError, "a slot's key_format is '8'"),
        (slots_changed(kv_heads=2.0), ArtifactError, r"a slot's kv_heads is '2\.0'"),
        (slots_changed(window=-16), ArtifactError, "a slot's window is '-16'"),
        (slots_changed(window=False), ArtifactError, "a slot's window is 'False'"),
        (slots_changed(sinks=3), ArtifactError, "does not describe the model: .*sinks"),
        (
            graph_changed(sliding_window_cache=1, local_window_size=20),
            ArtifactError,
            "layer 0 keeps a window of 20 tokens in the graph, of 0 by the manifest; export it again",
        ),
        (graph_changed(sliding_window_cache=1), ArtifactError, "layer 0 keeps a window of -1 tokens in the graph"),
        (attention_of_nothing, ArtifactError, "attention '.*' reads no cache of the manifest"),
        (one_slot_less, ArtifactError, r"past_key_values\.1\.key is not in the manifest"),
        (one_slot_more, ArtifactError, r"past_key_values\.2\.key should have .*, the graph has none"),
    ],
)
def test_a_directory_that_lies_is_refused(
    copy: Path, damage: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    """The digests agree in each of these: whoever makes a bad artifact makes its manifest too."""
    damage(copy)
    with pytest.raises(error, match=message):
        ryzen_compile.load(copy)


def test_a_copy_works_wherever_it_lies(copy: Path, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent)
    prompt = np.array([[5, 17, 80]])
    with ryzen_compile.load(original) as one, ryzen_compile.load("copy") as other:
        assert (one.generate(prompt, max_new_tokens=7) == other.generate(prompt, max_new_tokens=7)).all()


def rewrite(
    original: Path, out: Path, *, fail_at: str = "", error: BaseException | None = None, **options: Any
) -> Path:
    """Writes the artifact ``original`` again to ``out``; raises ``error`` in the middle of the step ``fail_at``."""
    found = artifacts.read(original)

    class Report:
        def to_json(self) -> dict[str, Any]:
            if fail_at == "report" and error:
                raise error
            return {}

        def to_markdown(self) -> str:
            return ""

        to_html = to_markdown

    def write_model(directory: Path) -> None:
        shutil.copyfile(original / "model.onnx", directory / "model.onnx")
        if fail_at == "model" and error:
            raise error
        shutil.copyfile(original / "model.onnx.data", directory / "model.onnx.data")

    def save_tokenizer(directory: Path) -> None:
        shutil.copyfile(original / "tokenizer.json", directory / "tokenizer.json")
        if fail_at == "tokenizer" and error:
            raise error

    companions = artifacts.Companions(found.config, found.generation_config, save_tokenizer)
    return artifacts.write(
        out,
        write_model,
        spec=found.spec,
        slots=found.slots,
        facts={},
        report=Report(),
        companions=companions,
        **options,
    )


@pytest.mark.parametrize("step", ["model", "tokenizer", "report"])
@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (ZeroDivisionError(), ZeroDivisionError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), ResourceError),
    ],
    ids=["exception", "Ctrl-C", "full disk"],
)
@pytest.mark.parametrize("force", [False, True], ids=["new", "replaced"])
def test_writing_that_fails_in_the_middle_leaves_nothing(
    original: Path, tmp_path: Path, step: str, error: BaseException, seen: type[BaseException], force: bool
) -> None:
    out = tmp_path / "out"
    if force:
        shutil.copytree(original, out)
    before = listing(tmp_path)
    with pytest.raises(seen):
        rewrite(original, out, fail_at=step, error=error, force=force)
    assert listing(tmp_path) == before
    if force:
        artifacts.read(out)
    rewrite(original, out, force=force)  # and the next try succeeds
    artifacts.read(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_model_that_its_own_check_refuses_is_not_published(original: Path, tmp_path: Path) -> None:
    found = artifacts.read(original)

    def write_half(directory: Path) -> None:
        shutil.copyfile(original / "model.onnx", directory / "model.onnx")
        (directory / "model.onnx.data").write_bytes(b"short")

    with pytest.raises(TamperedError, match=r"lie outside 'model\.onnx\.data' of 5 bytes"):
        artifacts.write(tmp_path / "out", write_half, spec=found.spec, slots=found.slots, facts={})
    assert listing(tmp_path) == {}
