"""A strict reading of a page: every tag closed in its order, ids unique, nothing loaded, nothing run."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
# What may not hold a block: a browser closes it by itself, and the page is another one than was written.
PHRASING_ONLY = {"p", "summary", "h1", "h2", "h3", "figcaption", "dt", "code", "span", "a"}
BLOCKS = {"p", "div", "ul", "ol", "dl", "table", "section", "figure", "h1", "h2", "h3", "pre", "details", "nav"}
LOADING = {"src", "srcset", "data", "action", "formaction", "poster", "background"}


class Page(HTMLParser):
    """Reads a page; raises ``AssertionError`` for what no valid page has."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.links: set[str] = set()
        self.uses: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        assert text.startswith("<!doctype html>\n"), text[:40]
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    @property
    def text(self) -> str:
        """What is shown, white space as one space."""
        return " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._start(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open or tag in VOID, f"<{tag}/> closes itself in XML only"
        self._start(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> within {self.open} at line {self.getpos()[0]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)

    def _start(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCKS:
            outer = PHRASING_ONLY.intersection(self.open)
            assert not outer, f"<{tag}> within {outer}"
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        self.tags[tag] += 1
        for name, value in attrs:
            self.attributes.append((tag, name, value or ""))
            if name == "id":
                self.ids[value or ""] += 1
            if name == "href":
                (self.links if tag == "a" else self.uses).add(value or "")


def check_page(text: str) -> Page:
    """The page, read; raises ``AssertionError`` where it is not valid, loads something, or could run something."""
    page = Page(text)
    twice = [name for name, times in page.ids.items() if times > 1]
    assert not twice, f"ids used twice: {twice}"
    assert not page.tags.keys() & {
        "script",
        "iframe",
        "object",
        "embed",
        "link",
        "img",
        "base",
        "form",
        "foreignobject",
    }
    assert page.tags["html"] == page.tags["head"] == page.tags["body"] == page.tags["main"] == page.tags["h1"] == 1
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), f"<{tag} {name}>"
        assert name not in LOADING, f"<{tag} {name}>"
        assert name == "aria-label" or not re.search(r"https?://|javascript:|url\((?!#)", value), (tag, name, value)
    for reference in page.links | page.uses:
        assert reference.startswith("#") and reference[1:] in page.ids, f"a link to {reference!r}, which is not here"
    for svg in drawings(text):
        check_svg(svg)
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "@import" not in style and "url(" not in style
    return page


def drawings(text: str) -> list[str]:
    return ["<svg" + part.partition("</svg>")[0] + "</svg>" for part in text.split("<svg")[1:]]


def check_svg(text: str) -> ET.Element:
    """The drawing, read as XML; raises ``AssertionError`` for ids that occur twice, or are used and not there."""
    root = ET.fromstring(text)  # noqa: S314 - drawn in the test that asks
    assert root.tag == "svg" and root.get("role") == "img" and root.get("aria-label")
    ids = Counter(element.get("id") for element in root.iter() if element.get("id"))
    assert all(times == 1 for times in ids.values()), ids
    used = set()
    for element in root.iter():
        for value in element.attrib.values():
            used |= {part.partition(")")[0] for part in value.split("url(#")[1:]}
        if element.get("href"):
            used.add(str(element.get("href"))[1:])
    assert used == set(ids), (used, ids)
    return root
