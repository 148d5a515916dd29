"""Faults of the storage, told apart from damaged files: a full disk, no permission, an outage."""

import errno
import os
import re

_CODE = re.compile(r"os_error_code='(\d+)'")
_FAULTS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
        *(errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN),
        *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
        *(errno.ECONNRESET, errno.ECONNREFUSED),
    }
)


def fault(error: BaseException) -> int | None:
    """The system's error number if `error`, or what caused it, is a fault of the storage."""
    seen: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in seen:
        seen.append(at)
        code = at.errno if isinstance(at, OSError) else _said(str(at))
        if code in _FAULTS:
            return code
        at = at.__cause__ or at.__context__
    return None


def in_words(code: int) -> str:
    """What the system says for an error number, and that nothing is lost."""
    return f"{os.strerror(code)}; what is finished is kept, and the same command goes on from there"


def _said(message: str) -> int | None:
    """The error number that orbax writes into its messages, or whose words TensorFlow writes."""
    found = _CODE.search(message)
    if found:
        return int(found[1])
    return next((code for code in _FAULTS if os.strerror(code) in message), None)
