"""Which text a recipe gets, and how much of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ryzen_compile.calibration import HELD_BACK, LENGTH, TOKENS, read_calibration
from ryzen_compile.config import find_recipe
from ryzen_compile.errors import UsageError
from tests.model_directory import tokenizer

TEXT = "".join(f"line {i} of {i * 7919 % 1009}\n" for i in range(6000))


def test_integers_get_windows_and_some_that_nobody_sees(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    found = read_calibration(tokenizer(), find_recipe("int4"), tmp_path / "text.txt")
    assert found is not None and found.long is None
    assert found.windows.shape == (TOKENS // LENGTH, LENGTH) and found.held_back.shape == (HELD_BACK, LENGTH)
    ids = torch.cat([found.windows, found.held_back]).flatten()
    assert tokenizer().decode(ids) in TEXT


def test_a_table_gets_all_of_the_text_but_what_is_held_back(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    recipe = find_recipe("fp32", embedding={"method": "kmeans"})
    found = read_calibration(tokenizer(), recipe, tmp_path / "text.txt")
    assert found is not None and found.long is not None
    every = torch.tensor(tokenizer()(TEXT, verbose=False)["input_ids"])
    every = every[: len(every) // LENGTH * LENGTH].reshape(-1, LENGTH)
    first = TOKENS // LENGTH
    assert len(every) > first + HELD_BACK + 2
    assert torch.equal(found.long, torch.cat([every[:first], every[first + HELD_BACK :]]))
    assert torch.equal(found.held_back, every[first : first + HELD_BACK])
    assert set(found.special) == {0, 1, 2}


def test_when_no_text_is_needed_and_when_it_is_missing(tmp_path: Path) -> None:
    assert read_calibration(tokenizer(), find_recipe("fp32")) is None
    assert read_calibration(None, find_recipe("int4")) is None
    (tmp_path / "text.txt").write_text("too short")
    with pytest.raises(UsageError, match="has no tokenizer"):
        read_calibration(None, find_recipe("int4"), tmp_path / "text.txt")
    with pytest.raises(UsageError, match="are needed for"):
        read_calibration(tokenizer(), find_recipe("fp32", embedding={}), tmp_path / "text.txt")
