"""Files of buckets and servers, which may not answer for a while: asked again, ever more rarely."""

import io
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from scaling_jax.errors import OutageError, first_line

# Waits between tries: about a minute in all.
WAITS_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
# An answer, though not the one wished for; asking again would not change it.
ANSWERS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


def patiently(what: str, action: Callable[[], Result]) -> Result:
    """What `action` returns, tried again after each of WAITS_SECONDS while it fails.

    Args:
      what: names the file or folder.
      action: its errors may be of any class: each bucket's library has its own.

    Raises:
      OutageError: it failed to the end.
      OSError: one of ANSWERS, at once; as are ImportError and ValueError, a library or a protocol
        that is not there.
    """
    for wait in WAITS_SECONDS:
        try:
            return action()
        except (*ANSWERS, ImportError, ValueError):
            raise
        except Exception as error:
            logger.warning("%s: %s; trying again in %g s", what, first_line(error), wait)
            time.sleep(wait)
    try:
        return action()
    except (*ANSWERS, ImportError, ValueError):
        raise
    except Exception as error:
        tries = len(WAITS_SECONDS) + 1
        raise OutageError(
            f"{what}: cannot be reached ({first_line(error)}), tried {tries} times; "
            "what is finished is kept, and the same command goes on from there"
        ) from None


class RemoteFile(io.RawIOBase):
    """A file that fsspec opens, read patiently: after an error it is opened anew, at its place.

    Raises:
      OutageError, OSError, ImportError, ValueError: as `patiently`, here and in reading.
    """

    def __init__(self, url: str):
        self._url = url
        self._file = patiently(url, self._open)

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """The place of the next byte."""
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves there."""
        return self._file.seek(offset, whence)

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Fills `buffer`, or its beginning; 0 at the end of the file."""
        place, broken = self.tell(), False

        def read() -> bytes:
            nonlocal broken
            if broken:
                self._file = self._open()
                self._file.seek(place)
            broken = True
            return self._file.read(len(buffer))

        content = patiently(self._url, read)
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        """Closes the connection."""
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()

    def _open(self) -> io.IOBase:
        import fsspec

        return fsspec.open(self._url, "rb").open()  # pyright: ignore[reportAttributeAccessIssue]
