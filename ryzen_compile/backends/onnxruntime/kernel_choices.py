"""Which block length and which arithmetic would be fastest for an artifact's quantized products, on this machine.

The artifact is not touched, and cannot be: another block length means other weights. What is timed is a stand-in, a
graph of the same products with made-up weights, shrunk in proportion where the whole would not fit, but not below what
the last-level cache holds: a decode step is bound by memory and must stay so. Every stand-in is open alone, for the
reason that ``tune`` gives. Quality is another matter: a shorter block is the finer grid, and ``export`` decides it.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, helper

from ryzen_compile.backends.onnxruntime import PREFILL_NAME
from ryzen_compile.backends.onnxruntime.artifact_check import check_model
from ryzen_compile.backends.onnxruntime.emit import CONTRIB
from ryzen_compile.errors import ArtifactError, UsageError

BLOCKS = (32, 64, 128, 256)
LEVELS = (0, 4)  # accuracy_level: activations as they are (float32), or rounded to int8 block by block
PROMPT = 512  # rows of the second timing
LEAST_BYTES, MOST_BYTES = 64 << 20, 192 << 20  # of a stand-in's codes
BEYOND_CACHE = 2  # times the last-level cache that a stand-in should have
MEMORY_SHARE = 16  # of the memory at hand one part may be codes: they exist in the file, packed, and as scales too
MOST_SIZE = 1 << 24
LEAST_ROWS = 16
LEAST_SAMPLES, MOST_SAMPLES = 3, 30
WORTHWHILE = 0.05  # of the time: smaller gains are not worth another export
ALIGNMENT = 4096


@dataclass(frozen=True)
class NbitsShape:
    """``count`` products of (M, ``depth``) with (``rows``, ``depth``) weights of ``bits`` each."""

    rows: int
    depth: int
    bits: int
    block: int
    accuracy_level: int
    count: int = 1

    @property
    def bytes(self) -> int:
        """Of the codes of one of them."""
        return self.rows * self.depth * self.bits // 8


@dataclass(frozen=True)
class KernelTiming:
    """Seconds that all of the artifact's quantized products would take, for one token and for ``PROMPT`` at once."""

    block: int
    accuracy_level: int
    token_seconds: float
    prompt_seconds: float


@dataclass(frozen=True)
class KernelChoices:
    """``timings`` in the order of blocks and levels, ``now`` what the artifact has, most often; ``skipped`` says why
    there are none."""

    timings: tuple[KernelTiming, ...] = ()
    now: tuple[int, int] | None = None
    advice: tuple[str, ...] = ()
    skipped: str = ""


def nbits_shapes(model: ModelProto) -> tuple[NbitsShape, ...]:
    """The products of ``model`` with quantized weights, equal ones counted; empty where there are none.

    Raises ``ArtifactError`` for sizes that no such operator has: they come from a file and decide what is allocated.
    """
    found = Counter(_shape(node) for node in _nodes(model) if node.op_type == "MatMulNBits" and node.domain == CONTRIB)
    return tuple(replace(shape, count=count) for shape, count in sorted(found.items(), key=_order))


