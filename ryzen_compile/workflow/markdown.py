"""``report.md``: the report in short, for a pull request.

What others named (models, passes, tests, reasons) is shown as it is and can do nothing: characters that Markdown or
HTML would act on become character references, so that a name ends no table cell, opens no tag and calls nobody.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ryzen_compile.validate.outcome import Outcome
from ryzen_compile.workflow import wording
from ryzen_compile.workflow.headlines import findings, headlines, sentence
from ryzen_compile.workflow.pass_rows import pass_rows
from ryzen_compile.workflow.report_schema import FinalReport, TestReport, ValidationReport

LISTED = 20  # findings, and tests that failed: a comment on a pull request holds 65,536 characters
TEXT_LENGTH = 500  # characters of a reason or a test's message
_SPECIAL = re.compile(r"[\\`*\[\]<#|~&$]|(?<![^\W_])_|_(?![^\W_])")
_UNFIT_FOR_BACKTICKS = re.compile(r"[`|\\<>&]")


def render_markdown(
    final: FinalReport, validation: ValidationReport | None = None, tests: TestReport | None = None
) -> str:
    """GitHub-flavoured Markdown. The same reports give the same text."""
    blocks = [
        f"## {prose(final.metadata.model)}: {final.summary.verdict}",
        prose(sentence(final)),
        _headlines(final, validation),
        _findings(final),
        _components(final),
        _passes(final),
        _tests(tests),
        _machine(final),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def prose(text: str, limit: int = TEXT_LENGTH) -> str:
    """``text`` on one line, as Markdown that shows exactly that; longer ones are cut."""
    line = _line(text, limit)
    # A name behind an "@" is told of the comment unless something stands between the two.
    return _SPECIAL.sub(_reference, line).replace("@", "@&#8203;").replace("://", "&#58;//").replace("www.", "www&#46;")


def code(text: str, limit: int = TEXT_LENGTH) -> str:
    """``text`` on one line in a fixed font; in a table's cell, too."""
    line = _line(text, limit)
    if not line:
        return ""
    return f"<code>{_SPECIAL.sub(_reference, line)}</code>" if _UNFIT_FOR_BACKTICKS.search(line) else f"`{line}`"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Cells are Markdown; columns of the numbers ``right`` are set to the right."""
    rule = ["---:" if i in right else "---" for i in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows))


def _line(text: str, limit: int) -> str:
    line = " ".join(wording.printable(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "\u2026"


def _reference(found: re.Match[str]) -> str:
    return f"&#{ord(found[0])};"


def _headlines(final: FinalReport, validation: ValidationReport | None) -> str:
    rows = [
        (one.label, f"**{one.value}**", one.interval, one.meaning, one.target, one.status or "")
        for one in headlines(final, validation)
    ]
    heads = ("", "measured", "95 % interval", "", "wanted", "verdict")
    return table(heads, rows, right=(1,)) if rows else ""


def _findings(final: FinalReport) -> str:
    found = findings(final)
    if not found:
        return ""
    lines = ["### Failures and warnings", "", *(_finding(one) for one in found[:LISTED])]
    return "\n".join([*lines, *_more(len(found))])


def _finding(outcome: Outcome) -> str:
    wanted = f", wanted {wording.target(outcome)}" if outcome.target is not None else ""
    reason = wording.reason(outcome)
    told = [
        prose(wording.measured(outcome.measured) + wanted) if outcome.measured is not None else "",
        prose(reason) if reason else "",
        f"to blame: {code(outcome.culprit)}" if outcome.culprit else "",
        f"measure again: {code(outcome.command)}" if outcome.command else "",
    ]
    details = "; ".join(part for part in told if part)
    return f"- **{outcome.status}** {prose(wording.words(outcome.check))}{': ' if details else ''}{details}"


def _components(final: FinalReport) -> str:
    rows = [
        (
            wording.words(component.component),
            component.status,
            prose(wording.words(one.check)) + (f" ({one.status})" if one.status != component.status else ""),
            wording.measured(one.measured, 3),
            wording.target(one),
        )
        for component in final.components
        for one in component.checks
    ]
    if not rows:
        return ""
    # A component's name and verdict stand in its first row only.
    shown = [row if i == 0 or rows[i - 1][0] != row[0] else ("", "", *row[2:]) for i, row in enumerate(rows)]
    return "### Checks\n\n" + table(("component", "verdict", "check", "measured", "wanted"), shown, right=(3, 4))


def _passes(final: FinalReport) -> str:
    rows = [
        (
            code(row.name),
            prose(row.promise),
            prose(row.status),
            f"{row.hits}",
            f"{row.left}",
            f"{row.nodes_before} → {row.nodes_after}",
            row.moved,
        )
        for row in pass_rows(final.passes)
    ]
    heads = ("pass", "promise", "status", "hits", "left alone", "nodes", "largest error, or KL")
    title = f"{len(rows)} pass{'' if len(rows) == 1 else 'es'}"
    return _folded(title, table(heads, rows, right=(3, 4, 5, 6))) if rows else ""


def _tests(tests: TestReport | None) -> str:
    if tests is None:
        return ""
    counts = ", ".join(f"{many} {prose(status)}" for status, many in tests.counts.items())
    rate = f": {wording.amount(tests.pass_rate, 'share')} passed" if tests.pass_rate is not None else ""
    reason = f" No test ran: {prose(tests.reason)}." if tests.reason else ""
    bad = [case for case in tests.tests if case.status in ("failed", "error")]
    lines = [
        "### Tests",
        "",
        f"{counts}{rate}, in {wording.duration(tests.seconds)}.{reason} {code(tests.command)}",
        *([""] if bad else []),
        *(f"- {case.status} {code(f'{case.file}::{case.name}')}: {prose(case.message, 200)}" for case in bad[:LISTED]),
        *_more(len(bad)),
    ]
    return "\n".join(lines)


def _machine(final: FinalReport) -> str:
    meta = final.metadata
    facts = [
        ("machine", f"{prose(meta.machine)} ({prose(meta.microarchitecture)})"),
        ("threads", f"{meta.threads}"),
        ("memory", wording.size(meta.memory_bytes)),
        ("system", prose(meta.system)),
        ("Python", prose(meta.python)),
        *((prose(name), prose(version)) for name, version in sorted(meta.libraries.items())),
        ("instruction sets", prose(", ".join(meta.isa))),
        ("artifact", code(meta.artifact)),
        ("written", f"{prose(meta.written)} by {prose(meta.made_by)}"),
        ("make it again", code(meta.command)),
    ]
    return _folded("Machine and versions", table(("", ""), facts))


def _folded(title: str, block: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{block}\n\n</details>"


def _more(many: int) -> list[str]:
    return [f"- and {many - LISTED} more"] if many > LISTED else []
