"""With which options an artifact is opened: those of ``load``, as asked, as tuned, as the machine is."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ryzen_compile.api import load
from ryzen_compile.backends.onnxruntime import artifact as artifacts
from ryzen_compile.backends.onnxruntime.claim_report import KINDS
from ryzen_compile.backends.onnxruntime.engine_options import engine_options
from ryzen_compile.backends.onnxruntime.session import SessionOptions
from ryzen_compile.errors import UsageError
from ryzen_compile.manifest import update_tuning
from ryzen_compile.validate.machine import cpu_key, read_machine
from tests.backends.test_tuning import GOOD
from tests.model_directory import shared_artifact

CORES = read_machine().usable_cores


@pytest.fixture
def tuned(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """Found best here: one thread more than there are cores, without spinning, norms alone native."""
    copy = Path(shutil.copytree(shared_artifact(tmp_path_factory), tmp_path / "copy"))
    best = {"kinds": ["norm"], "reason": "the fastest", "candidates": [{"kinds": ["norm"], "visits": [1.0]}]}
    update_tuning(copy, cpu_key(read_machine()), {**GOOD, "threads": CORES + 1, "native": best})
    return copy


@pytest.mark.parametrize(
    ("threads", "native", "wanted"),
    [
        (None, "auto", SessionOptions(CORES + 1, False, native=frozenset({"norm"}))),
        (3, "auto", SessionOptions(3, True, native=frozenset({"norm"}))),
        (None, False, SessionOptions(CORES + 1, False, native=frozenset())),
    ],
)
def test_what_was_tuned_is_used_as_load_uses_it(tuned: Path, threads: int | None, native: Any, wanted: Any) -> None:
    assert engine_options(artifacts.read(tuned), threads=threads, native=native) == wanted
    with load(tuned, threads=threads, native=native) as model:
        assert model.engine._options == wanted  # type: ignore[attr-defined]


def test_without_a_record_there_is_a_thread_for_each_core(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = artifacts.read(shared_artifact(tmp_path_factory))
    assert engine_options(found, threads=None) == SessionOptions(CORES)
    insisted = engine_options(found, threads=2, native=True)
    assert insisted == replace(SessionOptions(2), native=KINDS, require_native=True)
    with pytest.raises(UsageError, match="threads must be at least 1, got 0"):
        engine_options(found, threads=0)
