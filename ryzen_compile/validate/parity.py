"""The parity gate: is a rewritten Program still the captured model?

The oracle is the captured graph in float64 on a few probe sequences. A pass that promises to be exact may not be
further from it than twice the captured graph in float32 is, plus a floor: the rule by which torch's own compiler is
tested. It blames the rewrite, not rounding. A cached Program is run as it will be used, a chunk of prompt, a longer
chunk, single tokens, each row on its own length, so a cache that is off by one is seen too.

A lossy pass is held to a divergence instead, on text where there is some; once accepted, what it made is the reference
for the passes after it, so that each is blamed for its own rounding only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ryzen_compile.errors import CaptureError
from ryzen_compile.interpret import cached_feeds, empty_caches, first_tokens, interpret, text_feeds
from ryzen_compile.numerics.divergence import mean_divergence
from ryzen_compile.program import Program, is_call, module_path
from ryzen_compile.spec import CacheSlot

ALLOWANCE = 2.0  # times the captured graph's own float32 error
FLOOR = 1e-5  # of the logits' scale: errors below it say nothing
TOKENS = 17
LONGEST_WINDOW = 64  # up to which the probe sequence is made long enough to leave it
TEXT_TOKENS = 512  # that a lossy pass is measured on
LONG_TEXT = 1024  # the same for the cache, whose errors may grow with the sequence
CHUNKS = (5, 9, 1, 1)  # how a cached Program is fed the same tokens; the rest comes at once


class ParityGate:
    """Built on the captured Program; ``measure`` any rewrite of it.

    ``reference_rmse`` is the reference graph's own distance (float32 to float64) over all logits. ``text`` (B, T) int64
    is what a lossy pass is measured on; without it, on the probe's random tokens.
    """

    def __init__(self, captured: Program, *, text: Tensor | None = None, seed: int = 0) -> None:
        self._ids = _probe_ids(captured, seed)
        self._text = self._ids if text is None else text
        self.rebase(captured)

    def rebase(self, program: Program) -> None:
        """Makes ``program`` the reference from now on; one with a cache gives logits for all tokens still."""
        self._reference = program
        self._single, _ = logits_of(program, self._ids)
        self._double, _ = logits_of(program, self._ids, double=True)
        self._scale = max(1.0, float(self._double.square().mean().sqrt()))
        self.reference_rmse = _rmse(self._single, self._double)

    def measure_loss(self, program: Program) -> tuple[float, float, float]:
        """(mean KL divergence to the reference in nats per token, the same over the last quarter of a sequence, share
        of tokens whose most likely successor stays): what a lossy pass loses by itself.

        A Program with a cache reads one long sequence, all the text up to the context, through it.
        """
        if program.slots:
            text = self._text.flatten()[None, : min(LONG_TEXT, program.spec.context)]
        else:
            text = first_tokens(self._text, TEXT_TOKENS)
        reference, logits = (_read_at_once(p, text) for p in (self._reference, program))
        late = slice(reference.shape[1] - max(1, reference.shape[1] // 4), None)
        kl, top1 = mean_divergence(reference, logits)
        return kl, mean_divergence(reference[:, late], logits[:, late])[0], top1

    def measure(self, program: Program) -> tuple[float, float, bool]:
        """(rmse to float64, largest difference to the captured float32 logits, whether the rmse is within budget)."""
        logits, rows = logits_of(program, self._ids)
        rmse = _rmse(logits, self._double[:, rows])
        largest = float((logits - self._single[:, rows]).abs().max())
        within = rmse <= ALLOWANCE * self.reference_rmse + FLOOR * self._scale
        return rmse, largest, within

    def moved(self, before: Program, after: Program) -> str:
        """The module path of the first value that both graphs name and do not agree on."""
        if before.slots or after.slots:
            return "the cache or a later layer"
        values: dict[str, Tensor] = {}
        _watch(before, self._ids, lambda node, value: values.__setitem__(node.name, value))
        first: list[str] = []

        def compare(node: fx.Node, value: object) -> None:
            known = values.get(node.name)
            if first or not isinstance(value, Tensor) or not isinstance(known, Tensor) or known.shape != value.shape:
                return
            if not torch.allclose(known, value, rtol=1e-3, atol=1e-4 * float(known.abs().max() + 1)):
                first.append(f"{module_path(node) or 'the model'} ({node.name})")

        _watch(after, self._ids, compare)
        return first[0] if first else "the output"


def check_capture(model: nn.Module, program: Program) -> None:
    """Holds the captured graph to the model itself, run as its user runs it; raises ``CaptureError`` when they differ.

    Every pass is measured against the captured graph, so what capture itself got wrong would pass unseen: an attention
    option that it does not know of, say. Both run in float32; the budget is the gate's floor a hundred times over.
    """
    ids = _probe_ids(program, seed=1)
    training = [(module, module.training) for module in model.modules()]  # parts may be frozen in another mode
    model.eval()
    try:
        with torch.no_grad():
            result = model(ids)
    finally:
        for module, flag in training:
            module.training = flag
    logits = getattr(result, "logits", result)
    expected = logits[0] if isinstance(logits, tuple) else logits
    allowed = 100 * FLOOR * max(1.0, float(expected.square().mean().sqrt()))
    apart = _rmse(full_logits(program, ids), expected)
    if apart > allowed:
        raise CaptureError(
            f"the captured graph is not the model {type(model).__name__}: their logits are {apart:.2e} apart "
            f"(root mean square), {allowed:.0e} is allowed",
            hint="the model passes something to its attention that capture does not know; please report it",
        )


def _probe_ids(program: Program, seed: int) -> Tensor:
    """(2, T) random ids; T reaches past every window, and past what a cache of it holds by another window, so that one
    that is off by one shows, whole or after rows were dropped."""
    windows = [n.args[5] for n in program.graph.nodes if is_call(n, torch.ops.ryzen.attention)]
    near = [w + CacheSlot(0, 1, 1, 1, window=w).rows + 1 for w in windows if 0 < w <= LONGEST_WINDOW]
    tokens = min(max([TOKENS, *near]), program.spec.context)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(program.spec.vocab, (2, tokens), generator=generator)


def full_logits(program: Program, ids: Tensor, *, double: bool = False) -> Tensor:
    """(B, T, V) logits of an uncached Program on ``ids`` (B, T), positions from zero."""
    logits: Tensor = interpret(program, text_feeds(program, ids), [program.outputs[0]], double=double)[0]
    return logits


def _read_at_once(program: Program, ids: Tensor) -> Tensor:
    """(B, T, V) logits, through the cache where there is one."""
    feeds = cached_feeds(program, ids) if program.slots else text_feeds(program, ids)
    logits: Tensor = interpret(program, feeds, [program.outputs[0]])[0]
    return logits


def logits_of(program: Program, ids: Tensor, *, double: bool = False) -> tuple[Tensor, list[int]]:
    """The logits a Program gives for ``ids`` and the token rows they belong to, through its cache if it has one."""
    if not program.slots:
        logits = full_logits(program, ids, double=double)
        tokens = ids.shape[1]
        return logits, (list(range(tokens)) if logits.shape[1] == tokens else [tokens - 1])
    rows = [_cached_logits(program, row[None], double) for row in ids]
    return torch.cat([logits for logits, _ in rows]), rows[0][1]


def _cached_logits(program: Program, ids: Tensor, double: bool) -> tuple[Tensor, list[int]]:
    """One sequence in ``CHUNKS``; the capacity is larger than the sequence, so unwritten rows must not matter."""
    tokens = ids.shape[1]
    caches = empty_caches(program, 1, tokens + 3, rolling=True)
    collected: list[Tensor] = []
    rows: list[int] = []
    done = 0
    for chunk in (*CHUNKS, tokens):
        size = min(chunk, tokens - done)
        if size <= 0:
            break
        feeds = text_feeds(program, ids[:, done : done + size], start=done, caches=caches)
        logits, *caches = interpret(program, feeds, list(program.outputs), double=double)
        done += size
        rows.extend(range(done - logits.shape[1], done))
        collected.append(logits)
    return torch.cat(collected, dim=1), rows


def _watch(program: Program, ids: Tensor, watch: Callable[[fx.Node, Any], object]) -> None:
    def tensors(node: fx.Node, value: Any) -> None:
        if not is_call(node, torch.ops.aten.sym_size):
            watch(node, value)

    interpret(program, text_feeds(program, ids), [program.outputs[0]], watch=tensors)


def _rmse(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt())
