"""Generation with drafts is the generation without: the same text, or the same distribution, whoever drafts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from ryzen_compile.errors import NumericalError, PromptError, UnsupportedError
from ryzen_compile.numerics.row_shift import RowShift
from ryzen_compile.numerics.rows import RowFormat
from ryzen_compile.runtime.generate import GenerationStats, generate
from ryzen_compile.runtime.pool import CachePool
from ryzen_compile.runtime.speculative import verifier
from ryzen_compile.runtime.speculative.drafter import Draft, Drafter
from ryzen_compile.runtime.speculative.lookup import PromptLookup
from ryzen_compile.runtime.speculative.model_drafter import ModelDrafter
from ryzen_compile.runtime.speculative.speculator import Experience
from ryzen_compile.runtime.speculative.suffix import Corpus, SuffixDrafter
from ryzen_compile.runtime.stream import Stream
from ryzen_compile.spec import CacheSlot
from tests.runtime.speculative.scripted import Drawing, Random, Replay, Scripted, drafted, speculator
from tests.runtime.test_sampling import chi_square_p
from tests.runtime.torch_engine import VOCAB, TableEngine, TorchEngine, tiny_llama, tiny_tokenizer

PROMPT = [1, 11, 40, 7, 63, 22, 11, 40]
NEW = 30
LENGTHS = (1, 2, 4, 8, 16)
MINE = ["lookup", "suffix", "corpus", "draft model", "right", "wrong", "random", "three of four", "all of them"]


@cache
def engine() -> TorchEngine:
    return TorchEngine(tiny_llama())


@cache
def plain(**arguments: Any) -> np.ndarray:
    return np.asarray(generate(engine(), [PROMPT], max_new_tokens=NEW, **arguments)[0])


def drafters(name: str) -> list[Drafter]:
    text = plain()
    small = TorchEngine(tiny_llama(seed=1))
    made: dict[str, Callable[[], Drafter]] = {
        "lookup": lambda: PromptLookup(least_ngram=1),
        "suffix": lambda: SuffixDrafter(None),
        "corpus": lambda: SuffixDrafter(Corpus([text[5:20].tolist(), text[18:].tolist()])),
        "draft model": lambda: ModelDrafter.draft_model(small, CachePool(small.slots, limit=small.spec.context)),
        "right": lambda: Replay(text, VOCAB),
        "wrong": lambda: Replay(text, VOCAB, right=0),
        "random": lambda: Random(VOCAB),
        "three of four": lambda: Replay(text, VOCAB, right=0.75),
    }
    return [make() for make in made.values()] if name == "all of them" else [made[name]()]


# Greedy: the same tokens


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("name", MINE)
def test_greedy_text_is_what_it_is_without_drafts(name: str, tokens: int) -> None:
    ids, stats = drafted(engine(), PROMPT, drafters(name), tokens, max_new_tokens=NEW)
    assert np.array_equal(ids, plain())
    found = stats.speculation
    assert found is not None and found.tokens == NEW - 1 == stats.decode_tokens and found.steps == stats.decode_steps
    assert sum(found.lengths.values()) == found.drafts and not found.dropped
    assert sum(length * count for length, count in found.lengths.items()) == found.accepted


@pytest.mark.parametrize("tokens", LENGTHS)
def test_a_drafter_that_is_right_saves_every_step_but_one_in_so_many(tokens: int) -> None:
    _, stats = drafted(engine(), PROMPT, [Replay(plain(), VOCAB)], tokens, max_new_tokens=NEW)
    assert stats.decode_steps == -(-(NEW - 1) // (tokens + 1))
    assert stats.speculation is not None and stats.speculation.acceptance_rate == 1
    _, stats = drafted(engine(), PROMPT, [Replay(plain(), VOCAB, right=0)], tokens, max_new_tokens=NEW)
    assert stats.decode_steps == NEW - 1 and stats.speculation is not None and stats.speculation.accepted == 0


def test_settings_that_act_on_greedy_text_act_on_verified_text() -> None:
    for arguments in ({"repetition_penalty": 1.3}, {"eos_token_id": int(plain()[20]), "min_new_tokens": 18}):
        wanted = generate(engine(), [PROMPT], max_new_tokens=NEW, **arguments)[0]
        for drafter in (Replay(wanted, VOCAB), Replay(wanted, VOCAB, right=0.5), PromptLookup(least_ngram=1)):
            ids, _ = drafted(engine(), PROMPT, [drafter], 5, max_new_tokens=NEW, **arguments)
            assert np.array_equal(ids, wanted)


def test_an_eos_inside_a_draft_ends_the_text_there() -> None:
    text = plain()
    place = next(i for i in range(len(PROMPT) + 6, len(text)) if text[i] not in text[:i])
    ids, stats = drafted(engine(), PROMPT, [Replay(text, VOCAB)], 16, max_new_tokens=NEW, eos_token_id=int(text[place]))
    assert np.array_equal(ids, text[: place + 1])
    assert stats.speculation is not None and stats.speculation.accepted == stats.speculation.tokens  # the EOS, too


def test_stop_strings_criteria_processors_and_streamers_see_one_token_after_another() -> None:
    seen: list[int] = []

    class Streamer:
        def put(self, value: Any) -> None:
            seen.extend(np.asarray(value).reshape(-1).tolist())

        def end(self) -> None:
            seen.append(-1)

    lengths: list[int] = []

    def stops(ids: Any, scores: Any) -> bool:
        lengths.append(ids.shape[1])
        return bool(ids.shape[1] == len(PROMPT) + 11)

    def processor(ids: Any, scores: Any) -> Any:
        assert ids.shape[1] == len(PROMPT) + len(lengths)
        return scores

    ids, _ = drafted(
        engine(),
        PROMPT,
        [Replay(plain(), VOCAB)],
        4,
        max_new_tokens=NEW,
        streamer=Streamer(),
        stopping_criteria=[stops],
        logits_processor=[processor],
    )
    assert np.array_equal(ids, plain()[: len(PROMPT) + 11]) and seen == [*ids.tolist(), -1]
    assert lengths == list(range(len(PROMPT) + 1, len(PROMPT) + 12))
    tokenizer = tiny_tokenizer()
    stop = tokenizer.decode(plain()[len(PROMPT) + 4 : len(PROMPT) + 6].tolist())
    wanted = generate(engine(), [PROMPT], max_new_tokens=NEW, stop_strings=stop, tokenizer=tokenizer)[0]
    ids, _ = drafted(
        engine(), PROMPT, [Replay(plain(), VOCAB)], 8, max_new_tokens=NEW, stop_strings=stop, tokenizer=tokenizer
    )
    assert np.array_equal(ids, wanted) and len(ids) < len(plain())


@pytest.mark.parametrize("new", [1, 2, 3, 17])
def test_the_limit_holds_whatever_is_drafted(new: int) -> None:
    ids, stats = drafted(engine(), PROMPT, [Replay(plain(), VOCAB)], 16, max_new_tokens=new)
    assert np.array_equal(ids, plain()[: len(PROMPT) + new]) and stats.new_tokens == new


def test_the_context_is_filled_to_its_end() -> None:
    room = engine().spec.context - len(PROMPT)
    wanted = generate(engine(), [PROMPT], max_new_tokens=room)[0]
    ids, _ = drafted(engine(), PROMPT, [Replay(wanted, VOCAB)], 16, max_new_tokens=room)
    assert np.array_equal(ids, wanted) and len(ids) == engine().spec.context


def test_left_padding_is_no_context() -> None:
    seen = Replay(plain(), VOCAB)
    padded = [[0, 0, 0, *PROMPT]]
    ids = generate(
        engine(),
        padded,
        [[0, 0, 0, *[1] * len(PROMPT)]],
        max_new_tokens=NEW,
        speculator=speculator([seen], VOCAB, 3),
    )[0]
    assert np.array_equal(ids[3:], plain()) and seen.contexts[0] == len(PROMPT) + 1
    assert seen.begun == seen.ended == 1


# Sampling: the same text where drafts are certain, the same distribution where they are drawn


@pytest.mark.parametrize("name", [name for name in MINE if name not in ("draft model", "all of them")])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}])
def test_a_seeds_text_is_what_it_is_without_drafts(name: str, sampling: dict[str, Any]) -> None:
    arguments = {"do_sample": True, "seed": 7, "max_new_tokens": NEW, **sampling}
    wanted = generate(engine(), [PROMPT], **arguments)[0]
    ids, _ = drafted(engine(), PROMPT, drafters(name), 4, **arguments)
    assert np.array_equal(ids, wanted)
    right, stats = drafted(engine(), PROMPT, [Replay(wanted, VOCAB)], 4, **arguments)
    assert np.array_equal(right, wanted) and stats.speculation is not None and stats.speculation.acceptance_rate == 1


TOKENS = 16
DRAWS = 100_000
CONTROL = 10_000  # are enough to find a wrong rule out


def table(seed: int, zeros: int = 0) -> np.ndarray:
    """(V, V): the next token's probabilities by the last one."""
    generator = np.random.default_rng(seed)
    weights = generator.random((TOKENS, TOKENS)) ** 2 + 1e-3
    for row in weights:
        row[generator.choice(TOKENS, zeros, replace=False)] = 0
    return np.asarray(weights / weights.sum(1, keepdims=True))


