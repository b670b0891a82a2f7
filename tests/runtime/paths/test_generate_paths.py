"""Paths over the slow, obviously right engine: each as it is alone, forks as a plain reimplementation has them."""

from __future__ import annotations

import threading
import time
from contextvars import Context, copy_context
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from ryzen_compile.errors import MemoryLimitError, PromptError, UsageError
from ryzen_compile.runtime.compiled import CompiledModel
from ryzen_compile.runtime.generate import generate
from ryzen_compile.runtime.paths.result import Path, PathsResult
from ryzen_compile.runtime.paths.scheduler import generate_paths
from ryzen_compile.runtime.paths.settings import Budget, path_seed
from ryzen_compile.runtime.paths.verdict import Verdict
from ryzen_compile.runtime.sampling import SamplingParams, distribution, draw, spawn_generators
from tests.runtime.torch_engine import BOS, TableEngine, TorchEngine, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPT = [BOS, 11, 40, 7, 63, 22, 9]
PROMPTS = [PROMPT, [BOS], [5, 80, 41, 9, 9, 9, 9, 20, 3, 61, 17]]
OFTEN = list(range(60, 66))  # ids that end a path now and then
SAMPLED = {"max_new_tokens": 12, "temperature": 1.3, "eos_token_id": OFTEN}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def engine(model: LlamaForCausalLM) -> TorchEngine:
    return TorchEngine(model)


def paths_of(engine: Any, prompt: list[int] | None = None, n: int = 3, **arguments: Any) -> PathsResult:
    (result,) = generate_paths(
        engine, [PROMPT if prompt is None else prompt], n, **{"tokenizer": TOKENIZER, "seed": 3, **arguments}
    )
    return result


def alone(engine: Any, prompt: list[int], path: Path, **arguments: Any) -> list[int]:
    """What ``generate`` gives of ``path``: of a forked one, behind what it has from its parent."""
    whole = [*prompt, *path.tokens[: path.branched_at]]
    limit = arguments["max_new_tokens"] - path.branched_at
    given = arguments | {"do_sample": True, "max_new_tokens": limit, "seed": path.seed, "tokenizer": TOKENIZER}
    return generate(engine, [whole], **given)[0, len(prompt) :].tolist()


# --- each path as it is alone -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": 1.3},
        {"temperature": 1.0, "top_p": 0.8, "top_k": 0, "repetition_penalty": 1.3},
        {"min_p": 0.01, "stop_strings": ["a", "ct"]},
        {"min_new_tokens": 7},
        {"logits_processor": [lambda ids, scores: scores - ids.shape[1] * (torch.arange(97) == ids[0, -1])]},
        {"stopping_criteria": [lambda ids, scores: ids.shape[1] % 9 == 0]},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_a_path_is_what_generate_gives_alone(engine: TorchEngine, arguments: dict[str, Any]) -> None:
    given = {**SAMPLED, **arguments}
    results = generate_paths(engine, PROMPTS, 3, seed=11, tokenizer=TOKENIZER, rows=5, **given)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert len(result.paths) == 3 and len({path.tokens for path in result.paths}) > 1
        for path in result.paths:
            assert path.seed == path_seed(11, path.index)
            assert list(path.tokens) == alone(engine, prompt, path, **given), (prompt, path)
            assert path.log_probability == pytest.approx(mean_log_probability(engine, prompt, path.tokens), abs=1e-4)


def mean_log_probability(engine: TorchEngine, prompt: list[int], tokens: tuple[int, ...]) -> float:
    with torch.no_grad():
        logits = engine.model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1)[range(len(tokens)), list(tokens)].mean())


@pytest.mark.parametrize("rows", [1, 5, 12])
def test_other_prompts_and_rows_change_nothing(engine: TorchEngine, rows: int) -> None:
    together = generate_paths(engine, PROMPTS, 4, seed=5, tokenizer=TOKENIZER, rows=rows, **SAMPLED)
    assert rows - 2 <= max(batch for batch, _ in engine.steps) <= rows, "some end with their first token"
    for prompt, result in zip(PROMPTS, together, strict=True):
        single = paths_of(engine, prompt, 4, seed=5, **SAMPLED)
        assert [path.tokens for path in single.paths] == [path.tokens for path in result.paths]
        assert single.winner is not None and result.winner is not None and single.winner.index == result.winner.index


