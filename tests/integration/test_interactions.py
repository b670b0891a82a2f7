"""Two components at once: that neither takes from the other what it gives alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ryzen_compile.api import load
from ryzen_compile.backends.onnxruntime import native
from ryzen_compile.runtime.generate import GenerationStats
from ryzen_compile.runtime.speculative.settings import Speculation
from ryzen_compile.validate.quality import EngineScorer, ModelScorer, score

NEW = 32
LOOKUP = Speculation(drafters=("lookup",), tokens=4, fixed=True)  # whatever a step costs on this machine today
Record = Callable[[str, object], None]


def test_compression_takes_no_fusion_away_and_its_errors_add_up(
    artifacts: Any, float_model: Any, windows: Callable[[int, int], np.ndarray], record_property: Record
) -> None:
    """Every pass before the weights are rounded finds as many places with as without. A divergence goes with the square
    of what moves the logits, so that two causes that pull the same way give (√a + √b)² together, and independent ones
    a + b; a fifth more than the former is left for the text's spread."""
    text, kl, hits = windows(8, 128), {}, {}
    for name in ("fp32", "int4", "codes", "int4 and codes"):
        with artifacts.open(name, native=False) as model:
            hits[name] = {r["name"]: len(r["hits"]) for r in model.report["records"] if r["promise"] == "exact"}
            kl[name] = score(EngineScorer(model.engine), ModelScorer(float_model), text).kl.value
            record_property(f"kl {name}", kl[name])
    dead = "eliminate_dead"  # what is left unread is another matter
    assert all({**found, dead: 0} == {**hits["fp32"], dead: 0} for found in hits.values()), hits
    together = (math.sqrt(kl["int4"]) + math.sqrt(kl["codes"])) ** 2
    assert kl["fp32"] < min(kl["int4"], kl["codes"])  # or there was nothing to add up
    assert max(kl["int4"], kl["codes"]) / 2 < kl["int4 and codes"] <= 1.2 * together


def test_a_rounded_cache_serves_the_fused_graph_however_it_is_filled(
    artifacts: Any, prompts: np.ndarray, greedy: Any, record_property: Record
) -> None:
    """Attention turns, rounds and stores keys in one operator. Each row is rounded by itself, so that a prompt read at
    once, one read in pieces of 7 tokens, and one whose rows were kept from before are continued by the same tokens."""
    with load(artifacts.path("int8 cache"), threads=1, prefix_bytes=64 << 20) as model:
        assert {slot.key_format for slot in model.engine.slots} == {"int8"}
        assert all(record["status"] != "rolled back" for record in model.report["records"])
        stats = GenerationStats()
        again = greedy(model, np.concatenate([prompts, prompts]), NEW)[len(prompts) :]
        model.generate(prompts[:1], max_new_tokens=1, stats=stats)
    with artifacts.open("int8 cache") as model:
        whole = greedy(model, prompts, NEW)
        pieces = greedy(model, prompts, NEW, prefill_chunk_size=7)
    record_property("tokens_reused", stats.reused_tokens)
    assert stats.reused_tokens > 0
    assert pieces == whole
    assert again == whole
    assert len({token for row in whole for token in row}) > len(prompts)


def test_drafts_are_verified_over_compressed_weights(
    artifacts: Any, prompts: np.ndarray, greedy: Any, record_property: Record
) -> None:
    """The text stays the same to the last token where a step of one token and one of several compute alike: native
    operators do with integers, ONNX Runtime's own do with floats only, and there the table alone is compressed."""
    name = "codes" if native.unusable() else "int4 and codes"
    with artifacts.open(name) as model:
        plain = greedy(model, prompts, 2 * NEW)
        assert not model.speculation.drafts  # nothing drafts unasked
        drafted = greedy(model, prompts, 2 * NEW, speculation=LOOKUP)
        found = model.speculation
    record_property("artifact", name)
    record_property("acceptance", found.acceptance_rate)
    record_property("tokens_per_step", found.tokens / found.steps)
    assert drafted == plain
    assert found.accepted > 0 and found.steps_saved == found.accepted
