"""What every engine's process does: read a request, prepare files or measure once, answer in one line.

    python -m peer_engines.llamacpp prepare   < request.json
    python -m peer_engines.llamacpp measure   < request.json

The answer is the line that begins with ``RESULT``, whatever else the engine prints; an uncaught error is an answer too.
Only the standard library is used: this runs in every engine's environment.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

MARK = "RESULT "


@dataclass(frozen=True)
class Request:
    """``model``: the Hugging Face directory all engines are made from; ``path``: this engine's own directory.

    ``warm`` and ``prompt`` are token ids of equal number and nothing in common, so that a prefix cache finds nothing.
    """

    shape: str
    model: str
    path: str
    threads: int
    options: dict[str, Any] = field(default_factory=dict)
    warm: list[int] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    new: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Engine(Protocol):
    """An opened engine. ``versions`` names what a reader must know to repeat it, ``note`` how it was run."""

    versions: dict[str, str]
    note: str

    def run(self, prompt: list[int], new: int) -> tuple[float, float]:
        """Seconds from an empty cache to the logits of ``prompt``, and seconds for ``new`` steps of one token after."""


def serve(prepare: Callable[[Request], dict[str, Any]], open_engine: Callable[[Request], Engine]) -> None:
    """The ``main`` of an engine's module. ``prepare`` returns facts: ``bytes_per_token`` (weights), ``format``."""
    sys.excepthook = _answer_error
    request = Request(**json.load(sys.stdin))
    answer = prepare(request) if sys.argv[1] == "prepare" else measure(request, open_engine)
    print("\n" + MARK + json.dumps(answer), flush=True)


def measure(request: Request, open_engine: Callable[[Request], Engine]) -> dict[str, Any]:
    """One sample of a freshly opened engine, after a warm-up on other tokens."""
    started = time.perf_counter()
    engine = open_engine(request)
    load = time.perf_counter() - started
    engine.run(request.warm, min(8, request.new))
    prefill, decode = engine.run(request.prompt, request.new)
    return {
        "prefill_s": prefill,
        "decode_s": decode,
        "load_s": load,
        "peak_rss": peak_rss(),
        "versions": engine.versions,
        "note": engine.note,
    }


def peak_rss() -> int:
    """Bytes. The system's own mark where there is one: getrusage's counts the parent before the exec on Linux."""
    status = Path("/proc/self/status")
    if status.exists():
        found = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(found[0].split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_answer(output: str) -> dict[str, Any] | None:
    """The answer in what a child printed, or None when it died before it gave one."""
    for line in reversed(output.splitlines()):
        if line.startswith(MARK):
            return json.loads(line[len(MARK) :])
    return None


def _answer_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    traceback.print_exception(kind, error, trace)
    first = (str(error).strip().splitlines() or [""])[0]
    print("\n" + MARK + json.dumps({"error": f"{kind.__name__}: {first}"[:400]}), flush=True)
