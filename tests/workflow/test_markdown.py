"""The report for a pull request: its tables are tables, and names in it can do nothing."""

from __future__ import annotations

import html
import re

import pytest

from ryzen_compile.validate.measured import Measured
from ryzen_compile.validate.outcome import Outcome, Target, judge
from ryzen_compile.workflow import wording
from ryzen_compile.workflow.headlines import findings, headlines, sentence
from ryzen_compile.workflow.markdown import LISTED, code, prose, render_markdown
from ryzen_compile.workflow.report_schema import FinalReport
from tests.workflow.example_reports import (
    HOSTILE,
    components,
    final_report,
    outcomes,
    record,
    suite_report,
    validation_report,
)


@pytest.fixture(scope="module")
def text() -> str:
    return render_markdown(final_report(), validation_report(), suite_report())


def tables(text: str) -> list[list[list[str]]]:
    """Every table as rows of cells; raises ``AssertionError`` where rows of one have different numbers of cells."""
    found: list[list[list[str]]] = []
    last = ""
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
            cells = [cell.strip() for cell in line[1:-1].split("|")]
            if not last.startswith("|"):
                found.append([])
            found[-1].append(cells)
        last = line
    for rows in found:
        assert len({len(row) for row in rows}) == 1, rows
        assert all(re.fullmatch("-{3,}:?", cell) for cell in rows[1])
    return found


def shown(text: str) -> str:
    """As it reads once Markdown is rendered, roughly: marks of code gone, references resolved."""
    text = text.replace("&#8203;", "")
    return html.unescape(re.sub(r"</?(details|summary|code)>|`", "", text))


# --- what it says -----------------------------------------------------------------------------------------------------
def test_verdict_figures_and_findings_come_first(text: str) -> None:
    lines = text.splitlines()
    assert lines[0] == "## examples/tiny-lm: FAIL"
    assert lines[2] == "1 of 8 checks failed: compression ratio; 1 check left out."
    figures = tables(text)[0]
    assert [row[0] for row in figures[2:]] == [
        "End to end", "Decode", "First token", "Size", "Accuracy loss", "KV cache",
    ]  # fmt: skip
    assert figures[2][1:3] == ["**7.41 x**", "7.04 to 7.78 x"] and figures[5][4:] == ["≥ 2 x", "FAIL"]
    found = [line for line in lines if line.startswith("- **")]
    assert found[0] == (
        "- **FAIL** compression ratio: 1.83 x, wanted ≥ 2 x; to blame: `model.embed_tokens.weight`; "
        "measure again: `ryzen-compile export examples/tiny-lm out --recipe int4`"
    )
    assert shown(found[1]) == (
        "- **WARN** speculation speedup: 1.24 x (1.141 to 1.339 x), wanted ≥ 1.2 x; the interval reaches beyond "
        ">= 1.2; to blame: suffix drafter; measure again: python -m benchmarks.example --rounds 11"
    )
    assert len(found) == 2


def test_checks_passes_and_machine_are_tables(text: str) -> None:
    figures, checks, passes, machine = tables(text)
    assert len(checks) == 2 + len(outcomes())
    assert [row[0] for row in checks[2:] if row[0]] == [
        "kernels", "passes", "embedding", "KV cache", "speculation", "correctness", "end to end", "tests",
    ]  # fmt: skip
    assert checks[2 + 7][:3] == ["", "", "ttft ms (SKIPPED)"], "the second check of its component"
    assert [row[0] for row in passes[2:]] == [
        "`merge_projections`", "`fuse_rotary`", "`quantize_weights`", "`fold_norms`",
    ]  # fmt: skip
    assert passes[2][3:] == ["3", "3", "211 → 187", "2.4e-06"]
    assert ["torch", "2.11.0"] in machine and ["threads", "2"] in machine
    assert text.count("<details>") == text.count("</details>") == 2
    assert "<summary>4 passes</summary>" in text
    assert len(figures) == 8


def test_tests_are_counted_and_failures_named(text: str) -> None:
    assert "45 passed, 1 failed, 0 error, 1 skipped: 97.83 % passed, in 2 min 31 s." in shown(text)
    assert "- failed `tests/test_size.py::test_size`: AssertionError: assert 1.83 >= 2 where 1.83" in shown(
        text.replace("`", "\x01")
    ).replace("\x01", "`")


