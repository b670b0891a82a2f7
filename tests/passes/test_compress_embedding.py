"""The table of tokens as codes: the Program computes what the model with the decoded table computes."""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from ryzen_compile.capture import capture
from ryzen_compile.config import EmbeddingCompression, find_recipe
from ryzen_compile.errors import UsageError
from ryzen_compile.interpret import interpret
from ryzen_compile.numerics.codebook import CodebookFormat
from ryzen_compile.numerics.search.codebook_fit import FitSettings, fit_codebook
from ryzen_compile.passes.compress_embedding import EmbeddingCompressor, costliest, find_lookups
from ryzen_compile.pipeline import default_passes
from ryzen_compile.program import Program, is_call
from ryzen_compile.validate.parity import full_logits
from ryzen_compile.verify import verify
from tests.model_directory import case_named
from tests.zoo import VOCAB, NanoDecoder, build, randomize

IDS = torch.randint(VOCAB, (2, 13), generator=torch.Generator().manual_seed(3))
TEXT = torch.randint(VOCAB // 2, (6, 32), generator=torch.Generator().manual_seed(4))
NAMES = {"nano": "wte.weight", "tied llama": "model.embed_tokens.weight", "llama": "model.embed_tokens.weight"}


@cache
def model(name: str) -> nn.Module:
    if name == "nano":
        torch.manual_seed(0)
        decoder = NanoDecoder(width=48).eval()
        randomize(decoder)
        return decoder
    return build(case_named("llama", tie_word_embeddings=name == "tied llama"))


@cache
def captured(name: str) -> Program:
    """What the pass is given."""
    program = capture(model(name))
    for step in default_passes(find_recipe("fp32", embedding={"method": "kmeans"})):
        if step.name == "compress_embedding":
            return program
        program = step.run(program).program
    raise LookupError("the recipe does not compress the table")


def table_of(name: str) -> Tensor:
    return dict(model(name).named_parameters(remove_duplicate=False))[NAMES[name]].detach()


SETTINGS = {
    "4 bits": {"bits": 8, "cluster_dim": 2},
    "scalar": {"bits": 3, "cluster_dim": 1, "keep": 0.0},
    "two stages, groups": {"bits": 4, "cluster_dim": 4, "stages": 2, "group": 16, "keep": 0.1},
    "by ratio": {"ratio": 4.0},
}


@pytest.mark.parametrize("form", SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_lookups_read_codes_and_nothing_else_changes(name: str, form: str) -> None:
    """In float64 on both sides: the model whose lookups read the decoded table; a tied head keeps its weights."""
    compressor = EmbeddingCompressor(EmbeddingCompression(method="kmeans", **SETTINGS[form]), text=TEXT)
    result = compressor.run(captured(name))
    verify(result.program)
    counts = Counter(result.program.ops())
    assert counts["ryzen.codebook_embedding"] == 1 and len(result.hits) == 1
    before = Counter(captured(name).ops())["aten.embedding"]
    assert counts["aten.embedding"] == before - 1  # positions of the nano decoder stay

    twin = copy.deepcopy(model(name)).double()
    lookup = dict(twin.named_modules())[NAMES[name].removesuffix(".weight")]
    decoded = compressor.decompress(compressor.compress(table_of(name))).double()
    lookup.register_forward_hook(lambda _, args, __: decoded[args[0]])
    with torch.no_grad():
        out = twin(IDS)
    want = getattr(out, "logits", out)
    torch.testing.assert_close(full_logits(result.program, IDS, double=True), want, rtol=0, atol=1e-5)
    assert (full_logits(captured(name), IDS, double=True) - want).abs().max() > 1e-3  # codes did change something


def test_the_note_says_what_was_done_and_that_a_head_is_tied() -> None:
    compressor = EmbeddingCompressor(EmbeddingCompression(method="kmeans", keep=0.05), text=TEXT)
    note = compressor.run(captured("tied llama")).hits[0].note
    assert "lm_head.weight" in note and "5 rows kept" in note and "tied" in note  # one parameter of two names
    assert "tied" not in compressor.run(captured("llama")).hits[0].note


def test_a_table_looked_up_by_positions_is_left_with_the_reason() -> None:
    _, misses = find_lookups(captured("nano"))
    (miss,) = misses
    assert "is looked up by something else than input_ids" in miss.reason


def test_a_given_table_is_stored_as_it_is() -> None:
    table = table_of("llama")
    given = fit_codebook(table, CodebookFormat(2, 4), FitSettings())
    compressor = EmbeddingCompressor(EmbeddingCompression(method="kmeans"), given={NAMES["llama"]: given})
    program = compressor.apply(captured("llama"))
    node = next(n for n in program.graph.nodes if is_call(n, torch.ops.ryzen.codebook_embedding))
    rows = interpret(program, {program.inputs[0]: IDS}, [node])[0]
    assert torch.equal(rows, given.rows(IDS))


@pytest.mark.parametrize("ratio", [3.95, 7.1, 10.0, 16.0])
def test_a_ratio_is_reached_with_everything_counted(ratio: float) -> None:
    """A table of 3,000 x 40: what is stored is at most a ratio-th of float32, and at least 85 % of that."""
    table = torch.randn(3000, 40, generator=torch.Generator().manual_seed(0))
    compressor = EmbeddingCompressor(EmbeddingCompression(method="kmeans", ratio=ratio))
    tensor = compressor.compress(table)
    assert ratio <= compressor.ratio(tensor) < ratio / 0.85
    assert tensor.kept is not None and len(tensor.kept) >= 1


def test_frequent_rows_are_kept() -> None:
    """Tokens 0 to 48 occur in the text, the others do not: with rows of one size, the kept ones are among those."""
    table = torch.randn(VOCAB, 64, generator=torch.Generator().manual_seed(0))
    table /= table.norm(dim=1, keepdim=True)
    compressor = EmbeddingCompressor(EmbeddingCompression(method="kmeans", keep=0.1), text=TEXT)
    tensor = compressor.compress(table)
    kept = (tensor.slots >= 0).nonzero()[:, 0]
    assert len(kept) == 10 and kept.max() < VOCAB // 2
    assert torch.equal(tensor.rows(kept), table[kept].half().float())


def test_weighting_none_does_not_look_at_the_text() -> None:
    table = torch.randn(VOCAB, 16, generator=torch.Generator().manual_seed(0))
    settings = EmbeddingCompression(method="kmeans", weighting="none", bits=3)
    with_text, without = (EmbeddingCompressor(settings, text=text).compress(table) for text in (TEXT, None))
    assert torch.equal(with_text.decode(), without.decode())


def test_costliest_rows() -> None:
    """Distance from the mean row squared, times the weight: by hand."""
    table = torch.tensor([[1.0, 0], [-1, 0], [0, 3], [0, -3]])
    assert costliest(table, None, 2).tolist() == [2, 3]
    assert costliest(table, torch.tensor([100.0, 1, 1, 1]), 2).tolist() == [0, 2]
    assert costliest(table, None, 9).tolist() == [0, 1, 2, 3]
    assert costliest(table, None, 2, first=(0, 77)).tolist() == [0, 2]


def test_stats_and_validate_agree_with_the_tensor() -> None:
    table = torch.randn(500, 24, generator=torch.Generator().manual_seed(1))
    compressor = EmbeddingCompressor(EmbeddingCompression(method="kmeans", bits=6, keep=0.0))
    tensor = compressor.compress(table)
    stats = compressor.stats(tensor)
    assert stats.nbytes == tensor.nbytes and stats.ratio == pytest.approx(4 * table.numel() / tensor.nbytes)
    quality = compressor.validate(table, tensor, hidden=torch.randn(7, 24))
    error = (tensor.decode() - table).norm() / table.norm()
    assert quality.relative_error == pytest.approx(float(error), rel=1e-5)
    assert quality.kl is not None and quality.kl > 0 and compressor.validate(table, tensor).kl is None


@pytest.mark.parametrize(
    ("table", "settings", "message"),
    [
        (torch.zeros(0, 8), {}, "a matrix with rows"),
        (torch.zeros(8), {}, "a matrix with rows"),
        (torch.full((8, 8), float("nan")), {}, "NaN"),
        (torch.zeros(8, 7), {}, "not a multiple of dim"),
        (torch.zeros(64, 8), {"ratio": 100.0}, "is the most"),
    ],
)
def test_bad_tables_are_refused(table: Tensor, settings: dict[str, object], message: str) -> None:
    compressor = EmbeddingCompressor(EmbeddingCompression(method="kmeans", **settings))
    with pytest.raises(UsageError, match=message):
        compressor.compress(table)
