"""An artifact's operators of one kind, ready to run: in a session as the engine makes it, and in PyTorch.

Both sides get the same random inputs and, where they store floats, the same cache. Weights of products are random on
PyTorch's side; all other constants are the model's own on both.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from ryzen_compile.backends.onnxruntime import eager_operators, native
from ryzen_compile.backends.onnxruntime.artifact import Artifact
from ryzen_compile.backends.onnxruntime.artifact_check import check_model
from ryzen_compile.backends.onnxruntime.attention import padded_head_dim
from ryzen_compile.backends.onnxruntime.claim_report import ClaimReport
from ryzen_compile.backends.onnxruntime.operator_graphs import LAST, TOTAL, OperatorGraph, operator_graph
from ryzen_compile.backends.onnxruntime.operator_sites import KINDS, Attention, Kind, Norm, Product
from ryzen_compile.backends.onnxruntime.session import LOAD_ERRORS, NATIVE_ERRORS, SessionOptions, runtime_options
from ryzen_compile.errors import ArtifactError, MemoryLimitError, RyzenCompileError, UnsupportedError, UsageError
from ryzen_compile.numerics.rows import RowFormat
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.spec import CacheSlot
from ryzen_compile.validate.machine import read_machine

SAID = 5  # reasons to leave nodes out


@dataclass(frozen=True)
class Subject:
    """One kind. ``ours()`` writes ``outputs``, in the order of the graph's sites; ``theirs()``, in ``inference_mode``,
    returns tensors of the same meaning. ``native`` says that all nodes run on our own operators."""

    graph: OperatorGraph
    native: bool
    ours: Bound
    theirs: eager_operators.Run
    inputs: Mapping[str, np.ndarray]

    @property
    def outputs(self) -> list[np.ndarray]:
        """One array for each site."""
        return [self.ours.arrays[site.out] for site in self.graph.sites]


class Bound:
    """A session with ``arrays`` bound to its inputs and outputs by name, and a cache as past and as present at once."""

    def __init__(
        self, session: Any, graph: OperatorGraph, arrays: dict[str, np.ndarray], cache: KVCache | None
    ) -> None:
        self.arrays, self._cache = arrays, cache  # bound by address: they have to stay
        self._run, self._binding = session.run_with_iobinding, session.io_binding()
        read = {value.name for value in session.get_inputs()}
        for name, array in arrays.items():
            self._bind(name, array, output=name not in read)
        for site in graph.sites:
            if isinstance(site, Attention) and cache is not None:
                for half, buffers in (("key", cache.keys), ("value", cache.values)):
                    self._bind(f"past_key_values.{site.slot}.{half}", buffers[site.slot])
                    self._bind(f"present.{site.slot}.{half}", buffers[site.slot], output=True)

    def __call__(self) -> None:
        self._run(self._binding)

    def _bind(self, name: str, array: Any, *, output: bool = False) -> None:
        bind = self._binding.bind_output if output else self._binding.bind_input
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.__array_interface__["data"][0])


def prepare(
    found: Artifact, options: SessionOptions, *, context: int, tokens: int
) -> tuple[dict[Kind, Subject], dict[str, str]]:
    """The kinds of ``found`` that can be run, for ``tokens`` new tokens of one row behind ``context`` others; and of
    kinds or nodes that cannot, why.

    Raises ``UsageError`` for numbers that do not fit the model's context, ``MemoryLimitError`` where the products'
    float32 weights do not fit the memory, ``UnsupportedError`` where native operators are insisted on and cannot be
    had, and ``ArtifactError`` for what ONNX Runtime cannot load.
    """
    if context < 0 or tokens < 1 or context + tokens > found.spec.context:
        raise UsageError(
            f"{tokens} new tokens behind {context} do not fit the model's context of {found.spec.context}",
            hint="at least 1 token, behind 0 or more",
        )
    model = check_model(found.directory, found.model.name)
    subjects: dict[Kind, Subject] = {}
    reasons: dict[str, str] = {}
    for kind in KINDS:
        graph = operator_graph(model, kind, context=context, tokens=tokens)
        why = _left(graph)
        if graph.sites:
            session, claims = _opened(graph, found, options)
            ours = sum(claims.claimed.values()) == len(graph.sites)
            if kind == "product" and not ours and found.prefill is not None and tokens >= options.prefill_from:
                why = "so many tokens are read by the artifact's second form, whose products are others"
            else:
                subjects[kind] = _subject(session, ours, graph, found, context, tokens)
        if why:
            reasons[kind] = why
    return subjects, reasons


def _left(graph: OperatorGraph) -> str:
    """The nodes that are not in the graph, in words; empty where all are."""
    if not graph.left:
        return "" if graph.sites else f"no {graph.kind} is a node of the artifact's graph"
    most = sorted(graph.left.items(), key=lambda one: -one[1])[:SAID]
    return "left out: " + "; ".join(f"{count} x {reason}" for reason, count in most)


def _opened(graph: OperatorGraph, found: Artifact, options: SessionOptions) -> tuple[Any, ClaimReport]:
    """A session of the graph, over native operators where the engine would have them."""
    why = native.unusable(options.isa) if options.native else "they are switched off"
    if options.native and (not why or options.require_native):
        try:
            return native.open_claimed(found.model, runtime_options(options), options.native, options.isa, graph.model)
        except RyzenCompileError:
            raise
        except NATIVE_ERRORS as error:
            why = str(error)
            if options.require_native:
                raise UnsupportedError(f"native operators cannot run the model's {graph.kind} nodes: {why}") from error
            warnings.warn(f"{graph.kind} nodes run on stock operators, native ones failed: {why}", stacklevel=4)
    try:
        return native.open_model(graph.model, found.directory, runtime_options(options)), ClaimReport(reason=why)
    except LOAD_ERRORS as error:
        raise ArtifactError(
            f"ONNX Runtime cannot run the {graph.kind} nodes of {found.directory.name} alone: {error}",
            hint="export the model again",
        ) from error


def _subject(session: Any, ours: bool, graph: OperatorGraph, found: Artifact, context: int, tokens: int) -> Subject:
    random = np.random.default_rng(0)
    inputs = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in graph.inputs.items()}
    arrays: dict[str, np.ndarray] = dict(inputs)
    for site in graph.sites:
        arrays[site.out] = np.empty(site.out_shape, np.float32)
        if isinstance(site, Norm) and site.sums:
            arrays[site.sums] = np.empty(site.out_shape, np.float32)
    cache = None
    if graph.kind == "attention":
        arrays |= {LAST: np.array([context + tokens - 1], np.int32), TOTAL: np.array(context + tokens, np.int32)}
        cache = _filled(found, context + tokens, random)
    # Theirs first: what ours runs writes to the cache that theirs copies.
    theirs = _theirs(graph, found, inputs, cache, context, random)
    return Subject(graph, ours, Bound(session, graph, arrays, cache), theirs, inputs)


def _theirs(
    graph: OperatorGraph,
    found: Artifact,
    inputs: Mapping[str, np.ndarray],
    cache: KVCache | None,
    context: int,
    random: np.random.Generator,
) -> eager_operators.Run:
    def constant(name: str) -> np.ndarray:
        return graph.constant(name, found.directory)

    if cache is not None:
        attentions = cast("Sequence[Attention]", graph.sites)
        held = [_floats(cache, site, context, random) for site in attentions]
        channels = [_channels(site, cache.slots[site.slot], found.spec.head_dim) for site in attentions]
        return eager_operators.attentions(attentions, inputs, constant, held, context=context, channels=channels)
    if graph.kind == "norm":
        return eager_operators.norms(cast("Sequence[Norm]", graph.sites), inputs, constant)
    products = cast("Sequence[Product]", graph.sites)
    needed, free = 4 * sum(site.width * site.shape[-1] for site in products), read_machine().memory_available
    if needed > free:
        raise MemoryLimitError(
            f"PyTorch's products need {needed / 2**30:.1f} GiB of float32 weights, {free / 2**30:.1f} GiB are free"
        )
    return eager_operators.products(products, inputs)


def _channels(site: Attention, slot: CacheSlot, own: int) -> int:
    """Of a head before it was padded: the model's ``own``, where padding those gives what is stored."""
    padded = padded_head_dim(own, RowFormat.parse(slot.key_format).bits, rolling=slot.window > 0)
    return own if padded == site.width else site.width


def _filled(found: Artifact, tokens: int, random: np.random.Generator) -> KVCache:
    """A cache with room for ``tokens``, all of whose rows hold something."""
    cache = KVCache(found.slots, 1, tokens, limit=found.spec.context)
    for buffer in (*cache.keys, *cache.values):
        if buffer.dtype == np.float32:
            random.standard_normal(buffer.shape, dtype=np.float32, out=buffer)
        else:
            buffer[:] = random.integers(0, 128, buffer.shape, buffer.dtype)
    return cache


def _floats(
    cache: KVCache, site: Attention, context: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """What PyTorch's attention finds in its cache (1, K, rows, D): the same floats, or others where ours are codes."""
    held, resident = eager_operators.kept(site, context), cache.slots[site.slot].resident(context)
    buffers = cache.keys[site.slot], cache.values[site.slot]
    if any(buffer.dtype != np.float32 for buffer in buffers):
        shape = 1, site.kv_heads, held, site.width
        return random.standard_normal(shape, dtype=np.float32), random.standard_normal(shape, dtype=np.float32)
    keys, values = (np.asarray(buffer[:, :, resident - held : resident]) for buffer in buffers)
    return keys, values
