"""The sg tests of ``bench``: which texts are continued, in which turns, and what is reckoned from it."""

from __future__ import annotations

import csv
import io
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ryzen_compile.errors import UnsupportedError, UsageError
from ryzen_compile.runtime.compiled import CompiledModel
from ryzen_compile.runtime.generate import GenerationStats
from ryzen_compile.runtime.speculative.settings import Speculation
from ryzen_compile.runtime.speculative.stats import SpeculationStats
from ryzen_compile.validate.latency import Timing, Workload
from ryzen_compile.validate.speculation import Continuation, Continued, measure_speculation, spread_prompts
from ryzen_compile.validate.table import Row, render
from tests.runtime.torch_engine import TableEngine

PERIOD = 7
LOOKUP = Speculation(drafters=("lookup",), tokens=4, fixed=True)
PROMPTS = (np.arange(2)[:, None] + np.arange(20)) % PERIOD


def counting(**settings: Any) -> CompiledModel:
    """A model whose next token is one more, up to ``PERIOD`` and from the beginning."""
    table = np.zeros((PERIOD + 2, PERIOD + 2))
    table[np.arange(PERIOD), (np.arange(PERIOD) + 1) % PERIOD] = 1
    table[PERIOD:, 0] = 1
    return CompiledModel(TableEngine(table), **settings)


class Scripted:
    """In the place of a model: each kind takes the seconds it was given for each of its generations, and says so."""

    spec = SimpleNamespace(context=64)
    engine = SimpleNamespace(name="scripted")

    def __init__(self, seconds: dict[str, list[float]], steps: dict[str, int]) -> None:
        self.seconds, self.steps = {kind: iter(found) for kind, found in seconds.items()}, steps
        self.log: list[tuple[str, int]] = []

    def generate(self, prompt: np.ndarray, *, stats: GenerationStats, max_new_tokens: int, **given: Any) -> np.ndarray:
        kind = given["speculation"] or "plain"
        self.log.append((kind, int(prompt[0])))
        stats.decode_seconds, stats.decode_steps = next(self.seconds[kind]), self.steps[kind]
        if given["speculation"]:
            tokens, steps = max_new_tokens - 1, self.steps[kind]
            stats.speculation = SpeculationStats(tokens=tokens, steps=steps, drafts=2, drafted=8, accepted=6)
        text = [9] * max_new_tokens
        if kind == "other" and prompt[0] == 1:
            text[-1] = 8  # not the text of plain generation
        return np.array([[*prompt, *text]])


# --- prompts ----------------------------------------------------------------------------------------------------------
def test_prompts_are_spread_from_the_first_token_to_the_last() -> None:
    ids = list(range(100, 147))
    found = spread_prompts("text", lambda text: ids if text == "text" else [], count=4, length=5)
    assert found.dtype == np.int64 and found.shape == (4, 5)
    assert found[0].tolist() == ids[:5] and found[-1].tolist() == ids[-5:]
    assert (np.diff(found, axis=1) == 1).all()
    assert (found[1:, 0] > found[:-1, -1]).all(), "they do not overlap"


@pytest.mark.parametrize(("count", "length"), [(4, 5), (1, 20), (20, 1), (3, 6)])
def test_a_text_that_is_just_long_enough_is_read_whole(count: int, length: int) -> None:
    ids = list(range(count * length))
    assert spread_prompts("", lambda _: ids, count=count, length=length).ravel().tolist() == ids


def test_a_text_one_token_short_is_refused() -> None:
    with pytest.raises(UsageError, match=r"the text has 19 tokens, 20 are needed for 4 prompts of 5"):
        spread_prompts("", lambda _: [3] * 19, count=4, length=5)
    for count, length in ((0, 5), (4, 0)):
        with pytest.raises(UsageError, match="at least 1"):
            spread_prompts("", lambda _: [3] * 19, count=count, length=length)


# --- arithmetic -------------------------------------------------------------------------------------------------------
def test_turns_and_figures() -> None:
    prompts = np.array([[0, 5], [1, 5]])
    model = Scripted(
        {"plain": [99.0, 1.0, 3.0, 4.0, 4.0], "some": [99.0, 0.5, 0.5, 1.0, 1.0], "other": [99.0, 4.0, 4.0, 4.0, 4.0]},
        {"plain": 12, "some": 5, "other": 12},
    )
    kinds = {"some": {"speculation": "some"}, "other": {"speculation": "other"}}
    plain, some, other = measure_speculation(model, prompts, kinds, new=12, repeats=2)  # type: ignore[arg-type]
    turns = "".join(f"{kind[0]}{number}" for kind, number in model.log)
    assert turns == "p0s0o0" + "p0s0o0o1s1p1" + "o0s0p0p1s1o1", "once for warming up, then forwards and backwards"
    assert plain.timing == Timing("scripted", Continuation("tg", 12, 2), (2.0, 4.0)), "means of the prompts"
    assert plain.timing.rates == (6.0, 3.0) and some.timing.rates == (24.0, 12.0)
    assert (plain.times_plain, some.times_plain) == (1.0, 4.0) and other.times_plain == pytest.approx(3 / 4.5)
    assert (plain.tokens_per_step, some.tokens_per_step) == (1.0, 12 / 5)
    assert (some.stats.drafted, some.stats.accepted) == (32, 24), "of what was timed alone"
    assert [one.same_text for one in (plain, some, other)] == [2, 2, 1]
    assert [one.timing.workload.name for one in (plain, some, other)] == ["sg12", "sg12 +some", "sg12 +other"]
    assert some.record() == {
        "drafts": "some", "n_texts": 2, "same_text": 2, "times_plain": 4.0, "acceptance": 0.75, "tokens_per_step": 2.4,
    }  # fmt: skip
    assert plain.record()["drafts"] == "" and plain.record()["acceptance"] == 0
    assert some.to_text() == (
        "sg12 +some: 4.00 x plain, 75 % of 32 drafted tokens accepted, 2.40 tokens per step, the same text in 2 of 2"
    )


