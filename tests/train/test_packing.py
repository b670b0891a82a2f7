"""Rows hold every token once as a target, and the order of rows is a function of the position alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ryzen_compile.errors import ConfigError, UsageError
from ryzen_compile.train import packing as module
from ryzen_compile.train.config import NewTokenizer
from ryzen_compile.train.packing import RowOrder, pack
from ryzen_compile.train.tokenizer import train_tokenizer

TEXTS = ["def one(two):\n    return two\n" * 9, "", "class Three:\n    one = 'é'\n" * 7, "the end, the end\n"]
TOKENIZER = train_tokenizer(TEXTS, NewTokenizer(vocab=300))


def example_rows(texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> Tensor:
    """The definition, written the short way."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        ids += encoding.ids
        ids.append(tokenizer.eos_token_id)
    rows = (len(ids) - 1) // length
    return torch.tensor(ids[: rows * length + 1]).unfold(0, length + 1, length)


# --- rows -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("length", [1, 2, 7, 64, 100])
@pytest.mark.parametrize("characters", [1 << 22, 300, 280])
def test_rows_are_the_examples(monkeypatch: pytest.MonkeyPatch, length: int, characters: int) -> None:
    """However many texts are tokenized at a time; 261 characters are in the longest."""
    monkeypatch.setattr(module, "CHARACTERS", characters)
    rows = pack(TEXTS, TOKENIZER, length)
    assert torch.equal(rows, example_rows(TEXTS, TOKENIZER, length))
    assert rows.dtype == torch.int64 and rows.stride() == (length, 1)
    assert torch.equal(rows[1:, 0], rows[:-1, -1])


def test_each_document_is_closed_by_one_end_token() -> None:
    rows = pack(TEXTS, TOKENIZER, 1)
    stream = torch.cat((rows[:1, 0], rows[:, 1]))
    assert (stream == TOKENIZER.eos_token_id).sum() == len(TEXTS) and stream[-1] == TOKENIZER.eos_token_id
    assert TOKENIZER.decode(stream) == "".join(text + TOKENIZER.eos_token for text in TEXTS)


@pytest.mark.parametrize("text", ["one two\n" * 40, "x" * 333, "a\n\n" * 50 + "b" * 100])
def test_a_long_text_is_tokenized_in_parts_and_stays_one_document(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(module, "CHARACTERS", 50)
    rows = pack([text, "last"], TOKENIZER, 1)
    stream = torch.cat((rows[:1, 0], rows[:, 1]))
    assert TOKENIZER.decode(stream) == f"{text}{TOKENIZER.eos_token}last{TOKENIZER.eos_token}"


def test_parts_of_lines_have_the_tokens_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pack(["one two\n" * 40], TOKENIZER, 3)
    monkeypatch.setattr(module, "CHARACTERS", 50)
    assert torch.equal(pack(["one two\n" * 40], TOKENIZER, 3), whole)


def test_what_a_stored_tokenizer_adds_or_cuts_does_not_count() -> None:
    """Special tokens around each text, truncation and padding: settings for prompts, not for a stream."""
    from tokenizers.processors import TemplateProcessing

    other = train_tokenizer(TEXTS, NewTokenizer(vocab=300))
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    other.backend_tokenizer.enable_truncation(4)
    other.backend_tokenizer.enable_padding(length=200)
    other.model_max_length = 4
    assert other("one two")["input_ids"] != TOKENIZER("one two")["input_ids"]
    assert torch.equal(pack(TEXTS, other, 7), pack(TEXTS, TOKENIZER, 7))


@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (10, 1), (19, 1), (20, 2), (39, 3), (10_000, None)])
def test_tokens_bound_the_rows(tokens: int, rows: int | None) -> None:
    whole = pack(TEXTS, TOKENIZER, 10)
    assert torch.equal(pack(TEXTS, TOKENIZER, 10, tokens=tokens), whole[:rows])


