"""Signals while a step runs: the first is noted, the second does what it always did, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from ryzen_compile.train.interruption import SIGNALS, Interruption


class Heard(BaseException):
    """Raised by the handler that was there before."""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The caller's own: they raise, so a signal that is not noted is seen, and the test process lives on."""

    def before(number: int, frame: object) -> None:
        raise Heard(number)

    outer = {number: signal.signal(number, before) for number in SIGNALS}
    mine = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    found = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in outer.items():
        signal.signal(number, handler)
    assert found == mine


def send(number: int) -> None:
    """Handled by the time it returns: CPython runs handlers of the main thread between its instructions."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_first_signal_is_noted_and_the_second_is_the_callers(number: signal.Signals) -> None:
    with Interruption() as interruption:
        assert interruption.asked is None
        send(number)
        assert interruption.asked == number
        with pytest.raises(Heard):
            send(number)


def test_the_second_may_be_another_one() -> None:
    with Interruption():
        send(signal.SIGTERM)
        with pytest.raises(Heard):
            send(signal.SIGINT)


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["INT", "TERM"]
)
def test_what_was_noted_is_raised_when_it_is_asked_for(number: int, raised: type[BaseException]) -> None:
    with Interruption() as interruption:
        send(number)
    with pytest.raises(raised) as caught:
        interruption.raise_it()
    if raised is SystemExit:
        assert caught.value.code == 128 + signal.SIGTERM


def test_without_a_signal_nothing_is_raised() -> None:
    with Interruption() as interruption:
        interruption.raise_it()
    assert interruption.asked is None


def test_an_error_inside_gives_the_handlers_back() -> None:
    """The fixture looks at them."""
    with pytest.raises(ZeroDivisionError), Interruption():
        raise ZeroDivisionError


def test_behind_it_signals_are_the_callers_again() -> None:
    with Interruption():
        pass
    with pytest.raises(Heard):
        send(signal.SIGTERM)


def test_an_ignored_signal_stays_ignored() -> None:
    """A run started by nohup or in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            send(signal.SIGINT)
            assert interruption.asked is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_nothing_is_caught() -> None:
    mine = signal.getsignal(signal.SIGTERM)
    found: list[object] = []

    def work() -> None:
        with Interruption() as interruption:
            found.extend([interruption.asked, signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None, mine]


def test_one_inside_another_notes_for_the_inner_one_alone() -> None:
    with Interruption() as outer:
        with Interruption() as inner:
            send(signal.SIGTERM)
            send(signal.SIGTERM)
        assert inner.asked == outer.asked == signal.SIGTERM
