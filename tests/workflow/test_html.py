"""The page: valid, self-contained, inert whatever names hold, the same every time, and showing what it was given."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ryzen_compile.errors import UnsupportedError
from ryzen_compile.validate.measured import Measured
from ryzen_compile.validate.outcome import Outcome
from ryzen_compile.workflow.html import charts
from ryzen_compile.workflow.html import page as page_module
from ryzen_compile.workflow.html.page import render_html
from ryzen_compile.workflow.html.pass_views import LINE_LENGTH, pass_views
from ryzen_compile.workflow.pass_rows import pass_rows
from ryzen_compile.workflow.report_schema import FinalReport, PhaseRecord
from tests.workflow.example_reports import (
    HOSTILE,
    change,
    components,
    final_report,
    outcomes,
    passes,
    point,
    record,
    small_graph,
    suite_report,
    training_metrics,
    validation_report,
)
from tests.workflow.page_checks import check_page, drawings

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

SECTIONS = ("findings", "checks", "parts", "latency", "memory", "quality", "pareto", "speculation", "training",
            "passes", "tests", "phases")  # fmt: skip
MAX_BYTES = 3_000_000


STAND_IN = '<svg class="chart" role="img" aria-label="a chart" viewBox="0 0 1 1"></svg>'
DRAWING = {name: draw for name, draw in vars(charts).items() if name.endswith("_chart")}


@pytest.fixture(scope="module", autouse=True)
def remembered() -> Iterator[None]:
    """Charts of the same figures are drawn once: they take nearly all of a page's time, and have tests of their own."""
    drawn: dict[tuple[str, str], str] = {}

    def remember(name: str, draw: Callable[[object], str]) -> Callable[[object], str]:
        def found(figures: object) -> str:
            key = (name, repr(figures))
            if key not in drawn:
                drawn[key] = draw(figures)
            return drawn[key]

        return found

    with pytest.MonkeyPatch.context() as patch:
        for name, draw in DRAWING.items():
            patch.setattr(charts, name, remember(name, draw))
        yield


@pytest.fixture(scope="module")
def text() -> str:
    return render_html(final_report(), validation_report(), suite_report(), training_metrics())


def bare_report() -> FinalReport:
    empty = {"components": (), "end_to_end": None, "training": None, "passes": {}, "changes": (), "phases": ()}
    return final_report(**empty)


def sections(text: str) -> list[str]:
    return re.findall(r'<section id="([a-z]+)"', text)


# --- the page as a whole ----------------------------------------------------------------------------------------------
def test_the_page_is_valid_and_loads_nothing(text: str) -> None:
    page = check_page(text)
    assert sections(text) == list(SECTIONS)
    assert page.links == {f"#{name}" for name in SECTIONS}
    assert len(drawings(text)) == 8 + 2, "eight charts, and a drawing for each pass that changed something"
    # Not even as text: nothing of the page's own needs an address.
    assert "http://" not in text and "https://" not in text


