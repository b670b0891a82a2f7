"""Store a table that tokens are looked up in as codes into a small codebook.

    embedding(W, input_ids)  ->  codebook_embedding(input_ids, codes, codebook, scales, gain, offset, slots, kept)

After the fusions, which look for the plain lookup; before quantize_weights, which would take the table otherwise. Only
lookups are rewritten. A head tied to the table goes on reading W: it multiplies by every row at every step, which is
several times slower from codes (docs/log.md has the figures), so it keeps weights of its own, in the recipe's format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ryzen_compile import ops
from ryzen_compile.config import EmbeddingCompression
from ryzen_compile.edit import Edit
from ryzen_compile.errors import ConfigError, UsageError
from ryzen_compile.interpret import interpret
from ryzen_compile.numerics.blockwise import row_chunks
from ryzen_compile.numerics.codebook import MOST_KEPT, CodebookFormat, CodebookTensor
from ryzen_compile.numerics.codebook_size import format_for_ratio
from ryzen_compile.numerics.search.codebook_fit import FitSettings, fit_codebook
from ryzen_compile.numerics.table_quality import TableQuality, TableStats, table_quality, table_stats
from ryzen_compile.passes.base import NoMatch, Pass, PassResult, Promise, Site
from ryzen_compile.program import Program, is_call, module_path, shape

aten = torch.ops.aten
KEEP = 0.01  # of the rows, where nothing is said


@dataclass(frozen=True)
class Lookup:
    """``nodes`` look tokens up in ``table`` (V, C), the parameter ``name``; ``tied``: others read it, too."""

    table: fx.Node
    name: str
    nodes: tuple[fx.Node, ...]
    tied: bool


class EmbeddingCompressor(Pass):
    """Compresses tables, by itself (``compress``) or in a Program (``apply``).

    ``text`` (B, T) int64 says how often a token occurs. ``special`` are ids of rows that are kept before any others (a
    tokenizer's own tokens stand in every text that is generated from, and in few that are read). ``row_weights`` (V,)
    float32 by parameter name say what an error in each row counts, ``given`` are tables that were trained already, and
    ``notes`` what is to be said of that. ``progress`` hears of shares done.
    """

    name: ClassVar[str] = "compress_embedding"
    promise: ClassVar[Promise] = "lossy"
    produces: ClassVar[frozenset[str]] = frozenset({"ryzen::codebook_embedding"})
    required: ClassVar[bool] = True
    works_on: ClassVar[str] = "table that tokens are looked up in"

    def __init__(
        self,
        settings: EmbeddingCompression,
        *,
        text: Tensor | None = None,
        special: Sequence[int] = (),
        row_weights: Mapping[str, Tensor] | None = None,
        given: Mapping[str, CodebookTensor] | None = None,
        notes: Mapping[str, str] | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self.settings = settings
        self.max_kl = settings.max_kl
        self._text = text
        self._special = special
        self._row_weights = row_weights or {}
        self._given = given or {}
        self._notes = notes or {}
        self._progress = progress

    # --- one table

    def compress(self, table: Tensor, row_weights: Tensor | None = None) -> CodebookTensor:
        """``table`` (V, C) floating-point as the settings say; ``row_weights`` (V,) in place of the text's counts.

        Nothing is trained here. Raises ``UsageError`` for what cannot be stored so.
        """
        rows, width = (int(size) for size in table.shape) if table.ndim == 2 else (0, 0)
        if not rows:
            raise UsageError(f"a table must be a matrix with rows, got {tuple(table.shape)}")
        form, kept = self._format(rows, width)
        weights = self._counts(rows) if row_weights is None else row_weights
        keep = costliest(table, weights, kept, self._special) if kept else None
        plain = self.settings.method == "dkm"  # draws weights by plain distances, which a gain would change
        settings = FitSettings(channel_gain=not plain, row_weights=weights, keep=keep)
        return fit_codebook(table, form, settings, self._progress)

    def decompress(self, tensor: CodebookTensor) -> Tensor:
        """The table (V, C) float32 that ``tensor`` stands for."""
        return tensor.decode()

    def ratio(self, tensor: CodebookTensor) -> float:
        """Float32 bytes over stored bytes; codebooks, scales and kept rows count."""
        return self.stats(tensor).ratio

    def stats(self, tensor: CodebookTensor) -> TableStats:
        """What ``tensor`` takes, and how well its codes use it."""
        return table_stats(tensor)

    def validate(self, table: Tensor, tensor: CodebookTensor, hidden: Tensor | None = None) -> TableQuality:
        """How far ``tensor`` is from ``table`` (V, C); with states ``hidden`` (N, C), also as a head of them."""
        return table_quality(table, tensor.decode(), hidden)

    def _format(self, rows: int, width: int) -> tuple[CodebookFormat, int]:
        settings = self.settings
        if settings.ratio is not None:
            return format_for_ratio(settings.ratio, rows, width)
        form = CodebookFormat(settings.bits or 8, settings.cluster_dim or 2, settings.stages, settings.group)
        form.check(width)
        keep = KEEP if settings.keep is None else settings.keep
        return form, min(round(keep * rows), MOST_KEPT)

    def _counts(self, rows: int) -> Tensor | None:
        """(V,) float32: how often a token occurs, once more than it was seen; none where all rows are alike."""
        if self._text is None or self.settings.weighting == "none":
            return None
        return torch.bincount(self._text.reshape(-1), minlength=rows)[:rows].float() + 1

    # --- a Program

    def apply(self, program: Program) -> Program:
        """``program`` with its table compressed."""
        return self.run(program).program

    @torch.no_grad()
    def run(self, program: Program) -> PassResult:
        lookups, misses = find_lookups(program)
        edit = Edit(program, self.name)
        nodes = {node.name: node for node in edit.graph.nodes}  # Edit works on a copy of the graph
        hits = []
        for lookup in lookups:
            table: Tensor = interpret(program, {}, [lookup.table])[0]
            tensor = self._given.get(lookup.name)
            if tensor is None:
                self._expect_prepared(lookup)
                tensor = self.compress(table, self._row_weights.get(lookup.name))
            _rewrite(edit, lookup, tensor, nodes)
            hits.append(Site(lookup.nodes[0].name, module_path(lookup.nodes[0]), self._note(lookup, table, tensor)))
        left = [Site(m.node.name, module_path(m.node), m.reason) for m in misses]
        return PassResult(edit.finish() if hits else program, tuple(hits), tuple(left))

    def _expect_prepared(self, lookup: Lookup) -> None:
        settings = self.settings
        if settings.method == "dkm" or (settings.weighting == "fisher" and lookup.name not in self._row_weights):
            raise ConfigError(
                f"the embedding's settings ask for what {lookup.name} has to be prepared for with the model at hand",
                hint="use optimize() or export(), or train.embedding.prepare_compressor before the passes run",
            )

    def _note(self, lookup: Lookup, table: Tensor, tensor: CodebookTensor) -> str:
        form, stats = tensor.format, self.stats(tensor)
        quality = self.validate(table, tensor)
        stages = f", {form.stages} stages" if form.stages > 1 else ""
        kept = f", {stats.kept} rows kept" if stats.kept else ""
        tied = f"; tied to a head, which keeps its own weights: {tensor.nbytes:,} bytes more" if lookup.tied else ""
        trained = f"; {note}" if (note := self._notes.get(lookup.name)) else ""
        return (
            f"{lookup.name}: {form.bits} bits for {form.dim} weight(s){stages}{kept}, {stats.bits:.2f} bits per weight "
            f"in all, {stats.ratio:.1f} times smaller, relative error {quality.relative_error:.2%}{trained}{tied}"
        )


def find_lookups(program: Program) -> tuple[list[Lookup], list[NoMatch]]:
    """The tables that ``input_ids`` are looked up in, and why other lookups are left alone."""
    found: dict[fx.Node, list[fx.Node]] = {}
    misses = []
    for node in program.graph.nodes:
        if not is_call(node, aten.embedding) or not node.users:
            continue
        why = _reason(node, program)
        if why:
            misses.append(NoMatch(why, node))
        else:
            found.setdefault(node.args[0], []).append(node)
    lookups = [
        Lookup(table, _name(table, program), tuple(nodes), tied=len(table.users) > len(nodes))
        for table, nodes in found.items()
    ]
    return lookups, misses


def _reason(node: fx.Node, program: Program) -> str:
    """Why this lookup is not ours; empty if it is."""
    table, ids = node.args[:2]
    if ids is not program.inputs[0]:
        return f"{table.name} is looked up by something else than input_ids"
    if not _is_constant(table, program):
        return f"{table.name} is computed from the input, not from weights"
    if len(shape(table)) != 2 or not table.meta["val"].is_floating_point():
        return f"{table.name} is no matrix of floating-point numbers"
    return ""


def _is_constant(node: fx.Node, program: Program) -> bool:
    pending, seen = [node], set()
    while pending:
        at = pending.pop()
        if at.op == "placeholder" and at.name not in program.weights:
            return False
        if at not in seen:
            seen.add(at)
            pending.extend(at.all_input_nodes)
    return True


def _name(table: fx.Node, program: Program) -> str:
    return program.weight_names[table.name] if table.op == "placeholder" else table.name


def costliest(table: Tensor, weights: Tensor | None, count: int, first: Sequence[int] = ()) -> Tensor:
    """(count,) int64, ascending: ``first``, as far as the table has them, and the rows of ``table`` (V, C) that would
    cost most as codes.

    Codes leave every row about the same share of its size as an error, so what counts is the row's squared distance
    from the mean row, times its weight.
    """
    mean = table.mean(0, dtype=torch.float32)
    costs = torch.cat([(table[a:b].float() - mean).square().sum(1) for a, b in row_chunks(*table.shape)])
    if weights is not None:
        costs *= weights
    costs[[i for i in first if 0 <= i < len(costs)]] = torch.inf
    return costs.topk(min(count, len(costs))).indices.sort().values


def _rewrite(edit: Edit, lookup: Lookup, tensor: CodebookTensor, nodes: Mapping[str, fx.Node]) -> None:
    stem = re.sub(r"\W+", "_", lookup.name.removesuffix(".weight"))
    stored = {name: edit.add_constant(f"{stem}_{name}", value) for name, value in tensor.tensors.items()}
    optional = [stored.get(name) for name in ("scales", "gain", "offset", "slots", "kept")]
    for twin in lookup.nodes:
        node = nodes[twin.name]
        row = edit.call(
            ops.codebook_embedding,
            *(node.args[1], stored["codes"], stored["codebook"], *optional),
            *(tensor.shape[1], tensor.format.bits, tensor.format.group_argument),
            before=node,
        )
        edit.replace(node, row)
