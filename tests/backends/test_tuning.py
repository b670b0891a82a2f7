"""The tuning record: what is chosen, and that nothing odd gets in through a manifest."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from ryzen_compile.backends.onnxruntime.candidates import Candidate, NativeCandidate, choose
from ryzen_compile.backends.onnxruntime.claim_report import KINDS
from ryzen_compile.backends.onnxruntime.tune import read_tuning, tuned_options
from ryzen_compile.backends.onnxruntime.tuning import Tuning
from ryzen_compile.errors import ArtifactError
from ryzen_compile.runtime.speculative.exit_choice import ExitChoice

KEY = "zen4-2c-32M"
GOOD: dict[str, Any] = {
    "threads": 2,
    "spinning": False,
    "reason": "2 threads, spinning off: the fastest",
    "context": 512,
    "curves": {"64": {"1": 0.018}, "512": {"1": 0.02, "2": 0.021, "16": 0.05}},
    "prefill": {"128": 0.6},
    "candidates": [{"threads": 1, "spinning": True, "visits": [4.0, 4.1]}],
    "versions": {"onnxruntime": "1.31.1", "ryzen-compile": "0.1.0.dev1+abc"},
}


def test_round_trip() -> None:
    tuning = Tuning.from_json(KEY, GOOD)
    assert tuning.curves == {64: {1: 0.018}, 512: {1: 0.02, 2: 0.021, 16: 0.05}} and tuning.candidates[0].visits == (
        4.0,
        4.1,
    )
    assert json.loads(json.dumps(tuning.to_json())) == GOOD
    assert Tuning.from_json(KEY, tuning.to_json()) == tuning


NATIVE: dict[str, Any] = {
    "kinds": ["attention", "matmul"],
    "reason": "native attention, matmul: the fastest",
    "candidates": [{"kinds": ["attention", "matmul"], "visits": [4.0]}, {"kinds": [], "visits": [5.0, 5.1]}],
}


EXIT = {"layers": 2, "agreement": 0.7, "seconds": 0.001, "gain": 1.2}


def test_an_early_exit_is_an_optional_part_of_the_record() -> None:
    tuning = Tuning.from_json(KEY, {**GOOD, "exit": EXIT})
    assert tuning.exit == ExitChoice(2, 0.7, 0.001, 1.2) and tuning.exit.pays
    assert json.loads(json.dumps(tuning.to_json())) == {**GOOD, "exit": EXIT}
    assert Tuning.from_json(KEY, GOOD).exit is None and "exit" not in Tuning.from_json(KEY, GOOD).to_json()


def test_native_operators_are_an_optional_part_of_the_record() -> None:
    """Records from before there were any stand; then, and where none were there to measure, all are used."""
    without, tuning = (Tuning.from_json(KEY, record) for record in (GOOD, {**GOOD, "native": NATIVE}))
    assert without.native is None and "native" not in without.to_json()
    assert tuning.native is not None and tuning.native.kinds == {"attention", "matmul"}
    assert tuning.native.candidates[1] == NativeCandidate(frozenset(), (5.0, 5.1))
    assert json.loads(json.dumps(tuning.to_json())) == {**GOOD, "native": NATIVE}
    for record, kinds in ((GOOD, KINDS), ({**GOOD, "native": NATIVE}, {"attention", "matmul"})):
        options = tuned_options(Tuning.from_json(KEY, record))
        assert options.native == kinds and not options.require_native


def test_native_operators_are_chosen_like_threads() -> None:
    every, some, none = (
        NativeCandidate(frozenset(k), v) for k, v in ((KINDS, (10.1,)), (["norm"], (10.0,)), ([], (14.0,)))
    )
    assert choose((none, some, every))[0] is every  # within the noise: what runs where nothing was measured
    chosen, why = choose((none, every))
    assert (
        chosen is every
        and why == f"native {', '.join(sorted(KINDS))}: the fastest, and nothing simpler comes within the noise"
    )
    assert choose((NativeCandidate(KINDS, (20.0,)), none)) == (
        none,
        f"{none}: the fastest, and nothing simpler comes within the noise",
    )
    assert str(none) == "stock operators"


def test_options_come_from_the_record_of_this_machine_only() -> None:
    manifest = {"tuned": {KEY: GOOD, "zen5-8c-32M": {"damaged": True}}}
    found = read_tuning(manifest, KEY)
    assert found is not None
    assert (tuned_options(found).threads, tuned_options(found).spinning) == (2, False)
    assert read_tuning(manifest, "zen4-4c-32M") is None
    assert read_tuning({}, KEY) is None
    with pytest.raises(ArtifactError, match="'zen5-8c-32M': threads is missing; run ryzen-compile tune again"):
        read_tuning(manifest, "zen5-8c-32M")
    with pytest.raises(ArtifactError, match="'tuned' is not a table of machines: list"):
        read_tuning({"tuned": []}, KEY)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("threads",), 0, "threads must be a whole number from 1 to 16, got '0'"),
        (("threads",), 17, "from 1 to 16"),  # 8 a core: a manifest cannot ask for thousands of threads
        (("threads",), True, "threads must be a whole number"),
        (("threads",), 2.0, "threads must be a whole number"),
        (("spinning",), 1, "spinning must be true or false"),
        (("reason",), "x" * 1001, "reason must be a text"),
        (("context",), -1, "context must be a whole number"),
        (("curves",), {}, "curves must be an object of 1 to 8 curves"),
        (("curves",), {str(context): {"1": 0.1} for context in range(9)}, "curves must be an object of 1 to 8 curves"),
        (("curves",), {"64": {"1": 0.1}}, "curves end behind 64 tokens, its context is 512"),
        (("curves", "1.5"), {"1": 0.1}, "curves has '1.5'"),
        (("curves", "512"), {}, "curves must be an object of 1 to 64"),
        (("curves", "512"), {"2": 0.1}, "curves has no figure for 1 token"),
        (("curves", "512"), [0.1], "curves must be an object"),
        (("curves", "512", "1"), float("nan"), "curves must be seconds above 0"),
        (("curves", "512", "1"), float("inf"), "curves must be seconds above 0"),
        (("curves", "512", "1"), 0, "curves must be seconds above 0"),
        (("curves", "512", "1"), -0.1, "curves must be seconds above 0"),
        (("curves", "512", "1"), "0.1", "curves must be seconds above 0"),
        (("curves", "512", "1"), 10**400, "curves must be seconds above 0"),
        (("curves", "512", "01"), 0.1, "curves has '01' for a number of tokens"),
        (("curves", "512", "65"), 0.1, "from 1 to 64"),
        (("curves", "512", "0"), 0.1, "from 1 to 64"),
        (("prefill", "99999999"), 0.1, "prefill must be a whole number"),
        (("candidates",), [], "candidates must be a list"),
        (("candidates", 0, "visits"), [], "candidates must have 1 to 1000 visits"),
        (("candidates", 0, "visits"), [float("nan")], "candidates must be seconds"),
        (("candidates", 0, "more"), 1, "candidates must have threads, spinning and visits"),
        (("versions", "onnxruntime"), "1.0\n", "version"),
        (("versions", "onnxruntime"), 1, "version"),
        (("script",), "rm -rf", "'script' is not a field of it"),
        (("native",), True, "native must have kinds, reason and candidates"),
        (("native",), {**NATIVE, "script": 1}, "native must have kinds, reason and candidates"),
        (
            ("native",),
            {**NATIVE, "kinds": ["gemm"]},
            "native must name kinds of native operators, attention, embedding, matmul, norm",
        ),
        (("native",), {**NATIVE, "kinds": [["norm"]]}, "native must name kinds"),
        (("native",), {**NATIVE, "kinds": "norm"}, "native must name kinds"),
        (("native",), {**NATIVE, "reason": 1}, "native must be a text"),
        (("native",), {**NATIVE, "candidates": []}, "native must have 1 to 32 candidates"),
        (("native",), {**NATIVE, "candidates": [{"kinds": []}]}, "native must have kinds and visits"),
        (("native",), {**NATIVE, "candidates": [{"kinds": [], "visits": [0]}]}, "native must be seconds"),
        (("exit",), None, "exit must have layers, agreement, seconds and gain"),
        (("exit",), {**EXIT, "script": 1}, "exit must have layers, agreement, seconds and gain"),
        (("exit",), {**EXIT, "layers": 0}, "exit must be a whole number from 1 to"),
        (("exit",), {**EXIT, "layers": 2.0}, "exit must be a whole number"),
        (("exit",), {**EXIT, "agreement": 1.1}, "exit must be numbers from 0 to 1"),
        (("exit",), {**EXIT, "agreement": float("nan")}, "exit must be numbers from 0 to 1"),
        (("exit",), {**EXIT, "gain": True}, "exit must be numbers from 0 to 100"),
        (("exit",), {**EXIT, "gain": float("inf")}, "exit must be numbers from 0 to 100"),
        (("exit",), {**EXIT, "seconds": 0}, "exit must be seconds above 0"),
    ],
)
def test_odd_fields_are_refused_by_name(place: tuple[Any, ...], value: object, message: str) -> None:
    record = copy.deepcopy(GOOD)
    inner = record
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    with pytest.raises(ArtifactError) as caught:
        Tuning.from_json(KEY, record)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", list(GOOD))
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        Tuning.from_json(KEY, {field: value for field, value in GOOD.items() if field != name})


@pytest.mark.parametrize("key", ["", "zen4", "zen4-0c", "zen4-2c-32M\n", "../x-2c", "zen4-99999c-1M"])
def test_odd_keys_are_refused(key: str) -> None:
    with pytest.raises(ArtifactError, match="its name is not of the form zen4-2c-32M"):
        Tuning.from_json(key, GOOD)


@pytest.mark.parametrize("key", ["x86_64_v4-16c-64M", "zen4-1c", "m1-8c-0.5M"])
def test_keys_of_real_machines(key: str) -> None:
    assert Tuning.from_json(key, GOOD).key == key


def test_a_record_must_be_an_object() -> None:
    with pytest.raises(ArtifactError, match="it is a list, expected an object"):
        Tuning.from_json(KEY, [])


def candidate(threads: int, spinning: bool, *visits: float) -> Candidate:
    return Candidate(threads, spinning, visits)


@pytest.mark.parametrize(
    ("candidates", "chosen", "why"),
    [
        # A clear gain is taken ...
        ([candidate(1, True, 20, 20.1, 20.2), candidate(2, True, 12, 12.1, 12.2)], 1, "the fastest"),
        # ... one within the noise is not, whatever the order.
        ([candidate(2, True, 10, 14, 18), candidate(1, True, 15, 15.1, 15.2)], 1, "within the noise"),
        ([candidate(1, True, 10.1, 10.1), candidate(2, True, 10, 10)], 0, "within the noise"),  # 1 %, below the floor
        # Small steps add up: 4 threads beat 1 clearly though no step beats the one before it.
        (
            [
                candidate(1, True, 10.6, 10.6),
                candidate(2, True, 10.3, 10.3),
                candidate(3, True, 10.1, 10.1),
                candidate(4, True, 10, 10),
            ],
            2,
            "within the noise",
        ),
        # Spinning stays on where it makes no difference.
        ([candidate(2, False, 10, 10), candidate(2, True, 10.1, 10.1)], 1, "spinning on"),
        ([candidate(2, False, 10, 10), candidate(2, True, 12, 12)], 0, "spinning off"),
        # One wild visit of five moves neither a median nor the noise.
        ([candidate(1, True, 20, 20, 20, 20, 90), candidate(2, True, 12, 12, 12, 12, 80)], 1, "the fastest"),
        ([candidate(3, True, 5)], 0, "nothing else was tried"),
    ],
)
def test_choice(candidates: list[Candidate], chosen: int, why: str) -> None:
    best, reason = choose(tuple(candidates))
    assert best is candidates[chosen]
    assert why in reason and str(best) in reason


def test_spread_shrinks_with_visits_and_has_a_floor() -> None:
    assert candidate(1, True, 10, 10, 10).spread == pytest.approx(0.1)
    # deviations 1, 0, 1, 2, 2: their median is 1
    assert candidate(1, True, 9, 10, 11, 12, 8).spread == pytest.approx(1.4826 / 5**0.5)


@pytest.mark.parametrize(
    ("curve", "steady"),
    [({1: 1.0, 2: 1.0, 4: 3.0}, True), ({1: 1.2, 2: 1.0}, True), ({1: 1.0, 2: 9.0, 3: 1.1}, False)],
)
def test_a_disturbed_curve_is_noticed(curve: dict[int, float], steady: bool) -> None:
    record = {**GOOD, "curves": {"64": {"1": 9.0}, "512": {str(m): seconds for m, seconds in curve.items()}}}
    assert Tuning.from_json(KEY, record).steady is steady
