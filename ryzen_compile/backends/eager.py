"""The eager backend: every operator's reference, one after another. Slow, and the oracle of everything else.

Expressions over weights alone (a merged matrix, ``1 + w``) are computed once, when the Program is compiled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ryzen_compile import ops
from ryzen_compile.backends.base import Capability
from ryzen_compile.errors import UsageError
from ryzen_compile.interpret import interpret, text_feeds
from ryzen_compile.program import Program
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.engine import check_last
from ryzen_compile.runtime.storage import HOST

SUPPORTED = frozenset(f"ryzen::{name}" for name in ops.__all__ if name not in {"ACTIVATIONS", "activate"})


class EagerBackend:
    """Always available; supports the whole dialect, because the references are the dialect."""

    name = "eager"
    supported_ops = SUPPORTED
    cache_formats = None
    evicts = True

    def probe(self) -> Capability:
        return Capability(True, f"torch {torch.__version__}")

    def compile(self, program: Program) -> EagerEngine | EagerEncoder:
        return EagerEngine(program) if program.spec.pooling is None else EagerEncoder(program)


class EagerEncoder:
    """An ``EncoderEngine`` over the references."""

    name = "eager"

    def __init__(self, program: Program) -> None:
        self.spec = program.spec
        self._program = program
        self._constants = fold_constants(program)

    def embed(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """See ``EncoderEngine.embed``."""
        ids, padding = (torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64)) for x in (tokens, mask))
        given = self._constants | text_feeds(self._program, ids, mask=padding)
        vectors: Tensor = interpret(self._program, given, self._program.outputs)[0]
        return vectors.float().numpy()

    def close(self) -> None:
        self._constants = {}


class EagerEngine:
    """An ``Engine`` over the references. Raises ``UsageError`` when ``program`` has no cache slots."""

    name = "eager"
    storage = HOST

    def __init__(self, program: Program) -> None:
        if not program.slots:
            raise UsageError("the Program has no key/value cache", hint="run insert_kv_cache, or use run_full")
        self.spec = program.spec
        self.slots = program.slots
        self.all_logits = program.outputs[0].meta["val"].shape[1] != 1
        self.verifies = self.all_logits
        self.prompt_from = 2  # torch multiplies a lone row by a matrix in another way
        self._program = program
        self._constants = fold_constants(program)

    def step(self, tokens: np.ndarray, cache: KVCache, last: int = 1) -> np.ndarray:
        """See ``Engine.step``; the array returned is freshly allocated."""
        check_last(last, tokens, self.verifies)
        new = tokens.shape[1]
        lengths = cache.lengths[:, None]
        total = int(cache.lengths.max()) + new
        feeds: dict[str, Any] = {
            "input_ids": torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64)),
            "position_ids": torch.from_numpy(lengths + np.arange(new)),
            "attention_mask": torch.from_numpy((np.arange(total) < lengths + new).astype(np.int64)),
        }
        for index, (key, value) in enumerate(zip(cache.keys, cache.values, strict=True)):
            feeds[f"past_key_values_{index}_key"] = torch.from_numpy(key)
            feeds[f"past_key_values_{index}_value"] = torch.from_numpy(value)
        given = self._constants | {node: feeds[node.name] for node in self._program.inputs}
        logits, *present = interpret(self._program, given, self._program.outputs)
        for index in range(len(self.slots)):
            np.copyto(cache.keys[index], present[2 * index].numpy())
            np.copyto(cache.values[index], present[2 * index + 1].numpy())
        return logits.float().numpy()

    def close(self) -> None:
        self._constants = {}


def run_full(program: Program, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """The logits of a Program without a cache: ``input_ids`` and ``position_ids`` (B, T) int64 -> (B, T or 1, V)."""
    if program.slots:
        raise UsageError("the Program has a key/value cache", hint="compile it and call step")
    feeds = {"input_ids": input_ids, "position_ids": position_ids}
    logits: Tensor = interpret(program, {node: feeds[node.name] for node in program.inputs}, [program.outputs[0]])[0]
    return logits


def fold_constants(program: Program) -> dict[fx.Node, Any]:
    """The values of all weights that the rest of the graph reads, and of every expression over weights alone.

    A weight that only such expressions read is left out: its merged copy is what stays in memory.
    """
    weights = program.weights
    constant = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in weights]
    known = set(constant)
    for node in program.graph.nodes:
        if node.op == "call_function" and node.all_input_nodes and known.issuperset(node.all_input_nodes):
            constant.append(node)
            known.add(node)
    read = [node for node in constant if not known.issuperset(node.users)]
    return dict(zip(read, interpret(program, {}, read), strict=True))