def test_the_page_is_the_same_for_the_same_reports(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, draw in DRAWING.items():
        monkeypatch.setattr(charts, name, draw)
    assert render_html(final_report(), validation_report(), suite_report(), training_metrics()) == text


def test_tables_say_what_their_cells_are_of(text: str) -> None:
    page = check_page(text)
    scopes = [value for tag, name, value in page.attributes if tag == "th" and name == "scope"]
    assert len(scopes) == page.tags["th"] > 100
    assert set(scopes) == {"col", "row", "rowgroup"}
    # A table may be wider than a telephone: it scrolls in a box of its own, which a keyboard reaches.
    boxes = text.count('class="scroll" tabindex="0" role="region" aria-label=')
    assert boxes == text.count('class="scroll"') and boxes >= 9


def test_the_template_states_language_width_and_both_colour_schemes(text: str) -> None:
    assert '<html lang="en">' in text and 'name="viewport"' in text and '<meta charset="utf-8">' in text
    assert "color-scheme: light dark" in text and "prefers-color-scheme: dark" in text and "@media print" in text


def many_passes(line: str) -> str:
    """Thirty passes with two hundred lines each, and the largest drawing that a record of changes holds."""
    names = [f"pass_{i}" for i in range(30)]
    one = small_graph().nodes[3]
    nodes = tuple(one.model_copy(update={"id": f"%{i}", "label": f"%11.self_attention.linear_{i}"}) for i in range(40))
    edges = tuple((f"%{i}", f"%{j}") for i in range(40) for j in range(i + 1, 40) if (i + 2 * j) % 13 == 0)
    graph = small_graph().model_copy(update={"nodes": nodes, "edges": edges})
    changes = tuple(change(name).model_copy(update={"diff": (line,) * 200, "graph": graph}) for name in names)
    final = final_report(passes={"records": [record(name) for name in names]}, changes=changes)
    return render_html(final, validation_report(), suite_report(), training_metrics())


def test_size_stays_small_with_many_passes() -> None:
    line = "-%11.q_proj.linear = aten.linear(%11.input_norm.rms_norm, @11.q_proj.weight)  : f32[B,T,2048]  # layers.11"
    text = many_passes(line)
    check_page(text)
    assert text.count(" = aten.linear(%11.input_norm") == 6000, "lines of usual length are all there"
    assert len(text.encode()) < MAX_BYTES


def test_size_stays_small_with_long_lines() -> None:
    text = many_passes("-%0.q = aten.linear(%0.norm" + ", 'x'" * 100 + ")")
    check_page(text)
    kept = text.count('<span class="out">-%0.q = aten.linear')
    (omitted,) = set(re.findall(r"(\d+) more lines left out", text))
    assert kept % 30 == 0 and kept // 30 + int(omitted) == 200 + 40
    assert len(text.encode()) < MAX_BYTES


# --- hostile names ----------------------------------------------------------------------------------------------------
def named(name: str) -> tuple[FinalReport, dict[str, object]]:
    """All reports with ``name`` wherever others choose what stands there."""
    found = [
        one.model_copy(
            update={"check": name, "reason": name, "culprit": name, "command": name, "details": {name: name}}
        )
        for one in outcomes()
    ]
    graph = small_graph(name)
    graph = graph.model_copy(update={"nodes": tuple(n.model_copy(update={"label": name}) for n in graph.nodes)})
    changed = change(name).model_copy(update={"operators": {name: 1}, "diff": (f"+{name}", name), "graph": graph})
    site = {"node": name, "module": name, "note": name}
    final = final_report(
        model=name,
        components=components(found),
        passes={"records": [record(name, promise=name, status=name, detail=name, hits=[site], misses=[site])]},
        changes=(changed,),
        training={name: name},
        phases=(PhaseRecord(phase="train", status="skipped", seconds=1, reason=name),),
    )
    whole = final.end_to_end
    assert whole is not None
    parts = {"parts": {name: Measured(value=2, unit=name)}, "interaction": {name: 1.0}}
    meta = dict.fromkeys(("made_by", "written", "command", "artifact", "machine", "system", "python"), name)
    final = final.model_copy(
        update={
            "end_to_end": whole.model_copy(update=parts),
            "metadata": final.metadata.model_copy(update={**meta, "libraries": {name: name}, "isa": (name,)}),
        }
    )
    case = suite_report().tests[-2].model_copy(update={"name": name, "file": name, "message": name})
    skipped = case.model_copy(update={"status": "skipped", "properties": {name: name}})
    tests = suite_report(command=name, reason=name, counts={name: 1}, tests=(case, skipped))
    validation = validation_report(pareto=(point(name, 3.0, 0.01, 0.003, 7.0), point("b", 4.0, 0.02, 0.004, 8.0)))
    inference = validation.inference
    assert inference is not None and validation.text is not None
    engines = {key: one.model_copy(update={"name": name}) for key, one in inference.engines.items()}
    ratios = {name: Measured(value=2, unit=name)}
    validation = validation.model_copy(
        update={
            "inference": inference.model_copy(update={"engines": engines, "speed_ups": ratios}),
            "text": validation.text.model_copy(update={"name": name}),
        }
    )
    return final, {"validation": validation, "tests": tests}


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text_wherever_they_stand(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    final, others = named(name)
    if "<script>" not in name:  # names in charts have a test of their own; one of them here is enough
        for chart in DRAWING:
            monkeypatch.setattr(charts, chart, lambda figures: STAND_IN)
    found = render_html(final, **others)  # type: ignore[arg-type]
    page = check_page(found)
    assert sections(found) == list(SECTIONS)
    # What the page is made of is the template's: no name added a tag or an attribute of a kind that it lacks.
    known = check_page(text)
    assert page.tags.keys() <= known.tags.keys()
    assert {(tag, key) for tag, key, _ in page.attributes} <= {(tag, key) for tag, key, _ in known.attributes}
    shown = " ".join(re.sub("[\x00-\x08\x1b\u202e]", "\ufffd", name).split())
    assert page.text.count(shown) > 30, "the name is shown, not lost"
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\u202e]", found)


def test_halves_of_surrogate_pairs_do_not_break_the_file(tmp_path: Path) -> None:
    final = final_report(passes={"records": [record("half \ud800 a pair")]}, changes=())
    text = render_html(final)
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    assert "half \ufffd a pair" in text


# --- what is shown ----------------------------------------------------------------------------------------------------
def test_the_top_says_verdict_figures_and_how_to_make_it_again(text: str) -> None:
    top = text[text.index("<header>") : text.index("</header>")]
    shown = check_page(text).text
    assert '<span class="badge FAIL">FAIL</span>' in top
    assert "1 of 8 checks failed: compression ratio; 1 check left out." in top
    for label, value in (("End to end", "7.41 x"), ("Decode", "8.03 x"), ("First token", "5.2 x"), ("Size", "1.83 x"),
                         ("Accuracy loss", "0.31 %"), ("KV cache", "73.4 %")):  # fmt: skip
        assert re.search(rf'class="label">{label}.*?class="value">{value}<', top, re.DOTALL), label
    assert "7.04 to 7.78 x" in top and "0.12 to 0.5 %" in top
    assert "Example 9999X 2-Core Processor (zen4), 2 threads, 24 GiB of memory, Linux 6.1 x86_64" in shown
    assert "ryzen-compile run --config examples/configs/workflow.yaml --seed 7" in top
    assert "2026-11-30T04:05:06+00:00" in top and "onnxruntime" in top


def test_what_failed_comes_before_what_nearly_did_with_its_culprit(text: str) -> None:
    found = text[text.index('id="findings"') : text.index('id="checks"')]
    failed, warned = found.index(">FAIL<"), found.index(">WARN<")
    assert failed < warned
    assert found.index("model.embed_tokens.weight") in range(failed, warned)
    assert found.index("ryzen-compile export examples/tiny-lm out --recipe int4") in range(failed, warned)
    assert found.index("suffix drafter") > warned
    assert ">PASS<" not in found


def test_every_check_has_its_row(text: str) -> None:
    found = text[text.index('id="checks"') : text.index('id="parts"')]
    rows = re.findall(r"<tr><th scope=\"row\">.*?</tr>", found, re.DOTALL)
    assert len(rows) == len(outcomes())
    (size,) = [row for row in rows if "compression ratio" in row]
    assert "≥ 2 x" in size and "1.83 x" in size and ">FAIL<" in size
    (loss,) = [row for row in rows if "accuracy loss" in row]
    assert "≤ 1 %" in loss and "0.31 %" in loss and "0.12 to 0.5 %" in loss
    (skipped,) = [row for row in rows if "SKIPPED" in row]
    assert "≤ 120 ms" in skipped and "no machine to hold it to" in skipped
    assert "parts of the figure" in rows[0] and "matmul_nbits" in rows[0] and "matmul_nbits" not in rows[1]


def test_statistics_of_every_engine_are_listed(text: str) -> None:
    found = text[text.index('id="latency"') : text.index('id="memory"')]
    report = validation_report().inference
    assert report is not None
    for engine in report.engines.values():
        for field in ("ttft_ms", "tpot_ms", "itl_ms", "request_ms", "tokens_per_second"):
            spread = getattr(engine, field)
            for value in (spread.mean, spread.median, spread.p95, spread.minimum, spread.maximum):
                assert f'<td class="n">{f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"}</td>' in found
    memory = text[text.index('id="memory"') : text.index('id="quality"')]
    assert "188 MiB" in memory and "25.8 MiB" in memory and "peak is 7.3 times" in memory


def test_each_pass_shows_counts_reasons_diff_and_drawing(text: str) -> None:
    found = text[text.index('<section id="passes"') : text.index('<section id="tests"')]
    assert "211 → 187" in found and "KL 4.2e-03, top-1 98.1%" in found and "2.4e-06" in found
    folded = found.split('<details class="pass">')[1:]
    assert len(folded) == 3, "a pass that found nothing has nothing to fold out"
    merged = folded[0]
    assert "2 × no activation follows <code>model.layers.0.mlp.up</code>" in merged
    assert merged.index("2 × no activation") < merged.index("1 × its weight has another reader")
    assert "<code>aten.linear</code> \u221212" in merged and "<code>aten.cat</code> +6" in merged
    assert merged.count('<span class="in">') == 2 and merged.count('<span class="place">') == 3
    assert "40 more lines left out" in merged and "5 more nodes of this place not drawn" in merged
    assert merged.count("<svg") == 1 and "the logits moved by 3.1e-2" in folded[2]


def test_tests_that_failed_are_told_with_their_message(text: str) -> None:
    found = text[text.index('<section id="tests"') :]
    assert "45 passed, 1 failed, 0 error, 1 skipped: 97.83 % passed, in 2 min 31 s." in found
    assert "assert 1.83 &gt;= 2\n  where 1.83 = ratio(&lt;artifact&gt;)" in found
    assert found.count('<tr><th scope="row"><span class="name">test_') == 47
    assert "needs a CUDA device" in found and "tokens_per_second 1,690" in found


def test_many_failures_are_counted_not_all_told() -> None:
    case = suite_report().tests[-2]
    tests = suite_report(tests=tuple(case.model_copy(update={"name": f"test_{i}"}) for i in range(67)))
    found = render_html(final_report(), None, tests)
    assert found.count('<div class="message">') == page_module.SHOWN_MESSAGES
    assert "The messages of 37 more are in the JSON report." in found


# --- present or absent ------------------------------------------------------------------------------------------------
def test_a_report_of_nothing_is_a_valid_page_without_sections() -> None:
    text = render_html(bare_report())
    page = check_page(text)
    assert sections(text) == [] and "Nothing was checked." in page.text
    assert drawings(text) == [] and page.tags["table"] == 0


ABSENT = {
    "findings": {"components": components([outcomes()[0]])},
    "checks": {"components": ()},
    "parts": {"end_to_end": None},
    "passes": {"passes": {}, "changes": ()},
    "phases": {"phases": ()},
}


@pytest.mark.parametrize("section", ABSENT)
def test_a_section_without_data_is_left_out_and_not_linked(section: str) -> None:
    text = render_html(final_report(**ABSENT[section]), validation_report(), suite_report(), training_metrics())
    check_page(text)
    also = {"checks": {"findings"}}.get(section, set())  # what was not checked cannot have failed
    assert set(SECTIONS) - set(sections(text)) == {section} | also


def test_sections_of_the_validation() -> None:
    def left(**changed: object) -> set[str]:
        text = render_html(final_report(), validation_report(**changed), suite_report(), training_metrics())
        check_page(text)
        return set(SECTIONS) - set(sections(text))

    assert left(inference=None) == {"latency", "memory"}
    assert left(pareto=()) == {"pareto"}
    assert left(pareto=(), text=None) == {"pareto", "quality"}
    assert left(step_cost={}) == left(acceptance={}) == set()
    assert left(step_cost={}, acceptance={}) == {"speculation"}


def test_without_validation_tests_and_training_the_rest_is_there() -> None:
    text = render_html(final_report(training=None))
    check_page(text)
    missing = {"latency", "memory", "quality", "pareto", "speculation", "training", "tests"}
    assert set(SECTIONS) - set(sections(text)) == missing
    assert "training" in sections(render_html(final_report())), "the run's own summary is shown without metrics, too"


def test_passes_and_changes_are_joined_by_name_in_their_order() -> None:
    rows = pass_rows({"records": [record("twice"), record("once"), record("twice", hits=[])]})
    first, second, other = change("twice", 3), change("twice", 5), change("gone", 7)
    views = pass_views(rows, [first, other, second])
    assert [(view.row.name, len(view.diff)) for view in views] == [("twice", 3), ("once", 0), ("twice", 5), ("gone", 7)]
    assert views[3].row.status == "applied" and not pass_views([], [])


def test_a_line_of_a_diff_is_cut_at_its_end() -> None:
    row = pass_rows({"records": [record("one")]})
    longest = "+" + "x" * (LINE_LENGTH - 1)
    (view,) = pass_views(row, [change("one").model_copy(update={"diff": (longest, longest + "y")})])
    assert view.diff == (("in", longest), ("in", longest[:-1] + "\u2026"))


def test_a_report_without_the_artifacts_record_still_has_its_passes() -> None:
    assert pass_rows({}) == [] and pass_rows({"records": [{}]})[0].name == ""
    text = render_html(final_report(passes={}))
    check_page(text)
    assert text.count('<details class="pass">') == 2
    assert len(pass_rows(passes())) == 4


# --- colours ----------------------------------------------------------------------------------------------------------
def luminance(color: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_stands_out_from_what_it_stands_on(text: str) -> None:
    """4.5 for text and 3 for what is drawn: levels AA of WCAG 2.1."""
    light, dark = (
        dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", part))
        for part in re.findall(r":root \{(.*?)\}", text.partition("</style>")[0], re.DOTALL)
    )
    assert light.keys() == dark.keys()
    for scheme in (light, dark):
        for ink in ("ink", "muted", "accent", "added", "removed", "warned"):
            assert contrast(scheme[ink], scheme["paper"]) >= 4.5, ink
        pairs = [(state, f"{state}-tint") for state in ("added", "removed", "warned")]
        pairs += [("muted", "context-tint")]
        pairs += [(ink, f"{state}-tint") for ink in ("ink", "muted") for state in ("added", "removed", "context")]
        for ink, ground in pairs:
            assert contrast(scheme[ink], scheme[ground]) >= 4.5, (ink, ground)
        assert contrast(scheme["baseline"], scheme["paper"]) >= 3


def test_contrast_by_hand() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


# --- what is missing --------------------------------------------------------------------------------------------------
def test_without_jinja2_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UnsupportedError, match=r"jinja2.*pip install 'ryzen-compile\[report\]'"):
        render_html(final_report())


def test_a_report_without_anything_to_draw_needs_no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, draw in DRAWING.items():
        monkeypatch.setattr(charts, name, draw)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "Optimization report" in render_html(bare_report())


def test_templates_ship_with_the_package() -> None:
    import tomllib

    root = Path(__file__).resolve().parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    assert "*.j2" in project["tool"]["setuptools"]["package-data"]["ryzen_compile.workflow.html"]
    assert {f"{name}.html.j2" for name in SECTIONS} < {
        path.name for path in Path(page_module.__file__).parent.iterdir()
    }


def test_a_check_without_measurement_or_target_has_a_row() -> None:
    lone = Outcome(component="kernels", check="kernel_speedup", status="SKIPPED", reason="no library")
    page = check_page(render_html(final_report(components=components([lone]))))
    assert "no library" in page.text and "Nothing was checked." in page.text
