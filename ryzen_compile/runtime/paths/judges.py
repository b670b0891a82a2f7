"""Asking verifiers: those that wait for a process in threads, so that decoding goes on; others at once."""

from __future__ import annotations

import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from types import TracebackType
from typing import Self

from ryzen_compile.runtime.paths.verdict import Verdict, Verifier, judged

Judgement = tuple[Verdict, float]  # and the seconds that it took


class Judges:
    """``threads`` of them. A ``with`` block drops what nobody waits for any more; a program that runs ends within its
    limits."""

    def __init__(self, threads: int = 2) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="verify")
        self._asked: set[Future[Judgement]] = set()

    def ask(self, verifier: Verifier, text: str) -> Future[Judgement]:
        """The verdict on ``text``, now or later. Raises what ``judged`` does, or the future does."""
        if getattr(verifier, "waits", False):
            # In this context, so that a verifier which calls the model is refused instead of waiting for ever.
            future = self._pool.submit(copy_context().run, _timed, verifier, text)
            self._asked.add(future)
        else:
            future = Future()
            future.set_result(_timed(verifier, text))
        return future

    def wait(self) -> None:
        """Until one more is done, if any is asked."""
        self._asked = {future for future in self._asked if not future.done()}
        if self._asked:
            wait(self._asked, return_when=FIRST_COMPLETED)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _timed(verifier: Verifier, text: str) -> Judgement:
    began = time.perf_counter()
    return judged(verifier, text), time.perf_counter() - began
