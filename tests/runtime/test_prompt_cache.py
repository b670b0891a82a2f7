"""Prompt cache files: what comes back, and everything that is refused."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ryzen_compile.errors import (
    ArtifactError,
    MemoryLimitError,
    NumericalError,
    PromptError,
    ResourceError,
    TamperedError,
    UnsafeError,
    UsageError,
)
from ryzen_compile.numerics.rows import RowFormat, encode
from ryzen_compile.runtime import prompt_cache, prompt_cache_header
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.prompt_cache import PromptCache, load_prompt_cache, save_prompt_cache
from ryzen_compile.safetensors_header import check_safetensors
from ryzen_compile.spec import CacheSlot

SLOTS = (
    CacheSlot(0, 3, 5, 3),
    CacheSlot(1, 1, 8, 6, "int8", "int4"),
    CacheSlot(4, 2, 16, 8, "int4-g8", "int8-g4"),
    CacheSlot(5, 2, 3, 2, window=4),
)
IDENTITY, VOCAB = "sha256:0123abcd", 50


def computed(tokens: int, slots: tuple[CacheSlot, ...] = SLOTS) -> tuple[KVCache, np.ndarray]:
    """A row with room to spare that holds ``tokens`` encoded tokens, and these tokens."""
    random = np.random.default_rng(tokens)
    row = KVCache(slots, 1, tokens + 3)
    for slot, key, value in zip(slots, row.keys, row.values, strict=True):
        for buffer, text, dim in ((key, slot.key_format, slot.head_dim), (value, slot.value_format, slot.value_dim)):
            floats = random.standard_normal((*buffer.shape[:3], dim)).astype(np.float32)
            buffer[:] = encode(floats, RowFormat.parse(text), np.float32(0.1))
    row.lengths[0] = tokens
    return row, random.integers(0, VOCAB, tokens)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A file of seven tokens, which ``load`` accepts."""
    path = tmp_path / "prompt.safetensors"
    row, ids = computed(7)
    save_prompt_cache(path, row, ids, IDENTITY)
    return path


def load(path: Path, **changes: Any) -> tuple[KVCache, np.ndarray]:
    arguments = {"slots": SLOTS, "identity": IDENTITY, "vocab": VOCAB, **changes}
    prompt = load_prompt_cache(path, **arguments)
    return prompt.row, prompt.tokens


def parts(path: Path) -> tuple[dict[str, Any], bytearray]:
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), bytearray(raw[end:])


def forge(path: Path, header: object, data: bytes | bytearray) -> None:
    """What somebody writes who knows the format: the digest fits, wherever there is a place for it."""
    if isinstance(header, dict) and "sha256" in header.get("__metadata__", ()):
        header["__metadata__"]["sha256"] = hashlib.sha256(data).hexdigest()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("tokens", [1, 7, 20, 21, 127])
def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path, tokens: int) -> None:
    row, ids = computed(tokens)
    path = tmp_path / "prompt.safetensors"
    save_prompt_cache(path, row, ids.tolist(), IDENTITY)
    loaded, again = load(path, limit=1000)
    assert again.dtype == np.int64
    np.testing.assert_array_equal(again, ids)
    assert loaded.lengths.tolist() == [tokens] and loaded.capacity == tokens and loaded.limit == 1000
    for index, slot in enumerate(SLOTS):
        held = slot.resident(tokens)
        assert held == tokens or slot.window
        for one, two in ((row.keys, loaded.keys), (row.values, loaded.values)):
            np.testing.assert_array_equal(two[index][:, :, :held], one[index][:, :, :held])
    loaded.reserve(tokens + 1)
    loaded.advance(1)


