"""The report says the same in text, Markdown, HTML and JSON, and its HTML can carry anything safely."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from ryzen_compile.passes.base import Site
from ryzen_compile.report import PassRecord, Report
from ryzen_compile.spec import ModelSpec

SPEC = ModelSpec(2, 4, 2, 16, 64, 99, 128, True, 1_234_567, "<b>llama & co</b>")
EVIL = "<script>alert('x')</script> & \"more\""
MISSES = (
    Site("mul_7", "model.layers.0.mlp", "one reason"),
    Site("mul_8", "", EVIL),
    Site("mul_9", "model.layers.1.mlp", "one reason"),
)
DETAIL = "logits moved by 1.00e-01 (rmse 2.00e-02), first in model.layers.1.mlp (add_5)"
HITS = (Site("a", "m"),) * 3
RECORDS = (
    PassRecord("canonicalize", "exact", "applied", HITS, (), 40, 31, {"aten.add": 2}, 0.0124, 1.5e-7, 1e-8),
    PassRecord("fuse_norm", "exact", "unchanged", (), MISSES, 31, 31, {"aten.add": 2}, 0.5),
    PassRecord("wrong", "exact", "rolled back", (), (), 31, 31, {"aten.add": 2}, 1.0, 0.1, 0.02, DETAIL),
    PassRecord("fancy", "exact", "unsupported", (), (), 31, 31, {"aten.mul": 1, "aten.add": 2}, 0.0),
)  # fmt: skip


@pytest.fixture
def report() -> Report:
    provenance = {"class": "LlamaForCausalLM", "torch": EVIL}
    return Report(SPEC, provenance, {"aten.view": 9, "aten.add": 11}, RECORDS, 3e-8, 1.25, {"recipe": "fp32"})


def test_hits_and_reasons(report: Report) -> None:
    assert report.hits() == {"canonicalize": 3, "fuse_norm": 0, "wrong": 0, "fancy": 0}
    assert RECORDS[1].reasons() == [("one reason", 2, MISSES[0]), (EVIL, 1, MISSES[1])]
    assert RECORDS[0].reasons() == []


def test_text(report: Report) -> None:
    lines = report.lines()
    assert lines[0].split() == ["pass", "status", "hits", "left", "nodes", "ms", "max", "error"]
    assert lines[1].split() == ["canonicalize", "applied", "3", "0", "40>31", "12", "1.5e-07"]
    assert lines[2].split() == ["fuse_norm", "unchanged", "0", "3", "31>31", "500"]
    assert lines[3:5] == ["    2 x one reason  [model.layers.0.mlp]", f"    1 x {EVIL}  [mul_8]"]
    assert lines[5].split()[:3] == ["wrong", "rolled", "back"] and lines[6] == f"    {DETAIL}"
    assert lines[-2:] == ["operators before: aten.add 11, aten.view 9", "operators after:  aten.add 2, aten.mul 1"]
    assert len({len(line) for line in (lines[0], lines[1], lines[5])}) == 1  # a table: the columns stand in line
    assert report.to_text() == "\n".join(lines) + "\n"
    short = report.lines(misses=False)
    assert len(short) == len(lines) - 2 and "one reason" not in report.to_text(misses=False)


def test_markdown(report: Report) -> None:
    text = report.to_markdown()
    lines = text.splitlines()
    assert lines[0] == "# <b>llama & co</b>: 1,234,567 parameters"
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(RECORDS) and {line.count("|") for line in table} == {8}
    assert "| canonicalize | applied | 3 | 0 | 40 → 31 | 12 | 1.5e-07 |" in table
    assert f"- **wrong** rolled back: {DETAIL}" in lines
    assert "- **fuse_norm**: 2 × one reason (`model.layers.0.mlp`)" in lines
    assert text.endswith("\n") and not text.endswith("\n\n")


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: set[str] = set()
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_html_holds_everything_and_runs_nothing(report: Report) -> None:
    text = report.to_html()
    page = Page(text)
    assert page.open == []  # every tag is closed, in order
    assert not {"script", "a", "link", "img", "iframe", "b"} & set(page.tags)
    assert not {"href", "src", "onclick", "onload", "style"} & page.attributes
    assert "http" not in text and "@import" not in text and "url(" not in text
    assert page.words.count(EVIL) == 2  # a reason and a fact, as they were written
    for part in ("<b>llama & co</b>", "1,234,567 parameters", DETAIL, "2 × one reason", "40 → 31", "recipe", "fp32"):
        assert part in page.words
    assert "aten.add 11, aten.view 9" in page.words and "aten.add 2, aten.mul 1" in page.words
    assert page.tags.count("tr") == 1 + len(RECORDS) + 2 + 1  # header, passes, two reasons, one detail


def test_json_round_trip(report: Report) -> None:
    value = json.loads(json.dumps(report.to_json(), allow_nan=False))
    records = tuple(
        PassRecord(**{**r, **{k: tuple(Site(**site) for site in r[k]) for k in ("hits", "misses")}})
        for r in value["records"]
    )
    again = Report(**{**value, "spec": ModelSpec(**value["spec"]), "records": records})
    assert again == report
    assert again.to_text() == report.to_text() and again.to_html() == report.to_html()


def test_a_run_without_passes() -> None:
    empty = Report(SPEC, {}, {"aten.add": 1}, ())
    assert empty.hits() == {}
    assert empty.lines()[-2:] == ["operators before: aten.add 1", "operators after:  aten.add 1"]
    assert "## " not in empty.to_markdown()
    assert Page(empty.to_html()).open == []
    assert json.loads(json.dumps(empty.to_json()))["records"] == []


def test_a_loss_is_shown_with_its_drift_in_json() -> None:
    record = PassRecord("quantize", "lossy", "applied", HITS, (), 9, 9, {}, 0.1, kl=0.0123, late_kl=0.02, top1=0.98)
    report = Report(SPEC, {}, {}, (record,))
    assert record.moved == "KL 1.2e-02" and report.lines()[1].split()[-2:] == ["KL", "1.2e-02"]
    assert "| KL 1.2e-02 |" in report.to_markdown() and "KL 1.2e-02" in Page(report.to_html()).words
    (found,) = json.loads(json.dumps(report.to_json()))["records"]
    assert (found["kl"], found["late_kl"], found["top1"], found["rmse"]) == (0.0123, 0.02, 0.98, None)


def test_what_was_done_at_one_place_is_said_in_words() -> None:
    """At several places it would be a list, which JSON has."""
    one, two = (
        PassRecord(name, "lossy", "applied", hits, (), 9, 9, {"aten.add": 2}, 0.1)
        for name, hits in (("single", (Site("a", "m", EVIL),)), ("double", (Site("a", "m", "first"),) * 2))
    )
    report = Report(SPEC, {}, {"aten.add": 2}, (one, two))
    assert f"    {EVIL}\n" in report.to_text(misses=False) and "first" not in report.to_text()
    assert f"- **single**: {EVIL}\n" in report.to_markdown() and "first" not in report.to_markdown()
    assert "&lt;script&gt;alert" in report.to_html() and EVIL not in report.to_html()
