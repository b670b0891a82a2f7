"""A matplotlib figure as SVG that can be put into a page: text stays text, colours are the page's variables.

Colours are variables so that one drawing is readable on light and dark. matplotlib knows colours only, so it draws with
stand-ins (``INK``, ``ACCENT`` and so on), which are exchanged in what it wrote. The same figure gives the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree as ET

from ryzen_compile.errors import UnsupportedError
from ryzen_compile.workflow import wording

HINT = "pip install 'ryzen-compile[report]'"
INK, MUTED, LINE, PAPER, ACCENT, BASELINE = "#010101", "#020202", "#040404", "#060606", "#030303", "#050505"
_VARIABLES = {
    INK: "var(--ink, #1b1f24)",
    MUTED: "var(--muted, #5c6470)",
    LINE: "var(--line, #d5d9df)",
    PAPER: "var(--paper, #ffffff)",
    ACCENT: "var(--accent, #1f5fbf)",
    BASELINE: "var(--baseline, #8b94a1)",
}
WIDTH = 5.0  # inches of 72 units: what a page on a telephone shows without shrinking the text much
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # a tenth of the bytes of outlines, can be searched and copied, and takes the page's font
    "svg.hashsalt": "ryzen_compile",
    "text.parse_math": False,  # a name may hold dollar signs
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "figure.facecolor": "none",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
}
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_COLOR = re.compile("|".join(_VARIABLES))


@dataclass
class Chart:
    """``axes`` to draw in; ``svg`` is there once the block is left."""

    figure: Any
    axes: Sequence[Any]
    svg: str = field(default="")


@contextmanager
def chart(name: str, title: str, height: float, panels: tuple[int, int] = (1, 1), **axes: Any) -> Iterator[Chart]:
    """A figure of ``WIDTH`` x ``height`` inches with (rows, columns) of axes, drawn when the block ends.

    ``name`` goes before every id in it and must be unique in the page; ``title`` says what it shows to those who do
    not see it; ``axes`` are options of ``Figure.subplots``. Raises ``UnsupportedError`` without matplotlib.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError("charts are drawn with matplotlib, which is not installed", hint=HINT) from None
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the page's font draws it, not this one
        mpl.rcdefaults()  # a user's own style would change the page
        mpl.rcParams.update(_STYLE)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        made = Chart(figure, list(figure.subplots(*panels, squeeze=False, **axes).flat))
        yield made
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    made.svg = _inlined(wording.printable(file.getvalue()), name, title)


def plain_numbers(axis: Any) -> None:
    """Tick labels as reports write numbers, without powers of ten set as formulas or taken out of the labels."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: wording.number(value, 3)))
    axis.set_minor_formatter(NullFormatter())


def _inlined(text: str, name: str, title: str) -> str:
    root = ET.fromstring(text)  # noqa: S314 - matplotlib wrote it just now
    for parent in root.iter():
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    elements = list(root.iter())
    used = {target for element in elements for value in element.attrib.values() for target in _targets(value)}
    for element in elements:
        element.tag = _local(element.tag)
        element.attrib = {_local(key): value for key, value in element.attrib.items()}
        _set_apart(element.attrib, name, used)
    box = root.attrib["viewBox"]
    root.attrib = {"class": "chart", "role": "img", "aria-label": wording.printable(title), "viewBox": box}
    ET.indent(root, "")
    return ET.tostring(root, encoding="unicode")


def _set_apart(attributes: dict[str, str], name: str, used: set[str]) -> None:
    """Ids that nothing refers to go, others get ``name`` in front; colours become variables, the font the page's."""
    own = attributes.pop("id", None)
    if own in used:
        attributes["id"] = f"{name}-{own}"
    for key, value in attributes.items():
        if key == "href":
            attributes[key] = f"#{name}-{value[1:]}"
        elif key == "clip-path":
            attributes[key] = _REFERENCE.sub(rf"url(#{name}-\1)", value)
        elif key == "style":
            rules = [rule for rule in value.split("; ") if not rule.startswith("font-family:")]
            attributes[key] = _COLOR.sub(lambda found: _VARIABLES[found[0]], "; ".join(rules))


def _targets(value: str) -> list[str]:
    return [value[1:]] if value.startswith("#") else _REFERENCE.findall(value)


def _local(name: str) -> str:
    return name.rpartition("}")[2]
