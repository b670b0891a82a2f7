"""A graph as plain data: one form for the graph of a Program and for that of an artifact.

Whatever shows or compares graphs is thereby written once, and needs neither torch nor onnx. A view holds no values of
tensors. All of its text is printable and stands on one line, whatever a module or a file calls itself.
"""

from __future__ import annotations

from dataclasses import dataclass

# As they are written after a colon; what is not listed keeps the name it came with.
SHORT = {
    "float64": "f64",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "int64": "i64",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
    "int4": "i4",
    "int2": "i2",
    "uint64": "u64",
    "uint32": "u32",
    "uint16": "u16",
    "uint8": "u8",
    "uint4": "u4",
    "uint2": "u2",
}


@dataclass(frozen=True)
class ValueType:
    """``dims`` are numbers, or names and expressions of symbolic sizes (``B``, ``B*T``); none for what is no tensor,
    or a tensor whose rank is unknown."""

    dtype: str
    dims: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return self.dtype if self.dims is None else f"{self.dtype}[{','.join(self.dims)}]"


UNKNOWN = ValueType("?")


@dataclass(frozen=True)
class ValueView:
    """An input or a weight. ``name`` is what nodes call it, ``label`` the weight's qualified name in the model."""

    name: str
    type: ValueType
    label: str = ""


@dataclass(frozen=True)
class NodeView:
    """One call. ``inputs`` are names of values, empty ones stand for an optional tensor left out; ``outputs`` are the
    values it makes. ``attributes`` are its other arguments as text, without those that have their default.
    ``parameters`` are what the operator calls its inputs, one for each, where that is known."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[tuple[str, str], ...]
    types: tuple[ValueType, ...]
    module: str
    parameters: tuple[str, ...] = ()

    @property
    def shape(self) -> str:
        """Types and shapes of the outputs, ``f32[B,T,64]``; several are separated by commas."""
        return ", ".join(map(str, self.types))


@dataclass(frozen=True)
class GraphView:
    """``nodes`` are in the order in which they are computed, ``outputs`` names of values. ``functions`` are the bodies
    of what nodes call by name, sorted by name; a Program has none."""

    inputs: tuple[ValueView, ...]
    weights: tuple[ValueView, ...]
    nodes: tuple[NodeView, ...]
    outputs: tuple[str, ...]
    functions: tuple[tuple[str, GraphView], ...] = ()


def plain(text: str) -> str:
    """``text`` with everything but printable characters (line breaks, controls, marks that turn the direction of
    writing), and the backslash, as escapes: on one line, and different for different texts."""
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode("ascii") for c in text)
