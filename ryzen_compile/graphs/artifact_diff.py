"""What differs between two artifacts: what they were made from and how, what they take, and their graphs.

Pure functions of what manifests and graphs say; reading and checking them is the backend's, printing the caller's.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, JsonValue

from ryzen_compile.fields import Fields
from ryzen_compile.graphs.change import CONTEXT, operator_changes
from ryzen_compile.graphs.text import canonical_text
from ryzen_compile.graphs.view import GraphView, plain

# They record how an export went, in seconds too: two exports of one model never have the same.
RECORDS = frozenset({"report.json", "report.md", "report.html"})
SECTIONS = ("source", "recipe", "versions", "passes", "spec")
MAX_DEPTH = 8  # of settings; what is nested deeper, which we never write, is not looked into
MAX_VALUE = 200  # characters of a value in text


@dataclass(frozen=True)
class ArtifactFacts:
    """One artifact. ``name`` is what the user called it; ``token_bytes`` are those that a token adds to a cache,
    ``sequence_bytes`` those that a sequence takes for windows however short it is."""

    name: str
    manifest: Mapping[str, Any]
    graph: GraphView
    token_bytes: int
    sequence_bytes: int


class Difference(Fields):
    """A setting that the two do not share; ``only`` says which one has it, where the other has none."""

    what: str
    a: JsonValue = None
    b: JsonValue = None
    only: Literal["", "a", "b"] = ""

    def to_text(self) -> str:
        """``weights.bits: 4 -> 8``."""
        old = "(none)" if self.only == "b" else _shown(self.a)
        new = "(none)" if self.only == "a" else _shown(self.b)
        return f"{self.what}: {old} -> {new}"


class FileDifference(Fields):
    """A file by its size in bytes in each artifact, none where it is missing."""

    name: str
    a: int | None = Field(description="bytes")
    b: int | None = Field(description="bytes")
    same: bool = Field(description="equal SHA-256")

    def to_text(self) -> str:
        """``model.onnx.data: 10 bytes -> 20 bytes``."""
        if self.a == self.b:
            return f"{self.name}: {_bytes(self.a)}, other content"
        return f"{self.name}: {_bytes(self.a)} -> {_bytes(self.b)}"


class ArtifactDiff(Fields):
    """``a`` and ``b`` are the artifacts' names. ``differs`` leaves out files that only record how an export went."""

    a: str
    b: str
    differs: bool
    source: tuple[Difference, ...]
    recipe: tuple[Difference, ...]
    versions: tuple[Difference, ...]
    passes: tuple[Difference, ...] = Field(description="hits")
    spec: tuple[Difference, ...]
    cache: tuple[Difference, ...]
    files: tuple[FileDifference, ...]
    operators: dict[str, int] = Field(description="of b's graph that are more than in a's, or fewer")
    graph: tuple[str, ...] = Field(description="unified diff of the canonical texts")

    def to_text(self) -> str:
        """Section by section what differs, the graphs last; sections without a difference are left out."""
        lines = [f"--- {self.a}", f"+++ {self.b}"]
        for name in SECTIONS:
            lines += _section(name, [difference.to_text() for difference in getattr(self, name)])
        lines += _section("cache", _cache_lines(self.cache))
        lines += _section("files", self._file_lines())
        lines += _section("operators", [f"{op}: {count:+d}" for op, count in self.operators.items()])
        lines += ["graph", *self.graph] if self.graph else []
        if not self.differs:
            lines.append("no difference but in the records of the export" if self._others() else "no difference")
        return "\n".join(lines) + "\n"

    def _others(self) -> list[FileDifference]:
        return [file for file in self.files if not file.same]

    def _file_lines(self) -> list[str]:
        others = self._others()
        same = len(self.files) - len(others)
        return [*(file.to_text() for file in others), f"{same} more are the same"] if others else []