def test_rows_of_ended_paths_go_to_those_that_wait(engine: TorchEngine) -> None:
    result = paths_of(engine, n=9, rows=3, **SAMPLED)
    steps = [batch for batch, count in engine.steps if count == 1]
    assert sum(steps) == sum(len(path.tokens) - 1 for path in result.paths), "a row for each token but the last"
    assert steps[0] == 3 and result.totals.steps == len(steps) < 3 * 11
    assert result.totals.tokens == sum(path.cost.tokens for path in result.paths)


def test_the_prompt_is_read_once(engine: TorchEngine) -> None:
    paths_of(engine, n=6, **SAMPLED)
    assert [count for _, count in engine.steps if count > 1] == [len(PROMPT)]


def test_a_long_path_outgrows_its_cache(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ryzen_compile.runtime.paths.scheduler.INITIAL_ROOM", 2)
    given = {"max_new_tokens": 40, "temperature": 1.3, "step_tokens": 7, "max_depth": 3}
    result = paths_of(engine, n=4, **given)
    for path in result.paths:
        assert alone(engine, PROMPT, path, max_new_tokens=40, temperature=1.3)[: len(path.tokens)] == list(path.tokens)


# --- pruning and forking ----------------------------------------------------------------------------------------------
class Plain:
    """A path of ``searched``."""

    def __init__(self, index: int, tokens: list[int], total: float, parent: Any = None) -> None:
        self.index, self.tokens, self.total = index, list(tokens), total
        self.generator = spawn_generators(path_seed(3, index), 1)[0]
        self.depth, self.ended = (0, None) if parent is None else (parent.depth, None)
        self.origin = None if parent is None else (parent.index, len(tokens))


def searched(
    model: LlamaForCausalLM,
    n: int,
    limit: int,
    depth: int,
    is_boundary: Any,
    score: Any,
    *,
    temperature: float = 1.3,
) -> list[Plain]:
    """The search written down once more, without caches, batches or verdicts: one path after the other."""
    params = SamplingParams(do_sample=True, temperature=temperature, top_k=50)
    paths = [Plain(index, [], 0.0) for index in range(n)]
    going = list(paths)
    while going:
        waiting = []
        for path in going:
            while path.ended is None:
                with torch.no_grad():
                    logits = model(torch.tensor([[*PROMPT, *path.tokens]])).logits[0, -1]
                token = draw(*distribution(logits.numpy(), params), path.generator)
                path.total += float(logits.log_softmax(-1)[token])
                path.tokens.append(token)
                if token in OFTEN:
                    path.ended = "eos"
                elif len(path.tokens) == limit:
                    path.ended = "length"
                elif path.depth < depth and is_boundary(path.tokens, path.depth):
                    waiting.append(path)
                    break
        waiting.sort(key=lambda path: (-score(path.tokens), -path.total / len(path.tokens), path.index))
        half = (len(waiting) + 1) // 2
        for path in waiting[half:]:
            path.ended = "pruned"
        for path in waiting[:half]:
            path.depth += 1
        forks = []
        for place in range(len(waiting) - half):
            parent = waiting[place % half]
            forks.append(Plain(len(paths) + place, parent.tokens, parent.total, parent))
        paths += forks
        going = waiting[:half] + forks
    return paths


def occurs(tokens: list[int], depth: int) -> bool:
    """Whether the newest token completes a "t"."""
    return TOKENIZER.decode(tokens[-1:]).endswith("t")


def share_of_s(text: str) -> float:
    return min(1.0, text.count("s") / 4)


@pytest.mark.parametrize(
    ("kind", "n", "depth", "rows"),
    [("tokens", 7, 3, 7), ("tokens", 2, 1, 16), ("strings", 5, 20, 5), ("strings", 1, 4, 2), ("guided", 5, 3, 16)],
)
def test_the_tree_is_that_of_a_plain_search(engine: TorchEngine, kind: str, n: int, depth: int, rows: int) -> None:
    given: dict[str, Any] = {"max_depth": depth, "rows": rows, **SAMPLED, "max_new_tokens": 15}
    score: Any = lambda tokens: 0.0
    if kind == "strings":
        expected = searched(engine.model, n, 15, depth, occurs, score)
        result = paths_of(engine, n=n, step_strings="t", **given)
    else:
        if kind == "guided":
            score = lambda tokens: share_of_s(TOKENIZER.decode(tokens, skip_special_tokens=True))
            given["guide"] = share_of_s
        every = lambda tokens, depth: len(tokens) == 4 * (depth + 1)
        expected = searched(engine.model, n, 15, depth, every, score)
        result = paths_of(engine, n=n, step_tokens=4, **given)
    found = [(list(path.tokens), path.ended, path.depth) for path in result.paths]
    assert found == [(path.tokens, path.ended, path.depth) for path in expected]
    origins = [None if path.parent is None else (path.parent, path.branched_at) for path in result.paths]
    assert origins == [path.origin for path in expected]
    assert result.totals.tokens == sum(len(p.tokens) - (p.origin[1] if p.origin else 0) for p in expected)
    assert not any(path.counted for path in result.paths if path.ended == "pruned")


def test_no_boundary_is_plain_sampling(engine: TorchEngine) -> None:
    plain = [path.tokens for path in paths_of(engine, n=4, **SAMPLED).paths]
    for arguments in ({"max_depth": 0, "step_tokens": 2}, {"max_depth": 9}, {"step_tokens": 100}):
        assert [path.tokens for path in paths_of(engine, n=4, **SAMPLED, **arguments).paths] == plain


def test_several_prompts_branch_side_by_side(engine: TorchEngine) -> None:
    given = {"step_strings": ["t", "v"], "max_depth": 4, "rows": 9, **SAMPLED}
    together = generate_paths(engine, PROMPTS, 4, seed=3, tokenizer=TOKENIZER, **given)
    for prompt, result in zip(PROMPTS, together, strict=True):
        assert [path.tokens for path in result.paths] == [
            path.tokens for path in paths_of(engine, prompt, 4, **given).paths
        ]
        for path in result.paths:
            assert alone(engine, prompt, path, **SAMPLED)[: len(path.tokens)] == list(path.tokens)


# --- votes, stops, budgets --------------------------------------------------------------------------------------------
def coin(*probabilities: float) -> TableEngine:
    """Any token is followed by token 3 + i with ``probabilities[i]``."""
    row = np.full(97, -100.0)
    row[3 : 3 + len(probabilities)] = np.log(probabilities)
    return TableEngine(np.tile(row, (97, 1)))


def test_the_majority_wins_and_says_how_sure_it_is() -> None:
    result = paths_of(coin(0.6, 0.4), n=15, max_new_tokens=1)  # a or b
    counts = {vote.answer: vote.count for vote in result.votes}
    texts = [path.text for path in result.paths]
    assert counts == {text: texts.count(text) for text in "ab"} and sum(counts.values()) == 15
    assert result.text == max(counts, key=lambda text: counts[text]) == result.votes[0].answer
    assert result.confidence is not None and 0.5 < result.confidence < 1


def test_answers_are_a_pattern_or_a_callable_and_may_be_none() -> None:
    given = {"n": 6, "max_new_tokens": 4, "seed": 1}
    result = paths_of(coin(0.5, 0.5), answer="^(.)", **given)
    assert {vote.answer for vote in result.votes} <= {"a", "b"} and sum(vote.count for vote in result.votes) == 6
    result = paths_of(coin(0.5, 0.5), answer=lambda text: text.count("a") if text.startswith("a") else None, **given)
    assert sum(vote.count for vote in result.votes) == sum(path.text.startswith("a") for path in result.paths) < 6
    nothing = paths_of(coin(0.5, 0.5), answer="z", **given)
    assert nothing.winner is None and nothing.text == "" and nothing.votes == () and nothing.confidence is None


def test_the_best_wins_and_likelihood_breaks_ties() -> None:
    result = paths_of(coin(0.5, 0.3, 0.2), n=9, max_new_tokens=3, vote="best", verifier=lambda text: "c" in text)
    passed = [path for path in result.paths if path.verdict is not None and path.verdict.passed]
    assert result.winner == max(passed, key=lambda path: (path.log_probability, -path.index))
    assert [path.counted for path in result.paths] == ["c" in path.text for path in result.paths]
    assert result.confidence == 1
    unverified = paths_of(coin(0.5, 0.3, 0.2), n=9, max_new_tokens=3, vote="best")
    assert unverified.winner is not None
    assert unverified.winner.log_probability == max(path.log_probability for path in unverified.paths)


def test_what_fails_votes_only_if_all_fail() -> None:
    some = paths_of(coin(0.8, 0.2), n=9, max_new_tokens=1, seed=2, verifier=lambda text: text == "b")
    assert some.text == "b" and {vote.answer for vote in some.votes} == {"b"}
    none = paths_of(coin(0.8, 0.2), n=9, max_new_tokens=1, seed=2, verifier=lambda text: 0.25)
    assert none.text == "a" and sum(vote.count for vote in none.votes) == 9


def test_a_caller_may_choose(engine: TorchEngine) -> None:
    result = paths_of(engine, n=4, vote=lambda paths: len(paths) - 1, **SAMPLED)
    assert result.winner == result.paths[-1]
    with pytest.raises(PromptError, match="vote must return a place among 4 paths, got 4"):
        paths_of(engine, n=4, vote=len, **SAMPLED)


@pytest.mark.parametrize("wave", [1, 4, 7])
def test_the_first_that_passes_ends_it(engine: TorchEngine, wave: int) -> None:
    everything = paths_of(engine, n=12, vote="best", **SAMPLED)
    wanted = everything.paths[6].text  # nobody before it has it
    assert wanted not in [path.text for path in everything.paths[:6]]
    result = paths_of(
        engine, n=12, wave=wave, vote="best", stop="first", verifier=lambda text: text == wanted, **SAMPLED
    )
    assert result.winner is not None and result.winner.index == 6
    assert len(result.paths) == -(-7 // wave) * wave and result.totals.spared == 12 - len(result.paths)
    for path, whole in zip(result.paths, everything.paths, strict=False):
        assert path.tokens == whole.tokens[: len(path.tokens)]
        assert path.tokens == whole.tokens or path.ended == "cancelled"


def test_a_sure_majority_ends_it() -> None:
    sure = paths_of(coin(0.999, 0.001), n=16, max_new_tokens=2, stop="confident", wave=2)
    assert sure.text == "aa" and len(sure.paths) == 4 and sure.totals.spared == 12  # 1 - 0.5 ** 5 > 0.95
    assert sure.confidence == pytest.approx(1 - 0.5**5, abs=1e-5)
    unsure = paths_of(coin(*[1 / 24] * 24), n=16, max_new_tokens=2, stop="confident")
    assert len(unsure.paths) == 16 and unsure.totals.spared == 0
    # The rest cannot change it: three of five, whatever the posterior.
    beaten = paths_of(coin(0.999, 0.001), n=5, max_new_tokens=1, stop="confident", confidence=0.9999, wave=1)
    assert len(beaten.paths) == 3


def test_slow_verdicts_change_nothing_but_what_is_spared(engine: TorchEngine) -> None:
    class Slow:
        waits = True

        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def verify(self, text: str) -> Verdict:
            time.sleep(self.seconds * (len(text) % 3))
            return Verdict(1, True) if len(text) == 9 else Verdict(0, False)

    for stop in ("first", "never"):
        given = {"n": 12, "vote": "best", "stop": stop, **SAMPLED}
        fast, slow = (paths_of(engine, verifier=Slow(seconds), **given) for seconds in (0, 0.05))
        assert fast.winner is not None and fast.winner.index == slow.winner.index  # type: ignore[union-attr]
        assert [path.counted for path in fast.paths] == [path.counted for path in slow.paths]


@pytest.mark.parametrize("stop", ["never", "first"])
def test_tokens_are_never_more_than_the_budget_and_cut_no_path(engine: TorchEngine, stop: str) -> None:
    for tokens in (12, 30, 61):
        result = paths_of(
            engine, n=40, budget=Budget(tokens=tokens), stop=stop, verifier=lambda text: False, vote="best", **SAMPLED
        )
        assert tokens - 12 < result.totals.tokens <= tokens and result.winner is not None
        assert {path.ended for path in result.paths} <= {"eos", "length"}
        for path in result.paths:
            assert alone(engine, PROMPT, path, **SAMPLED) == list(path.tokens)
    short = paths_of(engine, n=4, budget=Budget(tokens=5), **SAMPLED)
    assert len(short.paths) == 1 and len(short.paths[0].tokens) <= 5


def test_forks_keep_to_the_budget(engine: TorchEngine) -> None:
    given = {"step_tokens": 2, "vote": "best", "max_new_tokens": 12, "temperature": 1.3}
    result = paths_of(engine, n=4, budget=Budget(tokens=48), **given)
    assert result.totals.tokens <= 48 and len(result.paths) > 4
    bounded = paths_of(engine, n=4, budget=Budget(samples=5), **given)
    assert len(bounded.paths) == 5
    assert len(paths_of(engine, n=9, budget=Budget(samples=2), **SAMPLED).paths) == 2
    assert len(paths_of(engine, n=9, budget={"samples": 2}, **SAMPLED).paths) == 2


def test_time_ends_paths_where_they_are(engine: TorchEngine) -> None:
    class Late(TorchEngine):
        def step(self, tokens: np.ndarray, cache: Any, last: int = 1) -> np.ndarray:
            if len(self.steps) == 4:
                time.sleep(0.3)
            return super().step(tokens, cache, last)

    given = {"max_new_tokens": 30, "temperature": 1.3, "rows": 2}
    whole = paths_of(engine, n=3, **given)
    result = paths_of(Late(engine.model), n=3, budget=Budget(seconds=0.3), **given)
    assert [path.ended for path in result.paths] == ["budget", "budget"]
    assert [len(path.tokens) for path in result.paths] == [5, 5]
    assert all(path.tokens == full.tokens[:5] for path, full in zip(result.paths, whole.paths, strict=False))
    assert result.winner is not None and result.confidence is None, "what ran out of time is better than nothing"


# --- what verifiers and callers do wrong ------------------------------------------------------------------------------
def test_a_verifier_that_raises_fails_one_path_only(engine: TorchEngine) -> None:
    def judge(text: str) -> float:
        if len(text) % 2:
            raise KeyError(text)
        return 1

    result = paths_of(engine, n=6, verifier=judge, vote="best", **SAMPLED)
    for path in result.paths:
        assert path.verdict is not None and path.verdict.passed == (len(path.text) % 2 == 0)
        assert path.verdict.passed or "the verifier raised KeyError" in path.verdict.detail


def test_a_callback_cannot_call_the_model(engine: TorchEngine) -> None:
    with CompiledModel(engine, tokenizer=TOKENIZER) as compiled:
        with pytest.raises(UsageError, match="called from inside a running call"):
            compiled.generate_paths(PROMPT, verifier=lambda text: bool(compiled.generate([PROMPT])), **SAMPLED)
        assert len(compiled.generate_paths(PROMPT, **SAMPLED).paths) == 3, "and it is free again"


@pytest.mark.parametrize("what", ["generate", "generate_paths"])
def test_neither_can_a_verifier_in_its_thread(engine: TorchEngine, what: str) -> None:
    """In a thread of its own, as it is the call that would never end."""
    compiled = CompiledModel(engine, tokenizer=TOKENIZER)

    class Asks:
        waits = True

        def verify(self, text: str) -> Verdict:
            return Verdict(1, bool(getattr(compiled, what)(PROMPT)))

    raised: list[BaseException] = []

    def call() -> None:
        try:
            compiled.generate_paths(PROMPT, verifier=Asks(), **SAMPLED)
        except UsageError as error:
            raised.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it waits for itself"
    assert f"{what} was called from inside a running call of the same model" in str(raised[0])
    assert len(compiled.generate_paths(PROMPT, **SAMPLED).paths) == 3, "and it is free again"


def test_what_a_call_leaves_behind_may_call_the_model(engine: TorchEngine) -> None:
    """A thread that outlives the call whose context it has is an ordinary caller."""
    compiled = CompiledModel(engine, tokenizer=TOKENIZER)
    contexts: list[Context] = []

    def keeps(text: str) -> bool:
        contexts.append(copy_context())
        return True

    compiled.generate_paths(PROMPT, verifier=keeps, **SAMPLED)
    assert len(contexts[0].run(compiled.generate_paths, PROMPT, **SAMPLED).paths) == 3


@pytest.mark.parametrize("verifier", [None, lambda text: True], ids=["unverified", "verified"])
def test_a_text_is_decoded_once(verifier: Any) -> None:
    """Whatever asks for it: a verifier, the votes after each path, the result. Undecided votes make it ask often."""
    decoded: list[tuple[int, ...]] = []

    class Counting:
        def decode(self, tokens: list[int], **options: bool) -> str:
            decoded.append(tuple(tokens))
            return TOKENIZER.decode(tokens, **options)

    given = {"max_new_tokens": 3, "stop": "confident", "confidence": 0.99999, "tokenizer": Counting()}
    result = paths_of(coin(*[1 / 24] * 24), n=24, wave=5, verifier=verifier, **given)
    assert len(result.paths) == 24
    assert sorted(decoded) == sorted([tuple(PROMPT), *((*PROMPT, *path.tokens) for path in result.paths)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"n": 0}, "n must be an integer >= 1, got 0"),
        ({"n": True}, "n must be an integer >= 1, got True"),
        ({"max_depth": -1}, "max_depth must be an integer >= 0"),
        ({"step_tokens": 0}, "step_tokens must be an integer >= 1"),
        ({"step_strings": [""]}, "step_strings must be a non-empty string or a list of them, got ['']"),
        ({"step_strings": 3}, "step_strings must be a non-empty string or a list of them, got 3"),
        ({"step_strings": b"ab"}, "step_strings must be a non-empty string or a list of them, got b'ab'"),
        ({"step_strings": ["a", None]}, "step_strings must be a non-empty string"),
        ({"vote": "loudest"}, "vote must be 'majority', 'best' or a callable, got 'loudest'"),
        ({"answer": "("}, "is not a regular expression"),
        ({"stop": "soon"}, "stop must be 'never', 'first' or 'confident'"),
        ({"stop": "first"}, "stop='first' waits for a path that passes"),
        ({"stop": "confident", "vote": "best"}, "stop='confident' needs a majority"),
        ({"confidence": 1.0}, "confidence must be a number with 0 < confidence < 1"),
        ({"confidence": "0.9"}, "confidence must be a number with 0 < confidence < 1, got '0.9'"),
        ({"budget": 100}, "budget must be a Budget or a mapping with some of tokens, seconds, samples, got 100"),
        ({"budget": {"token": 100}}, "budget has no 'token', only tokens, seconds, samples"),
        ({"budget": {"tokens": 0}}, "budget.tokens must be an integer >= 1, got 0"),
        ({"budget": {"seconds": "1"}}, "budget.seconds must be a number above 0, got '1'"),
        ({"n": 20, "step_tokens": 3}, "20 paths that branch are stepped together, and there are 16 rows"),
        ({"temperature": 0.0}, "3 paths need sampling"),
        ({"num_return_sequences": 2}, "n says how many paths there are"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"temprature": 1.0}, "did you mean 'temperature'"),
        ({"window": 8}, "is for CompiledModel.generate"),
        ({"max_new_tokens": 100}, "exceeds the model's context of 64 tokens"),
        ({"tokenizer": None}, "votes and verifiers need the model's tokenizer"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused(engine: TorchEngine, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(PromptError) as error:
        paths_of(engine, **{**SAMPLED, **arguments})
    assert said in str(error.value)
    assert not engine.steps, "before anything is computed"


@pytest.mark.parametrize("budget", [{"tokens": 0}, {"samples": 1.5}, {"seconds": 0}, {"seconds": float("nan")}])
def test_budgets_are_above_nothing(budget: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match=f"budget.{next(iter(budget))} must be"):
        Budget(**budget)


def test_a_verifier_is_one(engine: TorchEngine) -> None:
    with pytest.raises(UsageError, match="a verifier has a method verify"):
        paths_of(engine, verifier=3, **SAMPLED)
    with pytest.raises(UsageError, match="a verdict's score must be a number from 0 to 1, got 7"):
        paths_of(engine, verifier=lambda text: 7, **SAMPLED)


# --- what a prompt may be ---------------------------------------------------------------------------------------------
def test_prompts_in_all_forms(engine: TorchEngine) -> None:
    texts = lambda results: [[path.tokens for path in result.paths] for result in results]
    with CompiledModel(engine, tokenizer=lambda_tokenizer()) as compiled:
        given = {"seed": 4, "bos_token_id": BOS, **SAMPLED}
        one = compiled.generate_paths(PROMPT, **given)
        for same in (np.array(PROMPT), np.array([PROMPT]), torch.tensor([PROMPT]), tuple(PROMPT), "7"):
            assert texts([compiled.generate_paths(same, **given)]) == texts([one])
        assert texts(compiled.generate_paths([PROMPT, "7", np.array(PROMPT)], **given)) == texts([one] * 3)
        empty = compiled.generate_paths(None, **given)
        assert empty.totals.prompt_tokens == 1 and len(empty.paths) == 3
        assert texts([empty]) == texts([compiled.generate_paths("", **given)])
        assert texts(compiled.generate_paths([[]], **given)) == texts([empty])
        assert compiled.generate_paths([], **given) == []
        with pytest.raises(PromptError, match="the prompt is empty and no BOS token is defined"):
            compiled.generate_paths(None, seed=4, **SAMPLED)
        with pytest.raises(PromptError, match="a prompt is one sequence of ids, got 2"):
            compiled.generate_paths(np.array([PROMPT, PROMPT]), **given)
    with CompiledModel(engine) as silent, pytest.raises(PromptError, match="a prompt in words needs"):
        silent.generate_paths("a", **given)


def lambda_tokenizer() -> Any:
    """ "7" is PROMPT, other texts are nothing."""

    class Speaks:
        def __call__(self, text: str) -> dict[str, np.ndarray]:
            return {"input_ids": np.array([PROMPT if text == "7" else []])}

        def decode(self, tokens: list[int], **options: bool) -> str:
            return TOKENIZER.decode(tokens, **options)

    return Speaks()


def test_defaults_one_path_and_json(engine: TorchEngine) -> None:
    with CompiledModel(
        engine, tokenizer=TOKENIZER, generation_config={"max_new_tokens": 6, "temperature": 1.3}
    ) as compiled:
        result = compiled.generate_paths(PROMPT, 1)
        assert [len(path.tokens) for path in result.paths] == [6] and result.winner == result.paths[0]
        again = compiled.generate_paths(PROMPT, 1, seed=result.seed)
        assert again.paths[0].tokens == result.paths[0].tokens
    plain = result.to_json()
    assert plain["winner"] == 0 and plain["paths"][0]["tokens"] == list(result.paths[0].tokens)
    assert plain["totals"]["prompt_tokens"] == len(PROMPT)
    assert result.to_text().splitlines()[0].startswith("* 0: 6 tokens, length, log p -")


def test_greedy_alone_is_allowed(engine: TorchEngine) -> None:
    result = paths_of(engine, n=1, max_new_tokens=9, do_sample=False)
    assert list(result.paths[0].tokens) == generate(engine, [PROMPT], max_new_tokens=9)[0, len(PROMPT) :].tolist()


def test_memory_is_asked_for_first(engine: TorchEngine) -> None:
    with CompiledModel(engine, tokenizer=TOKENIZER, cache_budget_bytes=8 * 64 * 4) as compiled:
        assert len(compiled.generate_paths(PROMPT, 3, **SAMPLED).paths) == 3
        with pytest.raises(MemoryLimitError):
            compiled.generate_paths(PROMPT, 30, **SAMPLED)
        assert compiled.generate_paths(PROMPT, 30, rows=3, **SAMPLED).totals.paths == 30


def test_known_prefixes_are_not_read_again(engine: TorchEngine) -> None:
    with CompiledModel(engine, tokenizer=TOKENIZER, prefix_bytes=1 << 16) as compiled:
        first, second = (compiled.generate_paths(PROMPT * 6, seed=1, **SAMPLED) for _ in range(2))
    assert first.totals.reused_tokens == 0 < second.totals.reused_tokens < 42
    assert [path.tokens for path in first.paths] == [path.tokens for path in second.paths]


def test_path_seeds_are_fixed_and_all_different() -> None:
    assert path_seed(0, 0) == 0xF09BF659BFEF6
    seeds = {path_seed(seed, index) for seed in (0, 1, 2**70) for index in range(100)}
    assert len(seeds) == 300 and max(seeds) < 2**53
