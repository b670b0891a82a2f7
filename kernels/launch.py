"""What launching any kernel takes: tensors on one device, memory for results, blocks, and the choice among several.

Which block shapes, warps and stages are fastest differs between devices. ``tuned`` measures a few candidates the first
time that a kernel meets a device and a size of problem, and keeps the choice in a file beside Triton's compiled
kernels. Nothing is measured when this is imported, in Triton's interpreter, or while a CUDA graph is being captured.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompileTimeAssertionFailure
from triton.runtime.errors import OutOfResources, PTXASError

from ryzen_compile.errors import UnsupportedError, UsageError

ELEMENTS_PER_WARP = 256  # 8 for each of its 32 threads: a 16-byte load of half precision
MOST_WARPS = 16
WARMUP_MS, MEASURE_MS = 5, 20


@triton.jit
def _nothing() -> None:
    pass


def interpreted() -> bool:
    """Whether Triton interprets kernels, on the CPU: the environment said so when they were imported."""
    return not isinstance(_nothing, triton.JITFunction)


def expect_device(op: str, **tensors: Tensor | None) -> torch.device:
    """The device that all ``tensors`` are on, none being allowed; at least one is given.

    Raises ``UsageError`` when they are on several, ``UnsupportedError`` when Triton cannot launch there.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, device = next((name, tensor.device) for name, tensor in given.items())
    elsewhere = [f"{name} on {tensor.device}" for name, tensor in given.items() if tensor.device != device]
    if elsewhere:
        raise UsageError(f"{op}: all tensors must be on one device: {first} is on {device}, {', '.join(elsewhere)}")
    if device.type != "cuda" and not interpreted():
        raise UnsupportedError(
            f"{op}: a Triton kernel runs on a GPU, the tensors are on {device}",
            hint="move them to a CUDA device; TRITON_INTERPRET=1 in the environment of the process runs it on the CPU",
        )
    return device


def on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's own. On a CPU this does nothing."""
    return torch.cuda.device_of(tensor)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a kernel's result. Every kernel allocates here, so that tests can lay guards around what it writes."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def warps(elements: int) -> int:
    """For a program that works on so many elements at a time."""
    return min(max(triton.next_power_of_2(elements) // ELEMENTS_PER_WARP, 1), MOST_WARPS)


def bucket(size: int) -> int:
    """Sizes that share a choice: up to the next power of two."""
    return 1 << (max(size, 1) - 1).bit_length()


def tuned(
    kernel: str,
    key: Sequence[object],
    candidates: Sequence[triton.Config],
    run: Callable[[triton.Config], object],
    device: torch.device,
) -> triton.Config:
    """The fastest of ``candidates`` for ``kernel`` on problems alike in ``key`` (types and bucketed sizes, no spaces).

    ``run`` launches it once with a candidate, which must be harmless any number of times. The first candidate is the
    one to take where nothing can be measured, and so the one that ought to work everywhere; one that needs more of the
    device than there is, or does not compile for it, drops out. Raises what the last one raised when all do.
    """
    if len(candidates) == 1 or device.type != "cuda":
        return candidates[0]
    choices, name = _CHOICES.of(torch.cuda.get_device_name(device)), " ".join((kernel, *map(str, key)))
    known = choices.known(name, candidates)
    if known is not None:
        return known
    if torch.cuda.is_current_stream_capturing():
        return candidates[0]
    return choices.measure(name, candidates, run)


class Choices:
    """The choices made for one device, in memory and in ``file``, which may be missing, stale or unwritable: then what
    it would say is measured again. Entries of another version of Triton do not count."""

    def __init__(self, file: Path, milliseconds: Callable[[Callable[[], object]], float]) -> None:
        self._file = file
        self._milliseconds = milliseconds
        self._said: dict[str, dict[str, Any]] | None = None

    def known(self, name: str, candidates: Sequence[triton.Config]) -> triton.Config | None:
        """The one of ``candidates`` that was chosen for ``name`` before, if it is one of them."""
        if self._said is None:
            self._said = self._read()
        said = self._said.get(name)
        return next((config for config in candidates if config.all_kwargs() == said), None)

    def measure(
        self, name: str, candidates: Sequence[triton.Config], run: Callable[[triton.Config], object]
    ) -> triton.Config:
        """Measures ``candidates``, remembers and returns the fastest. Raises as ``tuned``."""
        chosen = self._fastest(candidates, run)
        said = chosen.all_kwargs()
        self._said = (self._said or {}) | {name: said}
        self._write(name, said)
        return chosen

    def _fastest(self, candidates: Sequence[triton.Config], run: Callable[[triton.Config], object]) -> triton.Config:
        best, least, lack = None, float("inf"), None
        for config in candidates:
            try:
                taken = self._milliseconds(lambda config=config: run(config))  # type: ignore[misc]
            except (OutOfResources, PTXASError, CompileTimeAssertionFailure) as error:
                lack = error
                continue
            if taken < least:
                best, least = config, taken
        if best is None:
            raise lack or UsageError("there is no candidate to choose from")
        return best

    def _read(self) -> dict[str, dict[str, Any]]:
        """Entries of the file that look like ones of ours; none of a file that cannot be read."""
        with suppress(OSError, ValueError):
            stored = json.loads(self._file.read_text(encoding="utf-8"))
            if isinstance(stored, dict) and stored.get("triton") == triton.__version__:
                choices = stored.get("choices")
                if isinstance(choices, dict):
                    return {name: said for name, said in choices.items() if isinstance(said, dict)}
        return {}

    def _write(self, name: str, said: dict[str, Any]) -> None:
        """Add an entry to what is there by now; another process may lose one that way, and measures it again."""
        with suppress(OSError):  # a directory that cannot be written costs measuring anew, nothing else
            self._file.parent.mkdir(parents=True, exist_ok=True)
            stored = {"triton": triton.__version__, "choices": self._read() | {name: said}}
            with tempfile.NamedTemporaryFile(
                "w", dir=self._file.parent, prefix=self._file.name, delete=False, encoding="utf-8"
            ) as file:
                json.dump(stored, file, indent=1, sort_keys=True)
            Path(file.name).replace(self._file)


class _Devices:
    """``Choices`` by the device's name, opened when they are first asked for."""

    def __init__(self) -> None:
        self._by_name: dict[str, Choices] = {}

    def of(self, name: str) -> Choices:
        if name not in self._by_name:
            file = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() + ".json"
            self._by_name[name] = Choices(Path(triton.knobs.cache.dir) / "ryzen_compile" / file, _milliseconds)
        return self._by_name[name]


_CHOICES = _Devices()


def _milliseconds(run: Callable[[], object]) -> float:
    taken: float = triton.testing.do_bench(run, warmup=WARMUP_MS, rep=MEASURE_MS, return_mode="median")
    return taken
