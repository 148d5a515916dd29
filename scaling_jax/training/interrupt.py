"""Stopping politely: the first Ctrl-C or SIGTERM is noted, and acted on between two steps."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class StopRequest:
    """Whether somebody has asked the run to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @property
    def asked(self) -> bool:
        """Whether the request has come."""
        return self.signal is not None

    def ask(self, number: int, _: object = None) -> None:
        """Notes the request; asked a second time, stops at once."""
        if self.asked:
            raise KeyboardInterrupt
        self.signal = number


@contextlib.contextmanager
def noticing() -> Iterator[StopRequest]:
    """Within the block, SIGINT and SIGTERM only set the request that is yielded.

    Outside the main thread signals cannot be caught, and the request never comes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {
        number: signal.signal(number, request.ask) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
