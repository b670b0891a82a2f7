"""Where models come from: what is accepted, and one test for each way in which a model directory can be bad."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ryzen_compile import source
from ryzen_compile.errors import ModelError, ResourceError, RyzenCompileError, UnsafeError, UsageError
from ryzen_compile.safetensors_header import TensorEntry, check_safetensors
from ryzen_compile.source import inspect, load_model, resolve


def safetensors_bytes(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: str = "F32", shape: Any = (1,), start: Any = 0, end: Any = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


GOOD = {
    "plain": (safetensors_bytes({"a": entry()}, b"1234"), 1),
    "padded header": (safetensors_bytes(b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}   ', b"12"), 1),
    "metadata": (safetensors_bytes({"__metadata__": {"format": "pt"}, "a": entry()}, b"1234"), 1),
    "scalar": (safetensors_bytes({"a": entry(shape=())}, b"1234"), 1),
    "no tensors": (safetensors_bytes({}), 0),
    "zero-size tensor": (safetensors_bytes({"a": entry(shape=(0, 7), end=0), "b": entry()}, b"1234"), 2),
    "any order": (safetensors_bytes({"b": entry(start=4, end=8), "a": entry()}, b"12345678"), 2),
    "four bits": (safetensors_bytes({"a": entry("F4", (3, 2), 0, 3)}, b"123"), 1),
}

BAD = {
    "empty file": (b"", "not a safetensors header: the file has 0 bytes"),
    "pickle": (pickle.dumps({"a": list(range(100))}), "not a safetensors header: it claims"),
    "length over file": (safetensors_bytes({}, length=1000), "claims 1000 bytes, the file has 2"),
    "length 2^64-1": (safetensors_bytes({}, length=2**64 - 1), "claims 18446744073709551615 bytes"),
    "not an object": (safetensors_bytes(b"[1, 2]"), r"starts with .*, expected '\{'"),
    "not UTF-8": (safetensors_bytes(b'{"\xff": 1}'), "not UTF-8 at byte 2"),
    "not JSON": (safetensors_bytes(b'{"a": '), "not JSON"),
    "NaN": (safetensors_bytes(b'{"a": NaN}'), "not JSON: NaN"),
    "deeply nested": (safetensors_bytes(b'{"a":' * 100_000), "not JSON"),
    "duplicate name": (
        safetensors_bytes(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}'),
        "name 'a' is there twice",
    ),
    "duplicate key": (safetensors_bytes(b'{"a":{"dtype":"U8","dtype":"F32"}}'), "name 'dtype' is there twice"),
    "unknown dtype": (safetensors_bytes({"a": entry("F33")}, b"1234"), "tensor 'a' has the unknown dtype 'F33'"),
    "extra key": (safetensors_bytes({"a": {**entry(), "x": 1}}, b"1234"), "tensor 'a' does not have exactly"),
    "entry not an object": (safetensors_bytes({"a": 3}), "tensor 'a' does not have exactly"),
    "metadata not strings": (safetensors_bytes({"__metadata__": {"a": 1}}), "__metadata__ is not"),
    "overlap": (
        safetensors_bytes({"a": entry(), "b": entry(start=2, end=6)}, b"123456"),
        "tensors 'a' and 'b' overlap at byte 2",
    ),
    "zero-size inside": (
        safetensors_bytes({"a": entry(), "b": entry(shape=(0,), start=2, end=2)}, b"1234"),
        "tensors 'a' and 'b' overlap",
    ),
    "hole": (safetensors_bytes({"a": entry(), "b": entry(start=8, end=12)}, b"1" * 12), "hole of 4 bytes.*'b'"),
    "hole at start": (safetensors_bytes({"a": entry(start=4, end=8)}, b"1" * 8), "hole of 4 bytes before tensor 'a'"),
    "trailing bytes": (safetensors_bytes({"a": entry()}, b"12345"), "1 trailing bytes after the last tensor 'a'"),
    "outside file": (safetensors_bytes({"a": entry(shape=(2,), end=8)}, b"1234"), "bytes 0..8, outside .* 4 bytes"),
    "backwards": (safetensors_bytes({"a": entry(start=4, end=0)}, b"1234"), "tensor 'a' lies at bytes 4..0"),
    "shape mismatch": (safetensors_bytes({"a": entry(shape=(3,))}, b"1234"), "needs 12 bytes, its offsets hold 4"),
    "overflow": (safetensors_bytes({"a": entry(shape=(2**40, 2**40))}, b"1234"), "overflows 64 bits"),
    "overflow, then 0": (safetensors_bytes({"a": entry(shape=(2**40, 2**40, 0), end=0)}), "overflows 64 bits"),
    "negative": (safetensors_bytes({"a": entry(shape=(-1, -1))}, b"1234"), "expected a list of whole numbers"),
    "boolean size": (safetensors_bytes({"a": entry(shape=(True,))}, b"1234"), "expected a list of whole numbers"),
    "float offset": (safetensors_bytes({"a": entry(end=4.0)}, b"1234"), "expected two whole numbers"),
    "half a byte": (safetensors_bytes({"a": entry("F4", (3,), 0, 2)}, b"12"), r"needs 1\.5 bytes"),
    "long odd name": (safetensors_bytes({"\x1b[31m" + "x" * 999: 3}), r"tensor '\\x1b\[31mxx+\.\.\.' does"),
}


@pytest.mark.parametrize(("data", "tensors"), GOOD.values(), ids=GOOD.keys())
def test_good_headers(tmp_path: Path, data: bytes, tensors: int) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    assert len(check_safetensors(tmp_path / "a.safetensors")) == tensors


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD.keys())
def test_bad_headers(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=message) as caught:
        check_safetensors(tmp_path / "a.safetensors")
    assert caught.value.exit_code == 3
    assert len(str(caught.value)) < 400


def test_a_header_over_the_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", 100_000_001))
        stream.truncate(200_000_000)  # sparse
    with pytest.raises(ModelError, match="100000001 bytes, the limit is 100000000"):
        check_safetensors(tmp_path / "a.safetensors")


def test_too_many_tensors(tmp_path: Path) -> None:
    one = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header = "{" + ",".join(f'"{i}":{one}' for i in range(100_001)) + "}"
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header.encode()))
    with pytest.raises(ModelError, match="has 100001 tensors, the limit is 100000"):
        check_safetensors(tmp_path / "a.safetensors")


def test_agrees_with_the_library(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.zeros(5, dtype=torch.int8)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    found = check_safetensors(tmp_path / "a.safetensors")
    assert found == {"a": TensorEntry("BF16", (2, 3), 0, 12), "b": TensorEntry("I8", (5,), 12, 17)}


# --- directories ------------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The smallest directory that ``inspect`` accepts."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(GOOD["plain"][0])
    return tmp_path


def configure(directory: Path, value: object, name: str = "config.json") -> None:
    (directory / name).write_text(json.dumps(value))


def shard(directory: Path, weight_map: object) -> None:
    (directory / "model.safetensors").rename(directory / "one.safetensors")
    configure(directory, {"weight_map": weight_map}, "model.safetensors.index.json")


def only(directory: Path, *names: str) -> None:
    (directory / "model.safetensors").unlink()
    for name in names:
        (directory / name).touch()


def test_inspect_reports(bare: Path) -> None:
    files = inspect(bare)
    assert files.config == {"model_type": "llama"}
    assert files.weights == (bare / "model.safetensors",)
    assert files.tensors == {"a": TensorEntry("F32", (1,), 0, 4)}


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda d: (d / "config.json").unlink(), ModelError, "holds no config.json"),
        (lambda d: (d / "config.json").write_text("{"), ModelError, "config.json is not JSON"),
        (lambda d: (d / "config.json").write_text("[" * 100_000), ModelError, "config.json is not JSON"),
        (lambda d: configure(d, []), ModelError, "holds a list"),
        (lambda d: configure(d, {"auto_map": {"AutoModel": "x.Y"}}), UnsafeError, "key 'auto_map'"),
        (lambda d: configure(d, {"a": [{"auto_map": {"A": "b"}}]}), UnsafeError, r"key 'a\.0\.auto_map'"),
        (lambda d: configure(d, {"text_config": {"trust_remote_code": True}}), UnsafeError, "trust_remote_code'"),
        (
            lambda d: configure(d, {"auto_map": {"AutoTokenizer": ["x.Y", None]}}, "tokenizer_config.json"),
            UnsafeError,
            "tokenizer_config.json asks to run code",
        ),
        (lambda d: configure(d, {"_attn_implementation": "someone/kernel"}), UnsafeError, "kernel from the hub"),
        (lambda d: configure(d, {"num_hidden_layers": 10**9}), ModelError, r"is 1e\+09, the limit is 10000"),
        (lambda d: configure(d, {"text": {"vocab_size": 10**9}}), ModelError, r"'text\.vocab_size'"),
        (lambda d: configure(d, {"transformers_weights": "a"}), ModelError, "its own weight file"),
        (lambda d: configure(d, {}, "adapter_config.json"), ModelError, "is a PEFT adapter"),
        (only, ModelError, "holds no model.safetensors"),
        (lambda d: only(d, "pytorch_model.bin", "x.pt2"), UnsafeError, "pickled.*'pytorch_model.bin', 'x.pt2'.*safe"),
        (lambda d: only(d, "model.gguf"), ModelError, "only 'model.gguf'"),
        (lambda d: shard(d, {"a": "one.safetensors", "b": "two.safetensors"}), ModelError, "1 of 2 .* 'two.saf"),
        (lambda d: shard(d, {"a": "../one.safetensors"}), UnsafeError, r"tensor 'a' to .*contains '\.\.'"),
        (lambda d: shard(d, {"a": "/one.safetensors"}), UnsafeError, "which is an absolute path"),
        (lambda d: shard(d, {"a": "sub/one.safetensors"}), UnsafeError, "points into another directory"),
        (lambda d: shard(d, {"a": "C:\\one.safetensors"}), UnsafeError, "contains a backslash"),
        (lambda d: shard(d, {"a": "weights.bin"}), UnsafeError, "not a safetensors file"),
        (lambda d: shard(d, {"a": 3}), UnsafeError, "is not a file name"),
        (lambda d: shard(d, []), ModelError, "has no weight_map"),
        (lambda d: shard(d, {"a": "one.safetensors", "b": "one.safetensors"}), ModelError, "1 tensor.*lack them: 'b'"),
    ],
)
def test_bad_directories(bare: Path, damage: Any, error: type[RyzenCompileError], message: str) -> None:
    damage(bare)
    with pytest.raises(error, match=message) as caught:
        inspect(bare)
    assert caught.type is error


def test_a_tensor_in_two_shards(bare: Path) -> None:
    shard(bare, {"a": "one.safetensors", "b": "two.safetensors"})
    (bare / "two.safetensors").write_bytes((bare / "one.safetensors").read_bytes())
    with pytest.raises(ModelError, match=r"'a' is in two files: 'one\.safetensors' and 'two\.safetensors'"):
        inspect(bare)


def test_near_misses_are_accepted(bare: Path) -> None:
    configure(bare, {"auto_map": {}, "trust_remote_code": False, "attn_implementation": "sdpa", "vocab_size": 262_144})
    (bare / "pytorch_model.bin").touch()  # beside safetensors: never read
    (bare / "modeling_x.py").touch()
    inspect(bare)
    configure(bare, {"auto_map": {"AutoModel": "modeling_x.X"}})
    inspect(bare, trust_remote_code=True)
    shard(bare, {"a": "one.safetensors"})
    inspect(bare, trust_remote_code=True)


def test_links_as_the_hub_cache_makes_them(bare: Path, tmp_path: Path) -> None:
    (bare / "model.safetensors").rename(tmp_path / "blob")
    (bare / "model.safetensors").symlink_to(tmp_path / "blob")
    inspect(bare)


# --- names ------------------------------------------------------------------------------------------------------------


def test_resolve_takes_a_directory_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("gpt2") == Path("gpt2")  # a directory of that name comes before the hub
    assert resolve(tmp_path) == tmp_path


@pytest.mark.parametrize(
    "name", ["./absent", "/absent/model", "a/b/c", "absent/", "..", "~/absent", "C:\\m", "", "a b"]
)
def test_missing_paths_never_reach_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    if Path(name).expanduser().is_dir():
        assert resolve(name).is_dir()
        return
    with pytest.raises(ModelError, match="does not exist"):
        resolve(name)


def test_resolve_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="is a file, expected a directory"):
        resolve(tmp_path / "model.safetensors")


def test_an_uncached_id_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"'someone/absent' is neither .* nor in the hub cache.*HF_HUB_OFFLINE"):
        resolve("someone/absent", local_files_only=True)


def test_only_harmless_files_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **kwargs: Any) -> str:
        asked.update(kwargs, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("someone/model", revision="v1", token="t") == tmp_path
    assert (asked["name"], asked["revision"], asked["token"]) == ("someone/model", "v1", "t")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not [pattern for pattern in asked["allow_patterns"] if pattern.endswith((".bin", ".py", ".pt", "*"))]
    resolve("someone/model", trust_remote_code=True)
    assert "*.py" in asked["allow_patterns"]


def test_a_full_disk_while_fetching(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **kwargs: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ResourceError, match="No space left"):
        resolve("someone/model")


# --- loading ----------------------------------------------------------------------------------------------------------

VOCAB = 24


def tokenizer_of(size: int, *added: AddedToken) -> PreTrainedTokenizerFast:
    words = {"<unk>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, size)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer_of(VOCAB).save_pretrained(directory)
    return directory


@pytest.fixture
def model_dir(trained: Path, tmp_path: Path) -> Path:
    for path in trained.iterdir():
        os.link(path, tmp_path / path.name)
    return tmp_path


def edit_weights(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def edit_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").unlink()
    configure(directory, {**config, **changes})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_load(model_dir: Path, dtype: str) -> None:
    model, tokenizer, generation = load_model(model_dir, dtype=dtype)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert tokenizer is not None
    assert tokenizer("w3 w4")["input_ids"] == [3, 4]
    assert generation is not None


def test_half_precision_files_load_as_float32(model_dir: Path) -> None:
    edit_weights(model_dir, lambda t: t.update({name: tensor.half() for name, tensor in t.items()}))
    model, _, _ = load_model(model_dir)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_no_tokenizer(model_dir: Path) -> None:
    for path in model_dir.glob("token*"):
        path.unlink()
    assert load_model(model_dir)[1] is None


def test_an_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'int8': expected float32"):
        load_model(tmp_path, dtype="int8")


NORM = "model.norm.weight"
EMBED = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), r"1 tensor\(s\) missing: 'model\.norm\.weight'"),
        (
            lambda t: [t.pop(name) for name in list(t) if ".layers." in name],
            r"18 tensor\(s\) missing: .* and 8 more",
        ),
        (lambda t: t.update({"model.extra": torch.ones(1)}), r"1 tensor\(s\) unknown: 'model\.extra'"),
        (
            lambda t: t.update({NORM: torch.ones(15)}),
            r"another shape: 'model\.norm\.weight' is \(15,\), expected \(16,\)",
        ),
        (lambda t: t[NORM].view(-1)[3:5].fill_(float("nan")), r"'model\.norm\.weight' holds 2 NaN .* 1 tensor"),
        (lambda t: t[EMBED].view(-1)[7].fill_(float("-inf")), r"'model\.embed_tokens\.weight' holds 1 NaN or inf"),
        (lambda t: t.update({"lm_head.weight": t[EMBED] + 1}), "ties 'lm_head.weight' to 'model.embed_tokens.weight'"),
    ],
)
def test_weights_that_do_not_fit(model_dir: Path, change: Any, message: str) -> None:
    edit_weights(model_dir, change)
    with pytest.raises(ModelError, match=message):
        load_model(model_dir)


def test_an_equal_copy_of_a_tied_tensor_is_fine(model_dir: Path) -> None:
    edit_weights(model_dir, lambda t: t.update({"lm_head.weight": t[EMBED].clone()}))
    load_model(model_dir)


def test_extreme_but_finite_weights_are_fine(model_dir: Path) -> None:
    edit_weights(model_dir, lambda t: t[NORM].fill_(3e38))
    load_model(model_dir)


def test_an_unknown_architecture(model_dir: Path) -> None:
    edit_config(model_dir, model_type="perpetuum")
    with pytest.raises(ModelError, match=r"transformers cannot load the model in .*perpetuum") as caught:
        load_model(model_dir)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model(model_dir: Path) -> None:
    (model_dir / "tokenizer.json").unlink()
    tokenizer_of(VOCAB + 5).save_pretrained(model_dir)
    with pytest.raises(ModelError, match=f"tokenizer knows {VOCAB + 5} tokens, the model's vocabulary has {VOCAB}"):
        load_model(model_dir)


def test_an_ordinary_added_token_beyond_the_vocabulary(model_dir: Path) -> None:
    (model_dir / "tokenizer.json").unlink()
    tokenizer_of(VOCAB, AddedToken("more", special=False)).save_pretrained(model_dir)
    with pytest.raises(ModelError, match=f"knows {VOCAB + 1} tokens"):
        load_model(model_dir)


def test_a_special_token_beyond_the_vocabulary_is_a_warning(model_dir: Path) -> None:
    """As in Gemma 3's text models, which carry an image token that they have no embedding for."""
    (model_dir / "tokenizer.json").unlink()
    tokenizer_of(VOCAB, AddedToken("<image>", special=True)).save_pretrained(model_dir)
    with pytest.warns(UserWarning, match=f"outside the model's vocabulary of {VOCAB}: '<image>'"):
        load_model(model_dir)


def test_an_end_token_beyond_the_vocabulary(model_dir: Path) -> None:
    (model_dir / "tokenizer.json").unlink()
    tokenizer = tokenizer_of(VOCAB, AddedToken("<end>", special=True))
    tokenizer.eos_token = "<end>"
    tokenizer.save_pretrained(model_dir)
    with pytest.raises(ModelError, match=f"eos_token_id {VOCAB} is outside the model's vocabulary of {VOCAB}"):
        load_model(model_dir)


def test_importing_the_module_is_cheap() -> None:
    names = vars(source)
    assert "torch" not in names
    assert "transformers" not in names
