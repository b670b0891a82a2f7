"""Encoders are captured as they are: many classes against the model itself, with padding on either side."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from ryzen_compile.backends.eager import EagerBackend
from ryzen_compile.capture_encoder import capture_encoder, embed
from ryzen_compile.errors import CaptureError, ConfigError
from ryzen_compile.program import Program
from ryzen_compile.spec import Pooling
from ryzen_compile.verify import verify
from tests.zoo import randomize

SIZES: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 2,
}  # fmt: skip
MEAN = Pooling("mean", normalize=True)
# Class -> settings, how attention comes in, the tokens that positions are held for, and the windows.
WINDOWED: dict[str, Any] = {"local_attention": 8, "global_attn_every_n_layers": 2}
FAMILIES: dict[str, tuple[dict[str, Any], str, int, list[int]]] = {
    "Bert": ({}, "interface", 64, [0, 0]),
    "Roberta": ({}, "interface", 62, [0, 0]),  # its first two rows of positions are padding's
    "DistilBert": ({"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}, "interface", 64, [0, 0]),
    "Electra": ({"embedding_size": 16}, "interface", 64, [0, 0]),
    "Albert": ({"embedding_size": 16}, "interface", 64, [0, 0]),
    "ModernBert": (WINDOWED, "interface", 64, [0, 5]),  # 4 tokens to either side, and itself
    "NomicBert": ({}, "interface", 64, [0, 0]),
    "EuroBert": ({"num_key_value_heads": 2, "mask_token_id": 3}, "interface", 64, [0, 0]),
    "XLMRoberta": ({}, "interface", 62, [0, 0]),
    "MPNet": ({}, "aten", 62, []),  # a bias by distance, which the interface has no word for
    "RemBert": ({}, "aten", 64, []),
    "LayoutLM": ({}, "aten", 64, []),  # hands its attention a mask of its own
}
QUICK = {"Bert", "Roberta", "ModernBert", "MPNet", "EuroBert"}


def tiny(family: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SIZES | FAMILIES[family][0]))
    model: nn.Module = getattr(transformers, f"{family}Model")(config).float().eval()
    randomize(model)
    return model


def texts(rows: int = 4, tokens: int = 17) -> tuple[Tensor, Tensor]:
    """Padded behind, in front, down to one token, and not at all."""
    ids = torch.randint(5, 99, (rows, tokens), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, 9:], mask[1, :5], mask[2, 1:] = 0, 0, 0
    return ids.masked_fill(mask == 0, 1), mask


def vectors(program: Program, ids: Tensor, mask: Tensor) -> Tensor:
    return torch.from_numpy(EagerBackend().compile(program).embed(ids.numpy(), mask.numpy()))


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAMILIES])
def test_vectors_are_the_models(family: str) -> None:
    model, (_, how, context, windows) = tiny(family), FAMILIES[family]
    before = model.config._attn_implementation
    program = capture_encoder(model, MEAN)
    verify(program)
    assert model.config._attn_implementation == before
    assert [n.name for n in program.inputs] == ["input_ids", "attention_mask"]
    assert (program.provenance["attention"], program.spec.context) == (how, context)
    assert (program.spec.hidden, program.spec.vocab, program.spec.pooling) == (32, 99, MEAN)
    found = [n.args[5] for n in program.graph.nodes if n.target is torch.ops.ryzen.attention.default]
    assert found == windows and len(found) == program.spec.layers
    for rows, tokens in ((4, 17), (3, 7), (3, context)):
        ids, mask = texts(rows, tokens)
        got = vectors(program, ids, mask)
        # float32 sums in another order, on vectors of length 1
        torch.testing.assert_close(got, embed(model, program.spec, ids, mask), rtol=0, atol=2e-6)
    assert float((got[0] - got[1]).abs().max()) > 0.05  # these vectors do say something


def test_a_text_does_not_depend_on_its_batch() -> None:
    program = capture_encoder(tiny("ModernBert"), MEAN)
    ids, mask = texts()
    together = vectors(program, ids, mask)
    alone = vectors(program, ids[:1, :9], mask[:1, :9])
    torch.testing.assert_close(alone, together[:1], rtol=0, atol=2e-6)
    ids[0, 9:] = 50  # what stands in the padding
    torch.testing.assert_close(vectors(program, ids, mask)[:1], together[:1], rtol=0, atol=2e-6)


class Plain(nn.Module):
    """Tokens that see each other through one mean; padding has no part in it."""

    def __init__(self, rank: int = 3) -> None:
        super().__init__()
        self.table, self.mix, self.rank, self.block_size = nn.Embedding(11, 8), nn.Linear(8, 8), rank, 31

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        x = self.table(ids)
        kept = padding.unsqueeze(-1).to(x.dtype)
        x = x + self.mix((x * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True))
        return x if self.rank == 3 else x.sum(-1)


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "last"])
def test_a_plain_module(mode: Any) -> None:
    model = Plain().train()
    program = capture_encoder(model, Pooling(mode, normalize=False))
    assert model.training
    assert (program.spec.layers, program.spec.context, program.spec.hidden) == (0, 31, 8)
    ids, mask = texts()
    ids = ids % 11
    torch.testing.assert_close(vectors(program, ids, mask), embed(model, program.spec, ids, mask), rtol=0, atol=1e-6)
    assert model.training


class NoMask(nn.Module):
    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        return input_ids


class NoTable(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return input_ids[:, :, None].float() * torch.ones(5)


def test_what_is_no_encoder_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"got forward\(input_ids, token_type_ids\)") as caught:
        capture_encoder(NoMask(), MEAN, context=31)
    assert "how far it is padded" in caught.value.hint
    with pytest.raises(CaptureError, match=r"got a result of shape \(\d+, \d+\)"):
        capture_encoder(Plain(rank=2), MEAN)
    with pytest.raises(CaptureError, match="expected a table that input_ids are looked up in"):
        capture_encoder(NoTable(), MEAN, context=31)


def test_a_context_is_what_the_tables_hold() -> None:
    model = tiny("Roberta")
    assert capture_encoder(model, MEAN, context=31).spec.context == 31
    with pytest.raises(ConfigError, match="context 64 exceeds the 62 tokens"):
        capture_encoder(model, MEAN, context=64)
    with pytest.raises(ConfigError, match="context 65 exceeds the 64 positions"):
        capture_encoder(model, MEAN, context=65)


def test_the_engine_takes_arrays_of_any_layout() -> None:
    program = capture_encoder(Plain(), MEAN)
    ids, mask = texts()
    ids = ids % 11
    engine = EagerBackend().compile(program)
    want = engine.embed(ids.numpy(), mask.numpy())
    got = engine.embed(np.asfortranarray(ids.numpy().astype(np.int32)), np.asfortranarray(mask.numpy()))
    assert want.dtype == np.float32 and np.array_equal(got, want)
    engine.close()
    engine.close()
