"""Ctrl-C and SIGTERM while a step runs: remembered until it is over, so that weights and optimizer fit together."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Inside, the first signal is only noted in ``asked``; a second one does what it did before.

    In another thread than the main one nothing is caught.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()

    def raise_it(self) -> None:
        """What the signal would have raised: ``KeyboardInterrupt``, or ``SystemExit`` with 128 + its number."""
        if self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        if self.asked is not None:
            raise SystemExit(128 + self.asked)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.asked = number
        self._give_back()

    def _give_back(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
