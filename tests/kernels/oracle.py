"""What kernels are held to: the operator's reference in float64, and memory around their results that they leave alone.

The error is the NMSE, ``sum((got - want)^2) / sum(want^2)``, at most ``LIMITS`` for each type of number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 1e-7, torch.float16: 1e-5, torch.bfloat16: 1e-4}
DTYPES = tuple(LIMITS)
GUARD = 1024  # elements at either side of a result
PATTERN = -77  # what guards hold


def nmse(got: Tensor, want: Tensor) -> float:
    """The squared error over the squares of ``want``, both in float64; of elements that are finite in both."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    finite = want.isfinite() & got.isfinite()
    error, size = (got - want)[finite].square().sum(), want[finite].square().sum()
    return float(error / size) if size else float(error)


def assert_close(got: Tensor, want: Tensor, limit: float | None = None) -> None:
    """``got`` is ``want``, which was computed in float64, as closely as its type asks for (or within ``limit``): shape,
    NaNs and infinities alike, every other element finite."""
    assert got.shape == want.shape
    host, wanted = got.detach().cpu().double(), want.detach().cpu().double()
    assert torch.equal(host.isnan(), wanted.isnan()), "NaNs differ"
    infinite = wanted.isinf()
    assert torch.equal(host[infinite], wanted[infinite]), "infinities differ"
    assert host[~infinite & ~wanted.isnan()].isfinite().all(), "infinities differ"
    error = nmse(got, want)
    assert error <= (LIMITS[got.dtype] if limit is None else limit), f"NMSE {error:.3g} in {got.dtype}"


@contextmanager
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Within it, everything that ``launch.empty`` gives lies between guards and begins as NaNs (integers: ``PATTERN``).

    At its end the guards must be untouched. Yields what was allocated, in order, for tests that look for elements which
    no kernel wrote.
    """
    from ryzen_compile.kernels import launch

    wholes: list[Tensor] = []
    parts: list[Tensor] = []

    def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = int(torch.Size(shape).numel())
        whole = torch.full((size + 2 * GUARD,), PATTERN % 256 if dtype == torch.uint8 else PATTERN, device=device)
        whole = whole.to(dtype)
        part = whole[GUARD : GUARD + size].view(tuple(shape))
        if dtype.is_floating_point:
            part.fill_(float("nan"))
        wholes.append(whole)
        parts.append(part)
        return part

    with monkeypatch.context() as patch:
        patch.setattr(launch, "empty", empty)
        yield parts
    for whole in wholes:
        pattern = whole[:1].clone().fill_(PATTERN % 256 if whole.dtype == torch.uint8 else PATTERN)
        assert (whole[:GUARD] == pattern).all(), "written before the result"
        assert (whole[-GUARD:] == pattern).all(), "written behind the result"
