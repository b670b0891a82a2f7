"""Charts: nothing for no data, valid drawings otherwise, the same bytes every time, and the figures they were given."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from xml.etree import ElementTree as ET

import pytest

from ryzen_compile.errors import UnsupportedError
from ryzen_compile.validate.measured import Measured
from ryzen_compile.workflow.html import charts
from ryzen_compile.workflow.report_schema import EndToEnd
from ryzen_compile.workflow.wording import printable
from tests.workflow.example_reports import (
    HOSTILE,
    engine,
    final_report,
    inference,
    point,
    ratio,
    training_metrics,
    validation_report,
)
from tests.workflow.page_checks import check_svg

pytest.importorskip("matplotlib")

DRAWN: dict[str, Callable[[], str]] = {
    "latency": lambda: charts.latency_chart(inference()),
    "memory": lambda: charts.memory_chart(inference()),
    "quality": lambda: charts.quality_chart(validation_report().pareto),
    "pareto": lambda: charts.pareto_chart(validation_report().pareto),
    "step_cost": lambda: charts.step_cost_chart(validation_report().step_cost),
    "acceptance": lambda: charts.acceptance_chart(validation_report().acceptance),
    "training": lambda: charts.training_chart(training_metrics()),
    "parts": lambda: charts.parts_chart(final_report().end_to_end),
}


def words(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in check_svg(svg).iter("text")]


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    return {name: draw() for name, draw in DRAWN.items()}


def test_charts_are_valid_drawings_without_colours_of_their_own(drawn: dict[str, str]) -> None:
    for name, svg in drawn.items():
        root = check_svg(svg)
        assert len(words(svg)) >= 4, name
        assert "http" not in svg and "<metadata" not in svg and "<style" not in svg
        styles = [element.get("style", "") for element in root.iter()]
        # All that is painted takes a variable of the page, so that it is seen on light and on dark.
        assert not [style for style in styles if re.search(r"(fill|stroke): #", style)], name
        assert any("var(--accent" in style for style in styles) and "font-family" not in svg


def test_ids_of_all_charts_of_a_page_differ(drawn: dict[str, str]) -> None:
    found = [name for svg in drawn.values() for name in re.findall(r' id="([^"]+)"', svg)]
    assert len(found) > 10 and len(found) == len(set(found))


@pytest.mark.parametrize("name", DRAWN)
def test_the_same_figures_give_the_same_bytes(drawn: dict[str, str], name: str) -> None:
    assert DRAWN[name]() == drawn[name]


def test_a_style_of_the_user_changes_nothing(drawn: dict[str, str]) -> None:
    import matplotlib as mpl

    before = mpl.rcParams["lines.linewidth"]
    with mpl.rc_context({"lines.linewidth": 9, "axes.facecolor": "red", "font.size": 31, "svg.fonttype": "path"}):
        assert DRAWN["step_cost"]() == drawn["step_cost"]
        assert mpl.rcParams["lines.linewidth"] == 9, "the user's own style is put back"
    assert mpl.rcParams["lines.linewidth"] == before


def test_nothing_is_drawn_of_nothing() -> None:
    assert charts.latency_chart(None) == charts.memory_chart(None) == charts.training_chart(None) == ""
    assert charts.quality_chart(()) == charts.pareto_chart(()) == charts.parts_chart(None) == ""
    assert charts.step_cost_chart({}) == charts.step_cost_chart({5: {}}) == ""
    assert charts.acceptance_chart({}) == charts.acceptance_chart({0: 0, 1: 0}) == ""
    bare = training_metrics().model_copy(update={"batches": (), "validations": ()})
    assert charts.training_chart(bare) == ""


def test_values_stand_beside_their_bars(drawn: dict[str, str]) -> None:
    report = inference()
    found = words(drawn["latency"])
    for name in ("baseline", "optimized"):
        assert f"{report.engines[name].ttft_ms.median:.3g}" in found
        assert f"{report.engines[name].tpot_ms.median:.3g}" in found
    found = words(drawn["memory"])
    for size in (197_132_288, 150_994_944, 22_020_096, 1_572_864):
        assert f"{size / 2**20:.3g}" in found
    assert "0.31 %" in words(drawn["quality"]) and "0.22" in words(drawn["quality"])
    assert "7.41 x" in words(drawn["parts"]) and "native operators" in words(drawn["parts"])


def test_memory_that_was_not_measured_is_left_out() -> None:
    nothing = {"peak_memory_bytes": None, "mean_memory_bytes": None}
    engines = {name: engine(name, 1.0).model_copy(update=nothing) for name in ("baseline", "optimized")}
    found = words(charts.memory_chart(inference().model_copy(update={"engines": engines})))
    assert not [word for word in found if "Peak" in word or "Mean" in word]
    assert [word for word in found if "Weights" in word]
    engines["baseline"] = engine("baseline", 1.0)
    alone = charts.memory_chart(inference().model_copy(update={"engines": engines}))
    assert [word for word in words(alone) if "Peak" in word]


def bar_widths(svg: str) -> list[float]:
    """Of the bars, in pixels, from their paths: M left top, L right top and so on."""
    found = []
    for element in check_svg(svg).iter("path"):
        style, path = element.get("style", ""), element.get("d", "")
        if ("--accent" in style or "--baseline" in style) and style.startswith("fill: var") and path.count("L") == 3:
            xs = [float(x) for x in re.findall(r"[ML] ([-\d.]+) ", path)]
            found.append(max(xs) - min(xs))
    return found


def test_lengths_of_bars_are_in_proportion() -> None:
    report = inference()
    widths = bar_widths(charts.latency_chart(report))
    assert len(widths) == 4
    wanted = report.engines["baseline"].ttft_ms.median / report.engines["optimized"].ttft_ms.median
    # matplotlib writes six digits.
    assert widths[0] / widths[1] == pytest.approx(wanted, rel=1e-3)


def test_engines_far_apart_are_points_on_a_logarithmic_axis() -> None:
    engines = {"baseline": engine("slow", 1.0), "optimized": engine("fast", 0.01)}
    assert bar_widths(charts.latency_chart(inference().model_copy(update={"engines": engines}))) == []


def test_recipes_that_differ_by_orders_of_magnitude_are_apart(drawn: dict[str, str]) -> None:
    close = charts.pareto_chart((point("a", 3.0, 0.010, 0.0, 100.0), point("b", 4.0, 0.011, 0.0, 90.0)))
    assert {"a", "b"} <= set(words(close))
    assert {"fp32", "int8", "int4", "int4-dkm", "int3", "ternary"} <= set(words(drawn["pareto"]))


def test_names_of_points_do_not_meet(drawn: dict[str, str]) -> None:
    """By a bound on their boxes: 0.6 em a character, as wide as common fonts get on average."""
    boxes = []
    for element in check_svg(drawn["pareto"]).iter("text"):
        name, style = "".join(element.itertext()), element.get("style", "")
        if name in {"fp32", "int8", "int4", "int4-dkm", "int3", "ternary"}:
            size = float(re.findall(r"font-size: ([\d.]+)px", style)[0])
            x, y, width = float(element.get("x", 0)), float(element.get("y", 0)), 0.6 * size * len(name)
            anchor = re.findall(r"text-anchor: (\w+)", style)[0]
            left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * width
            boxes.append((left, y - size, left + width, y))
    assert len(boxes) == 6
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert not (a[0] < b[2] and b[0] < a[2] and a[1] + 2 < b[3] and b[1] + 2 < a[3]), (a, b)


def test_figures_that_are_no_numbers_are_said_and_not_drawn() -> None:
    lost = point("broken", 2.0, 0.1, 0.1, 5.0).model_copy(
        update={"kl": Measured(value=float("inf")), "accuracy_loss": Measured(value=float("nan"), unit="share")}
    )
    found = words(charts.quality_chart((lost, point("int4", 3.0, 0.01, 0.002, 9.0))))
    assert "infinite" in found and "not a number" in found
    assert "broken" not in words(charts.pareto_chart((lost, point("int4", 3.0, 0.01, 0.002, 9.0))))
    assert charts.pareto_chart((lost,)) == ""
    assert charts.quality_chart((lost,))
    whole = EndToEnd(speed_up=ratio(2), prefill=Measured(value=float("nan"), unit="x"), decode=ratio(3), parts={},
                     interaction={})  # fmt: skip
    assert "first token" not in words(charts.parts_chart(whole))


def test_losses_that_are_gains_are_drawn() -> None:
    svg = charts.quality_chart((point("better", 3.0, 0.0, -0.01, 9.0), point("worse", 3.0, 0.02, 0.01, 9.0)))
    assert "-1 %" in words(svg)


def test_names_are_text() -> None:
    points = tuple(point(name, 3.0 + i, 0.01 * (1 + i), 0.002, 9.0) for i, name in enumerate(HOSTILE))
    parts = {name: Measured(value=2.0, unit=name) for name in HOSTILE}
    whole = EndToEnd(speed_up=ratio(2), prefill=ratio(2), decode=ratio(3), parts=parts, interaction={})
    known = {"svg", "g", "path", "text", "use", "defs", "clipPath", "rect"}
    for svg in (charts.quality_chart(points), charts.pareto_chart(points), charts.parts_chart(whole)):
        root: ET.Element = check_svg(svg)
        assert {element.tag for element in root.iter()} <= known
        assert not [key for element in root.iter() for key in element.attrib if key.startswith("on")]
        said = [word.replace("_", " ") for word in words(svg)]  # as names of parts are shown
        for name in HOSTILE:
            beginning = " ".join(printable(name).replace("_", " ").split())[:14]
            assert [word for word in said if word.startswith(beginning)], f"{name!r} is not shown"


def test_a_name_is_cut_to_the_room_it_has() -> None:
    found = words(charts.quality_chart((point("r" * 300, 3.0, 0.01, 0.002, 9.0),)))
    assert [word for word in found if set(word) == {"r", "\u2026"} and len(word) == 20]


def test_an_axis_of_tokens_has_whole_numbers() -> None:
    found = words(charts.acceptance_chart({0: 5, 1: 2}))
    assert not [word for word in found if re.fullmatch(r"0\.\d+", word)]
    assert {"0", "1"} <= set(found) and "71" in " ".join(found), "5 of 7 drafts"


def test_without_matplotlib_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r"matplotlib.*pip install 'ryzen-compile\[report\]'"):
        charts.latency_chart(inference())
    assert charts.latency_chart(None) == "", "nothing to draw needs nothing"