def test_it_is_the_same_for_the_same_reports(text: str) -> None:
    assert render_markdown(final_report(), validation_report(), suite_report()) == text


def test_what_is_missing_is_left_out() -> None:
    empty = final_report(components=(), end_to_end=None, training=None, passes={}, changes=(), phases=())
    text = render_markdown(empty)
    assert "Nothing was checked." in text
    assert "###" not in text and len(tables(text)) == 1, "the machine's"
    good = final_report(components=components([outcomes()[0]]))
    assert "nearly" not in render_markdown(good)


def test_long_lists_are_cut_so_that_a_comment_holds_them() -> None:
    bad = outcomes()[2].model_copy(update={"reason": "too slow " * 400, "culprit": "pass " * 400})
    tests = suite_report(tests=tuple(suite_report().tests[-2].model_copy(update={"message": "x " * 999})
                                     for _ in range(200)))  # fmt: skip
    many = final_report(components=components([bad] * 50), passes={"records": [record(f"pass_{i}") for i in range(40)]})
    text = render_markdown(many, validation_report(), tests)
    assert text.count("- **FAIL**") == LISTED and "- and 30 more" in text
    assert text.count("- failed") == LISTED and "- and 180 more" in text
    assert len(text) < 65_536


# --- names ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_inert_and_still_shown(name: str) -> None:
    found = [one.model_copy(update={"check": name, "reason": name, "culprit": name, "command": name})
             for one in outcomes()]  # fmt: skip
    final = final_report(
        model=name,
        components=components(found),
        passes={"records": [record(name, status=name, promise=name)]},
        phases=(),
    )
    case = suite_report().tests[-2].model_copy(update={"name": name, "file": name, "message": name})
    text = render_markdown(final, None, suite_report(command=name, counts={name: 3}, reason=name, tests=(case,)))
    plain = render_markdown(final_report(), None, suite_report())
    assert [len(rows[0]) for rows in tables(text)] == [len(rows[0]) for rows in tables(plain)]
    # No tag but those that the report writes itself, no link, no image, nobody called.
    assert set(re.findall(r"</?([a-zA-Z!]+)", text)) <= {"details", "summary", "code"}
    assert text.count("<details>") == text.count("</details>") == 2
    outside = re.sub(r"`[^`]*`|<code>.*?</code>", "", text)
    assert not re.search(r"\]\(|!\[|@\w|\\", outside)
    assert "`" not in outside and "\x00" not in text and "\u202e" not in text
    wanted = " ".join(wording.printable(name).split())
    assert shown(text).count(wanted) >= 10


@pytest.mark.parametrize(
    "plain", ["fuse_rotary", "model.layers.0.mlp", "int4 with 32 rows", "1.5 x", "snake_case_name"]
)
def test_ordinary_names_stay_as_they_are(plain: str) -> None:
    assert prose(plain) == plain and code(plain) == f"`{plain}`"


def test_marks_at_the_edge_of_words_are_escaped() -> None:
    assert prose("_emphasis_ a_b") == "&#95;emphasis&#95; a_b"
    assert prose("a|b") == "a&#124;b" and code("a|b") == "<code>a&#124;b</code>"
    assert code("`") == "<code>&#96;</code>" and code("") == "" and code("\n") == ""
    assert prose("see https://example.org or www.example.org, @someone") == (
        "see https&#58;//example.org or www&#46;example.org, @&#8203;someone"
    )


# --- what is told first -----------------------------------------------------------------------------------------------
def judged(*statuses: str) -> FinalReport:
    found = [Outcome.model_validate({"component": "kernels", "check": f"check_{i}", "status": status})
             for i, status in enumerate(statuses)]  # fmt: skip
    return final_report(components=components(found), end_to_end=None)


def test_the_sentence_says_the_worst_first() -> None:
    assert sentence(judged("PASS", "FAIL", "WARN")) == "1 of 3 checks failed: check 1."
    assert sentence(judged("PASS", "WARN", "SKIPPED")) == (
        "1 of 2 checks came with a warning: check 1; 1 check left out."
    )
    assert sentence(judged(*["FAIL"] * 5)) == "5 of 5 checks failed: check 0, check 1, check 2 and 2 more."
    assert sentence(judged("PASS", "PASS")) == "All 2 checks passed."
    assert sentence(judged("PASS")) == "The one check passed."
    assert sentence(judged("SKIPPED")) == sentence(judged()) == "Nothing was checked."
    whole = final_report(components=components([outcomes()[0]] * 2))
    assert sentence(whole) == "All 2 checks passed, 7.41 x end to end."


