"""Being asked to stop, by Ctrl-C or whoever runs the machine."""

import signal
import threading
from types import FrameType
from typing import Any, Self


class StopRequest:
    """Within it, SIGINT and SIGTERM ask for a stop after the current step; a second SIGINT stops at once.

    Off the main thread, where Python has no signals, nothing is asked for.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not Python's

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