def test_the_file_is_safetensors_to_a_strict_reader_and_to_the_library(saved: Path) -> None:
    row, ids = computed(7)
    strict, library = check_safetensors(saved), load_file(saved)
    assert list(strict) == ["tokens"] + [f"{kind}.{index}" for index in range(4) for kind in ("keys", "values")]
    np.testing.assert_array_equal(library["tokens"], ids)
    for index in range(4):
        np.testing.assert_array_equal(library[f"keys.{index}"], row.keys[index][0, :, :7])
        np.testing.assert_array_equal(library[f"values.{index}"], row.values[index][0, :, :7])
    assert int.from_bytes(saved.read_bytes()[:8], "little") % 8 == 0


def test_only_rows_in_use_are_written(tmp_path: Path) -> None:
    slots = (CacheSlot(0, 2, 4, 4), CacheSlot(1, 1, 2, 2, window=4))
    row, ids = computed(21, slots)
    for buffer in (row.keys[0][:, :, 21:], row.values[1][:, :, 4:]):  # 21 tokens leave the window alone
        buffer[:] = np.nan
    save_prompt_cache(tmp_path / "a", row, ids, IDENTITY)
    header, data = parts(tmp_path / "a")
    assert header["keys.1"]["shape"] == [1, 4, 2] and slots[1].resident(21) == 4
    assert len(data) == 8 * 21 + 4 * (2 * 21 * 8 + 4 * 4)
    loaded, _ = load(tmp_path / "a", slots=list(slots))
    assert not loaded.values[1][:, :, 4:].any()


def test_a_row_of_a_batch_can_be_saved_and_a_file_replaced(tmp_path: Path, saved: Path) -> None:
    row, _ = computed(7)
    batch = row.fork(3)
    batch.lengths[:] = [7, 2, 5]
    save_prompt_cache(saved, batch.row(1), np.array([3, 4], np.uint8), IDENTITY)
    loaded, ids = load(saved)
    assert ids.tolist() == [3, 4] and loaded.lengths.tolist() == [2]
    assert [path.name for path in tmp_path.iterdir()] == [saved.name]


def test_saving_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_prompt_cache(tmp_path / "a", *computed(1), IDENTITY)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_saving_refuses_what_could_not_be_loaded(tmp_path: Path) -> None:
    row, ids = computed(3)
    path = tmp_path / "a"
    for bad in (ids[:2], np.append(ids, 1), ids.astype(np.float32), ids[None], []):
        with pytest.raises(UsageError, match=r"one row and its tokens, got rows of \[3\] tokens"):
            save_prompt_cache(path, row, bad, IDENTITY)
    with pytest.raises(UsageError, match="got rows of"):
        save_prompt_cache(path, row.fork(2), ids, IDENTITY)
    with pytest.raises(UsageError, match=r"rows of \[0\] tokens"):
        save_prompt_cache(path, KVCache(SLOTS, 1, 3), [], IDENTITY)
    with pytest.raises(UsageError, match="needs the identity"):
        save_prompt_cache(path, row, ids, "")
    row.values[3][0, 1, 2, 0] = np.inf
    with pytest.raises(NumericalError, match=r"values\.3 of the prompt"):
        save_prompt_cache(path, row, ids, IDENTITY)
    assert not list(tmp_path.iterdir())


def test_saving_replaces_no_link_and_no_directory_and_leaves_nothing_behind(tmp_path: Path, saved: Path) -> None:
    content = saved.read_bytes()
    link, directory = tmp_path / "link", tmp_path / "directory"
    link.symlink_to(saved)
    directory.mkdir()
    for target in (link, directory):
        with pytest.raises(UsageError, match="is a link or no plain file"):
            save_prompt_cache(target, *computed(1), IDENTITY)
    with pytest.raises(ResourceError, match="cannot write"):
        save_prompt_cache(tmp_path / "none" / "a", *computed(1), IDENTITY)
    assert saved.read_bytes() == content and link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "link", saved.name]


def test_a_failed_write_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, saved: Path) -> None:
    content = saved.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prompt_cache.os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left"):
        save_prompt_cache(saved, *computed(3), IDENTITY)
    assert saved.read_bytes() == content and len(list(tmp_path.iterdir())) == 1