def test_texts_behind_the_bound_are_not_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHARACTERS", 50)
    seen: list[str] = []

    class Watching(PreTrainedTokenizerFast):
        def __call__(self, text: list[str], **options: object) -> object:
            seen.extend(text)
            return super().__call__(text, **options)

    watching = Watching(tokenizer_object=TOKENIZER.backend_tokenizer, eos_token="<|endoftext|>")
    pack(["one two three four " * 2] * 20, watching, 4, tokens=4)
    assert len(seen) == 1
    pack(["one two three four " * 2] * 20, watching, 4)
    assert len(seen) == 21


def test_too_little_text_is_refused() -> None:
    assert pack(["a", "b"], TOKENIZER, 3).tolist() == [
        [*TOKENIZER("a")["input_ids"], 0, *TOKENIZER("b")["input_ids"], 0]
    ]
    with pytest.raises(ConfigError, match=r"has 4 tokens, end tokens included, 5 are needed"):
        pack(["a", "b"], TOKENIZER, 4)
    with pytest.raises(ConfigError, match="has 0 tokens"):
        pack([], TOKENIZER, 4)
    with pytest.raises(UsageError, match="length"):
        pack(["a"], TOKENIZER, 0)


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer)
    with pytest.raises(ConfigError, match="no end token"):
        pack(TEXTS, endless, 4)


# --- order ------------------------------------------------------------------------------------------------------------
orders = st.builds(RowOrder, rows=st.integers(1, 50), seed=st.integers(0, (1 << 32) - 1))


@settings(max_examples=50, deadline=None)
@given(order=orders, epoch=st.integers(0, 1000))
def test_every_epoch_is_a_permutation(order: RowOrder, epoch: int) -> None:
    found = order.at(epoch * order.rows, order.rows)
    assert found.dtype == torch.int64
    assert found.sort().values.tolist() == list(range(order.rows))


@settings(max_examples=100, deadline=None)
@given(order=orders, position=st.integers(0, 500), counts=st.lists(st.integers(0, 120), max_size=6))
def test_any_cut_gives_the_same_sequence(order: RowOrder, position: int, counts: list[int]) -> None:
    """Batches of any size, entered anywhere, are parts of one sequence: what resuming and processes rely on."""
    whole = RowOrder(order.rows, order.seed).at(0, position + sum(counts))
    for count in counts:
        assert torch.equal(order.at(position, count), whole[position : position + count])
        position += count


def test_epochs_and_seeds_differ() -> None:
    seen = {tuple(RowOrder(30, seed).at(30 * epoch, 30).tolist()) for seed in range(20) for epoch in range(20)}
    assert len(seen) == 400


def test_places_are_drawn_evenly() -> None:
    """Each row is first in about one epoch of six: 6 standard deviations of a binomial over 6000 epochs."""
    first = torch.stack([RowOrder(6, 3).at(6 * epoch, 6) for epoch in range(6000)])
    for place in range(6):
        counts = first[:, place].bincount(minlength=6)
        assert (counts - 1000).abs().max() < 6 * (6000 * 5 / 36) ** 0.5


def test_the_sequence_is_the_same_in_another_process_and_version() -> None:
    order = RowOrder(7, 20)
    assert order.at(5, 12).tolist() == [1, 3, 3, 0, 5, 1, 4, 6, 2, 5, 3, 2]
    code = "from ryzen_compile.train.packing import RowOrder; print(RowOrder(7, 20).at(5, 12).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(order.at(5, 12).tolist())


def test_what_is_returned_may_be_written_to() -> None:
    order = RowOrder(5, 1)
    before = order.at(0, 5)
    order.at(0, 5).zero_()
    assert torch.equal(order.at(0, 5), before)


def test_epochs_are_passes() -> None:
    assert [RowOrder(8, 0).epoch(position) for position in (0, 4, 8, 20)] == [0.0, 0.5, 1.0, 2.5]


def test_what_makes_no_order_is_refused() -> None:
    for rows, seed in ((0, 0), (-1, 0), (1, -1)):
        with pytest.raises(UsageError, match="expected at least one row"):
            RowOrder(rows, seed)
    for position, count in ((-1, 1), (0, -1)):
        with pytest.raises(UsageError, match="position and count"):
            RowOrder(3, 0).at(position, count)
