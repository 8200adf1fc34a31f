"""SIGTERM, which ends a preempted job: asks for a checkpoint, and ends the process after it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any


class Sigterm:
    """Within the context, the first SIGTERM sets `received`; a second one acts as if there were no context.

    transformers has a handler too (5.24). It is set at construction, so a process that never trains ignores the signal;
    it waits three seconds, saves between backward and optimizer, and lets the script go on as after a whole training.

    When the context ends without an exception, a signal that was received is sent again, to whoever handled it before.
    Without `active`, and outside of the main thread, where Python handles no signals, it does nothing.
    """

    def __init__(self, active: bool) -> None:
        self._active = active and threading.current_thread() is threading.main_thread()
        self._before: Any = None
        self.received = False

    def __enter__(self) -> Sigterm:
        if self._active:
            self._before = signal.signal(signal.SIGTERM, self.receive)
        return self

    def receive(self, number: int = 0, frame: FrameType | None = None) -> None:
        """The signal's handler; or called for a signal that another rank received."""
        if self._active:
            self.received = True
            self._restore()

    def _restore(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self._active:
            return
        if not self.received:
            self._restore()
        elif error is None:
            sys.stdout.flush()
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGTERM)
