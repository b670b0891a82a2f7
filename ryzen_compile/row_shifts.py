"""Reads off a Program with a cache how the keys of every layer can be moved to other positions, or why they cannot."""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from ryzen_compile.errors import UnsupportedError
from ryzen_compile.interpret import interpret
from ryzen_compile.numerics.row_shift import RowShift
from ryzen_compile.numerics.rows import RowFormat
from ryzen_compile.program import Program, is_call, module_path, shape
from ryzen_compile.spec import CacheSlot

TOLERANCE = 1e-4  # of a table's unit circle, and
ROUNDING = 2.0**-22  # of every radian: what a model loses that multiplies positions and frequencies in float32
PRODUCTS = (torch.ops.aten.linear, torch.ops.ryzen.linear_nbits, torch.ops.ryzen.linear_ternary)
SAMPLES = 4096  # rows of a table that are read
OUTSIDE = "positions enter outside of the attention"


def row_shifts(program: Program) -> tuple[RowShift, ...]:
    """One per slot; raises ``UnsupportedError`` where a key's position cannot be changed once it is stored."""
    positions = program.input("position_ids")
    if positions is not None and positions.users:
        reader = next(iter(positions.users))
        raise UnsupportedError(f"{OUTSIDE}, in {module_path(reader) or reader.name}: its keys cannot be moved")
    nodes = [n for n in program.graph.nodes if is_call(n, torch.ops.ryzen.cached_attention)]
    return tuple(_shift(program, node, slot) for node, slot in zip(nodes, program.slots, strict=True))


def _shift(program: Program, node: fx.Node, slot: CacheSlot) -> RowShift:
    cos, sin, k_scale = node.args[6], node.args[7], node.args[14]
    scale = None if k_scale is None else _value(program, k_scale)
    frequencies = np.empty(0) if cos is None else _frequencies(_value(program, cos), _value(program, sin), node)
    if cos is None and _comes_from_rotation(node):
        raise UnsupportedError(f"keys of {module_path(node) or node.name} are rotated before they reach the cache")
    mean = None if node.args[20] is None else _value(program, node.args[20])
    interleaved, turned = bool(node.args[13]), bool(node.args[18])
    return RowShift(
        RowFormat.parse(slot.key_format), slot.head_dim, frequencies, interleaved, scale, turned=turned, mean=mean
    )


def _comes_from_rotation(node: fx.Node) -> bool:
    """Whether a rotation by position lies between this attention's keys and the projection they come from."""
    pending = [node.args[1] if isinstance(node.args[1], fx.Node) else node.args[0]]
    seen: set[fx.Node] = set()
    while pending:
        one = pending.pop()
        if is_call(one, torch.ops.ryzen.rotary):
            return True
        if one in seen or is_call(one, *PRODUCTS):
            continue
        seen.add(one)
        pending.extend(source for source in one.all_input_nodes if shape(source))
    return False


def _frequencies(cos: np.ndarray, sin: np.ndarray, node: fx.Node) -> np.ndarray:
    """Radians per position, from the tables' first step; every later row has to be that many steps."""
    length = np.hypot(cos[0], sin[0])  # some models scale their tables
    if len(cos) < 2:
        raise UnsupportedError(
            f"the rotation of {module_path(node) or node.name} has one position only: no step to read"
        )
    steps = _turn(cos, sin, np.array([1]), np.zeros(cos.shape[1]))[0]
    # The first step alone is too coarse for thousands of them: refine it on rows a little further each time.
    for row in np.unique(np.geomspace(1, len(cos) - 1, 64).astype(np.int64)):
        steps = steps + _turn(cos, sin, row[None], steps)[0] / row
    rows = np.unique(np.linspace(1, len(cos) - 1, SAMPLES).astype(np.int64))
    # Every row is rounded by itself: least squares over many says more than the last one.
    steps = steps + (rows[:, None] * _turn(cos, sin, rows, steps)).sum(0) / np.square(rows.astype(np.float64)).sum()
    angles = rows[:, None] * steps
    apart = np.maximum(np.abs(np.cos(angles) * length - cos[rows]), np.abs(np.sin(angles) * length - sin[rows]))
    if not (apart <= (TOLERANCE + ROUNDING * np.abs(angles)) * np.maximum(1.0, length)).all():  # NaN is refused too
        raise UnsupportedError(
            f"the rotation of {module_path(node) or node.name} does not turn evenly with the position (off by "
            f"{apart.max():.1e}): its keys cannot be moved"
        )
    return np.asarray(steps)


def _turn(cos: np.ndarray, sin: np.ndarray, rows: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """How far the angles in ``rows`` are from so many ``steps``, (len(rows), R) in -pi .. pi."""
    turn = np.arctan2(sin[rows].astype(np.float64), cos[rows].astype(np.float64)) - rows[:, None] * steps
    apart: np.ndarray = turn - 2 * np.pi * np.rint(turn / (2 * np.pi))
    return apart


def _value(program: Program, node: fx.Node) -> np.ndarray:
    value: np.ndarray = interpret(program, {}, [node])[0].numpy()
    return value
