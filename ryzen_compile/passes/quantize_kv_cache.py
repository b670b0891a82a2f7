"""Store keys and values in the cache as integers.

    out, k', v' = cached_attention(q, k, v, k_cache, v_cache, ...)      caches of 8 or 4 bits, with or without scales

After insert_kv_cache, which is held to be exact before anything is rounded. Fixed scales, one per channel, are chosen
from the keys and values that windows of calibration text leave in the unrounded cache; without text, from random
tokens. Rows that carry their own scales need no text; at 4 bits their keys lose their mean, where nothing else
in the attention would notice, and are turned by a Hadamard matrix. ``auto`` gives a layer 4 bits where that costs
little: each is tried alone, and those that cost least are taken while the sum stays within half of the budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from ryzen_compile import ops
from ryzen_compile.config import KVCacheConfig
from ryzen_compile.edit import Edit
from ryzen_compile.errors import UnsupportedError
from ryzen_compile.interpret import cached_feeds, interpret
from ryzen_compile.numerics.divergence import mean_divergence
from ryzen_compile.numerics.kv_scales import channel_scales
from ryzen_compile.numerics.rows import RowFormat
from ryzen_compile.passes.base import Pass, PassResult, Promise, Site
from ryzen_compile.program import Program, is_call, module_path, shape
from ryzen_compile.spec import CacheSlot

cached_attention = torch.ops.ryzen.cached_attention
WINDOWS, LONGEST = 4, 1024  # read one by one: attention's scores over all of them at once would fill the memory
RANDOM_LENGTH = 256  # of a window where there is no text
TRIED_ON = 512  # tokens that ``auto`` tries a layer on
AUTO_SHARE = 0.5  # of the budget that the sum of single layers' costs may reach: together they cost more


@dataclass(frozen=True)
class Plan:
    """How one layer's rows are stored; scales are none for rows that carry theirs."""

    key: RowFormat
    value: RowFormat
    key_scale: Tensor | None
    value_scale: Tensor | None
    turned: bool = False
    key_mean: Tensor | None = None