def kernel_choices(
    directory: Path,
    *,
    threads: int,
    spinning: bool = True,
    budget_seconds: float = 20.0,
    memory_bytes: int | None = None,
    l3_bytes: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> KernelChoices:
    """Times every pair of ``BLOCKS`` and ``LEVELS`` for the artifact in ``directory``, which has been checked.

    ``budget_seconds`` is an aim, ``LEAST_SAMPLES`` of each are taken however long they last. ``memory_bytes`` bounds
    the stand-in, ``l3_bytes`` says what it should exceed.
    """
    if threads < 1 or not 0 < budget_seconds < float("inf"):
        raise UsageError(f"expected at least 1 thread and a budget above 0, got {threads} and {budget_seconds}")
    shapes = nbits_shapes(check_model(directory))
    if not shapes:
        return KernelChoices(skipped="the artifact has no products with quantized weights")
    common = max(shapes, key=lambda s: s.bytes * s.count)
    parts, share = stand_in(shapes, _target_bytes(memory_bytes, l3_bytes))
    pairs = [(block, level) for block in BLOCKS for level in LEVELS]
    timings = []
    for block, level in pairs:
        if progress is not None:
            progress(f"timing blocks of {block} with {_arithmetic(level)} activations")
        with tempfile.TemporaryDirectory(prefix="ryzen_compile-tune-") as folder:
            path = write_stand_in(Path(folder) / "model.onnx", parts, block, level)
            token, prompt = _time(path, parts, threads, spinning, budget_seconds / len(pairs))
        timings.append(KernelTiming(block, level, token / share, prompt / share))
    now = (common.block, common.accuracy_level)
    # A second form for prompts multiplies other weights with another operator: what is timed here says nothing of it.
    return KernelChoices(tuple(timings), now, advise(timings, now, prompts=not (directory / PREFILL_NAME).exists()))


def advise(timings: Sequence[KernelTiming], now: tuple[int, int], *, prompts: bool = True) -> tuple[str, ...]:
    """One line for a token and, with ``prompts``, one for a prompt: what is fastest, and by how much against ``now``
    (block, level)."""
    lines = []
    wanted: list[tuple[str, Callable[[KernelTiming], float]]] = [("one token", lambda t: t.token_seconds)]
    if prompts:
        wanted.append((f"a prompt of {PROMPT}", lambda t: t.prompt_seconds))
    for what, seconds in wanted:
        best = min(timings, key=seconds)
        name = f"blocks of {best.block} with {_arithmetic(best.accuracy_level)} activations"
        own = next((t for t in timings if (t.block, t.accuracy_level) == now), None)
        if own is None:
            lines.append(f"for {what}, {name} are fastest; blocks of {now[0]}, as now, were not timed")
        elif (gain := 1 - seconds(best) / seconds(own)) < WORTHWHILE:
            lines.append(f"for {what}, nothing is more than {100 * WORTHWHILE:.0f} % faster than what the artifact has")
        else:
            lines.append(
                f"for {what}, {name} take {1e3 * seconds(best):.3g} ms instead of {1e3 * seconds(own):.3g} "
                f"({100 * gain:.0f} % less): export it again so, if the quality allows"
            )
    return tuple(lines)


def stand_in(shapes: Sequence[NbitsShape], target_bytes: int) -> tuple[tuple[NbitsShape, ...], float]:
    """Fewer or narrower products in the same proportions, of about ``target_bytes``; and which share of ``shapes``
    they are. Rows are independent of each other, so half of them take half of the time."""
    total = sum(shape.bytes * shape.count for shape in shapes)
    wanted = target_bytes / total
    if wanted >= 1:
        return tuple(shapes), 1.0
    parts = []
    for shape in shapes:
        copies = math.ceil(shape.count * wanted)
        rows = round(shape.rows * shape.count * wanted / copies / LEAST_ROWS) * LEAST_ROWS
        rows = min(shape.rows, max(LEAST_ROWS, rows))
        parts.append(replace(shape, rows=rows, count=copies))
    return tuple(parts), sum(part.bytes * part.count for part in parts) / total


def write_stand_in(path: Path, parts: Sequence[NbitsShape], block: int, level: int) -> Path:
    """A model of ``parts`` side by side with made-up weights in ``path``'s data file; one input a depth."""
    graph = onnx.GraphProto(name="products")
    random = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8)
    with path.with_name(f"{path.name}.data").open("wb") as stream:
        for depth in sorted({part.depth for part in parts}):
            graph.input.append(helper.make_tensor_value_info(f"x{depth}", TensorProto.FLOAT, ["M", depth]))
        for number, part in enumerate(each for each in parts for _ in range(each.count)):
            blocks = -(-part.depth // block)
            # Different ones in every product: ONNX Runtime packs equal weights once, and the caches would hold them.
            codes = np.resize(np.roll(random, number), (part.rows, blocks, block * part.bits // 8))
            scales = np.full((part.rows, blocks), 0.01, np.float32)
            graph.initializer.extend([_stored(f"w{number}", codes, stream), _stored(f"s{number}", scales, stream)])
            graph.node.append(
                helper.make_node(
                    "MatMulNBits",
                    [f"x{part.depth}", f"w{number}", f"s{number}"],
                    [f"y{number}"],
                    domain=CONTRIB,
                    K=part.depth,
                    N=part.rows,
                    bits=part.bits,
                    block_size=block,
                    accuracy_level=level,
                )
            )
            graph.output.append(helper.make_tensor_value_info(f"y{number}", TensorProto.FLOAT, ["M", part.rows]))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def _time(path: Path, parts: Sequence[NbitsShape], threads: int, spinning: bool, seconds: float) -> tuple[float, float]:
    """Median seconds for one row and for ``PROMPT`` rows."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = {part.depth for part in parts}
    medians = []
    for rows in (1, PROMPT):
        random = np.random.default_rng(0)
        feeds = {f"x{depth}": random.standard_normal((rows, depth), dtype=np.float32) for depth in sorted(inputs)}
        session.run(None, feeds)
        samples: list[float] = []
        until = time.perf_counter() + seconds / 2
        while len(samples) < LEAST_SAMPLES or (len(samples) < MOST_SAMPLES and time.perf_counter() < until):
            start = time.perf_counter()
            session.run(None, feeds)
            samples.append(time.perf_counter() - start)
        medians.append(statistics.median(samples))
    return medians[0], medians[1]


def _target_bytes(memory_bytes: int | None, l3_bytes: int | None) -> int:
    wanted = min(max(LEAST_BYTES, BEYOND_CACHE * (l3_bytes or 0)), MOST_BYTES)
    return wanted if memory_bytes is None else max(1 << 20, min(wanted, memory_bytes // MEMORY_SHARE))


def _nodes(model: ModelProto) -> Iterator[NodeProto]:
    yield from model.graph.node
    for function in model.functions:
        yield from function.node


def _shape(node: NodeProto) -> NbitsShape:
    values = {attribute.name: attribute.i for attribute in node.attribute}
    try:
        shape = NbitsShape(
            values["N"], values["K"], values.get("bits", 4), values["block_size"], values.get("accuracy_level", 0)
        )
    except KeyError as error:
        raise ArtifactError(f"a MatMulNBits lacks the attribute {error}", hint="export it again") from error
    if not (1 <= shape.rows <= MOST_SIZE and 1 <= shape.depth <= MOST_SIZE and shape.bits in (2, 4, 8)):
        raise ArtifactError(f"a MatMulNBits has {shape.rows} x {shape.depth} weights of {shape.bits} bits")
    return shape


def _order(entry: tuple[NbitsShape, int]) -> tuple[int, ...]:
    shape, _ = entry
    return shape.depth, shape.rows, shape.bits, shape.block, shape.accuracy_level


def _stored(name: str, array: np.ndarray, stream: Any) -> TensorProto:
    """An external tensor over ``array``, written where a mapping may begin."""
    stream.seek(-(-stream.tell() // ALIGNMENT) * ALIGNMENT)
    tensor = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL)
    tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    place = {"location": Path(stream.name).name, "offset": str(stream.tell()), "length": str(array.nbytes)}
    for key, value in place.items():
        tensor.external_data.add(key=key, value=value)
    stream.write(array.data)
    return tensor


def _arithmetic(level: int) -> str:
    return "int8" if level == 4 else "float32"
