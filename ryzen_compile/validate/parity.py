"""The parity gate: is a rewritten Program still the captured model?

The oracle is the captured graph in float64 on a few probe sequences. A pass that promises to be exact may not be
further from it than twice the captured graph in float32 is, plus a floor: the rule by which torch's own compiler is
tested. It blames the rewrite, not rounding. A cached Program is run as it will be used, a chunk of prompt, a longer
chunk, single tokens, each row on its own length, so a cache that is off by one is seen too.

A graph that rounds activations (``linear_ternary``) jumps where a value lies between two codes: two runs in float32
then differ by luck, by the side on which a few values fell. Such a rewrite is run in float64, too, when float32 says
no.

A lossy pass is held to a divergence instead, on text where there is some; once accepted, what it made is the reference
for the passes after it, so that each is blamed for its own rounding only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ryzen_compile.capture_encoder import embed, padded_texts
from ryzen_compile.errors import CaptureError
from ryzen_compile.interpret import cached_feeds, empty_caches, first_tokens, interpret, text_feeds
from ryzen_compile.numerics.divergence import mean_divergence
from ryzen_compile.passes.base import Pass
from ryzen_compile.program import Program, is_call, module_path
from ryzen_compile.report import Loss
from ryzen_compile.spec import CacheSlot

ALLOWANCE = 2.0  # times the captured graph's own float32 error
FLOOR = 1e-5  # of the logits' scale: errors below it say nothing
TOKENS = 17
LONGEST_WINDOW = 64  # up to which the probe sequence is made long enough to leave it
TEXT_TOKENS = 512  # that a lossy pass is measured on
LONG_TEXT = 1024  # the same for the cache, whose errors may grow with the sequence
LATE_ALLOWANCE = 2.0  # times a lossy pass's budget in the last quarter: fewer tokens are counted there
SHORT_TEXT, SHORT_TEXTS = 64, 16  # tokens of a text and texts that an encoder is measured on
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
        self._single, _ = self._read(program, double=False)
        self._double, _ = self._read(program, double=True)
        self._scale = self._scale_of(self._double)
        self.reference_rmse = _rmse(self._single, self._double)

    def judge(self, program: Program, pass_: Pass) -> Loss:
        """See ``pipeline.Gate``; held to ``pass_.max_kl``, in the last quarter of a sequence to a multiple of it."""
        kl, late, top1 = self.measure_loss(program)
        return divergence_loss(kl, late, top1, pass_.max_kl)

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
        values, rows = self._read(program, double=False)
        rmse = _rmse(values, self._double[:, rows])
        largest = float((values - self._single[:, rows]).abs().max())
        allowed = ALLOWANCE * self.reference_rmse + FLOOR * self._scale
        if rmse > allowed and _rounds(program):
            values, rows = self._read(program, double=True)
            rmse = _rmse(values, self._double[:, rows])
            largest = float((values - self._double[:, rows]).abs().max())
        return rmse, largest, rmse <= allowed

    def moved(self, before: Program, after: Program) -> str:
        """The module path of the first value that both graphs name and do not agree on."""
        if before.slots or after.slots:
            return "the cache or a later layer"
        values: dict[str, Tensor] = {}
        _watch(before, self._feeds(before), lambda node, value: values.__setitem__(node.name, value))
        first: list[str] = []

        def compare(node: fx.Node, value: object) -> None:
            known = values.get(node.name)
            if first or not isinstance(value, Tensor) or not isinstance(known, Tensor) or known.shape != value.shape:
                return
            if not value.is_floating_point():  # a mask, say
                apart = not torch.equal(known, value)
            else:
                apart = not torch.allclose(known, value, rtol=1e-3, atol=1e-4 * float(known.abs().max() + 1))
            if apart:
                first.append(f"{module_path(node) or 'the model'} ({node.name})")

        _watch(after, self._feeds(after), compare)
        return first[0] if first else "the output"

    def _read(self, program: Program, *, double: bool) -> tuple[Tensor, list[int]]:
        """What ``program`` makes of the probe, and which rows of the whole result these are."""
        return logits_of(program, self._ids, double=double)

    def _feeds(self, program: Program) -> dict[fx.Node, Tensor]:
        return text_feeds(program, self._ids)

    def _scale_of(self, values: Tensor) -> float:
        return max(1.0, float(values.square().mean().sqrt()))


class EncoderGate(ParityGate):
    """The same for an encoder, on texts with and without padding: vectors in the place of logits, and for a lossy pass
    the mean of 1 - cosine."""

    def __init__(self, captured: Program, *, text: Tensor | None = None, seed: int = 0) -> None:
        self._ids, self._mask = _padded_probe(captured, seed)
        self._texts = (self._ids, self._mask) if text is None else _short_texts(text, captured.spec.context)
        self.rebase(captured)

    def judge(self, program: Program, pass_: Pass) -> Loss:
        """See ``pipeline.Gate``; held to ``pass_.max_cosine``."""
        distance = self.measure_distance(program)
        text = f"mean of 1 - cosine {distance:.3g}, {pass_.max_cosine:g} is allowed"
        return Loss(distance <= pass_.max_cosine, text, cosine=distance)  # false for NaN too

    def measure_distance(self, program: Program) -> float:
        """The mean over texts of 1 - cosine between their vectors and the reference's."""
        ours, theirs = (vectors_of(p, *self._texts, double=False).double() for p in (program, self._reference))
        return float((1 - nn.functional.cosine_similarity(ours, theirs, dim=1)).mean())

    def _read(self, program: Program, *, double: bool) -> tuple[Tensor, list[int]]:
        vectors = vectors_of(program, self._ids, self._mask, double=double)
        return vectors, list(range(vectors.shape[1]))

    def _feeds(self, program: Program) -> dict[fx.Node, Tensor]:
        return text_feeds(program, self._ids, mask=self._mask)

    def _scale_of(self, values: Tensor) -> float:
        return float(values.square().mean().sqrt())  # vectors of length 1 have small channels


