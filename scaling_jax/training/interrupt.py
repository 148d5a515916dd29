"""Stopping politely: the first Ctrl-C or SIGTERM is noted, and acted on between two steps.

Of several processes that train one run, all stop after the same step, whichever was asked: JAX's
preemption service tells the others, and they agree on a step that none has reached yet. That costs
a step nothing, as only a request makes them talk. Of processes that work apart each stops after a
step of its own, once it hears of the request.
"""

import contextlib
import ctypes
import itertools
import signal
import threading
import time
from collections.abc import Iterator, Sequence

from jax.experimental import multihost_utils

from scaling_jax.training import distributed

# Between the times that a process which works apart asks whether all are to stop.
SECONDS_BETWEEN_LOOKS = 1.0
# All processes count alike; a second run of the same process goes on counting.
_looks = itertools.count()
# Of a process that works apart, from the beginning of that to its end.
_while_apart: list["SharedStopRequest"] = []


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


class SharedStopRequest(StopRequest):
    """The request that any of several processes hears which work apart; each stops when it can."""

    def __init__(self) -> None:
        super().__init__()
        self._looked = time.monotonic()
        self._from_another = False

    def look(self) -> None:
        """Call once after each step."""
        now = time.monotonic()
        if self.signal is None and now - self._looked >= SECONDS_BETWEEN_LOOKS:
            self._looked = now
            if distributed.is_to_stop():
                self.signal, self._from_another = signal.SIGTERM, True

    def ask(self, number: int, _: object = None) -> None:
        """Notes the request; what another process was asked before does not count as the first."""
        if self._from_another:
            self.signal, self._from_another = None, False
        super().ask(number)


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

    Outside the main thread signals cannot be caught, and the request never comes. Within a block of
    a process that works apart, it is the same request.
    """
    if _while_apart:
        yield _while_apart[0]
        return
    if distributed.several():  # the preemption service catches SIGTERM
        request, caught = AgreedStopRequest(), (signal.SIGINT,)
    else:
        request, caught = StopRequest(), (signal.SIGINT, signal.SIGTERM)
    with _caught(request, caught):
        yield request


@contextlib.contextmanager
def noticing_apart() -> Iterator[StopRequest]:
    """`noticing` for all that this process does while it works apart."""
    request = SharedStopRequest()
    _while_apart.append(request)
    try:
        with _preemption_service_kept(), _caught(request, (signal.SIGINT, signal.SIGTERM)):
            yield request
    finally:
        _while_apart.pop()


@contextlib.contextmanager
def _caught(request: StopRequest, numbers: Sequence[int]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, request.ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _preemption_service_kept() -> Iterator[None]:
    """After the block SIGTERM goes again to the service's handler, which Python does not know."""
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    handler = libc.signal(signal.SIGTERM, int(signal.SIG_IGN))
    try:
        yield
    finally:
        libc.signal(signal.SIGTERM, handler)