def test_why_nothing_was_drafted_is_said() -> None:
    timing = Timing("onnxruntime", Continuation("tg", 8, 4, "auto"), (1.0,))
    found = Continued(timing, SpeculationStats(idle="a reason"), 1.0, prompts=1, same_text=1, times_plain=0.995)
    assert found.to_text() == "sg8 +auto: 0.99 x plain, nothing drafted: a reason"


def test_its_rows_stand_beside_others() -> None:
    found = Continued(
        Timing("onnxruntime", Continuation("tg", 8, 4, "lookup"), (2.0,)),
        SpeculationStats(),
        1.5,
        1,
        1,
        times_plain=2.0,
    )
    rows = [
        Row("m", 1, 1, 2, Timing("onnxruntime", Workload("tg", 8), (4.0,))),
        Row("m", 1, 1, 2, found.timing, found.record()),
    ]
    first, second = csv.DictReader(io.StringIO(render(rows, "csv")))
    assert (first["test"], first["drafts"], first["times_plain"]) == ("tg8", "", "")
    assert (second["test"], second["drafts"], second["times_plain"]) == ("sg8 +lookup", "lookup", "2.0")
    assert "drafts" not in json.loads(render(rows, "json"))[0]
    assert render(rows).splitlines()[3].split("|")[6:8] == [" sg8 +lookup ", " 4.00 ± 0.00 "]
    with pytest.raises(UsageError, match="drafts"):
        render(rows, "json", extra={"drafts": "all"})


# --- a model ----------------------------------------------------------------------------------------------------------
def test_a_model_that_can_be_foreseen() -> None:
    plain, drafted = measure_speculation(counting(), PROMPTS, {"lookup": {"speculation": LOOKUP}}, new=20, repeats=3)
    assert len(drafted.timing.seconds) == 3 and all(seconds > 0 for seconds in drafted.timing.seconds)
    assert plain.tokens_per_step == 1 and plain.stats == SpeculationStats()
    # 20 tokens behind the first in drafts of 4 and one more each, for 2 prompts, 3 times.
    assert drafted.tokens_per_step == 5 and drafted.stats.steps == 4 * 2 * 3
    assert (drafted.stats.drafted, drafted.stats.acceptance_rate) == (4 * 4 * 2 * 3, 1.0)
    assert drafted.same_text == drafted.prompts == 2
    assert drafted.times_plain == drafted.timing.mean / plain.timing.mean


def test_a_models_own_config_neither_ends_the_text_nor_drafts_nor_draws() -> None:
    config = {"eos_token_id": 3, "prompt_lookup_num_tokens": 4, "do_sample": True, "temperature": 50.0}
    (plain,) = measure_speculation(counting(generation_config=config), PROMPTS, {}, new=20, repeats=1)
    assert plain.tokens_per_step == 1 and not plain.stats.drafts


def test_another_text_is_counted() -> None:
    def turned(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        return np.roll(scores, 1, axis=-1)

    kinds = {"lookup": {"speculation": LOOKUP}, "odd": {"speculation": LOOKUP, "logits_processor": [turned]}}
    found = measure_speculation(counting(), PROMPTS, kinds, new=9, repeats=1)
    assert [one.same_text for one in found] == [2, 2, 0]


def test_what_cannot_be_measured_is_refused_before_anything_runs() -> None:
    model = Scripted({}, {})
    for new, repeats, said in (
        (62, 1, "test sg62 needs 65 positions, the model has a context of 64"),
        (8, 0, "repeats"),
    ):
        with pytest.raises(UsageError, match=said):
            measure_speculation(model, np.zeros((1, 2), np.int64), {}, new=new, repeats=repeats)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least 1 token"):
        Continuation("tg", 0)
    exits = Speculation(drafters=("early_exit",), exit_layers=1)
    with pytest.raises(UnsupportedError, match="has no early exits"):
        measure_speculation(counting(), PROMPTS, {"early_exit": {"speculation": exits}}, new=4, repeats=1)
