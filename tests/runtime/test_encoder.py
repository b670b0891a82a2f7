"""Texts to vectors: order, padding, cuts, prompts, dimensions, codes, and who may call when."""

from __future__ import annotations

import multiprocessing
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ryzen_compile.errors import NumericalError, PromptError, UsageError
from ryzen_compile.numerics.embedding_codes import Int8Range
from ryzen_compile.runtime import batches
from ryzen_compile.runtime import encoder as module
from ryzen_compile.runtime.encoder import CompiledEncoder, EncodingStats
from ryzen_compile.runtime.tokenizer import Tokenizer
from ryzen_compile.spec import EncoderSettings, Pooling
from tests import model_directory
from tests.tiny_encoder import CONTEXT, HIDDEN, TorchEncoder, bert, tokenizer

TEXTS = ["the cat sat on the mat", "", "a", "dogs, running under trees!", "€ 🐈 漢字", "the big red dog " * 9, "a cat"]
# float32 rounding of a batch against a text alone: products of other shapes are summed in another order.
CLOSE = {"rtol": 0, "atol": 3e-6}


@pytest.fixture
def engine() -> TorchEncoder:
    return TorchEncoder(bert())


def compiled(engine: Any, settings: EncoderSettings | None = None, **more: Any) -> CompiledEncoder:
    return CompiledEncoder(engine, Tokenizer.from_transformers(tokenizer()), settings or EncoderSettings(), **more)


@pytest.fixture
def model(engine: TorchEncoder) -> Iterator[CompiledEncoder]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*longer than the 40 tokens")
        yield compiled(engine)


def expected(engine: TorchEncoder, text: str) -> np.ndarray:
    """One text alone, through transformers' own tokenizer."""
    batch = tokenizer()([text], truncation=True, max_length=CONTEXT, return_tensors="np")
    return engine.embed(batch["input_ids"].astype(np.int64), batch["attention_mask"].astype(np.int64))[0]


# --- vectors ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_each_vector_is_that_of_its_text_alone_in_the_given_order(
    model: CompiledEncoder, engine: TorchEncoder, batch_size: int
) -> None:
    wanted = np.stack([expected(engine, text) for text in TEXTS])
    assert np.abs(wanted[0] - wanted[3]).max() > 0.01  # else any order would do
    got = model.encode(TEXTS, batch_size=batch_size)
    assert got.shape == (len(TEXTS), HIDDEN) and got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, **CLOSE)


@pytest.mark.parametrize("pooling", [Pooling("cls"), Pooling("max", normalize=False), Pooling("last", normalize=False)])
def test_the_engine_pools(pooling: Pooling) -> None:
    engine = TorchEncoder(bert(), pooling)
    got = compiled(engine).encode(TEXTS[:4], batch_size=4)
    np.testing.assert_allclose(got, np.stack([expected(engine, text) for text in TEXTS[:4]]), rtol=1e-5, atol=3e-6)


def test_a_string_gives_one_vector_and_nothing_gives_none(model: CompiledEncoder) -> None:
    assert model.encode("a cat").shape == (HIDDEN,)
    np.testing.assert_allclose(model.encode("a cat"), model.encode(["a cat"])[0], **CLOSE)
    for precision, width, dtype in (("float32", 10, np.float32), ("int8", 10, np.int8), ("binary", 2, np.uint8)):
        none = model.encode([], dims=10, precision=precision)  # type: ignore[arg-type]
        assert none.shape == (0, width) and none.dtype == dtype


def test_texts_may_come_as_any_iterable(model: CompiledEncoder) -> None:
    wanted = model.encode(["a cat", "the dog"])
    for texts in (("a cat", "the dog"), np.array(["a cat", "the dog"]), iter(["a cat", "the dog"])):
        np.testing.assert_array_equal(model.encode(texts), wanted)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (None, "got NoneType"),
        (b"a cat", "got bytes"),
        ({"a": "cat"}, "got dict"),
        (["a", 5], "text 1 is of type int"),
        ([["a", "b"]], "text 0 is of type list"),
        (["a", "\ud800"], "text 1 is not valid Unicode at character 0"),
    ],
)
def test_what_is_no_text_is_named(model: CompiledEncoder, texts: Any, said: str) -> None:
    with pytest.raises(PromptError, match=said):
        model.encode(texts)