class QuantizeKVCache(Pass):
    """``calibration`` (B, T) int64 is text in the model's tokens, in consecutive windows."""

    name: ClassVar[str] = "quantize_kv_cache"
    promise: ClassVar[Promise] = "lossy"
    produces: ClassVar[frozenset[str]] = frozenset({"ryzen::cached_attention"})
    required: ClassVar[bool] = True
    works_on: ClassVar[str] = "cached attention"
    builds_on: ClassVar[str] = "insert_kv_cache"

    def __init__(self, settings: KVCacheConfig, *, calibration: Tensor | None = None) -> None:
        self.settings = settings
        self.max_kl = settings.budget
        self._calibration = calibration

    @torch.no_grad()
    def run(self, program: Program) -> PassResult:
        nodes = _attentions(program)
        if not nodes:
            return PassResult(program)
        if any(str(slot.key_format) != "fp32" for slot in program.slots):
            raise UnsupportedError("the cache is quantized already", hint="run this pass once")
        text, origin = self._text(program)
        plans = self._plans(program, nodes, text)
        result = store_as(program, dict(enumerate(plans)))
        sites = [
            Site(node.name, module_path(node), f"keys {plan.key}, values {plan.value}{_how(plan, origin)}")
            for node, plan in zip(nodes, plans, strict=True)
        ]
        return PassResult(result, tuple(sites))

    def _text(self, program: Program) -> tuple[Tensor, str]:
        """Windows as long as the context allows, and what they are, in words."""
        length = min(LONGEST, program.spec.context)
        if self._calibration is not None:
            tokens = self._calibration.flatten()
            length = min(length, len(tokens))
            windows = tokens[: len(tokens) // length * length].reshape(-1, length)
            spread = torch.arange(min(WINDOWS, len(windows))) * len(windows) // min(WINDOWS, len(windows))
            return windows[spread], "calibrated on text"
        generator = torch.Generator().manual_seed(0)
        size = (WINDOWS, min(length, RANDOM_LENGTH))
        return torch.randint(program.spec.vocab, size, generator=generator), "calibrated on random tokens"

    def _plans(self, program: Program, nodes: Sequence[fx.Node], text: Tensor) -> list[Plan]:
        settings = self.settings
        key, value = settings.formats
        found = _measured(program, nodes, text, key, value)
        if settings.dtype != "auto":
            return found
        wide = _measured(program, nodes, text, RowFormat(8), RowFormat(8))
        reference = _logits(program, text)
        cost = {
            i: mean_divergence(reference, _logits(store_as(program, {i: plan}), text))[0]
            for i, plan in enumerate(found)
        }
        chosen, spent = set(), 0.0
        for i in sorted(cost, key=lambda i: cost[i]):
            spent += cost[i]
            if spent > AUTO_SHARE * settings.budget:
                break
            chosen.add(i)
        return [narrow if i in chosen else wide[i] for i, narrow in enumerate(found)]


def store_as(program: Program, plans: Mapping[int, Plan]) -> Program:
    """``program`` with the caches of the layers in ``plans`` stored so; the others stay as they are."""
    edit = Edit(program, QuantizeKVCache.name)
    slots = list(program.slots)
    nodes = _attentions(edit.program)
    for i, plan in plans.items():
        slots[i] = replace(slots[i], key_format=str(plan.key), value_format=str(plan.value))
        _rewrite(edit, nodes[i], slots[i], plan)
    edit.set_slots(tuple(slots))
    return edit.finish()


def _attentions(program: Program) -> list[fx.Node]:
    return [n for n in program.graph.nodes if is_call(n, cached_attention)]


def _rewrite(edit: Edit, node: fx.Node, slot: CacheSlot, plan: Plan) -> None:
    *before, heads, scale, window, softcap, interleaved = node.args[:14]
    sides = (("key", plan.key, slot.head_dim), ("value", plan.value, slot.value_dim))
    for cache, (_, form, dim) in zip(before[3:5], sides, strict=True):
        size = (*shape(cache)[:3], form.width(dim))
        edit.retype_input(cache, edit.fake_empty(size, torch.from_numpy(np.empty(0, form.dtype)).dtype))
    named = (("key_scale", plan.key_scale), ("value_scale", plan.value_scale), ("key_mean", plan.key_mean))
    *scales, mean = (None if x is None else edit.add_constant(f"{name}_{slot.layer}", x) for name, x in named)
    results = edit.call(
        ops.cached_attention, *before, heads, scale, window, softcap, interleaved, *scales, str(plan.key),
        str(plan.value), plan.turned, slot.window > 0, mean, before=node,
    )  # fmt: skip
    for item in list(node.users):
        edit.replace(item, edit.item(results, int(item.args[1]), before=node))


def _measured(program: Program, nodes: Sequence[fx.Node], text: Tensor, key: RowFormat, value: RowFormat) -> list[Plan]:
    """A plan per layer, with scales that fit what ``text`` leaves in the caches."""
    for slot in program.slots:
        for form, dim in ((key, slot.head_dim), (value, slot.value_dim)):
            form.width(dim)  # refuses what does not divide, before any work
    # Measured: where every channel has a scale of its own there is nothing left to spread or to centre.
    centred = key.bits == 4 and key.group > 0
    turned = centred and all(_is_power_of_two(slot.head_dim) for slot in program.slots)
    if not centred and key.group and value.group:
        return [Plan(key, value, None, None)] * len(nodes)
    plans = []
    for node, (keys, values) in zip(nodes, _left_by(program, nodes, text), strict=True):
        mean = keys.mean((0, 2), keepdim=True) if centred and _ignores_constants(node) else None
        plans.append(Plan(key, value, _scale(keys, key), _scale(values, value), turned, mean))
    return plans


def _left_by(program: Program, nodes: Sequence[fx.Node], text: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The keys and values (N, K, T, D) of every layer that the windows ``text`` (N, T) leave in an unrounded cache."""
    found: dict[fx.Node, list[tuple[Tensor, Tensor]]] = {node: [] for node in nodes}

    def keep(node: fx.Node, result: Any) -> None:
        if node in found:
            keys, values = (rows[:, :, : text.shape[1]].clone() for rows in result[1:])
            found[node].append((keys, values))

    for window in text.split(1):
        interpret(program, cached_feeds(program, window), [nodes[-1]], watch=keep)
    return [(torch.cat([k for k, _ in pairs]), torch.cat([v for _, v in pairs])) for pairs in found.values()]


def _ignores_constants(node: fx.Node) -> bool:
    """Whether adding a constant to all scores of a query changes nothing: no sinks, no soft cap."""
    return node.args[8] is None and not node.args[12]


def _scale(rows: Tensor, form: RowFormat) -> Tensor | None:
    return None if form.group else channel_scales(rows, form.bits)


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def _logits(program: Program, text: Tensor) -> Tensor:
    logits: Tensor = interpret(program, cached_feeds(program, text[:1, :TRIED_ON]), [program.outputs[0]])[0]
    return logits


def _how(plan: Plan, origin: str) -> str:
    done = [", keys centred"] * (plan.key_mean is not None) + [", keys turned"] * plan.turned
    measured = plan.key_mean is not None or not (plan.key.group and plan.value.group)
    return "".join(done) + (f", {origin}" if measured else "")
