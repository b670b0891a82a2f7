"""The file of a trained table: what was saved comes back, everything else is refused, and an export stores it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ryzen_compile.capture import capture
from ryzen_compile.errors import ModelError, ResourceError, UnsafeError, UsageError
from ryzen_compile.numerics.codebook import CodebookFormat, CodebookTensor
from ryzen_compile.numerics.search.codebook_fit import FitSettings, fit_codebook
from ryzen_compile.passes.canonicalize import Canonicalize
from ryzen_compile.passes.compress_embedding import EmbeddingCompressor
from ryzen_compile.recipe_file import CODES_NAME
from ryzen_compile.train.config import DkmSettings
from ryzen_compile.train.dkm_table import DkmComponent
from ryzen_compile.train.table_file import FORMAT, given_tables, load_table, save_table
from tests.model_directory import case_named
from tests.zoo import VOCAB, build

TABLE = torch.randn(37, 24, generator=torch.Generator().manual_seed(0))
NAME = "model.embed_tokens.weight"
FORMS = {
    "a scale a row": (CodebookFormat(5, 2), FitSettings(channel_gain=False)),
    "groups, kept rows": (CodebookFormat(3, 4, group=8), FitSettings(keep=torch.tensor([3, 36]))),
    "two stages, kept in float32": (
        CodebookFormat(2, 4, 2),
        FitSettings(keep=torch.tensor([0]), keep_dtype=torch.float32),
    ),
    "no scales": (CodebookFormat(7, 1, group=None), FitSettings(centre=False, channel_gain=False)),
}


def saved(directory: Path, form: str = "groups, kept rows") -> tuple[Path, CodebookTensor]:
    tensor = fit_codebook(TABLE, *FORMS[form])
    path = directory / CODES_NAME
    save_table(path, NAME, tensor, TABLE)
    return path, tensor


@pytest.mark.parametrize("form", FORMS)
def test_what_was_saved_comes_back(tmp_path: Path, form: str) -> None:
    path, tensor = saved(tmp_path, form)
    found = load_table(path)
    assert found.name == NAME and found.tensor.format == tensor.format and found.tensor.shape == (37, 24)
    assert found.tensor.tensors.keys() == tensor.tensors.keys()
    for name, value in tensor.tensors.items():
        assert found.tensor.tensors[name].dtype == value.dtype and torch.equal(found.tensor.tensors[name], value)
    expected = (tensor.decode() - TABLE).norm() / TABLE.norm()
    assert found.relative_error == pytest.approx(float(expected), rel=1e-5)


def test_the_same_table_makes_the_same_bytes(tmp_path: Path) -> None:
    first = saved(tmp_path)[0].read_bytes()
    assert saved(tmp_path)[0].read_bytes() == first


def header_of(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def with_facts(**facts: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        inner = json.loads(header_of(path)["__metadata__"][FORMAT]) | facts
        kept = {key: value for key, value in inner.items() if value is not ...}
        save_file(load_file(path), path, metadata={FORMAT: json.dumps(kept)})

    return change


def with_tensors(**tensors: Tensor | None) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        metadata = header_of(path)["__metadata__"]
        found: dict[str, Any] = load_file(path) | tensors
        save_file({key: value for key, value in found.items() if value is not None}, path, metadata=metadata)

    return change


def with_metadata(metadata: dict[str, str] | None) -> Callable[[Path], None]:
    return lambda path: save_file(load_file(path), path, metadata=metadata)


def with_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def poisoned(path: Path) -> None:
    scales = load_file(path)["scales"]
    scales[3, 0] = torch.nan
    with_tensors(scales=scales)(path)


def misplaced(path: Path) -> None:
    slots = load_file(path)["slots"]
    slots[5] = 2  # of two kept rows
    with_tensors(slots=slots)(path)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (with_bytes(lambda raw: b""), "not a safetensors header"),
    "cut off": (with_bytes(lambda raw: raw[:-1]), "outside the file"),
    "bytes behind": (with_bytes(lambda raw: raw + b"\0"), "trailing bytes"),
    "no JSON": (with_bytes(lambda raw: raw[:9] + b"!" + raw[10:]), "not JSON"),
    "a pickle": (with_bytes(lambda raw: b"\x80\x04K*."), "not a safetensors header"),
    "weights of a model": (with_tensors(**{"model.norm.weight": torch.ones(3)}), "no part of a table of codes"),
    "no metadata": (with_metadata(None), f"is not {FORMAT}"),
    "another format": (with_metadata({"ryzen_compile.codes/2": "{}"}), f"is not {FORMAT}"),
    "metadata beside": (with_metadata({FORMAT: "{}", "other": "1"}), f"is not {FORMAT}"),
    "facts that are no JSON": (with_metadata({FORMAT: "{"}), "no JSON"),
    "facts that are a list": (with_metadata({FORMAT: "[]"}), "other metadata"),
    "a fact missing": (with_facts(bits=...), "other metadata"),
    "a fact too many": (with_facts(more=1), "other metadata"),
    "bits of another type": (with_facts(bits="3"), "do not fit together"),
    "bits that are True": (with_facts(bits=True), "do not fit together"),
    "other bits": (with_facts(bits=4), "do not fit together"),
    "another dim": (with_facts(dim=2), "do not fit together"),
    "other stages": (with_facts(stages=2), "do not fit together"),
    "another group": (with_facts(group=0), "do not fit together"),
    "another shape": (with_facts(shape=[24, 37]), "do not fit together"),
    "a shape of one": (with_facts(shape=[888]), "of other types"),
    "a negative shape": (with_facts(shape=[-37, 24]), "of other types"),
    "a shape of floats": (with_facts(shape=[37.0, 24.0]), "of other types"),
    "no name": (with_facts(parameter=None), "of other types"),
    "an infinite error": (with_facts(relative_error=float("inf")), "of other types"),
    "codes missing": (with_tensors(codes=None), "do not fit together"),
    "scales missing": (with_tensors(scales=None), "do not fit together"),
    "slots without rows": (with_tensors(kept=None), "do not fit together"),
    "codes of a wider type": (with_tensors(codes=torch.zeros(37, 3, dtype=torch.int32)), "codes as torch.int32"),
    "scales of a wider type": (with_tensors(scales=torch.ones(37, 3)), "scales as torch.float32"),
    "NaN": (poisoned, "scales that are NaN or infinite"),
    "a slot beyond the rows": (misplaced, "keeps 2 rows and refers to row 2"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_another_file_is_refused(tmp_path: Path, damage: str) -> None:
    path, _ = saved(tmp_path)
    load_table(path)
    change, message = DAMAGE[damage]
    change(path)
    with pytest.raises(ModelError, match=message):
        load_table(path)


def test_places_that_are_no_plain_file(tmp_path: Path) -> None:
    path, tensor = saved(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(path)
    for other in (link, tmp_path):
        with pytest.raises(UnsafeError, match="link or a special file"):
            load_table(other)
    with pytest.raises(ModelError, match="is missing"):
        load_table(tmp_path / "none")
    with pytest.raises(ResourceError, match="cannot write"):
        save_table(tmp_path / "none" / CODES_NAME, NAME, tensor, TABLE)
    with pytest.raises(UsageError, match="cannot be compared"):
        save_table(path, NAME, tensor, TABLE[:, :8])


# --- the model beside it ----------------------------------------------------------------------------------------------
def trained(tied: bool) -> tuple[nn.Module, DkmComponent]:
    """A model whose entries, scales and offset have moved from where k-means put them."""
    model = build(case_named("llama", tie_word_embeddings=tied))
    component = DkmComponent(DkmSettings(bits=(4,), cluster_dim=2))
    own = component.prepare(model)
    component.activate()
    with torch.no_grad():
        for parameter in own:
            parameter.normal_(std=0.02)
    return model, component


@pytest.mark.parametrize(("tied", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_an_export_stores_what_was_trained(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    """To the bit, whatever type the weights beside it are saved in, and by whatever name a tied table goes."""
    model, component = trained(tied)
    stored, path = component.table(), tmp_path / CODES_NAME
    save_table(path, component.table_name, stored, model.get_input_embeddings().weight)
    recipe = component.recipe_changes()
    component.detach(model)
    model = model.to(dtype).float()
    given = given_tables(model, path)
    assert len(given) == 1 + tied
    compressor = EmbeddingCompressor(recipe["embedding"], given=given)
    found = compressor.run(Canonicalize().run(capture(model)).program)
    assert len(found.hits) == 1
    for name, value in stored.tensors.items():
        (there,) = [v for key, v in found.program.weights.items() if key.endswith(f"_{name}")]
        assert torch.equal(there, value)


def test_codes_of_other_weights_are_refused(tmp_path: Path) -> None:
    model, component = trained(tied=False)
    path = tmp_path / CODES_NAME
    table = model.get_input_embeddings().weight
    save_table(path, component.table_name, component.table(), table)
    component.detach(model)
    assert set(given_tables(model, path)) == {NAME}
    with torch.no_grad():
        table += 0.3 * table.std() * torch.randn_like(table)
    with pytest.raises(ModelError, match="the weights have changed since"):
        given_tables(model, path)
    with pytest.raises(ModelError, match=r"has one of \(99, 32\)"):
        given_tables(build(case_named("llama", hidden_size=32)), path)
    with pytest.raises(ModelError, match="has none"):
        given_tables(build(case_named("gpt2")), path)


def test_a_table_that_the_codes_hold_exactly(tmp_path: Path) -> None:
    """An error of 0, and weights rounded to 16 bits beside it."""
    model = build(case_named("llama"))
    table = model.get_input_embeddings().weight
    stored = fit_codebook(table.detach(), CodebookFormat(8, 2), FitSettings(channel_gain=False))
    with torch.no_grad():
        table.copy_(stored.decode())
    save_table(tmp_path / CODES_NAME, NAME, replace(stored), table)
    assert load_table(tmp_path / CODES_NAME).relative_error == 0
    table.data = table.data.half().float()
    assert NAME in given_tables(model, tmp_path / CODES_NAME)
    assert table.shape[0] == VOCAB