def target(probabilities: np.ndarray) -> TableEngine:
    with np.errstate(divide="ignore"):
        logits = np.log(probabilities)
    return TableEngine(np.maximum(logits, -1e30), context=2 * DRAWS)


def neighbours(text: np.ndarray, probabilities: np.ndarray) -> float:
    """The least p-value of the rows, corrected for their number: each row's next tokens are draws from it."""
    pairs = np.zeros((TOKENS, TOKENS))
    np.add.at(pairs, (text[:-1], text[1:]), 1)
    assert not pairs[probabilities == 0].any()
    return TOKENS * min(
        chi_square_p(pairs[row], pairs[row].sum() * probabilities[row]) for row in range(TOKENS) if pairs[row].any()
    )


def sampled(engine: TableEngine, drafter: Drafter, tokens: int, new: int = DRAWS, **arguments: Any) -> np.ndarray:
    settings = {"do_sample": True, "top_k": 0, "seed": 3, "max_new_tokens": new, **arguments}
    ids, stats = drafted(engine, [0], [drafter], tokens, **settings)
    assert stats.speculation is not None and not stats.speculation.dropped
    return ids


CASES: dict[str, tuple[np.ndarray, np.ndarray, int, int]] = {  # target, draft, tokens of a draft, draws
    "far from the target": (table(0), table(1), 3, DRAWS),
    "the target itself": (table(0), table(0), 4, DRAWS // 4),
    "of other tokens": (table(2, zeros=9), table(3, zeros=9), 2, DRAWS // 4),
    "one-hot": (table(4), np.eye(TOKENS)[np.arange(TOKENS) - 5], 3, DRAWS // 4),
}


@pytest.mark.parametrize("name", CASES)
def test_drawn_drafts_leave_the_distribution(name: str) -> None:
    probabilities, proposal, tokens, draws = CASES[name]
    text = sampled(target(probabilities), Drawing(proposal), tokens, draws)
    assert neighbours(text, probabilities) > 1e-4
    # Two steps on, so that tokens of one draft are seen to be drawn from the right rows, too.
    two = probabilities @ probabilities
    thinned = text[: len(text) // 3 * 3].reshape(-1, 3)
    pairs = np.zeros((TOKENS, TOKENS))
    np.add.at(pairs, (thinned[:, 0], thinned[:, 2]), 1)
    assert TOKENS * min(chi_square_p(pairs[r], pairs[r].sum() * two[r]) for r in range(TOKENS)) > 1e-4


class Stopping(Drawing):
    """Stops behind a token that was improbable, as models that draft do."""

    def draft(self, context: np.ndarray, most: int) -> Draft | None:
        whole = super().draft(context, most)
        if whole is None or whole.proposals is None:
            return whole
        likely = [
            q[list(ids).index(token)] > 0.15 for token, (ids, q) in zip(whole.tokens, whole.proposals, strict=True)
        ]
        count = likely.index(False) + 1 if False in likely else most
        return Draft(whole.tokens[:count], whole.confidence, whole.proposals[:count])


def test_choosing_lengths_leaves_the_distribution() -> None:
    """Single drafted tokens do not pay, several do: to refuse the drafts of one token would favour the probable."""
    probabilities, proposal = table(0), 0.85 * table(0) + 0.15 * table(1)
    adaptive = speculator([Stopping(proposal)], TOKENS, 4, fixed=False, experience=certain({1: 1.0, 2: 2.1, 5: 2.15}))
    text = sampled(target(probabilities), Stopping(proposal), 4, DRAWS // 2, speculator=adaptive)
    assert neighbours(text, probabilities) > 1e-4
    assert adaptive.stats.drafts > DRAWS // 10


def warped(probabilities: np.ndarray, temperature: float, top_k: int) -> np.ndarray:
    powered = probabilities ** (1 / temperature)
    lowest = np.sort(powered, axis=1)[:, [-top_k]]
    powered[powered < lowest] = 0
    return np.asarray(powered / powered.sum(1, keepdims=True))


def test_warpers_act_on_both_sides() -> None:
    probabilities, small = table(0), target(table(1))
    expected = warped(probabilities, 0.8, 6)
    drafter = ModelDrafter.draft_model(small, CachePool(small.slots, limit=small.spec.context), threshold=0)
    text = sampled(target(probabilities), drafter, 3, new=DRAWS // 5, temperature=0.8, top_k=6)
    assert neighbours(text, expected) > 1e-4


def test_wrong_rules_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities, proposal, tokens, _ = CASES["far from the target"]

    def found() -> float:
        return neighbours(sampled(target(probabilities), Drawing(proposal), tokens, CONTROL), probabilities)

    assert found() > 1e-4
    with monkeypatch.context() as patch:
        patch.setattr(verifier, "acceptance", lambda *_: 1.0)
        assert found() < 1e-6
    with monkeypatch.context() as patch:
        patch.setattr(verifier, "residual", lambda ids, p, proposal: p)
        assert found() < 1e-6

    class OneOff(TableEngine):
        def step(self, tokens: np.ndarray, cache: Any, last: int = 1) -> np.ndarray:
            logits = super().step(tokens, cache, last)
            return np.roll(logits, 1, axis=1) if last > 1 else logits

    wrong = OneOff(np.log(probabilities), context=2 * DRAWS)
    assert neighbours(sampled(wrong, Drawing(proposal), tokens, CONTROL), probabilities) < 1e-6


# What cannot be drafted for, and what goes wrong


def test_several_sequences_are_refused_or_stepped_plainly() -> None:
    batch = [PROMPT, PROMPT[::-1]]
    wanted = generate(engine(), batch, max_new_tokens=9)
    with pytest.raises(PromptError, match="speculation takes one sequence at a time, got 2"):
        generate(engine(), batch, max_new_tokens=9, speculator=speculator([Random(VOCAB)], VOCAB, 4))
    stats = GenerationStats()
    relaxed = speculator([Random(VOCAB)], VOCAB, 4, required=False)
    assert np.array_equal(generate(engine(), batch, max_new_tokens=9, speculator=relaxed, stats=stats), wanted)
    assert stats.speculation is not None and "one sequence at a time" in stats.speculation.idle
    with pytest.raises(PromptError, match="got 3"):
        generate(
            engine(),
            [PROMPT],
            max_new_tokens=9,
            do_sample=True,
            num_return_sequences=3,
            speculator=speculator([Random(VOCAB)], VOCAB, 4),
        )


def test_an_engine_of_one_row_of_logits_cannot_verify() -> None:
    narrow = TorchEngine(tiny_llama(), all_logits=False)
    narrow.verifies = False
    with pytest.raises(UnsupportedError, match="drafts cannot be verified"):
        drafted(narrow, PROMPT, [Random(VOCAB)], 4, max_new_tokens=9)
    relaxed = speculator([Random(VOCAB)], VOCAB, 4, required=False)
    ids, stats = drafted(narrow, PROMPT, [], 4, max_new_tokens=NEW, speculator=relaxed)
    assert np.array_equal(ids, plain()) and stats.speculation is not None and stats.speculation.idle


def test_only_as_many_rows_of_logits_are_asked_for_as_are_needed() -> None:
    narrow = TorchEngine(tiny_llama(), all_logits=False)
    ids, _ = drafted(narrow, PROMPT, [Replay(plain(), VOCAB, right=0.8)], 5, max_new_tokens=NEW)
    assert np.array_equal(ids, plain())


class Failing(Scripted):
    """Raises in the method ``where``, or drafts ``nonsense``."""

    def __init__(self, where: str, nonsense: Any = None) -> None:
        super().__init__("failing")
        self.where, self.nonsense = where, nonsense

    def begin(self, *arguments: Any) -> None:
        super().begin(*arguments)
        self._at("begin")

    def draft(self, context: np.ndarray, most: int) -> Any:
        self._at("draft")
        return self.nonsense if self.nonsense is not None else super().draft(context, most)

    def guess(self, context: np.ndarray, place: int) -> int:
        return 5

    def observe(self, accepted: int) -> None:
        self._at("observe")

    def end(self) -> None:
        super().end()
        self._at("end")

    def _at(self, where: str) -> None:
        if where == self.where:
            raise RuntimeError(f"broken in {where}")


@pytest.mark.parametrize("where", ["begin", "draft", "observe", "end"])
def test_a_drafter_that_raises_is_dropped_with_one_warning_and_the_text_is_right(where: str) -> None:
    failing, other = Failing(where), Replay(plain(), VOCAB)
    with pytest.warns(UserWarning, match=f"drafter 'failing' failed .* RuntimeError: broken in {where}") as caught:
        ids, stats = drafted(engine(), PROMPT, [failing, other], 3, max_new_tokens=NEW)
    assert np.array_equal(ids, plain()) and len(caught) == 1
    assert stats.speculation is not None and stats.speculation.dropped == {
        "failing": f"RuntimeError: broken in {where}"
    }
    assert other.ended == failing.ended == 1
    if where != "end":
        assert stats.speculation.drafters["replay"].accepted > 0


HALF = (np.array([3, 5]), np.array([0.5, 0.5]))


@pytest.mark.parametrize(
    ("nonsense", "message"),
    [
        (Failing.__new__(Failing), "AttributeError"),
        ({"tokens": []}, "a draft needs token ids from 0 to 96, got \\[\\]"),
        ({"tokens": [3, VOCAB]}, "a draft needs token ids"),
        ({"tokens": [-1]}, "a draft needs token ids"),
        ({"tokens": [1.5]}, "TypeError"),
        ({"tokens": [3], "confidence": 8}, "confidence is from 0 to 7, got 8"),
        ({"tokens": [3, 5], "proposals": [HALF]}, "2 drafted tokens come with 1 proposals"),
        ({"tokens": [4], "proposals": [HALF]}, "token 4 was drafted with probability 0"),
        ({"tokens": [3], "proposals": [(HALF[0][::-1], HALF[1])]}, "no distribution over ascending ids"),
        ({"tokens": [3], "proposals": [(HALF[0], HALF[1] * 0.9)]}, "probabilities that sum to 0.9"),
        ({"tokens": [3], "proposals": [(HALF[0], np.array([np.nan, 0.5]))]}, "probabilities that sum to nan"),
        ({"tokens": [3], "proposals": [(HALF[0], np.array([1.5, -0.5]))]}, "probabilities"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_draft_drops_its_drafter(nonsense: Any, message: str) -> None:
    from types import SimpleNamespace

    if isinstance(nonsense, dict):
        nonsense = SimpleNamespace(**{"confidence": 1, "proposals": None, **nonsense})
    with pytest.warns(UserWarning, match=message):
        ids, _ = drafted(engine(), PROMPT, [Failing("", nonsense)], 3, max_new_tokens=NEW)
    assert np.array_equal(ids, plain())


def test_longer_drafts_than_asked_for_are_cut() -> None:
    class Eager(Replay):
        def draft(self, context: np.ndarray, most: int) -> Any:
            return super().draft(context, most + 9)

    ids, stats = drafted(engine(), PROMPT, [Eager(plain(), VOCAB)], 3, max_new_tokens=NEW)
    assert np.array_equal(ids, plain()) and stats.speculation is not None and max(stats.speculation.lengths) == 3


def test_the_targets_own_errors_are_not_the_drafters() -> None:
    class Sick(TorchEngine):
        def step(self, tokens: np.ndarray, cache: Any, last: int = 1) -> np.ndarray:
            logits = super().step(tokens, cache, last)
            if int(cache.lengths[0]) > len(PROMPT) + 3:
                logits[:] = np.nan
            return logits

    drafter = Replay(plain(), VOCAB)
    with pytest.raises(NumericalError, match="row 0 at step"):
        drafted(Sick(tiny_llama()), PROMPT, [drafter], 3, max_new_tokens=NEW)
    assert drafter.ended == 1


# Caches that forget


def test_a_stream_drops_what_it_would_without_drafts() -> None:
    shift = RowShift(RowFormat(), 1, np.empty(0))
    stream = Stream(9, 2, (shift,))
    wanted = generate(engine(), [PROMPT], max_new_tokens=150, stream=stream)[0]
    for drafter in (Replay(wanted, VOCAB), Replay(wanted, VOCAB, right=0.7), PromptLookup(least_ngram=1)):
        ids, stats = drafted(engine(), PROMPT, [drafter], 16, max_new_tokens=150, stream=stream)
        assert np.array_equal(ids, wanted)
        assert stats.decode_steps < 149 if isinstance(drafter, Replay) else True


def test_no_draft_makes_a_window_drop_rows() -> None:
    """The rows that a layer with a window holds say at every step that nothing was lost to a draft."""
    slot = CacheSlot(0, 1, 1, 1, window=8)

    class Windowed(TableEngine):
        slots = (slot,)

        def step(self, tokens: np.ndarray, cache: Any, last: int = 1) -> np.ndarray:
            held = int(cache.lengths[0])
            if last > 1:
                assert slot.resident(held + last) == slot.resident(held + 1) + last - 1
            return super().step(tokens, cache, last)

    probabilities = table(9)
    wanted = generate(Windowed(np.log(probabilities), context=400), [[0]], max_new_tokens=200)[0]
    ids, stats = drafted(
        Windowed(np.log(probabilities), context=400), [0], [Replay(wanted, TOKENS)], 16, max_new_tokens=200
    )
    assert np.array_equal(ids, wanted) and stats.decode_steps < 60


# Adapting


def certain(curve: dict[int, float]) -> Experience:
    """Steps cost what ``curve`` says, whatever they take here."""
    experience = Experience({10: curve})
    experience.cost.observe = lambda *_: None  # type: ignore[method-assign]
    return experience


def test_drafts_stop_where_they_are_never_right_and_are_tried_again_now_and_then() -> None:
    wrong = Replay(plain(), VOCAB, right=0)
    experience = certain({1: 1.0, 2: 1.2, 17: 4.0})
    adaptive = speculator([wrong], VOCAB, 8, fixed=False, experience=experience)
    room = engine().spec.context - len(PROMPT)
    wanted = generate(engine(), [PROMPT], max_new_tokens=room)[0]
    wrong.text = wanted
    ids, stats = drafted(engine(), PROMPT, [wrong], 8, max_new_tokens=room, speculator=adaptive)
    assert np.array_equal(ids, wanted)
    assert stats.speculation is not None and 1 <= stats.speculation.drafts <= 8
    assert len(wrong.contexts) < room // 2  # it is not even asked at every step


def test_drafts_grow_where_they_are_always_right() -> None:
    experience = certain({1: 1.0, 17: 1.2})
    for _ in range(3):
        adaptive = speculator([Replay(plain(), VOCAB)], VOCAB, 16, fixed=False, experience=experience)
        ids, stats = drafted(engine(), PROMPT, [], 16, max_new_tokens=NEW, speculator=adaptive)
        assert np.array_equal(ids, plain())
    assert stats.speculation is not None and stats.speculation.drafts == stats.decode_steps == 2


def test_the_cheapest_drafter_with_a_draft_wins() -> None:
    class Silent(Scripted):
        def draft(self, context: np.ndarray, most: int) -> None:
            self.contexts.append(len(context))

    silent, first, second = Silent("silent"), Replay(plain(), VOCAB), Random(VOCAB)
    _, stats = drafted(engine(), PROMPT, [silent, first, second], 4, max_new_tokens=NEW)
    assert stats.speculation is not None and set(stats.speculation.drafters) == {"silent", "replay"}
    assert silent.contexts and not second.contexts
