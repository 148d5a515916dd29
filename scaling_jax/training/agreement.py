"""Several processes that each work alone for a while, and then do the same thing about it."""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax

from scaling_jax.errors import Interrupted, PeerError
from scaling_jax.training import distributed, interrupt

Result = TypeVar("Result")
# While a process waits for others that work apart.
SECONDS_BETWEEN_LOOKS = 0.2

_exchanges = itertools.count()  # all processes count alike


def together(work: Callable[[], Result], kinds: Sequence[type[Exception]]) -> Result:
    """What `work` gives in this process, once all have done it; if one fails, all of them raise.

    A process that went on alone would meet the others in collectives that do not match. One that
    has failed in the same way as another raises its own error.

    Args:
      work: must not wait for other processes.
      kinds: of errors that all processes raise when one does; a later kind only where there is no
        earlier one.

    Raises:
      PeerError: another process failed with an error of another kind.
    """
    error = mine = None
    result: Any = None
    try:
        result = work()
    except Exception as raised:
        error, mine = raised, [type(raised).__name__, str(raised)]
    failures = [failure for failure in of_all(mine) if failure]
    if not failures:
        return result
    known = {kind.__name__: kind for kind in kinds}
    order = [*known]
    name, text = min(failures, key=lambda each: order.index(each[0]) if each[0] in known else -1)
    if error is not None and type(error).__name__ == name:
        raise error
    raise known.get(name, PeerError)(text)


def apart(work: Callable[[], Result], kinds: Sequence[type[Exception]]) -> Result:
    """`together`, of work in which each process is as alone, on the devices of its own host.

    What it does may differ, and takes as long as it takes. When one fails or is asked to stop, the
    others are: all have saved what they have before the first one leaves.

    Raises:
      PeerError: as `together`.
    """
    number = next(_exchanges)

    def alone() -> Result:
        with distributed.apart(), _all_waited_for(f"scaling_jax/done/{number}"):
            return work()

    return together(alone, kinds)


def of_all(message: Any) -> list[Any]:
    """What each process says, in JSON, in every process; no devices are asked."""
    if not distributed.several():
        return [message]
    service, number = distributed.service(), next(_exchanges)
    keys = [f"scaling_jax/agreement/{number}/{who}" for who in range(jax.process_count())]
    service.key_value_set(keys[jax.process_index()], json.dumps(message))
    wait = distributed.LONGEST_WAIT_MS
    return [json.loads(service.blocking_key_value_get(key, wait)) for key in keys]


@contextlib.contextmanager
def _all_waited_for(key: str) -> Iterator[None]:
    """Waits for all that work apart, once the block is left; raises Interrupted if asked to."""
    try:
        yield
    except Exception:
        distributed.stop_all()
        _wait_for_all(key)
        raise
    asked = _wait_for_all(key)
    if asked is not None:
        raise Interrupted("stopped; all is saved", asked)


def _wait_for_all(key: str) -> int | None:
    """Waits until all that work apart have come here; the signal if any of them is to stop."""
    if not distributed.is_apart():
        return None
    distributed.say_so(key)
    told = False
    with interrupt.noticing() as stop:
        while distributed.count_sayings(key) < distributed.processes():
            time.sleep(SECONDS_BETWEEN_LOOKS)
            stop.look()
            if stop.asked and not told:
                distributed.stop_all()
                told = True
    return stop.signal
