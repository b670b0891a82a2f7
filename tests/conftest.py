"""What every test relies on: two threads, no network, no GPU needed, quiet libraries, and the shipped model's place."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Before any library reads them. Offline is not a convenience: a test that would download must fail here as well.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

# Without a GPU, Triton interprets its kernels. It reads this as soon as it is imported, and torch imports it when any
# operator of ours is called: setting it where kernels are tested would be too late.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

REPOSITORY = Path(__file__).resolve().parent.parent

# Two, as on the smallest machine the suite is meant for: more would change the order of floating-point sums.
torch.set_num_threads(2)


# Shells start what they put into the background with this signal ignored, and tests of interruptions send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first candidate of each kernel, on a GPU as in the interpreter: measuring all would take most of the time,
    and leave choices made under test in the user's cache."""
    pytest.importorskip("triton")
    from ryzen_compile.kernels import launch

    monkeypatch.setattr(launch, "tuned", lambda kernel, key, candidates, run, device: candidates[0])


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def tiny_python_lm() -> Path:
    """The directory of the trained model that the repository ships: config, safetensors, tokenizer."""
    return REPOSITORY / "examples" / "tiny-python-lm"
