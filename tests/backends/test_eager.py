"""The eager backend: the cached graph equals attention written out, and weights are folded once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from ryzen_compile import ops
from ryzen_compile.backends.eager import EagerBackend, EagerEngine, fold_constants, run_full
from ryzen_compile.errors import UsageError
from ryzen_compile.runtime.cache import KVCache

IDS = np.random.default_rng(2).integers(0, 61, (2, 9))
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}  # sums in another order


def step_all(engine: EagerEngine, ids: np.ndarray, chunks: tuple[int, ...]) -> np.ndarray:
    cache, outs, at = KVCache(engine.slots, 1, 11), [], 0
    for new in chunks:
        outs.append(engine.step(ids[:, at : at + new], cache).copy())
        cache.advance(new)
        at += new
    return np.concatenate(outs, axis=1)


def test_cached_attention_equals_attention_over_the_whole_sequence(attentions_program, heads):
    spec = heads(packed=False, window=4, softcap=3.0, sinks=True, interleaved=True)
    program = attentions_program(spec)
    weights = {name.rsplit(".", 1)[-1]: program.weights[key] for key, name in program.weight_names.items()}
    positions = torch.arange(9)[None]
    x = weights["table"][torch.from_numpy(IDS[:1])] + 0.01 * positions[:, :, None]
    q, k, v = ((x @ weights[n].T).view(1, 9, h, 16).transpose(1, 2) for n, h in (("q", 4), ("k", 2), ("v", 2)))
    q, k = (ops.rotary(t, positions, weights["cos"], weights["sin"], True) for t in (q, k))
    want = ops.attention(q, k, v, weights["sinks"], 1 / math.sqrt(16), 4, 3.0, True).flatten(2)
    engine = EagerBackend().compile(program)
    for chunks in ((9,), (4, 1, 3, 1), (1,) * 9):
        np.testing.assert_allclose(step_all(engine, IDS[:1], chunks), want.detach().numpy(), **TOLERANCE)


@pytest.mark.parametrize("window", [1, 4, 7])
def test_a_rolling_cache_sees_what_a_whole_one_does(attentions_program, heads, window):
    """Both read the same rows of the same window, also after rows were dropped; only the rolling one stays small."""
    ids = np.random.default_rng(3).integers(0, 61, (2, 60))
    options = {"window": window, "sinks": True, "softcap": 3.0}
    engines = [EagerEngine(attentions_program(heads(**options, rolling=rolls))) for rolls in (False, True)]
    assert [slot.rows for engine in engines for slot in engine.slots] == [0, window + 16]
    for chunks in ((60,), (1,) * 60, (17, 1, 1, 30, 11)):
        found = []
        for engine in engines:
            cache, outs, at = KVCache(engine.slots, 2, 60), [], 0
            for new in chunks:
                rows = [cache] if new == 1 or not at else [cache.row(0), cache.row(1)]  # as engines are called
                parts = ids[None] if len(rows) == 1 else ids[:, None]
                outs.append(
                    np.concatenate(
                        [engine.step(part[:, at : at + new], row) for row, part in zip(rows, parts, strict=True)]
                    )
                )
                cache.advance(new)
                at += new
            assert cache.keys[0].shape[2] == (engine.slots[0].rows or 60)
            found.append(np.concatenate(outs, axis=1))
        np.testing.assert_allclose(found[1], found[0], **TOLERANCE)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_stored_rows_are_read_as_they_were_rounded(attentions_program, heads, form):
    """Near the unrounded model, but not it, and the same in any chunks."""
    exact, rounded = (EagerEngine(attentions_program(heads(form=one))) for one in ("fp32", form))
    assert rounded.slots[0].key_format == rounded.slots[0].value_format == form
    want, whole = (step_all(engine, IDS[:1], (9,)) for engine in (exact, rounded))
    apart = np.abs(whole - want).max()
    assert 1e-3 < apart < 0.5 * np.abs(want).max(), "the scales clamp some of the codes"
    for chunks in ((4, 1, 3, 1), (1,) * 9):
        np.testing.assert_allclose(step_all(rounded, IDS[:1], chunks), whole, **TOLERANCE)


def test_unequal_rows_decode_as_they_would_alone(decoder):
    engine = EagerEngine(decoder)
    cache = KVCache(engine.slots, 2, 11)
    for index, length in enumerate((5, 2)):
        row = cache.row(index)
        engine.step(IDS[index : index + 1, :length], row)
        row.advance(length)
    together = engine.step(IDS[[0, 1], [5, 2]][:, None], cache)
    for index, length in enumerate((5, 2)):
        alone = step_all(engine, IDS[index : index + 1], (length, 1))
        np.testing.assert_allclose(together[index, 0], alone[0, -1], **TOLERANCE)


def test_weight_expressions_are_folded_once_and_their_sources_dropped(decoder):
    constants = fold_constants(decoder)
    merged = [n for n in decoder.graph.nodes if n.name.startswith("cat")]
    assert len(merged) == 4
    for node in merged:
        assert torch.equal(constants[node], torch.cat([decoder.weights[s.name] for s in node.all_input_nodes]))
    assert constants.keys().isdisjoint(s for n in merged for s in n.all_input_nodes)
    table = next(n for n in decoder.graph.nodes if "embedding" in n.name).args[0]
    assert constants[table].data_ptr() == decoder.weights[table.name].data_ptr()


def test_run_full_feeds_what_the_program_takes(plain_program):
    class Plain(nn.Module):
        def forward(self, input_ids):
            return (input_ids[:, :, None].float() * 2,)

    ids = torch.from_numpy(IDS)
    logits = run_full(plain_program(Plain(), ids), ids, ids)
    torch.testing.assert_close(logits, ids[:, :, None] * 2.0, rtol=0, atol=0)


def test_a_cache_is_asked_for_or_refused(decoder, plain_program):
    ids = torch.from_numpy(IDS)
    with pytest.raises(UsageError, match="has a key/value cache; compile it and call step"):
        run_full(decoder, ids, ids)
    with pytest.raises(UsageError, match="no key/value cache; run insert_kv_cache"):
        EagerEngine(plain_program(nn.Linear(3, 3), torch.randn(2, 3)))


def test_close_gives_up_the_folded_weights(decoder):
    engine = EagerEngine(decoder)
    engine.close()
    engine.close()
    assert not engine._constants


def test_every_operator_of_the_dialect_is_supported():
    assert {"ryzen::cached_attention", "ryzen::rotary"} <= EagerBackend.supported_ops
    assert all(hasattr(torch.ops.ryzen, name.removeprefix("ryzen::")) for name in EagerBackend.supported_ops)
