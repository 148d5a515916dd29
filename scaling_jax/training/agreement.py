"""Several processes that each work alone for a while, and then do the same thing about it."""

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

from scaling_jax.errors import PeerError
from scaling_jax.training import distributed

Result = TypeVar("Result")

_exchanges = itertools.count()  # all processes count alike


def together(work: Callable[[], Result], kinds: Sequence[type[Exception]]) -> Result:
    """What `work` gives in this process, once all have done it; if one fails, all of them raise.

    A process that went on alone would meet the others in collectives that do not match.

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
    if error is not None and mine == [name, text]:
        raise error
    raise known.get(name, PeerError)(text)


def of_all(message: Any) -> list[Any]:
    """What each process says, in JSON, in every process; no devices are asked."""
    if not distributed.several():
        return [message]
    service, number = distributed.service(), next(_exchanges)
    keys = [f"scaling_jax/agreement/{number}/{who}" for who in range(jax.process_count())]
    service.key_value_set(keys[jax.process_index()], json.dumps(message))
    wait = distributed.LONGEST_WAIT_MS
    return [json.loads(service.blocking_key_value_get(key, wait)) for key in keys]
