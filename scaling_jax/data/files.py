"""Files as they lie and as they read: .gz and .zst unpacked on the way, local or remote."""

import contextlib
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from scaling_jax.data.remote import RemoteFile, patiently
from scaling_jax.errors import UserError

# What reading a file that is cut short or damaged raises.
CORRUPT = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)
READ_BYTES = 1 << 18


@contextlib.contextmanager
def opened(file: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Opens a path or a URL of fsspec's: the file as it lies, and its content unpacked.

    The two are the same object where nothing is packed. Reading a packed file that is damaged or
    cut short raises one of CORRUPT.

    Raises:
      UserError: the file cannot be opened.
    """
    with _open(file) as raw:
        if file.lower().endswith(".gz"):
            yield raw, gzip.GzipFile(fileobj=raw)  # pyright: ignore[reportReturnType]
        elif file.lower().endswith(".zst"):
            yield raw, io.BufferedReader(_ZstdContent(raw), READ_BYTES)
        else:
            yield raw, raw


def found(folder: str, pattern: str) -> dict[str, int]:
    """The files below a folder that a glob pattern finds, by name, and their sizes in bytes.

    Raises:
      UserError: there is none, or the folder cannot be searched.
    """
    with _searching(folder) as (system, root):
        wanted = f"{root.rstrip('/')}/{pattern}"
        entries = patiently(folder, lambda: system.glob(wanted, detail=True))
    sizes = {
        system.unstrip_protocol(name) if "://" in folder else name: int(entry["size"])
        for name, entry in sorted(entries.items())
        if entry["type"] != "directory"  # a link is neither that nor a file
    }
    if not sizes:
        raise UserError(f"{folder}: no file is called {pattern}; folder=... says where they are")
    return sizes


def below(folder: str) -> list[str]:
    """All files below a folder, by their names from there on.

    Raises:
      UserError: the folder cannot be searched.
    """
    with _searching(folder) as (system, root):
        names = patiently(folder, lambda: system.find(root))
        return sorted(name.removeprefix(root).lstrip("/") for name in names)


def is_folder(path: str) -> bool | None:
    """Whether a path or a URL of fsspec's is that of a folder; None if nothing is there.

    Raises:
      UserError: that cannot be found out.
    """
    if "://" not in path:
        return os.path.isdir(path) if os.path.exists(path) else None  # noqa: PTH110, PTH112 - of any text
    with _searching(path) as (system, root):
        try:
            return patiently(path, lambda: system.info(root))["type"] == "directory"
        except FileNotFoundError:
            return None


def size(file: str) -> int:
    """Bytes, as the file lies."""
    with opened(file) as (raw, _):
        return raw.seek(0, io.SEEK_END)


@contextlib.contextmanager
def _searching(folder: str) -> Iterator[tuple[Any, str]]:
    """The file system of a folder and its name there; what fails in the block is a UserError."""
    import fsspec

    try:
        yield fsspec.core.url_to_fs(folder)
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"{folder}: cannot be searched ({error})") from None


def _open(file: str) -> IO[bytes]:
    try:
        if "://" not in file:
            return Path(file).open("rb")
        # fsspec's own files look for the ends of lines in Python
        return io.BufferedReader(RemoteFile(file), READ_BYTES)
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"{file}: cannot be opened ({error})") from None


class _ZstdContent(io.RawIOBase):
    """The content of a .zst file, frame after frame.

    zstandard's own stream reader ends without a word where a file has been cut short.
    """

    def __init__(self, packed: IO[bytes]):
        self._packed = packed
        self._context = zstandard.ZstdDecompressor()
        self._frame = self._context.decompressobj()
        self._in_frame = False
        self._left = b""  # packed bytes that belong to the next frame
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Fills `buffer`, or its beginning; 0 at the end of the file."""
        while not self._unpacked:
            chunk = self._left or self._packed.read(READ_BYTES)
            if not chunk and self._in_frame:
                raise EOFError("the file ends in the middle of a zstd frame")
            if not chunk:
                return 0
            self._unpacked = memoryview(self._frame.decompress(chunk))
            self._in_frame, self._left = not self._frame.eof, self._frame.unused_data
            if self._frame.eof:
                self._frame = self._context.decompressobj()
        count = min(len(buffer), len(self._unpacked))
        buffer[:count] = self._unpacked[:count]
        self._unpacked = self._unpacked[count:]
        return count