def test_batches_hold_texts_of_one_length_and_no_more_than_their_tokens(
    model: CompiledEncoder, engine: TorchEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a", "a cat sat", "a", "a cat sat", "a cat sat on the mat"]
    stats = EncodingStats()
    model.encode(texts, batch_size=2, stats=stats)
    assert engine.shapes == [(2, 8), (2, 5), (1, 3)]
    assert stats == EncodingStats(5, 0, 8 + 5 + 5 + 3 + 3, 3 + 2, 3, stats.seconds)
    monkeypatch.setattr(batches, "BATCH_TOKENS", 6)
    engine.shapes.clear()
    model.encode(texts, batch_size=4)
    assert engine.shapes == [(1, 8), (1, 5), (1, 5), (2, 3)]


def test_many_texts_are_tokenized_a_window_at_a_time(
    model: CompiledEncoder, engine: TorchEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = model.encode(TEXTS)
    monkeypatch.setattr(module, "WINDOW", 3)
    engine.shapes.clear()
    np.testing.assert_allclose(model.encode(TEXTS), wanted, **CLOSE)
    assert [shape[0] for shape in engine.shapes] == [3, 3, 1]


def test_a_text_of_no_tokens_has_the_zero_vector(engine: TorchEncoder) -> None:
    plain = Tokenizer.from_transformers(model_directory.tokenizer())  # puts nothing around a text
    assert plain.encode("") == []
    encoder = CompiledEncoder(_Vocab(engine), plain, EncoderSettings())
    got = encoder.encode(["", "a", ""])
    assert not got[[0, 2]].any() and got[1].any()
    assert not encoder.encode("").any() and not encoder.encode([""], precision="binary").any()
    ranges = Int8Range(np.full(HIDDEN, 0.5), np.full(HIDDEN, 0.01))
    coded = CompiledEncoder(_Vocab(engine), plain, EncoderSettings(), int8=ranges).encode([""], precision="int8")
    np.testing.assert_array_equal(coded, np.full((1, HIDDEN), -50, np.int8))


class _Vocab:
    """The engine, for ids of a larger vocabulary than its model's."""

    def __init__(self, engine: TorchEncoder) -> None:
        self.engine, self.spec, self.name = engine, engine.spec, "torch"

    def embed(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return self.engine.embed(tokens % self.spec.vocab, mask)

    def close(self) -> None: ...


def test_a_vector_that_is_not_finite_is_named(model: CompiledEncoder, engine: TorchEncoder) -> None:
    with np.errstate(all="ignore"):
        engine.model.get_input_embeddings().weight.data[tokenizer().convert_tokens_to_ids("the")] = np.nan
        with pytest.raises(NumericalError, match="vector of text 2 is not finite"):
            model.encode(["a cat", "a dog", "the"], batch_size=1)


# --- cuts -------------------------------------------------------------------------------------------------------------
def test_long_texts_are_cut_and_that_is_said(engine: TorchEncoder) -> None:
    encoder = compiled(engine, EncoderSettings(context=7))
    assert encoder.context == 7
    long = "a cat sat on the mat and ran"
    with pytest.warns(UserWarning, match=r"1 of 2 text\(s\) are longer than the 7 tokens"):
        got = encoder.encode([long, "a cat sat on the"])  # the second has exactly 7
    np.testing.assert_allclose(got[0], got[1], **CLOSE)
    stats = EncodingStats()
    encoder.encode([long, "a"], stats=stats)  # who counts is not warned
    assert (stats.texts, stats.truncated, stats.tokens) == (2, 1, 7 + 3)


def test_a_context_beyond_the_models_is_the_models(engine: TorchEncoder) -> None:
    assert compiled(engine, EncoderSettings(context=1000)).context == CONTEXT


@pytest.mark.parametrize("unit", ["the cat ", "ab", "x" * 30 + " ", " ", "a\n\n", "🐈"])
def test_a_huge_text_is_what_its_whole_beginning_is(unit: str) -> None:
    ours = Tokenizer.from_transformers(tokenizer())
    text = unit * (200_000 // len(unit))
    wanted = tokenizer()(text, truncation=True, max_length=CONTEXT)["input_ids"]
    (ids, cut), (short, uncut) = ours.encode_batch([text, "a"], CONTEXT)
    assert ids.tolist() == wanted and cut == (len(tokenizer()(text)["input_ids"]) > CONTEXT)
    assert short.tolist() == [2, tokenizer().convert_tokens_to_ids("a"), 3] and not uncut


def test_a_tokenizer_that_keeps_the_end_reads_all_of_a_text() -> None:
    last = Tokenizer.from_transformers(tokenizer())
    last = Tokenizer(last._backend, {"truncation_side": "left"})
    ((ids, cut),) = last.encode_batch(["a " * 5000 + "cat"], 5)
    assert cut and ids.tolist() == [2, *tokenizer().convert_tokens_to_ids(["a", "a", "cat"]), 3]


def test_a_context_of_special_tokens_alone_is_refused() -> None:
    with pytest.raises(PromptError, match="2 tokens leave no room beside 2 special ones"):
        Tokenizer.from_transformers(tokenizer()).encode_batch(["a"], 2)


def test_lower_case_is_a_step_of_the_tokenizer() -> None:
    lowering = Tokenizer.from_transformers(tokenizer(), lower_case=True)
    assert lowering.encode("The CAT") == lowering.encode("the cat") == tokenizer()("the cat")["input_ids"]
    assert tokenizer()("The CAT")["input_ids"] != tokenizer()("the cat")["input_ids"]


# --- prompts ----------------------------------------------------------------------------------------------------------
def test_prompts_are_put_before_the_texts(engine: TorchEncoder) -> None:
    prompts = {"query": "the big ", "passage": "a ", "empty": ""}
    encoder = compiled(engine, EncoderSettings(prompts=prompts, default_prompt="passage"))

    def is_that_of(got: np.ndarray, text: str) -> None:
        np.testing.assert_allclose(got, expected(engine, text), **CLOSE)

    is_that_of(encoder.encode("dog"), "a dog")
    is_that_of(encoder.encode("dog", prompt_name="query"), "the big dog")
    is_that_of(encoder.encode("dog", prompt_name="empty"), "dog")
    is_that_of(encoder.encode("dog", prompt="blue "), "blue dog")
    is_that_of(encoder.encode("dog", prompt=""), "dog")
    is_that_of(encoder.encode_query("dog"), "the big dog")
    is_that_of(encoder.encode_document("dog"), "a dog")
    is_that_of(encoder.encode_document("dog", prompt=""), "dog")
    with pytest.raises(PromptError, match="no prompt 'other'; its prompts: 'query', 'passage', 'empty'"):
        encoder.encode("dog", prompt_name="other")
    with pytest.raises(PromptError, match="both given"):
        encoder.encode("dog", prompt="a", prompt_name="query")
    with pytest.raises(PromptError, match="prompt must be a str, got int"):
        encoder.encode("dog", prompt=5)  # type: ignore[arg-type]


def test_a_model_without_prompts_encodes_queries_plainly(model: CompiledEncoder) -> None:
    np.testing.assert_array_equal(model.encode_query("a cat"), model.encode("a cat"))
    np.testing.assert_array_equal(model.encode_document(["a cat"], dims=3), model.encode(["a cat"], dims=3))


# --- dimensions and codes ---------------------------------------------------------------------------------------------
def test_fewer_dimensions_are_a_prefix_of_length_one(model: CompiledEncoder) -> None:
    whole, short = model.encode(TEXTS), model.encode(TEXTS, dims=7)
    wanted = whole[:, :7] / np.linalg.norm(whole[:, :7], axis=1, keepdims=True)
    np.testing.assert_allclose(short, wanted, **CLOSE)
    assert model.dims == HIDDEN
    np.testing.assert_array_equal(model.encode(TEXTS, dims=HIDDEN), whole)


def test_a_model_may_keep_fewer_dimensions_by_itself(engine: TorchEncoder) -> None:
    encoder = compiled(engine, EncoderSettings(dims=5))
    assert encoder.dims == 5 and encoder.encode("a").shape == (5,)
    assert encoder.encode("a", dims=HIDDEN).shape == (HIDDEN,)
    with pytest.raises(UsageError, match="24 dimensions, its settings keep 25"):
        compiled(engine, EncoderSettings(dims=25))


@pytest.mark.parametrize("dims", [0, -1, HIDDEN + 1, True, 2.5])
def test_dimensions_out_of_range(model: CompiledEncoder, dims: Any) -> None:
    with pytest.raises(PromptError, match="dims"):
        model.encode("a", dims=dims)


@pytest.mark.parametrize("batch_size", [0, -3, 1.5, None])
def test_batch_sizes_out_of_range(model: CompiledEncoder, batch_size: Any) -> None:
    with pytest.raises(PromptError, match="batch_size must be a number of at least 1"):
        model.encode("a", batch_size=batch_size)


def test_an_unknown_precision_is_refused(model: CompiledEncoder) -> None:
    with pytest.raises(PromptError, match="no precision 'int4'; use one of float32, int8, binary"):
        model.encode("a", precision="int4")  # type: ignore[arg-type]


@pytest.mark.parametrize("calibrated", [True, False])
def test_int8_codes_decode_to_within_half_a_step(
    model: CompiledEncoder, engine: TorchEncoder, calibrated: bool
) -> None:
    vectors = model.encode(TEXTS)
    encoder = compiled(engine, int8=Int8Range.fit(vectors) if calibrated else None)
    assert encoder.calibrated is calibrated
    codes = encoder.encode(TEXTS, precision="int8", stats=EncodingStats())
    step = encoder.int8_range.step
    assert codes.dtype == np.int8 and codes.shape == vectors.shape
    assert step.max() < 1 / 127 if calibrated else (step == np.float32(1 / 127)).all()
    raw = codes * step + encoder.int8_range.middle
    assert (np.abs(raw - vectors) <= step / 2 + 1e-5).all()
    decoded = encoder.decode(codes)
    np.testing.assert_allclose(np.linalg.norm(decoded, axis=1), 1, atol=1e-6)
    # Half a step in each dimension, and what normalizing adds: of a vector of length 1.
    assert (np.linalg.norm(decoded - vectors, axis=1) <= np.sqrt(HIDDEN) * step.max() + 1e-5).all()


def test_int8_codes_of_fewer_dimensions_are_the_first_of_all(model: CompiledEncoder, engine: TorchEncoder) -> None:
    encoder = compiled(engine, int8=Int8Range.fit(model.encode(TEXTS)))
    stats = EncodingStats()
    whole, short = (encoder.encode(TEXTS, precision="int8", dims=dims, stats=stats) for dims in (None, 9))
    np.testing.assert_array_equal(short, whole[:, :9])
    vectors = model.encode(TEXTS, dims=9)
    cosines = (encoder.decode(short, dims=9) * vectors).sum(axis=1)
    assert cosines.min() > 0.999  # an eighth of a percent of the range, in each of nine dimensions


def test_int8_of_a_model_without_ranges_or_length_is_refused() -> None:
    encoder = compiled(TorchEncoder(bert(), Pooling("mean", normalize=False)))
    with pytest.raises(UsageError, match="no int8 ranges"):
        encoder.encode("a", precision="int8")
    with pytest.raises(UsageError, match="24 dimensions, its int8 ranges 3"):
        compiled(encoder.engine, int8=Int8Range(np.zeros(3), np.ones(3)))


@pytest.mark.parametrize("dims", [None, 9])
def test_binary_codes_are_signs(model: CompiledEncoder, dims: int | None) -> None:
    vectors = model.encode(TEXTS, dims=dims)
    packed = model.encode(TEXTS, dims=dims, precision="binary")
    assert packed.dtype == np.uint8 and packed.shape == (len(TEXTS), -(-vectors.shape[1] // 8))
    np.testing.assert_array_equal(packed, np.packbits(vectors > 0, axis=1))
    decoded = model.decode(packed, dims=dims)
    np.testing.assert_array_equal(np.sign(decoded), np.where(vectors > 0, 1, -1))
    np.testing.assert_allclose(np.linalg.norm(decoded, axis=1), 1, atol=1e-6)


def test_normalize_is_for_models_that_do_not() -> None:
    encoder = compiled(TorchEncoder(bert(), Pooling("mean", normalize=False)))
    raw, unit = encoder.encode(TEXTS[:4]), encoder.encode(TEXTS[:4], normalize=True)
    assert np.linalg.norm(raw, axis=1).max() > 1.5
    np.testing.assert_allclose(unit, raw / np.linalg.norm(raw, axis=1, keepdims=True), **CLOSE)


# --- similarity -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("measure", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity_is_the_models_own(engine: TorchEncoder, measure: Any) -> None:
    sentence_util = pytest.importorskip("sentence_transformers.util.similarity")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 5)).astype(np.float32), rng.normal(size=(4, 5)).astype(np.float32)
    encoder = compiled(engine, EncoderSettings(similarity=measure))
    wanted = sentence_util.SimilarityFunction.to_similarity_fn(measure)(a, b).numpy()
    got = encoder.similarity(a, b)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(encoder.similarity(a[0], b), got[:1], rtol=1e-6)
    with pytest.raises(UsageError, match="expected 5 dimensions, got 4"):
        encoder.similarity(a, b[:, :4])


def test_a_zero_vector_is_like_nothing(model: CompiledEncoder) -> None:
    assert model.similarity(np.zeros(3, np.float32), np.ones((2, 3), np.float32)).tolist() == [[0.0, 0.0]]


# --- who may call -----------------------------------------------------------------------------------------------------
def test_threads_get_what_they_would_alone(model: CompiledEncoder) -> None:
    lots = [TEXTS, TEXTS[::-1], [f"a cat {'and a dog ' * n}" for n in range(9)], ["a"]]
    alone = [model.encode(texts) for texts in lots]
    got: list[Any] = [None] * 8

    def call(number: int) -> None:
        got[number] = model.encode(lots[number % 4], stats=EncodingStats())

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, vectors in enumerate(got):
        np.testing.assert_array_equal(vectors, alone[number % 4])


def test_nothing_is_encoded_after_close(engine: TorchEncoder) -> None:
    with compiled(engine) as encoder:
        encoder.encode("a")
        assert not encoder.closed
    encoder.close()
    assert encoder.closed and engine.closed == 1
    with pytest.raises(UsageError, match="encode was called on a closed model"):
        encoder.encode("a")


def _encode_in_child(encoder: CompiledEncoder, said: Any) -> None:
    try:
        encoder.encode("a")
    except UsageError as error:
        said.send(str(error))


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_is_told(model: CompiledEncoder) -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_encode_in_child, args=(model, there))
    child.start()
    child.join(20)
    assert "encode was called in a forked process" in here.recv()


def test_a_model_without_a_saver_has_nothing_to_save(model: CompiledEncoder, tmp_path: Any) -> None:
    with pytest.raises(UsageError, match="'torch' engine, has nothing to save"):
        model.save_pretrained(tmp_path)


def test_a_model_without_a_tokenizer_says_so(engine: TorchEncoder) -> None:
    with pytest.raises(UsageError, match="without a tokenizer"):
        CompiledEncoder(engine, None, EncoderSettings()).encode("a")


def test_progress_is_shown_on_stderr_when_asked_for(model: CompiledEncoder, capsys: pytest.CaptureFixture[str]) -> None:
    model.encode(TEXTS)
    assert capsys.readouterr() == ("", "")
    model.encode(TEXTS, show_progress=True)
    assert capsys.readouterr().out == ""