def diff_artifacts(a: ArtifactFacts, b: ArtifactFacts, context: int = CONTEXT) -> ArtifactDiff:
    """What differs from ``a`` to ``b``; ``context`` is the number of equal lines around changed ones of the graph."""
    sections = {name: _settings(a.manifest.get(name, {}), b.manifest.get(name, {})) for name in SECTIONS}
    cache = _differences(_cache(a), _cache(b))
    files = _files(a.manifest, b.manifest)
    operators = operator_changes(a.graph, b.graph)
    texts = canonical_text(a.graph), canonical_text(b.graph)
    graph = tuple(difflib.unified_diff(*texts, plain(a.name), plain(b.name), n=context, lineterm=""))
    other_files = any(not file.same and file.name not in RECORDS for file in files)
    return ArtifactDiff(
        a=plain(a.name),
        b=plain(b.name),
        differs=bool(any(sections.values()) or cache or other_files or operators or graph),
        cache=cache,
        files=files,
        operators=operators,
        graph=graph,
        **sections,
    )


def _settings(a: Any, b: Any) -> tuple[Difference, ...]:
    """By name, so that a group that only one has stands beside what the other has instead of it."""
    return tuple(sorted(_differences(_flat(a), _flat(b)), key=lambda difference: difference.what))


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Difference, ...]:
    found = []
    for what in dict.fromkeys((*a, *b)):
        if what not in a or what not in b:
            found.append(Difference(what=what, a=a.get(what), b=b.get(what), only="a" if what in a else "b"))
        elif a[what] != b[what] or type(a[what]) is not type(b[what]):  # 1 is no true
            found.append(Difference(what=what, a=a[what], b=b[what]))
    return tuple(found)


def _flat(value: Any) -> dict[str, Any]:
    """Settings by their dotted path; what is no setting (a list of numbers, something too deep) as one value."""
    return dict(_leaves(value, "", 0))


def _leaves(value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    nested = value.items() if isinstance(value, Mapping) else enumerate(value) if _is_table(value) else None
    if nested is None or not value:
        if path or value:
            yield plain(path), _encodable(value)
    elif depth >= MAX_DEPTH:
        yield plain(path), f"{len(value)} entries"
    else:
        for key, part in nested:
            yield from _leaves(part, f"{path}.{key}" if path else str(key), depth + 1)


def _encodable(value: Any) -> Any:
    """``value`` without halves of surrogate pairs, which JSON can spell and no file can hold."""
    if isinstance(value, list):
        return [_encodable(part) for part in value]
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _is_table(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(part, (dict, list)) for part in value)


def _cache(facts: ArtifactFacts) -> dict[str, Any]:
    totals = {"bytes per token": facts.token_bytes, "bytes per sequence, for windows": facts.sequence_bytes}
    return totals | {f"slot {name}": value for name, value in _flat(facts.manifest.get("slots", [])).items()}


def _files(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[FileDifference, ...]:
    old, new = a["files"], b["files"]
    return tuple(
        FileDifference(
            name=plain(name),
            a=old[name]["size"] if name in old else None,
            b=new[name]["size"] if name in new else None,
            same=name in old and name in new and old[name]["sha256"] == new[name]["sha256"],
        )
        for name in sorted({*old, *new})
    )


def _cache_lines(differences: Iterable[Difference]) -> list[str]:
    """A line for all slots that differ alike: ``slots 0, 1: key_format: "fp32" -> "int8"``."""
    slots: dict[str, list[str]] = {}
    lines = []
    for difference in differences:
        numbered = re.fullmatch(r"slot (\d+)\.(.+)", difference.what)
        if numbered is None:
            lines.append(difference.to_text())
        else:
            slots.setdefault(difference.model_copy(update={"what": numbered[2]}).to_text(), []).append(numbered[1])
    return lines + [f"{'slots' if len(n) > 1 else 'slot'} {', '.join(n)}: {text}" for text, n in slots.items()]


def _section(title: str, lines: list[str]) -> list[str]:
    return [title, *(f"  {line}" for line in lines)] if lines else []


def _shown(value: JsonValue) -> str:
    text = plain(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}..."


def _bytes(size: int | None) -> str:
    return "(none)" if size is None else f"{size:,} bytes"
