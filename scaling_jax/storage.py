"""Faults of the storage, told apart from damaged files: a full disk, no permission, an outage."""

import errno
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from scaling_jax.errors import OutageError, UserError

# Somebody has to act: make room, allow it, close files.
LASTING = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
        *(errno.EMFILE, errno.ENFILE),
    }
)
# It may be over when the command is given again.
PASSING = frozenset(
    {
        *(errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN),
        *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET),
        *(errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED),
    }
)
# Seconds between the times that a storage which does not answer is read.
PAUSES = (1.0, 5.0, 20.0)

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

_CODE = re.compile(r"os_error_code='(\d+)'")
# What TensorStore says of a service that does not answer.
_NO_ANSWER = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED")


def fault(error: BaseException) -> int | None:
    """The system's error number if `error`, or what caused it, is a fault of the storage."""
    codes = (_code(each) for each in causes(error))
    return next((code for code in codes if code in LASTING | PASSING), None)


def causes(error: BaseException) -> Iterator[BaseException]:
    """`error`, what caused it, and so on."""
    seen: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in seen:
        yield at
        seen.append(at)
        at = at.__cause__ or at.__context__


def refusal(what: str, code: int) -> UserError | OutageError:
    """The error to raise where `what` failed with an error number of LASTING or PASSING."""
    kind = OutageError if code in PASSING else UserError
    return kind(f"{what}: {in_words(code)}")


def patiently(read: Callable[[], Result], pauses: Sequence[float] = PAUSES) -> Result:
    """What `read` gives; after an OutageError it is asked again, once after each pause."""
    for pause in pauses:
        try:
            return read()
        except OutageError as error:
            logger.warning("trying again in %g s: %s", pause, error)
            time.sleep(pause)
    return read()


def in_words(code: int) -> str:
    """What the system says for an error number, and that nothing is lost."""
    return f"{os.strerror(code)}; what is finished is kept, and the same command goes on from there"


def _code(error: BaseException) -> int | None:
    if isinstance(error, TimeoutError):  # most have no number
        return errno.ETIMEDOUT
    return error.errno if isinstance(error, OSError) else _said(error)


def _said(error: BaseException) -> int | None:
    """The error number that TensorStore writes into its messages, or whose words TensorFlow does.

    Only lasting faults are looked for by words: a peer's "Connection reset" is none of the storage.
    """
    message = str(error)
    found = _CODE.search(message)
    if found:
        return int(found[1])
    if isinstance(error, ValueError) and _NO_ANSWER.match(message):
        return errno.ETIMEDOUT
    return next((code for code in LASTING if os.strerror(code) in message), None)
