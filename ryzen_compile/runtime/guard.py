"""One call at a time on one engine, none after it was closed, and an error where waiting would never end."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ryzen_compile.errors import UsageError

_calls: ContextVar[tuple[object, ...]] = ContextVar("_calls", default=())  # that the code at hand runs inside of


class Guard:
    """Calls from several threads wait for each other; those that could only hang or crash raise ``UsageError``.

    Inside of a call are its own thread and whatever runs in a copy of its context (``contextvars.copy_context``): a
    helper thread that the call waits for.
    """

    def __init__(self) -> None:
        self.closed = False
        self._lock = threading.Lock()
        self._holder: int | None = None  # a thread
        self._call: object = None
        self._pid = os.getpid()

    @contextmanager
    def entered(self, what: str, *, even_closed: bool = False) -> Iterator[None]:
        """Hold the engine for one call, named ``what`` in errors, or say why it cannot be had."""
        if os.getpid() != self._pid:
            # Neither the lock nor an engine's threads survive a fork.
            raise UsageError(f"{what} was called in a forked process", hint="load the model after the fork")
        if self._holder == threading.get_ident() or (self._call is not None and self._call in _calls.get()):
            raise UsageError(
                f"{what} was called from inside a running call of the same model, by a streamer or another callback",
                hint="call it after the first one has returned, or load the model twice",
            )
        with self._lock:
            if self.closed and not even_closed:
                raise UsageError(f"{what} was called on a closed model", hint="load it again")
            self._holder, self._call = threading.get_ident(), object()
            outside = _calls.set((*_calls.get(), self._call))
            try:
                yield
            finally:
                self._holder = self._call = None
                _calls.reset(outside)