def test_findings_are_those_that_failed_then_those_that_nearly_did() -> None:
    found = findings(judged("WARN", "PASS", "FAIL", "SKIPPED", "WARN", "FAIL"))
    assert [one.check for one in found] == ["check_2", "check_5", "check_0", "check_4"]


def test_headlines_come_from_what_was_measured() -> None:
    assert headlines(judged("PASS")) == []
    found = headlines(judged("PASS"), validation_report())
    assert [(one.label, one.value) for one in found] == [
        ("End to end", "7.41 x"), ("Decode", "8.03 x"), ("First token", "5.2 x"),
    ]  # fmt: skip
    lone = outcomes()[6].model_copy(update={"measured": Measured(value=2.5, unit="x")})
    (whole,) = headlines(final_report(components=components([lone]), end_to_end=None))
    assert (whole.value, whole.interval, whole.target, whole.status) == ("2.5 x", "", "≥ 3 x", "PASS")


# --- figures in words -------------------------------------------------------------------------------------------------
def test_figures_by_hand() -> None:
    assert [wording.number(v) for v in (7.4123, 12345.6, 0.00001234, 0.0, -3.0)] == [
        "7.412", "12,346", "1.234e-05", "0", "-3",
    ]  # fmt: skip
    assert wording.number(float("nan")) == "not a number" and wording.number(float("-inf")) == "minus infinite"
    assert [wording.size(v) for v in (0, 1, 1023, 1024, 1536, 1023 * 2**20, 3 * 2**30, 2**51)] == [
        "0 bytes", "1 bytes", "1,023 bytes", "1 KiB", "1.5 KiB", "1,023 MiB", "3 GiB", "2,048 TiB",
    ]  # fmt: skip
    assert [wording.duration(v) for v in (0, 0.00021, 0.21, 12.34, 59.94, 59.96, 252, 3780)] == [
        "0 s", "0.21 ms", "0.21 s", "12.3 s", "59.9 s", "1 min 00 s", "4 min 12 s", "1 h 03 min",
    ]  # fmt: skip
    assert wording.amount(0.0031, "share") == "0.31 %" and wording.amount(7.4, "x") == "7.4 x"
    assert wording.amount(5, "") == "5" and wording.amount(float("nan"), "share") == "not a number"


def test_a_reason_does_not_repeat_the_figures_beside_it() -> None:
    def told(measured: Measured, target: Target) -> str:
        status, reason = judge(measured, target)
        check = Outcome(component="kernels", check="a", status=status, measured=measured, target=target, reason=reason)
        return wording.reason(check)

    two = Measured(value=1.9, low=1.5, high=2.5, unit="x")
    assert told(two, Target(value=2)) == told(two, Target(value=1)) == ""
    assert told(two, Target(value=2, tolerance=0.1)) == "within the tolerance of 10%"
    assert told(two, Target(value=1.7)) == "the interval reaches beyond >= 1.7"
    own = outcomes()[2].model_copy(update={"reason": "the head is stored twice"})
    assert wording.reason(own) == "the head is stored twice"
    assert wording.reason(own.model_copy(update={"measured": None})) == "the head is stored twice"


def test_intervals_and_targets_by_hand() -> None:
    assert wording.interval(Measured(value=2, low=1.5, high=2.5, unit="x")) == "1.5 to 2.5 x"
    assert wording.interval(Measured(value=2, low=1.5, high=2.5)) == "1.5 to 2.5"
    assert wording.interval(Measured(value=2, low=2**10, high=2**21, unit="bytes")) == "1 KiB to 2 MiB"
    assert wording.interval(Measured(value=2, unit="x")) == ""
    assert wording.measured(Measured(value=2, low=1.5, high=2.5, unit="x")) == "2 x (1.5 to 2.5 x)"
    assert wording.measured(None) == ""
    loss = Outcome(component="correctness", check="accuracy_loss", status="SKIPPED",
                   target=Target(value=0.01, at_least=False))  # fmt: skip
    assert wording.target(loss) == "≤ 1 %", "the unit of what was not measured follows from the threshold's name"
    assert wording.target(loss.model_copy(update={"target": None})) == ""
    assert wording.target(loss.model_copy(update={"check": "something"})) == "≤ 0.01"
