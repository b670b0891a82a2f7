"""What is measured computes what it says, in sizes that the interpreter can run; tables, files and pictures."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from ryzen_compile import kernels
from tests.kernels.oracle import DEVICE

LIMIT = 1e-4  # of bfloat16
SUBJECTS = ("norm", "activation", "attention", "cached_attention", "linear", "embedding", "rotary", "loss")


@pytest.fixture
def cases() -> ModuleType:
    pytest.importorskip("triton")
    from ryzen_compile.kernels import bench_cases

    return bench_cases


@pytest.fixture
def bench() -> ModuleType:
    pytest.importorskip("triton")
    from ryzen_compile.kernels import bench

    return bench


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_problem_is_solved_by_all_that_solve_it(cases, subject):
    assert tuple(cases.SUBJECTS) == SUBJECTS
    torch.manual_seed(0)
    found = 0
    for case in cases.SUBJECTS[subject](torch.device(DEVICE), cases.SMALL):
        for name, run in case.runs.items():
            if name != "compile":  # it is torch's, and compiling takes longer than all else together
                is_dense = name.startswith("torch ") and case.op in ("linear_nbits", "linear_ternary")
                assert is_dense or case.error(run) < LIMIT, (case.op, case.shape, name)
        assert case.bytes or case.flops
        found += 1
    assert found


def test_every_kernel_that_a_decoder_runs_is_measured(cases):
    measured = {case.op for make in cases.SUBJECTS.values() for case in make(torch.device(DEVICE), cases.SMALL)}
    unmeasured = {op.removeprefix("ryzen::") for op in kernels.supported_ops()} - measured
    assert unmeasured == {
        "activation", "activation_backward", "add_layer_norm", "cached_attention_inplace", "codebook_embedding",
        "gated_linear", "linear_act", "linear_cross_entropy", "linear_cross_entropy_backward",
    }, "these are a product of cuBLAS and a kernel that is measured, or a form of one"  # fmt: skip


def rows(bench: ModuleType) -> list:
    ours = bench.Row(
        when="2026-11-29T00:00:00+00:00", device="H200", versions="torch 2", op="rms_norm", shape="8 x 4", dtype="bf16",
        implementation="ours", ms=0.5, ms_low=0.4, ms_high=0.6, rate=4000.0, unit="GB/s", of_limit=0.9, times_ours=1.0,
        nmse=1e-6, peak_mib=1.5,
    )  # fmt: skip
    return [ours, replace(ours, implementation="torch", ms=1.0, times_ours=2.0, of_limit=0.45)]


def test_rows_become_a_table_and_a_file(bench, tmp_path):
    text = bench.to_text(rows(bench)[0])
    assert text.count("|") == bench.HEAD.splitlines()[0].count("|")
    assert text == (
        "| rms_norm | 8 x 4 | bf16 | ours | 0.5000 (0.4000 - 0.6000) | 4000 GB/s | 90.0 % | 1.00 | 1e-06 | 1.5 |"
    )
    file = tmp_path / "new" / "kernels.csv"
    bench.append(rows(bench), file)
    bench.append(rows(bench), file)
    with file.open(newline="") as stream:
        found = list(csv.DictReader(stream))
    assert len(found) == 4 and found[1]["times_ours"] == "2" and found[0]["device"] == "H200"


def test_what_fails_costs_nothing_else(bench, cases, monkeypatch, tmp_path):
    """A kernel that fails, and a problem that cannot be made: the other rows are kept as soon as they are there."""
    one = torch.ones(2)

    def failing() -> None:
        raise RuntimeError("out of registers\nmore")

    def made(device: object, sizes: object) -> Iterator:
        yield cases.Case("a", "2", 8, {"ours": lambda: one, "torch": lambda: one}, lambda: one)
        yield cases.Case("b", "2", 8, {"ours": failing, "torch": lambda: one}, lambda: one)
        yield cases.Case("c", "2", 8, {"ours": lambda: one}, lambda: one)
        raise ValueError("no such shape")

    for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(bench, "milliseconds", lambda run: (1.0, 1.0, 1.0))
    monkeypatch.setitem(bench.SUBJECTS, "made", made)
    facts = {"when": "now", "device": "none", "versions": ""}
    file = tmp_path / "kernels.csv"
    limits = bench.Limits(1.0, {"bf16": 1.0})
    failures = bench.measure_subject("made", torch.device("cpu"), limits, facts, file)
    assert failures == ["b 2 ours: RuntimeError: out of registers", "made: ValueError: no such shape"]
    with file.open(newline="") as stream:
        kept = [(row["op"], row["implementation"], row["times_ours"]) for row in csv.DictReader(stream)]
    assert kept == [("a", "ours", "1"), ("a", "torch", "1"), ("b", "torch", "nan"), ("c", "ours", "1")]


def test_the_last_run_is_drawn(bench, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "kernels.csv"
    bench.append(rows(bench), file)
    bench.plot(file, tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_names_and_missing_gpus_are_said(bench, monkeypatch):
    command = [sys.executable, "-m", "ryzen_compile.kernels.bench"]
    child = subprocess.run([*command, "norms"], capture_output=True, text=True, timeout=120, check=False)
    assert child.returncode == 2 and "there is no 'norms'; give some of norm, activation" in child.stderr
    if DEVICE == "cpu":
        child = subprocess.run([*command, "norm"], capture_output=True, text=True, timeout=120, check=False)
        assert child.returncode == 1 and "kernels cannot be measured here: " in child.stderr
