"""``report.html``: one page with everything in it, which needs no network and no script."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile.errors import UnsupportedError
from ryzen_compile.train.metrics_schema import Report as TrainingMetrics
from ryzen_compile.workflow import wording
from ryzen_compile.workflow.headlines import findings, headlines, sentence
from ryzen_compile.workflow.html import charts
from ryzen_compile.workflow.html.pass_views import pass_views
from ryzen_compile.workflow.html.svg_figure import HINT
from ryzen_compile.workflow.pass_rows import pass_rows
from ryzen_compile.workflow.report_schema import FinalReport, TestCase, TestReport, ValidationReport

if TYPE_CHECKING:
    import jinja2

TEMPLATE = "report.html.j2"
SHOWN_DETAILS = 3000  # characters of the parts of a figure; the JSON report has all
SHOWN_MESSAGES = 30  # tests that failed, with their whole messages


def render_html(
    final: FinalReport,
    validation: ValidationReport | None = None,
    tests: TestReport | None = None,
    training: TrainingMetrics | None = None,
) -> str:
    """The page. The same reports give the same text. Sections for which there are no data are left out.

    Raises ``UnsupportedError`` where jinja2 or, if there is something to draw, matplotlib is not installed.
    """
    environment = _environment()
    inference = validation.inference if validation is not None else None
    drawn = {
        "latency": charts.latency_chart(inference),
        "memory": charts.memory_chart(inference),
        "quality": charts.quality_chart(validation.pareto if validation is not None else ()),
        "pareto": charts.pareto_chart(validation.pareto if validation is not None else ()),
        "step_cost": charts.step_cost_chart(validation.step_cost if validation is not None else {}),
        "acceptance": charts.acceptance_chart(validation.acceptance if validation is not None else {}),
        "training": charts.training_chart(training),
        "parts": charts.parts_chart(final.end_to_end),
    }
    facts = {
        "final": final,
        "validation": validation,
        "inference": inference,
        "tests": tests,
        "training": training,
        "charts": drawn,
        "sentence": sentence(final),
        "headlines": headlines(final, validation),
        "findings": findings(final),
        "passes": pass_views(pass_rows(final.passes), final.changes),
        "bad_tests": _failed(tests),
        "shown_messages": SHOWN_MESSAGES,
    }
    facts["sections"] = _sections(facts)
    return wording.printable(environment.get_template(TEMPLATE).render(facts))


def _sections(facts: dict[str, Any]) -> dict[str, str]:
    """Ids and titles of the sections for which there is something to show, in their order."""
    final, validation, drawn = facts["final"], facts["validation"], facts["charts"]
    found = {
        "findings": ("Failures and warnings", facts["findings"]),
        "checks": ("Checks", final.components),
        "parts": ("The whole and its parts", final.end_to_end),
        "latency": ("Latency", facts["inference"]),
        "memory": ("Memory", facts["inference"]),
        "quality": ("Quality", validation and (validation.text or validation.pareto)),
        "pareto": ("Size against quality", validation and validation.pareto),
        "speculation": ("Several tokens a step", drawn["step_cost"] or drawn["acceptance"]),
        "training": ("Training", facts["training"] or final.training),
        "passes": ("Passes", facts["passes"]),
        "tests": ("Tests", facts["tests"]),
        "phases": ("Phases", final.phases),
    }
    return {key: title for key, (title, data) in found.items() if data}


def _failed(tests: TestReport | None) -> list[TestCase]:
    cases = tests.tests if tests is not None else ()
    return [case for case in cases if case.status in ("failed", "error")]


def _environment() -> jinja2.Environment:
    try:
        import jinja2
    except ImportError:
        raise UnsupportedError("the page is made with jinja2, which is not installed", hint=HINT) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": wording.number,
        "size": wording.size,
        "duration": wording.duration,
        "amount": wording.amount,
        "measured": wording.measured,
        "interval": wording.interval,
        "target": wording.target,
        "words": wording.words,
        "reason": wording.reason,
        "parts": _parts,
        "plain": _plain,
    }
    return environment


def _parts(details: dict[str, Any]) -> str:
    """The parts of a figure as indented JSON, cut where it gets long."""
    text = json.dumps(details, indent=2, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN_DETAILS else text[:SHOWN_DETAILS] + "\n\u2026 the rest is in the JSON report"


def _plain(value: Any) -> str:
    """A value of JSON as text: numbers as reports write them, what has parts as JSON."""
    if isinstance(value, str):
        return value or "\u2013"
    if isinstance(value, float):
        return wording.number(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN_DETAILS else text[:SHOWN_DETAILS] + "\u2026"
