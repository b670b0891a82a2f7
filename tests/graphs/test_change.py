"""What a pass changed: counted, compared line by line, and drawn at its first place."""

from __future__ import annotations

from collections import Counter

import pytest

from ryzen_compile.config import Recipe
from ryzen_compile.graphs import change
from ryzen_compile.graphs.change import ChangeRecorder, PassChange, changes_between
from ryzen_compile.graphs.program_view import view_program
from ryzen_compile.graphs.text import canonical_text, names_of
from ryzen_compile.passes.base import Pass
from ryzen_compile.passes.canonicalize import Canonicalize
from ryzen_compile.passes.fuse_norm import FuseNorm
from ryzen_compile.pipeline import default_passes, run_passes
from ryzen_compile.program import Program, module_path
from ryzen_compile.report import PassRecord, Report
from tests.passes.graphs import captured

NORM = "model.layers.0.input_layernorm"


@pytest.fixture(scope="module")
def canonical() -> Program:
    return Canonicalize().run(captured("llama")).program


@pytest.fixture(scope="module")
def observed() -> tuple[ChangeRecorder, Program, Report]:
    recorder = ChangeRecorder()
    program, report = run_passes(captured("llama"), default_passes(Recipe()), observe=recorder)
    return recorder, program, report


def test_a_pass_that_did_nothing_changed_nothing(canonical: Program) -> None:
    found = changes_between("idle", "unchanged", canonical, canonical)
    assert found == PassChange(name="idle", status="unchanged", operators={}, diff=())
    assert (found.diff_omitted, found.graph) == (0, None)
    copied = changes_between("copying", "applied", canonical, canonical.copy())
    assert copied.diff == () and copied.graph is None and not copied.operators


def test_the_first_fused_norm(canonical: Program) -> None:
    fused = FuseNorm().run(canonical).program
    found = changes_between("fuse_norm", "applied", canonical, fused)
    left = {n.name for n in fused.graph.nodes}
    norm = [n for n in canonical.graph.nodes if module_path(n) == NORM and n.name not in left]
    drawn = found.graph
    assert drawn is not None and drawn.cut == 0
    removed = [n for n in drawn.nodes if n.state == "removed"]
    assert len(removed) == len(norm) >= 5 and {n.module for n in removed} == {NORM}
    assert Counter(n.op for n in removed) == Counter(f"aten.{n.target._opname}" for n in norm)
    (added,) = [n for n in drawn.nodes if n.state == "added"]
    assert (added.op, added.label, added.module) == ("ryzen.rms_norm", "%0.input_layernorm.rms_norm", NORM)
    around = {n.label for n in drawn.nodes if n.state == "context"}
    assert around == {
        "%embed_tokens.embedding", "@0.input_layernorm.weight",
        "%0.q_proj.linear", "%0.k_proj.linear", "%0.v_proj.linear",
    }  # fmt: skip
    readers = {f"%0.{name}_proj.linear" for name in "qkv"}
    assert {b for a, b in drawn.edges if a == added.id} == readers
    assert {a for a, b in drawn.edges if b == added.id} == {"%embed_tokens.embedding", "@0.input_layernorm.weight"}
    assert found.operators["ryzen.rms_norm"] == 5 and found.operators["aten.rsqrt"] == -5
    assert all(line[0] in " +-@" for line in found.diff) and found.diff_omitted == 0
    assert sum(line.startswith("+%") for line in found.diff) >= 5 and "---" not in found.diff[0]


def test_every_pass_of_a_run_is_recorded(observed: tuple[ChangeRecorder, Program, Report]) -> None:
    recorder, program, report = observed
    assert [(c.name, c.status) for c in recorder.changes] == [(r.name, r.status) for r in report.records]
    counts = Counter(report.captured_ops)
    for found in recorder.changes:
        assert bool(found.diff) == bool(found.graph) == (found.status == "applied"), found.name
        assert all(found.operators.values())
        counts.update(found.operators)
        assert found == PassChange.model_validate_json(found.model_dump_json())
    assert {op: n for op, n in counts.items() if n} == Counter(program.ops())


def test_a_node_keeps_its_name_through_a_run() -> None:
    recorder, views = ChangeRecorder(), []

    def both(record: PassRecord, before: Program, after: Program) -> None:
        recorder(record, before, after)
        views.append((view_program(before), view_program(after)))

    run_passes(captured("llama"), default_passes(Recipe()), observe=both)
    names, first = names_of(views[0][0]), {}
    for (before, after), found in zip(views, recorder.changes, strict=True):
        old, names = canonical_text(before, names), names_of(after, (before, names))
        new = canonical_text(after, names)
        assert {line[1:] for line in found.diff if line[0] == "-"} <= set(old), found.name
        assert {line[1:] for line in found.diff if line[0] == "+"} <= set(new), found.name
        for node in after.nodes:
            assert first.setdefault((node.name, node.op, node.module), names.nodes[node.name]) == names.nodes[node.name]
    assert len(first) > 50


def test_a_long_diff_is_cut_between_hunks(canonical: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = FuseNorm().run(canonical).program
    whole = changes_between("fuse_norm", "applied", canonical, fused).diff
    starts = [i for i, line in enumerate(whole) if line.startswith("@@")]
    assert len(starts) >= 3 and starts[0] == 0
    assert starts[1] < (starts[2] - 1) // 2 and starts[-1] > len(whole) // 2  # so that each case below is one
    for limit, kept in (
        (len(whole), len(whole)),
        (len(whole) - 1, starts[-1]),
        (starts[2], starts[2]),
        (starts[2] - 1, starts[2] - 1),  # whole hunks would be less than half
        (starts[1] - 1, starts[1] - 1),  # the first is longer than the limit
    ):
        monkeypatch.setattr(change, "MAX_LINES", limit)
        found = changes_between("fuse_norm", "applied", canonical, fused)
        assert found.diff == whole[:kept] and found.diff_omitted == len(whole) - kept


class Wrong(FuseNorm):
    """Needs an operator that no backend has."""

    name = "wrong"
    produces = frozenset({"ryzen::nothing"})


def test_what_was_not_kept_changed_nothing(canonical: Program) -> None:
    recorder = ChangeRecorder()
    passes: tuple[Pass, ...] = (Wrong(), FuseNorm())
    run_passes(canonical, passes, supported_ops=FuseNorm.produces, observe=recorder)
    assert [(c.name, c.status, bool(c.diff)) for c in recorder.changes] == [
        ("wrong", "unsupported", False), ("fuse_norm", "applied", True),
    ]  # fmt: skip


def test_a_recorder_can_see_several_runs(canonical: Program) -> None:
    recorder = ChangeRecorder()
    for _ in range(2):
        run_passes(canonical, (FuseNorm(),), observe=recorder)
    assert recorder.changes[0] == recorder.changes[1]
