"""Two processes that share a run, under torchrun with gloo: the run is the one that a single process makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("accelerate")

CHILD = Path(__file__).with_name("distributed_child.py")


def launch(directory: Path, processes: int, batch: int, accumulate: int, kind: str = "plain") -> Path:
    directory.mkdir(exist_ok=True)
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [*command, str(CHILD), str(directory), str(batch), str(accumulate), kind],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-4000:]
    return directory / "run" / "optimized"


def losses(run: Path, kind: str) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n") if line]
    return [record["loss"] for record in records if record["kind"] == kind]


@pytest.mark.parametrize("kind", ["plain", "dkm"])
def test_two_processes_make_the_run_of_one_with_twice_the_accumulation(tmp_path: Path, kind: str) -> None:
    """Losses of steps and validations agree, relative 1e-4; so do the weights, absolute 1e-4 at rates of 0.01."""
    one = launch(tmp_path / "one", 1, 2, 2, kind)
    two = launch(tmp_path / "two", 2, 2, 1, kind)
    for what in ("batch", "validation"):
        assert losses(two, what) == pytest.approx(losses(one, what), rel=1e-4)
    assert len(losses(one, "batch")) == 6 and losses(one, "batch")[0] > losses(one, "batch")[-1]
    expected, found = (load_file(run / "model" / "model.safetensors") for run in (one, two))
    for name, value in expected.items():
        assert torch.allclose(value, found[name], atol=1e-4), name


def test_a_shared_run_is_resumed_by_as_many_processes(tmp_path: Path) -> None:
    run = launch(tmp_path / "two", 2, 2, 1)
    before = load_file(run / "model" / "model.safetensors")
    launch(tmp_path / "two", 2, 2, 1)  # finished: goes on from its last checkpoint, and has nothing left to do
    after = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
