"""Stopping politely: the first Ctrl-C or SIGTERM is noted, and acted on between two steps.

Of several processes that train one run, all stop after the same step, whichever was asked: JAX's
preemption service tells the others, and they agree on a step that none has reached yet. That costs
a step nothing, as only a request makes them talk.
"""

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

# All processes count alike; a second run of the same process goes on counting.
_looks = itertools.count()


class StopRequest:
    """Whether somebody has asked the run to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @property
    def asked(self) -> bool:
        """Whether the request has come."""
        return self.signal is not None

    def look(self) -> None:
        """Call once after each step."""

    def ask(self, number: int, _: object = None) -> None:
        """Notes the request; asked a second time, stops at once."""
        if self.signal is not None:
            raise KeyboardInterrupt(number)
        self.signal = number


class AgreedStopRequest(StopRequest):
    """The request of any of several processes, once all have agreed on the step."""

    def __init__(self) -> None:
        super().__init__()
        self._agreed = False

    @property
    def asked(self) -> bool:
        """Whether this is the step after which all stop."""
        return self._agreed

    def look(self) -> None:
        """Call once after each step, in every process."""
        if multihost_utils.reached_preemption_sync_point(next(_looks)):
            self._agreed = True
            self.signal = self.signal or signal.SIGTERM

    def ask(self, number: int, _: object = None) -> None:
        """Notes Ctrl-C and hands it to the preemption service, which hears of SIGTERM itself."""
        super().ask(number)
        signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def noticing() -> Iterator[StopRequest]:
    """Within the block, SIGINT and SIGTERM only set the request that is yielded.

    Outside the main thread signals cannot be caught, and the request never comes.
    """
    several = jax.process_count() > 1
    request = AgreedStopRequest() if several else StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # SIGTERM is caught by the preemption service where there is one.
    caught = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, request.ask) for number in caught}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
