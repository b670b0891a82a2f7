"""What the Triton kernels need, said in words, and how they get to their operators."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from ryzen_compile import kernels, ops
from ryzen_compile.errors import UnsupportedError, UsageError

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_probe_names_what_is_missing(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert kernels.probe() == ("", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert kernels.probe()[0] == "torch finds no GPU"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert kernels.probe() == (
        f"torch {torch.__version__} is a build for CPUs",
        "install a build of torch for the machine's GPU",
    )
    monkeypatch.setitem(sys.modules, "triton", None)
    lack, remedy = kernels.probe()
    assert lack.startswith("triton cannot be imported: ") and remedy == "pip install 'ryzen-compile[triton]'"
    monkeypatch.setattr(sys, "platform", "win32")
    assert kernels.probe()[0].startswith("Triton is for Linux, this is ")


@without_gpu
def test_attach_fails_with_the_reason():
    lack, remedy = kernels.probe()
    with pytest.raises(UnsupportedError) as caught:
        kernels.attach()
    assert lack in caught.value.message and caught.value.hint == remedy


def test_an_attached_operator_runs_its_kernel():
    """In a child, for it stays attached. The reference raises for an id that is no row's, the kernel does not."""
    pytest.importorskip("triton")
    code = """
import torch
from ryzen_compile import kernels, ops
device = "cuda" if torch.cuda.is_available() else "cpu"
kernels.attach(device)
kernels.attach(device)
codes, codebook = torch.tensor([[2, 1], [0, 3]], dtype=torch.uint8), torch.arange(256.).view(1, 256, 1)
tensors = [tensor.to(device) for tensor in (torch.tensor([1, 5, 0]), codes, codebook)]
print(ops.codebook_embedding(*tensors, None, None, None, None, None, 2, 8, -1).tolist())
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert child.stdout.strip() == "[[0.0, 3.0], [nan, nan], [2.0, 1.0]]", child.stderr


@pytest.mark.parametrize("device", ["cuda:0", "CUDA", "hip", "xpu", ""])
def test_attach_knows_two_devices(device):
    with pytest.raises(UsageError, match="device must be cuda or cpu, got"):
        kernels.attach(device)


WITHOUT_INTERPRETER = """
import sys
import torch
from ryzen_compile import kernels, ops
from ryzen_compile.errors import UnsupportedError
if sys.argv[1] == "without triton":
    sys.modules["triton"] = None
try:
    kernels.attach("cpu")
except UnsupportedError as error:
    print(error)
codes, codebook = torch.tensor([[2, 1], [0, 3]], dtype=torch.uint8), torch.arange(256.).view(1, 256, 1)
print(ops.codebook_embedding(torch.tensor([1]), codes, codebook, None, None, None, None, None, 2, 8, -1).tolist())
"""


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("without interpreter", "Triton's interpreter is off; set TRITON_INTERPRET=1 in the environment"),
        ("without triton", "triton cannot be imported: "),
    ],
)
def test_attach_to_a_cpu_needs_the_interpreter_and_breaks_nothing(given, reason):
    pytest.importorskip("triton")
    child = subprocess.run(
        [sys.executable, "-c", WITHOUT_INTERPRETER, given],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "0"},
    )
    first, *rest = child.stdout.splitlines() or [""]
    assert first.startswith(f"Triton kernels cannot run on cpu here: {reason}"), child.stderr
    assert rest == ["[[0.0, 3.0]]"], child.stderr


def test_importing_kernels_imports_no_triton():
    code = "import sys, ryzen_compile.kernels; print(sorted({'torch', 'triton'} & set(sys.modules)))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert child.stdout.strip() == "[]", child.stderr


def test_without_attach_operators_run_their_references():
    codes, codebook = torch.tensor([[2, 1]], dtype=torch.uint8), torch.arange(256.0).view(1, 256, 1)
    with pytest.raises(IndexError):
        ops.codebook_embedding(torch.tensor([5]), codes, codebook, None, None, None, None, None, 2, 8, -1)
