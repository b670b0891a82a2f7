"""The order of the passes, and the loop that runs them under the IR's law and the parity gate."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Protocol

from torch import Tensor

from ryzen_compile.config import Recipe
from ryzen_compile.errors import ParityError, PassError, RyzenCompileError, UnsupportedError
from ryzen_compile.numerics.blockwise import BlockTensor
from ryzen_compile.passes.base import Pass, PassResult
from ryzen_compile.passes.bind_positions import BindPositions
from ryzen_compile.passes.canonicalize import Canonicalize
from ryzen_compile.passes.compress_embedding import EmbeddingCompressor
from ryzen_compile.passes.eliminate_dead import EliminateDead
from ryzen_compile.passes.fuse_add_norm import FuseAddNorm
from ryzen_compile.passes.fuse_attention import FuseAttention
from ryzen_compile.passes.fuse_linear import FuseLinear
from ryzen_compile.passes.fuse_norm import FuseNorm
from ryzen_compile.passes.fuse_rotary import FuseRotary
from ryzen_compile.passes.insert_kv_cache import InsertKVCache
from ryzen_compile.passes.merge_linear import MergeLinear
from ryzen_compile.passes.prune_logits import PruneLogits
from ryzen_compile.passes.quantize_kv_cache import QuantizeKVCache
from ryzen_compile.passes.quantize_weights import QuantizeWeights
from ryzen_compile.passes.recognize_activation import RecognizeActivation
from ryzen_compile.passes.smooth_activations import SmoothActivations
from ryzen_compile.passes.sparsify_activations import SparsifyActivations
from ryzen_compile.passes.ternary_linears import TernaryLinears
from ryzen_compile.program import Program
from ryzen_compile.report import Loss, PassRecord, Report, Status
from ryzen_compile.verify import verify

# Hears of every pass: its record, and the Program before and after it.
Observer = Callable[[PassRecord, Program, Program], None]

TERNARY_BUDGET = 0.5  # of rounding activations to 8 bits, nats per token: that of integer weights, too


def default_passes(
    recipe: Recipe,
    *,
    calibration: Tensor | None = None,
    given: Mapping[str, BlockTensor] | None = None,
    compressor: EmbeddingCompressor | None = None,
) -> tuple[Pass, ...]:
    """The passes of a recipe, in order. Each line says why it stands where it does.

    ``calibration`` (B, T) int64 is text for the passes that measure, ``given`` the weights that came quantized,
    ``compressor`` the recipe's own where it had to be prepared (its table was trained, or its rows weighed).
    """
    weights = recipe.weights
    if compressor is None and recipe.embedding is not None:
        compressor = EmbeddingCompressor(recipe.embedding, text=calibration)
    compress = () if compressor is None else (compressor,)
    ternary = (TernaryLinears(TERNARY_BUDGET),) if recipe.ternary else ()
    quantize = () if weights is None else (QuantizeWeights(weights, calibration=calibration, given=given),)
    sparse = recipe.sparsity
    sparsify = (SparsifyActivations(sparse, calibration=calibration),) if sparse is not None and sparse.drops else ()
    bounded = recipe.kv.bounded and recipe.kv.window is None  # a stream drops rows of all layers alike
    cache = () if recipe.kv.dtype == "fp32" else (QuantizeKVCache(recipe.kv, calibration=calibration),)
    prune = (PruneLogits(),) if recipe.logits == "last" else ()
    return (
        Canonicalize(),  # one spelling each, so that everything below matches one form
        *ternary,  # as soon as every product with a weight is a linear: what it makes is the reference of the others
        RecognizeActivation(),  # before the arithmetic it is made of is taken for something else
        BindPositions(),  # before rotary and attention read what still counts tokens
        FuseRotary(),  # while queries and keys still meet their angles
        FuseNorm(),  # before attention, whose queries and keys may be normalised
        FuseAddNorm(),  # needs the norms
        FuseAttention(),  # masks and repeated heads go away with it
        MergeLinear(),  # needs to know which three projections feed one attention
        FuseLinear(),  # needs the merged gate and up projection
        *compress,  # lookups only, before the table is taken for a weight like the others
        *quantize,  # weights stored together are merged, and the graph is still whole, so that it can be run on text
        *sparsify,  # what thresholds are measured with are the weights that are stored
        InsertKVCache(bounded=bounded),  # everything around attention is final, so its projections go in whole
        *cache,  # when the cache is known to be exact
        *prune,  # only a cached graph may forget the other rows
        EliminateDead(),  # last: what the others left unread
    )


def encoder_passes(
    recipe: Recipe, *, calibration: Tensor | None = None, given: Mapping[str, BlockTensor] | None = None
) -> tuple[Pass, ...]:
    """The passes of a recipe for an encoder: those of ``default_passes``, in its order, that need neither positions
    from outside nor a cache nor a head. ``calibration`` and ``given`` are as there."""
    weights = recipe.weights
    quantize: tuple[Pass, ...] = ()
    if weights is not None:
        quantize = (QuantizeWeights(weights, calibration=calibration, given=given),)
        if weights.accuracy_level and not given:  # before weights are rounded, where activations are, too
            quantize = (SmoothActivations(calibration), *quantize)
    return (
        Canonicalize(),
        RecognizeActivation(),
        FuseNorm(),
        FuseAddNorm(),
        FuseAttention(),
        MergeLinear(),
        FuseLinear(),
        *quantize,
        EliminateDead(),
    )


class Gate(Protocol):
    """Decides whether a rewritten Program still is the captured model."""

    reference_rmse: float

    def measure(self, program: Program) -> tuple[float, float, bool]:
        """(rmse to float64, largest error to float32, whether both are within the budget of an exact pass)."""

    def judge(self, program: Program, pass_: Pass) -> Loss:
        """What the lossy ``pass_`` lost by making ``program``, held to its budget."""

    def rebase(self, program: Program) -> None:
        """Makes ``program`` what later passes are measured against."""

    def moved(self, before: Program, after: Program) -> str:
        """The first module whose values differ between the two."""


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    *,
    supported_ops: frozenset[str] | None = None,
    gate: Gate | None = None,
    strict: bool = False,
    progress: Callable[[PassRecord], None] | None = None,
    observe: Observer | None = None,
) -> tuple[Program, Report]:
    """Runs ``passes`` in order; returns the final Program and the record.

    A pass whose operators the backend lacks is recorded as unsupported and not run. With a ``gate``, a pass that leaves
    its budget is rolled back and named with the module that moved; a ``required`` one raises ``ParityError`` or, when
    it could not rewrite everything it must, ``UnsupportedError``. ``strict`` checks the IR's law after every pass,
    not only at both ends. ``observe`` is called after each pass with the Program before and after it, the same one
    twice where nothing was kept of the pass; what it raises is passed on as it is.
    """
    captured_ops = dict(Counter(program.ops()))
    verify(program)
    records: list[PassRecord] = []
    for pass_ in passes:
        before = program
        if supported_ops is not None and not pass_.produces <= supported_ops:
            records.append(_record(pass_, "unsupported", program, PassResult(program), 0.0))
        else:
            result, record = _run_one(pass_, program, records, gate, strict)
            records.append(record)
            program = result
        if progress is not None:
            progress(records[-1])
        if observe is not None:
            observe(records[-1], before, program)
    verify(program)
    reference = gate.reference_rmse if gate is not None else None
    return program, Report(program.spec, dict(program.provenance), captured_ops, tuple(records), reference)


def _run_one(
    pass_: Pass, program: Program, before: Sequence[PassRecord], gate: Gate | None, strict: bool
) -> tuple[Program, PassRecord]:
    started = time.perf_counter()
    with _blamed_on(pass_, before):
        result = pass_.run(program)
        if strict and result.changed:
            verify(result.program)
    seconds = time.perf_counter() - started
    if pass_.required and not result.changed:
        raise _required_failure(pass_, result, before)
    if result.changed and gate is not None and pass_.promise == "lossy":
        return _accept_loss(pass_, program, result, before, gate, seconds)
    if not result.changed or gate is None:
        return result.program, _record(pass_, "applied" if result.changed else "unchanged", program, result, seconds)
    with _blamed_on(pass_, before):  # a graph that cannot run is the pass's fault too
        rmse, max_error, within = gate.measure(result.program)
    if within:
        record = _record(pass_, "applied", program, result, seconds, max_error, rmse)
        return result.program, record
    where = gate.moved(program, result.program)
    moved = "logits" if program.spec.pooling is None else "vectors"
    detail = (
        f"{moved} moved by {max_error:.2e} (rmse {rmse:.2e}, reference {gate.reference_rmse:.2e}), first in {where}"
    )
    if pass_.required:
        raise ParityError(f"pass {pass_.name}: {detail}", hint="this graph cannot be generated from with a cache")
    rolled = PassResult(program, (), result.misses)
    return program, _record(pass_, "rolled back", program, rolled, seconds, max_error, rmse, detail)


def _accept_loss(
    pass_: Pass, program: Program, result: PassResult, before: Sequence[PassRecord], gate: Gate, seconds: float
) -> tuple[Program, PassRecord]:
    """A lossy pass within its budget becomes the reference of those after it; one beyond it is not what was asked."""
    with _blamed_on(pass_, before):
        loss = gate.judge(result.program, pass_)
        if loss.within:
            gate.rebase(result.program)
    measured = partial(replace, kl=loss.kl, late_kl=loss.late_kl, top1=loss.top1, cosine=loss.cosine)
    if loss.within:
        return result.program, measured(_record(pass_, "applied", program, result, seconds))
    if pass_.required:
        raise ParityError(f"pass {pass_.name}: {loss.text}", hint=pass_.remedy)
    rolled = PassResult(program, (), result.misses)
    return program, measured(_record(pass_, "rolled back", program, rolled, seconds, detail=loss.text))


@contextmanager
def _blamed_on(pass_: Pass, before: Sequence[PassRecord]) -> Iterator[None]:
    """Names the pass, and those that ran before it, in whatever goes wrong inside."""
    ran = ", ".join(r.name for r in before) or "nothing"
    try:
        yield
    except PassError as error:
        raise PassError(f"pass {pass_.name} failed after {ran}: {error.message}") from error
    except RyzenCompileError:
        raise
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise PassError(f"pass {pass_.name} failed after {ran}: {type(error).__name__}: {error}") from error


def _required_failure(pass_: Pass, result: PassResult, before: Sequence[PassRecord]) -> UnsupportedError:
    """Names the first place that stopped ``pass_``: its own miss, or one of the pass that it builds on."""
    source, misses = pass_.name, result.misses
    if not misses:
        source, misses = next(((r.name, r.misses) for r in before if r.name == pass_.builds_on), (source, ()))
    if not misses:
        return UnsupportedError(f"{pass_.name} found nothing to rewrite: the graph holds no {pass_.works_on}")
    site = misses[0]
    return UnsupportedError(
        f"{source} cannot rewrite node {site.node} in {site.module or 'the model'}: {site.note}",
        hint=f"{len(misses)} such place(s), and {pass_.name} needs every one",
    )


def _record(
    pass_: Pass,
    status: Status,
    program: Program,
    result: PassResult,
    seconds: float,
    max_error: float | None = None,
    rmse: float | None = None,
    detail: str = "",
) -> PassRecord:
    return PassRecord(
        name=pass_.name,
        promise=pass_.promise,
        status=status,
        hits=result.hits,
        misses=result.misses,
        nodes_before=len(program.ops()),
        nodes_after=len(result.program.ops()),
        ops=dict(Counter(result.program.ops())),
        seconds=seconds,
        max_error=max_error,
        rmse=rmse,
        detail=detail,
    )
