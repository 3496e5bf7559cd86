"""Signals that wait for the end of a training step."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType

# What ends a process that does nothing about it. SIGUSR2 is also how Slurm, through submitit,
# announces the end of a job's time.
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
REQUEUE = signal.SIGUSR2
SIGNALLED = 128  # a process ended by a signal has this status, plus the signal's number
AGAIN = 2.0  # seconds after which a signal that comes again acts at once


class Deferred:
    """Notes signals between `start` and `stop`, in the main thread of a process.

    A handler of somebody else's is left alone, but for that of `REQUEUE`: submitit's saves the
    state of the training, and in the middle of a step that is half of one step and half of
    another.

    Attributes:
        number: of the first signal that came; 0 if none did.
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def start(self) -> None:
        """Begin to note signals; nothing in another thread, where Python does not allow it."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (*ENDING, REQUEUE):
            handler = signal.getsignal(number)
            default = handler in {signal.SIG_DFL, signal.default_int_handler}
            if default or (number == REQUEUE and callable(handler)):
                self._before[number] = signal.signal(number, self._note)

    def stop(self) -> None:
        """Put the handlers of before in place."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def hand_on(self, number: int) -> None:
        """Call the handler of somebody else's that waited for the end of the step, if there is."""
        handler = self._before.get(number)
        if callable(handler) and handler is not signal.default_int_handler:
            handler(number, None)

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.number and now - self._since > AGAIN:
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)
        elif not self.number:
            self.number, self._since = number, now
            name = signal.Signals(number).name
            # No logging, which may be what was interrupted.
            os.write(2, f"{name}: stopping after this step; again to stop at once\n".encode())


def ignore_in_worker(_: int) -> None:
    """Let a worker of a data loader live until its trainer, which waits for the step, ends it."""
    for number in (*ENDING, REQUEUE):
        signal.signal(number, signal.SIG_IGN)
