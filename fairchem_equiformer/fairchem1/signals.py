"""Signals that wait for the end of a training step."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from submitit.core.job_environment import SignalHandler

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

    A handler of somebody else's is left alone, but for two of submitit's: that of `REQUEUE`, which
    has the job begin again, waits for the end of the step; and SIGTERM, which submitit lets pass
    and Slurm sends before it ends a job, asks for a save.

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
            requeues = number == REQUEUE and callable(handler)
            if default or requeues or _lets_pass(handler):
                self._before[number] = signal.signal(number, self._note)

    def stop(self) -> None:
        """Put the handlers of before in place."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def hand_on(self, number: int) -> bool:
        """Call the handler of somebody else's that waited for the end of the step, if there is.

        Returns:
            Whether there is one; it may not return.
        """
        handler = self._before.get(number)
        if not callable(handler) or handler is signal.default_int_handler:
            return False
        handler(number, None)
        return True

    def passes(self, number: int) -> bool:
        """Whether a signal only announces the end of a job, and is no reason to end by oneself."""
        return _lets_pass(self._before.get(number))

    def forget(self, number: int) -> None:
        """What this signal asked for has been done; another that has come meanwhile stays."""
        if self.number == number:
            self.number = 0

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self.number or (self.passes(self.number) and not self.passes(number)):
            self.number, self._since = number, now
            what = "stopping after this step; again to stop at once"
            if self.passes(number):
                what = "saving after this step"
            # No logging, which may be what was interrupted.
            os.write(2, f"{signal.Signals(number).name}: {what}\n".encode())
        elif now - self._since > AGAIN and not self.passes(number):
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)


def _lets_pass(handler: Any) -> bool:
    return getattr(handler, "__func__", None) is SignalHandler.bypass


def ignore_in_worker(_: int) -> None:
    """Let a worker of a data loader live until its trainer, which waits for the step, ends it."""
    for number in (*ENDING, REQUEUE):
        signal.signal(number, signal.SIG_IGN)
