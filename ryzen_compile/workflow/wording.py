"""How figures are written for people: every report says a share, a size or a time in the same way."""

from __future__ import annotations

import math
import re

from ryzen_compile.validate.measured import Measured
from ryzen_compile.validate.outcome import Outcome, Target

# Characters that no page shows and that would make it invalid or misread: controls, marks that turn the direction of
# writing (a name could hide what follows it), halves of surrogate pairs, and noncharacters.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
_KIB = 1024.0


def printable(text: str) -> str:
    """``text`` with a replacement character for what no page can hold."""
    return _UNPRINTABLE.sub("\ufffd", text)


def number(value: float, digits: int = 4) -> str:
    """``digits`` significant digits, whole numbers from a thousand on with separators: ``7.412``, ``12,345``."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def size(count: float) -> str:
    """Bytes in the largest binary unit that leaves at least one: ``20.9 MiB``."""
    if not math.isfinite(count):
        return number(count)
    value, units = count, ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= _KIB and len(units) > 1:
        value, units = value / _KIB, units[1:]
    return f"{number(value, 3)} {units[0]}"


def duration(seconds: float) -> str:
    """``0.21 s``, ``12.4 s``, ``4 min 12 s``, ``1 h 03 min``."""
    if not math.isfinite(seconds):
        return number(seconds)
    if round(seconds, 1) < 60:
        return f"{seconds:.3g} s" if seconds >= 0.001 or seconds == 0 else f"{seconds * 1e3:.2g} ms"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def amount(value: float, unit: str, digits: int = 4) -> str:
    """A figure with its unit; shares as percentages, bytes in binary units."""
    if unit == "bytes":
        return size(value)
    if unit == "share":
        return f"{number(100 * value, digits)} %" if math.isfinite(value) else number(value)
    return f"{number(value, digits)} {unit}".rstrip()


def interval(figure: Measured, digits: int = 4) -> str:
    """``7.02 to 7.93 x``; empty where too little was measured for one."""
    if figure.low is None or figure.high is None:
        return ""
    low, high = amount(figure.low, figure.unit, digits), amount(figure.high, figure.unit, digits)
    tail = low.rpartition(" ")[2]
    shared = low.endswith(f" {tail}") and high.endswith(f" {tail}")
    return f"{low.removesuffix(f' {tail}') if shared else low} to {high}"


def measured(figure: Measured | None, digits: int = 4) -> str:
    """``7.41 x (7.02 to 7.93 x)``; empty for none."""
    if figure is None:
        return ""
    between = interval(figure, digits)
    return amount(figure.value, figure.unit, digits) + (f" ({between})" if between else "")


def target(outcome: Outcome) -> str:
    """What was wanted, in the unit of what was measured: ``≥ 2 x``; empty where nothing was."""
    wanted = outcome.target
    if wanted is None:
        return ""
    unit = outcome.measured.unit if outcome.measured is not None else _unit_of(outcome.check)
    return f"{_sign(wanted)} {amount(wanted.value, unit)}"


def reason(outcome: Outcome) -> str:
    """The check's reason without the figures that it repeats, for where these stand beside it in their unit."""
    text, figure, wanted = outcome.reason, outcome.measured, outcome.target
    if figure is None or wanted is None or not text.startswith(figure.to_text()):
        return text
    return text.removeprefix(figure.to_text()).removeprefix(f", expected {wanted.to_text()}").lstrip(":;, ")


def count(many: int, noun: str) -> str:
    """``1 check``, ``12 checks``."""
    return f"{many:,} {noun}" if many == 1 else f"{many:,} {noun}s"


def words(name: str) -> str:
    """A component's or a check's name as words: ``kv_cache`` becomes ``kv cache``."""
    return _WORDS.get(name, name.replace("_", " "))


_WORDS = {"kv_cache": "KV cache", "end_to_end": "end to end"}


def _sign(wanted: Target) -> str:
    return "≥" if wanted.at_least else "≤"


def _unit_of(check: str) -> str:
    """Of a threshold that was not measured: its name says it."""
    endings = {
        "speedup": "x",
        "ratio": "x",
        "saving": "share",
        "loss": "share",
        "rate": "share",
        "_ms": "ms",
        "per_second": "tok/s",
    }
    return next((unit for ending, unit in endings.items() if check.endswith(ending)), "")
