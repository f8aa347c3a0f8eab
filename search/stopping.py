"""Stopping a search from outside: Ctrl-C or SIGTERM once ends it in good order, Ctrl-C twice at once.

A search that is asked to stop ends at its next boundary, such as the end of the trial at hand, as if what it may spend
were spent: what was measured becomes a plan, and the run says that it was interrupted. Repeating the command with the
same `run_dir` goes on from there.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from types import FrameType

GRACE_S = 10.0
"""Seconds after which a search that was asked to stop measures no more than its plan needs: Slurm kills after 30."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedError(Exception):
    """The search was asked to stop, and is at a boundary."""


class Interrupted(SystemExit):
    """A search was stopped by a signal, and left its files in good order; ends the process with the given code.

    It is no `Exception`, so that it passes through whatever runs a search as one of many jobs.
    """


class Stop:
    """Whether a search was asked to stop, and by what.

    Attributes:
        signal: The signal that asked; None while nothing did.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.signal: int | None = None
        self._clock = clock
        self._asked_s = 0.0

    @property
    def is_asked(self) -> bool:
        """Whether the search is to stop."""
        return self.signal is not None

    @property
    def is_late(self) -> bool:
        """Whether the search was asked to stop so long ago that it should do only what its plan needs."""
        return self.is_asked and self._clock() - self._asked_s >= GRACE_S

    @property
    def exit_code(self) -> int:
        """What a process that was stopped exits with: 128 and the signal's number, as shells count."""
        return 128 + (self.signal or signal.SIGINT)

    def ask(self, number: int = signal.SIGINT) -> None:
        """Asks the search to stop at its next boundary."""
        self.signal, self._asked_s = number, self._clock()

    def check(self) -> None:
        """A boundary of the search.

        Raises:
            StoppedError: If it is to stop.
        """
        if self.is_asked:
            raise StoppedError("the search was stopped before anything was measured")


@contextmanager
def listening(stop: Stop, say: Callable[[str], None]) -> Iterator[None]:
    """Has Ctrl-C or SIGTERM ask to stop while the block runs.

    The first of them asks. Ctrl-C after that raises `KeyboardInterrupt` wherever the program is; a further
    SIGTERM changes nothing, as batch systems send several. A signal that is ignored, as Ctrl-C is by programs in the
    background, stays so. Python hears signals in its main thread only: in others nothing is listened to, which is said.

    Args:
        stop: What is asked.
        say: Shows the user a line; called from a thread of its own, as a signal may come in the middle of a print.
    """
    heard = SimpleQueue[int | None]()
    if threading.current_thread() is not threading.main_thread():
        say("this search is not in the main thread, where signals are heard: stopping it early means killing it")
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if not stop.is_asked:
            stop.ask(number)
            heard.put(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def announce() -> None:
        while (number := heard.get()) is not None:
            say(announcement(number))

    before = {number: signal.getsignal(number) for number in SIGNALS}
    announcer = threading.Thread(target=announce, name="announcer", daemon=True)
    announcer.start()
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        heard.put(None)
        announcer.join(timeout=5)


def announcement(number: int) -> str:
    """What is said when a signal asks to stop."""
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    once_more = "Ctrl-C once more" if number == signal.SIGINT else "Ctrl-C"
    return f"{name}: stopping after the trial at hand, with the best plan so far; {once_more} stops at once"
