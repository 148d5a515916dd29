"""Several processes that each work alone for a while, and then do the same thing about it."""

import itertools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

from scaling_jax.errors import Interrupted, PeerError
from scaling_jax.training import distributed, interrupt
from scaling_jax.training.interrupt import StopRequest

Result = TypeVar("Result")
# Of a process that waits for others that work apart.
SECONDS_BETWEEN_CALLS = 0.2

_exchanges = itertools.count()  # all processes count alike


def together(work: Callable[[], Result], kinds: Sequence[type[Exception]]) -> Result:
    """What `work` gives in this process, once all have done it; if one fails, all of them raise.

    A process that went on alone would meet the others in collectives that do not match. One that
    has failed in the same way as another raises its own error.

    Args:
      work: must not wait for other processes, unless it does so whatever happens.
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
    if name not in known:
        # It ends, and with it this process, with its exit code; or it is gone.
        time.sleep(2 * distributed.LEAVE_SECONDS)
    raise known.get(name, PeerError)(text)


def apart(work: Callable[[], Result], kinds: Sequence[type[Exception]]) -> Result:
    """`together`, of work in which each process is as alone, on the devices of its own host.

    What it does may differ, and takes as long as it takes. When one fails or is asked to stop, the
    others are: all have saved what they have before the first one leaves.

    Raises:
      PeerError: as `together`.
    """
    if not distributed.several():
        return work()
    everybody = f"scaling_jax/done/{next(_exchanges)}"

    def alone() -> Result:
        with distributed.apart(), interrupt.noticing_apart() as stop:
            try:
                result = work()
            except Exception:
                distributed.stop_all()
                _wait_for_all(everybody, stop)
                raise
            _wait_for_all(everybody, stop)
            if stop.signal is not None:
                raise Interrupted("stopped; all is saved", stop.signal)
            return result

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


def _wait_for_all(key: str, stop: StopRequest) -> None:
    """Waits until all that work apart have come here; hands on a request to stop."""
    distributed.mark(key)
    told = False
    while distributed.marks(key) < distributed.processes():
        time.sleep(SECONDS_BETWEEN_CALLS)
        stop.look()
        if stop.asked and not told:
            distributed.stop_all()
            told = True