def gate_for(captured: Program, *, text: Tensor | None = None) -> ParityGate:
    """The gate of a decoder or of an encoder, whichever ``captured`` is."""
    return (ParityGate if captured.spec.pooling is None else EncoderGate)(captured, text=text)


def divergence_loss(kl: float, late: float, top1: float, budget: float) -> Loss:
    """The figures of ``measure_loss``, held to ``budget`` nats per token."""
    text = (
        f"mean KL divergence {kl:.3g} nats per token, {late:.3g} in the last quarter of a sequence, "
        f"{budget:g} is allowed; top-1 agreement {top1:.1%}"
    )
    within = kl <= budget and late <= LATE_ALLOWANCE * budget  # false for NaN too
    return Loss(within, text, kl=kl, late_kl=late, top1=top1)


def check_capture(model: nn.Module, program: Program) -> None:
    """Holds the captured graph to the model itself, run as its user runs it; raises ``CaptureError`` when they differ.

    Every pass is measured against the captured graph, so what capture itself got wrong would pass unseen: an attention
    option that it does not know of, say. Both run in float32; the budget is the gate's floor a hundred times over. An
    encoder reads texts with and without padding.
    """
    if program.spec.pooling is not None:
        ids, mask = _padded_probe(program, seed=1)
        expected, found = embed(model, program.spec, ids, mask), vectors_of(program, ids, mask)
        _refuse_difference(model, found, expected, "vectors", float(expected.square().mean().sqrt()))
        return
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
    scale = max(1.0, float(expected.square().mean().sqrt()))
    _refuse_difference(model, full_logits(program, ids), expected, "logits", scale)


def _refuse_difference(model: nn.Module, found: Tensor, expected: Tensor, what: str, scale: float) -> None:
    apart, allowed = _rmse(found, expected), 100 * FLOOR * scale
    if apart > allowed:
        raise CaptureError(
            f"the captured graph is not the model {type(model).__name__}: their {what} are {apart:.2e} apart "
            f"(root mean square), {allowed:.0e} is allowed",
            hint="the model passes something to its attention that capture does not know; please report it",
        )


def _rounds(program: Program) -> bool:
    return any(is_call(node, torch.ops.ryzen.linear_ternary) for node in program.graph.nodes)


def _probe_ids(program: Program, seed: int) -> Tensor:
    """(2, T) random ids; T reaches past every window, and past what a cache of it holds by another window, so that one
    that is off by one shows, whole or after rows were dropped."""
    windows = [n.args[5] for n in program.graph.nodes if is_call(n, torch.ops.ryzen.attention)]
    near = [w + CacheSlot(0, 1, 1, 1, window=w).rows + 1 for w in windows if 0 < w <= LONGEST_WINDOW]
    tokens = min(max([TOKENS, *near]), program.spec.context)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(program.spec.vocab, (2, tokens), generator=generator)


def _padded_probe(program: Program, seed: int) -> tuple[Tensor, Tensor]:
    """Ids and their mask (B, T); T reaches past every window, to both sides."""
    windows = [n.args[5] for n in program.graph.nodes if is_call(n, torch.ops.ryzen.attention)]
    tokens = max([TOKENS, *(2 * w + 3 for w in windows if w <= LONGEST_WINDOW)])
    return padded_texts(program.spec.vocab, min(tokens, program.spec.context), seed=seed)


def _short_texts(text: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """``text`` cut into texts of ``SHORT_TEXT`` tokens, every other of which leaves a part of its row to padding."""
    tokens = min(SHORT_TEXT, context, text.numel())
    ids = text.flatten()[: text.numel() // tokens * tokens].view(-1, tokens)[:SHORT_TEXTS]
    lengths = torch.full((len(ids),), tokens)
    lengths[1::2] = torch.linspace(tokens, max(1, tokens // 8), len(lengths[1::2])).long()
    return ids, (torch.arange(tokens) < lengths[:, None]).long()


def vectors_of(program: Program, ids: Tensor, mask: Tensor, *, double: bool = False) -> Tensor:
    """(B, C) vectors of an encoder for ``ids`` and ``mask`` (B, T)."""
    vectors: Tensor = interpret(program, text_feeds(program, ids, mask=mask), [program.outputs[0]], double=double)[0]
    return vectors


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


def _watch(program: Program, feeds: dict[fx.Node, Tensor], watch: Callable[[fx.Node, Any], object]) -> None:
    def tensors(node: fx.Node, value: Any) -> None:
        if not is_call(node, torch.ops.aten.sym_size):
            watch(node, value)

    interpret(program, feeds, [program.outputs[0]], watch=tensors)


def _rmse(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt())
