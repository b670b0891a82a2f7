"""How much memory one engine takes to load and to answer a request, in a process of its own.

Two models in one process would share libraries and freed memory, and hide what each takes. Run as a script by
:func:`measure_footprint`, this file imports an engine's libraries, notes what is resident, then loads the model with
its tokenizer, generates, and prints one JSON object. A child that dies (of memory, of a native library) takes nothing
else down.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import Field, ValidationError

from ryzen_compile.errors import UsageError
from ryzen_compile.fields import Fields
from ryzen_compile.manifest import shown, shown_path
from ryzen_compile.validate.memory import current_rss_bytes, peak_rss

if TYPE_CHECKING:
    from ryzen_compile.runtime.engine import Engine

Kind = Literal["artifact", "huggingface"]
Opener = Callable[[Path, int], tuple["Engine", object]]  # a directory and threads; the engine and its tokenizer
SAMPLE_SECONDS = 0.01


class Footprint(Fields):
    """Resident memory of a process that loaded one engine and answered one request, pages of mapped files included.

    ``total`` is the whole process; above ``start_bytes`` it is what loading and generating added to imported libraries.
    """

    kind: Kind
    start_bytes: int = Field(ge=0, description="libraries imported, nothing loaded")
    peak_total_bytes: int = Field(ge=0, description="the most, libraries included")
    mean_total_bytes: int = Field(ge=0, description="the mean over loading and generating, libraries included")
    peak_is_exact: bool = Field(description="False where the peak may be from before the start, during the imports")
    seconds: float = Field(ge=0, description="loading and generating, imports not included")

    @property
    def peak_above_start_bytes(self) -> int:
        """The most that loading and generating added."""
        return max(0, self.peak_total_bytes - self.start_bytes)

    @property
    def mean_above_start_bytes(self) -> int:
        """What loading and generating added, as a mean over their time."""
        return max(0, self.mean_total_bytes - self.start_bytes)


@dataclass(frozen=True)
class Unmeasured:
    """There is no footprint: the child died, said nothing in time, or could not load the model or generate."""

    reason: str


def measure_footprint(
    kind: Kind,
    path: str | os.PathLike[str],
    *,
    prompt: Sequence[int],
    new_tokens: int,
    threads: int,
    timeout: float = 600.0,
) -> Footprint | Unmeasured:
    """The memory of the artifact or the Hugging Face model directory at ``path``, which it reads itself: one engine,
    ``threads`` of them computing, one ``prompt`` of ids and ``new_tokens`` greedy tokens behind it.

    ``huggingface`` is its eager forward over float32 weights, ``artifact`` what ``load(path, threads=threads)`` opens.
    A child without an answer after ``timeout`` seconds is killed. Raises ``UsageError`` for arguments out of range and
    for what is no directory (a model with random weights has to be saved first); all else is an ``Unmeasured``.
    """
    directory = _checked(kind, Path(path), prompt, new_tokens, threads, timeout)
    request = {
        "kind": kind,
        "path": str(directory),
        "prompt": [int(one) for one in prompt],
        "new_tokens": new_tokens,
        "threads": threads,
    }
    # Bars would be all that is left of an error's last line.
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        child = subprocess.run(
            _command(), input=json.dumps(request), capture_output=True, text=True, errors="replace", env=environment,
            timeout=timeout, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Unmeasured(f"no answer within {timeout:g} s: killed")
    except OSError as error:
        return Unmeasured(f"no process could be started: {error}")
    if child.returncode:
        return Unmeasured(_ending(child.returncode, child.stderr))
    return _answer(child.stdout)


def _checked(kind: str, path: Path, prompt: Sequence[int], new_tokens: int, threads: int, timeout: float) -> Path:
    """The directory, absolute."""
    if kind not in get_args(Kind):
        raise UsageError(f"unknown kind {kind!r}", hint=f"kinds are {', '.join(get_args(Kind))}")
    if not path.is_dir():
        raise UsageError(
            f"{shown_path(path)} is no directory, and a process of its own can only read one",
            hint="save or export the model first",
        )
    if not len(prompt) or min(prompt) < 0:
        raise UsageError(f"expected a prompt of at least one token id, all of them at least 0, got {list(prompt)[:8]}")
    if new_tokens < 1 or threads < 1 or not timeout > 0:
        raise UsageError(
            f"expected at least 1 new token and 1 thread and a timeout above 0 s, got {new_tokens}, {threads} and "
            f"{timeout}"
        )
    return path.absolute()


def _command() -> list[str]:
    # -P: the script's own directory stays off the path, or its neighbours would hide libraries of the same name.
    return [sys.executable, "-P", "-W", "ignore", __file__]


def _ending(status: int, stderr: str) -> str:
    """How a child died and the last that it said."""
    try:
        how = f"it ended in {signal.Signals(-status).name}" if status < 0 else f"it ended with status {status}"
    except ValueError:  # a signal without a name
        how = f"it ended in signal {-status}"
    said = stderr.strip().splitlines()
    return f"{how}: {shown(said[-1], 500)}" if said else how


def _answer(stdout: str) -> Footprint | Unmeasured:
    """From the last line that the child printed; a library may have printed others."""
    lines = stdout.strip().splitlines() or [""]
    try:
        return Footprint.model_validate_json(lines[-1])
    except ValidationError:
        return Unmeasured(f"it ended without an answer, its last line is {shown(lines[-1], 200)}")


# --- the child --------------------------------------------------------------------------------------------------------
def _run(request: dict[str, Any]) -> Footprint:
    """Loads what is asked for and generates once."""
    import numpy as np

    from ryzen_compile.runtime.cache import KVCache
    from ryzen_compile.validate.inference import timed_request

    kind: Kind = request["kind"]
    opener = {"artifact": _import_artifact, "huggingface": _import_huggingface}[kind]()
    prompt, new = np.array(request["prompt"], np.int64), int(request["new_tokens"])
    began = time.perf_counter()
    with peak_rss() as peak, _sampled() as samples:
        engine, _tokenizer = opener(Path(request["path"]), int(request["threads"]))
        room = len(prompt) + new - 1
        cache = KVCache(engine.slots, 1, room, limit=engine.spec.context, storage=engine.storage)
        timed_request(engine, cache, prompt, new)
    return Footprint(
        kind=kind,
        start_bytes=peak.start_bytes,
        peak_total_bytes=peak.peak_bytes,
        mean_total_bytes=_mean_over_time(samples),
        peak_is_exact=peak.exact,
        seconds=time.perf_counter() - began,
    )


def _import_artifact() -> Opener:
    """Imports what an artifact needs; the function that opens one as ``ryzen_compile.load`` does."""
    import tokenizers  # noqa: F401 - else its memory would be the model's

    from ryzen_compile.backends.onnxruntime import artifact
    from ryzen_compile.backends.onnxruntime.engine_options import engine_options
    from ryzen_compile.backends.onnxruntime.session import OrtEngine
    from ryzen_compile.runtime.tokenizer import Tokenizer

    def opened(directory: Path, threads: int) -> tuple[Engine, object]:
        found = artifact.read(directory, task="generate")
        options = engine_options(found, threads=threads)
        has_tokenizer = (directory / "tokenizer.json").exists()
        tokenizer = Tokenizer.from_directory(directory) if has_tokenizer else None
        return OrtEngine(found.model, found.spec, found.slots, options, found.prefill), tokenizer

    return opened


def _import_huggingface() -> Opener:
    """Imports PyTorch and transformers; the function that opens a directory with them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401 - as above

    from ryzen_compile.source import load_checkpoint
    from ryzen_compile.validate.huggingface import HuggingFaceEager

    def opened(directory: Path, threads: int) -> tuple[Engine, object]:
        torch.set_num_threads(threads)
        loaded = load_checkpoint(directory)
        return HuggingFaceEager(loaded.model), loaded.tokenizer

    return opened


@contextmanager
def _sampled() -> Iterator[list[tuple[float, int]]]:
    """Moments and the bytes resident then, from the beginning of the block to its end, about ``SAMPLE_SECONDS`` apart:
    further where a library holds the interpreter meanwhile."""
    samples = [(time.perf_counter(), current_rss_bytes())]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLE_SECONDS):
            samples.append((time.perf_counter(), current_rss_bytes()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield samples
    finally:
        over.set()
        watcher.join()
        samples.append((time.perf_counter(), current_rss_bytes()))


def _mean_over_time(samples: Sequence[tuple[float, int]]) -> int:
    """The mean of bytes between the first moment and the last, straight lines between samples: they are not evenly
    spaced, so that their plain mean would be that of the moments when nothing was computed."""
    area = sum((after - before) * (low + high) / 2 for (before, low), (after, high) in pairwise(samples))
    return round(area / (samples[-1][0] - samples[0][0]))


if __name__ == "__main__":
    sys.stdout.write(_run(json.load(sys.stdin)).model_dump_json() + "\n")