def test_another_artifact_and_other_slots_are_refused(saved: Path) -> None:
    with pytest.raises(ArtifactError, match="saved by the artifact 'sha256:0123abcd', this is 'other'"):
        load(saved, identity="other")
    with pytest.raises(ArtifactError, match="holds other slots: 'slot 3' does not belong there"):
        load(saved, slots=SLOTS[:3])
    with pytest.raises(ArtifactError, match="holds other slots: slot 4 is 'null'"):
        load(saved, slots=(*SLOTS, SLOTS[0]))
    with pytest.raises(ArtifactError, match=r"slot 3 is .*window.*4.*expected.*5"):
        load(saved, slots=(*SLOTS[:3], CacheSlot(5, 2, 3, 2, window=5)))


Change = Callable[[dict[str, Any]], object]
CHANGES: dict[str, tuple[Change, str]] = {
    "shape": (lambda h: h["keys.0"].update(shape=[5, 7, 3]), r"keys\.0 is .*5,7,3.*expected .*3,7,5"),
    "a 1 that is true": (lambda h: h["keys.1"].update(shape=[True, 7, 8]), r"keys\.1 is .*true,7,8"),
    "a 1 that is a float": (lambda h: h["keys.1"].update(shape=[1.0, 7, 8]), r"keys\.1 is .*1\.0,7,8"),
    "dtype": (lambda h: h["values.0"].update(dtype="I32"), r"values\.0 is .*I32.*expected .*F32"),
    "offsets": (lambda h: h["values.0"].update(data_offsets=[0, 252]), r"values\.0 is"),
    "a field more": (lambda h: h["values.0"].update(more=1), r"values\.0 is"),
    "a tensor less": (lambda h: h.pop("keys.2"), r"keys\.2 is 'null'"),
    "a tensor more": (
        lambda h: h.update(more={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}),
        "'more' does not belong there",
    ),
    "another order": (lambda h: h.update({"keys.0": h.pop("keys.0")}), "not spelled as it is written"),
    "a key of metadata more": (lambda h: h["__metadata__"].update(more=""), "__metadata__ is"),
    "no tokens": (lambda h: h.pop("tokens"), "tokens has the shape"),
    "tokens that are no entry": (lambda h: h.update(tokens=[7]), "tokens has the shape"),
    "zero tokens": (lambda h: h["tokens"].update(shape=[0]), r"tokens has the shape '\[0\]'"),
    "true tokens": (lambda h: h["tokens"].update(shape=[True]), "tokens has the shape"),
    "tokens of rank 2": (lambda h: h["tokens"].update(shape=[1, 7]), "tokens has the shape"),
    "more tokens than bytes": (lambda h: h["tokens"].update(shape=[1 << 62]), "tokens has the shape"),
    "one token more": (lambda h: h["tokens"].update(shape=[8]), "tokens is"),
    "no digest": (lambda h: h["__metadata__"].update(sha257=h["__metadata__"].pop("sha256")), "__metadata__ is"),
    "version": (lambda h: h["__metadata__"].update(version="2"), "has version '2', this is 1"),
    "no version": (lambda h: h["__metadata__"].pop("version"), "has version 'None'"),
    "another format": (lambda h: h["__metadata__"].update(format="pt"), "is no prompt cache"),
    "no metadata": (lambda h: h.pop("__metadata__"), "is no prompt cache"),
    "metadata that is a list": (lambda h: h.update(__metadata__=[]), "is no prompt cache"),
    "slots that are no text": (lambda h: h["__metadata__"].update(slots=[]), "holds other slots"),
    "slots that are no JSON": (lambda h: h["__metadata__"].update(slots="[" * 100_000), "slot 0 is 'null'"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_header_that_is_not_the_one_written_is_refused(
    monkeypatch: pytest.MonkeyPatch, saved: Path, change: Change, message: str
) -> None:
    header, data = parts(saved)
    forge(saved, header, data)
    load(saved)  # unchanged, what is forged is accepted
    change(header)
    forge(saved, header, data)
    monkeypatch.setattr(prompt_cache, "KVCache", None)  # refused before any cache is made
    with pytest.raises(ArtifactError, match=message):
        load(saved)


def test_a_header_that_is_no_object_is_refused(saved: Path) -> None:
    _, data = parts(saved)
    for text in (b"", b"[]", b"null", b"{", b'{"a":1', b"\xff\xfe", b"[" * 100_000, b"1" * 10_000):
        saved.write_bytes(len(text).to_bytes(8, "little") + text + data)
        with pytest.raises(ArtifactError, match="is no prompt cache"):
            load(saved)
    raw = len(text).to_bytes(8, "little")
    for content in (b"", raw[:7], (1 << 63).to_bytes(8, "little") + b"{}"):
        saved.write_bytes(content)
        with pytest.raises(ArtifactError, match="is no prompt cache"):
            load(saved)


def test_a_huge_header_is_refused_unread(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    monkeypatch.setattr(prompt_cache_header, "MAX_HEADER_BYTES", 100)
    with pytest.raises(ArtifactError, match="is no prompt cache, or one cut off in its header"):
        load(saved)


def test_a_name_twice_is_refused(saved: Path) -> None:
    header, data = parts(saved)
    text = json.dumps(header, separators=(",", ":"))
    text = text[:-1] + ',"values.3":' + json.dumps(header["values.3"], separators=(",", ":")) + "}"
    saved.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data)
    with pytest.raises(ArtifactError, match="not spelled as it is written"):
        load(saved)


def test_cut_off_and_longer_files_are_refused_before_a_cache_is_made(
    monkeypatch: pytest.MonkeyPatch, saved: Path
) -> None:
    monkeypatch.setattr(prompt_cache, "KVCache", None)
    raw = saved.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    for end in range(0, begin, 61):
        saved.write_bytes(raw[:end])
        with pytest.raises(ArtifactError, match="is no prompt cache"):
            load(saved)
    for content in (raw[:begin], raw[: begin + 60], raw[:-1], raw + b"\0", raw + raw):
        saved.write_bytes(content)
        with pytest.raises((TamperedError, ArtifactError), match=r"header describes|tokens has the shape"):
            load(saved)


def test_a_file_that_shrinks_while_it_is_read_is_refused(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    def shrinking(*arguments: Any, **options: Any) -> KVCache:
        os.truncate(saved, saved.stat().st_size - 1)
        return KVCache(*arguments, **options)

    # More than a reader's buffer, so that the end is not in memory already.
    slots = (CacheSlot(0, 1, 4096, 4096),)
    save_prompt_cache(saved, *computed(64, slots), IDENTITY)
    monkeypatch.setattr(prompt_cache, "KVCache", shrinking)
    with pytest.raises(TamperedError, match="became shorter"):
        load(saved, slots=slots)


def test_any_flipped_bit_is_noticed(saved: Path) -> None:
    raw = saved.read_bytes()
    random = np.random.default_rng(0)
    begin = 8 + int.from_bytes(raw[:8], "little")
    with saved.open("r+b", buffering=0) as stream:
        for index, byte in enumerate(raw):
            os.pwrite(stream.fileno(), bytes([byte ^ (1 << int(random.integers(8)))]), index)
            # The tokens are looked at before the digest is known.
            expected = (ArtifactError, TamperedError) if index < begin + 8 * 7 else TamperedError
            with pytest.raises(expected):
                load(saved)
            os.pwrite(stream.fileno(), bytes([byte]), index)
    load(saved)


@pytest.mark.parametrize("token", [-1, VOCAB, 1 << 40, -(1 << 63)])
def test_tokens_outside_the_vocabulary_are_refused_before_a_cache_is_made(
    monkeypatch: pytest.MonkeyPatch, saved: Path, token: int
) -> None:
    header, data = parts(saved)
    data[16:24] = token.to_bytes(8, "little", signed=True)
    forge(saved, header, data)
    monkeypatch.setattr(prompt_cache, "KVCache", None)
    with pytest.raises(ArtifactError, match=f"holds the token {token}, the vocabulary has {VOCAB}"):
        load(saved)


def test_the_largest_token_is_the_vocabularys_last(saved: Path) -> None:
    largest = int(load(saved)[1].max())
    load(saved, vocab=largest + 1)
    with pytest.raises(ArtifactError, match="the vocabulary has"):
        load(saved, vocab=largest)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "offset", "dtype"), [("keys.0", 4, np.float32), ("values.3", 0, np.float32), ("keys.2", 8, np.float16)]
)
def test_numbers_that_are_not_finite_are_refused(
    saved: Path, name: str, offset: int, dtype: type[np.floating], value: float
) -> None:
    header, data = parts(saved)
    end = header[name]["data_offsets"][1]
    row_bytes = {"keys.0": 20, "values.3": 8, "keys.2": 12}[name]
    at = end - row_bytes + offset  # in the last row of the last head
    raw = np.array(value, dtype).tobytes()
    data[at : at + len(raw)] = raw
    forge(saved, header, data)
    with pytest.raises(ArtifactError, match=f"{name} holds numbers that are not finite"):
        load(saved)


def test_integer_codes_may_be_any_bytes(saved: Path) -> None:
    header, data = parts(saved)
    for name in ("keys.1", "values.1"):
        begin, end = header[name]["data_offsets"]
        data[begin:end] = b"\xff" * (end - begin)
    forge(saved, header, data)
    assert (load(saved)[0].keys[1][:, :, :7] == -1).all()


def test_only_plain_files_are_read(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "link").symlink_to(saved)
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name, kind in (("link", "symbolic link"), ("directory", "directory"), ("fifo", "FIFO")):
        with pytest.raises(UnsafeError, match=f"is a {kind}, expected a plain file"):
            load(tmp_path / name)
    (tmp_path / "hard").hardlink_to(saved)
    with pytest.raises(UnsafeError, match="hard link"):
        load(saved)
    with pytest.raises(ArtifactError, match="there is no prompt cache"):
        load(tmp_path / "none")


def test_the_context_and_the_budget_are_the_caches(saved: Path) -> None:
    assert load(saved, limit=7)[0].limit == 7
    with pytest.raises(PromptError, match="7 tokens per row do not fit the model's context of 6"):
        load(saved, limit=6)
    with pytest.raises(MemoryLimitError):
        load(saved, budget_bytes=100)


def sequence(ids: np.ndarray, slots: tuple[CacheSlot, ...]) -> KVCache:
    """A row that has seen ``ids``: at position p, every byte is p's token plus p; rolling slots keep the last rows."""
    row = KVCache(slots, 1, len(ids) + 1)
    for slot, *buffers in zip(slots, row.keys, row.values, strict=True):
        held = slot.resident(len(ids))
        for buffer in buffers:
            buffer[0, :, :held] = (ids + np.arange(len(ids)))[len(ids) - held :, None]
    row.lengths[0] = len(ids)
    return row


def in_use(row: KVCache) -> list[np.ndarray]:
    tokens = int(row.lengths[0])
    pairs = zip(row.slots, row.keys, row.values, strict=True)
    return [buffer[:, :, : slot.resident(tokens)] for slot, *buffers in pairs for buffer in buffers]


@pytest.mark.parametrize(
    ("asked", "filled"),
    [
        ([], 0),
        ([3], 0),
        ([3, 1], 1),
        ([3, 2, 4], 1),
        ([2, 1, 4], 0),
        ([3, 1, 4, 0, 5, 9], 3),
        ([3, 1, 4, 1, 5], 4),
        ([3, 1, 4, 1, 6], 4),
        ([3, 1, 4, 1, 6, 5], 4),
        ([3, 1, 4, 1, 5, 9], 5),
        ([3, 1, 4, 1, 5, 9, 2], 5),
    ],
)
def test_what_two_prompts_have_in_common_is_filled(asked: list[int], filled: int) -> None:
    ids = np.array([3, 1, 4, 1, 5])
    prompt = PromptCache(sequence(ids, SLOTS), ids, IDENTITY)
    batch = KVCache(SLOTS, 2, 5)
    assert prompt.fill(batch.row(1), asked) == filled
    assert batch.lengths.tolist() == [0, filled]
    expected = sequence(ids[:filled], SLOTS)
    for one, two in zip(in_use(batch.row(1)), in_use(expected), strict=True):
        np.testing.assert_array_equal(one, two)
    assert not any(buffer[0].any() for buffer in (*batch.keys, *batch.values))
    grown = KVCache(SLOTS, 1, 0)
    assert prompt.fill(grown, np.array(asked, np.int32)) == filled and grown.capacity >= filled


@pytest.mark.parametrize("held", [19, 20, 21, 22, 36, 37, 38, 39, 60])
def test_a_prompt_cache_with_rolling_slots_fills_what_they_still_have(held: int) -> None:
    slots = (CacheSlot(0, 2, 4, 4), CacheSlot(1, 1, 2, 2, window=4), CacheSlot(2, 1, 2, 2, window=5))
    ids = np.arange(held)
    source = sequence(ids, slots)
    prompt = PromptCache(source, ids, IDENTITY)
    counts = []
    for common in range(held + 1):
        row = KVCache(slots, 1, held)
        expected = sequence(ids[:common], slots)
        # By its definition: every row that the shorter sequence holds stands where it should.
        possible = all(
            one.shape[2] <= two.shape[2] and (one == two[:, :, : one.shape[2]]).all()
            for one, two in zip(in_use(expected), in_use(source), strict=True)
        )
        filled = prompt.fill(row, [*ids[:common], 1000, 1000])
        assert filled == int(row.lengths[0]) == (common if possible else 0)
        counts.append(filled)
        if filled:
            for one, two in zip(in_use(row), in_use(expected), strict=True):
                np.testing.assert_array_equal(one, two)
        else:
            assert not any(buffer.any() for buffer in (*row.keys, *row.values))
    assert counts[-1] == held and (0 in counts[1:]) == (held > slots[1].rows)


def test_a_prompt_cache_refuses_what_does_not_belong_to_it() -> None:
    ids = np.array([3, 1, 4])
    row = sequence(ids, SLOTS)
    for bad in (ids[:2], ids.astype(np.float32), ids[None], np.zeros((), np.int64)):
        with pytest.raises(UsageError, match=r"one row and its tokens, got rows of \[3\] tokens"):
            PromptCache(row, bad, IDENTITY)
    for cache in (KVCache(SLOTS, 1, 0), row.fork(2)):
        with pytest.raises(UsageError, match="one row and its tokens"):
            PromptCache(cache, ids[: int(cache.lengths[0])], IDENTITY)
    prompt = PromptCache(row, ids, IDENTITY)
    with pytest.raises(UsageError, match="fills an empty row, this one holds 3 tokens"):
        prompt.fill(row.fork(1), ids)
    with pytest.raises(UsageError, match="belongs to one row, this cache has 2"):
        prompt.fill(KVCache(SLOTS, 2, 4), ids)
    with pytest.raises(UsageError, match="slots are not those of the prefix"):
        prompt.fill(KVCache(SLOTS[:2], 1, 4), ids)
    with pytest.raises(UsageError, match="tokens must be one row of integers"):
        prompt.fill(KVCache(SLOTS, 1, 4), [1.5])
