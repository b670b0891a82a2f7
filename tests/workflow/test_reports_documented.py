"""docs/reports.md names every field of every report, every threshold and its value, and every exit code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ryzen_compile import errors
from ryzen_compile.fields import Fields
from ryzen_compile.report import PassRecord, Report
from ryzen_compile.validate.outcome import STATUSES
from ryzen_compile.validate.thresholds import Thresholds
from ryzen_compile.workflow import report_schema
from ryzen_compile.workflow.report_schema import FinalReport, ValidationReport, json_schema

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "reports.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`([a-z_0-9]+)`", TEXT))


def fields(schema: dict[str, Any]) -> set[str]:
    kinds = [schema, *schema.get("$defs", {}).values()]
    return {name for kind in kinds for name in kind.get("properties", {})}


@pytest.mark.parametrize("kind", [FinalReport, ValidationReport, report_schema.TestReport])
def test_every_field_is_named(kind: type[Fields]) -> None:
    wanted = fields(json_schema(kind))
    assert len(wanted) > 10
    assert not wanted - NAMED


def test_every_field_of_an_artifacts_record_is_named() -> None:
    wanted = {*Report.__dataclass_fields__, *PassRecord.__dataclass_fields__}
    assert not wanted - NAMED


def test_every_threshold_is_named_with_its_value() -> None:
    for name, field in Thresholds.model_fields.items():
        if name != "tolerance":
            (line,) = [line for line in TEXT.splitlines() if line.startswith(f"| `{name}` | at ")]
            assert float(re.findall(r"at (?:least|most) ([\d.]+)", line)[0]) == field.default
            target = Thresholds().target(name)
            assert target is not None
            assert ("at least" in line) == target.at_least and ("advisory" in line) == target.advisory


def test_every_verdict_and_exit_code_is_explained() -> None:
    assert all(f"| {status} |" in TEXT for status in STATUSES)
    told = {int(code) for code in re.findall(r"\d+", " ".join(re.findall(r"^\| ([\d, ]+) \|", TEXT, re.MULTILINE)))}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code")]
    assert {kind.exit_code for kind in kinds} | {0, 130, 143} == told


def test_links_lead_to_headings_of_the_page() -> None:
    headings = re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert not set(re.findall(r"\]\(#([^)]+)\)", TEXT)) - anchors
