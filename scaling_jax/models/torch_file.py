"""Files of torch.save, read and written without PyTorch, and read without running what they hold.

Such a file is an uncompressed zip archive: `data.pkl` describes dictionaries of tensors
(`scaling_jax.models.torch_pickle`), `data/0`, `data/1`, ... are their numbers. Those are mapped
into memory, so that a file may be larger than it.

Source: torch `serialization.py`; caffe2 `serialize/inline_container.h`.
"""

import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scaling_jax import atomic
from scaling_jax.errors import UserError
from scaling_jax.models import torch_pickle

LARGEST_PICKLE = 64 << 20
ALIGNMENT = 64  # bytes; torch can map the storages of a file that keeps it
_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_LOCAL_HEADER = struct.Struct("<4s22xHH")


def read(path: Path) -> dict[str, Any]:
    """What torch.save wrote to `path`; tensors are read-only arrays that lie in the file.

    Raises:
      UserError: there is no such file, it is damaged or of another format, or its pickle asks for
        more than data. Nothing of it was run.
    """
    archive = _Archive(path)
    try:
        content = torch_pickle.loads(archive.pickle(), archive.tensor)
    except ValueError as error:
        raise UserError(f"{path}: refused: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes dictionaries of texts, numbers and arrays so that torch.load reads them, atomically.

    Raises:
      TypeError: something else is in `content`.
    """
    data, arrays = torch_pickle.dumps(content)
    with (
        atomic.replacing(path) as temporary,
        temporary.open("wb") as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):

        def add(name: str, part: bytes | memoryview) -> None:
            entry = zipfile.ZipInfo(f"{path.stem}/{name}")
            header = file.tell() + _LOCAL_HEADER.size + len(entry.filename.encode()) + 4
            padding = -header % ALIGNMENT
            entry.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
            archive.writestr(entry, part)

        add("data.pkl", data)
        add("byteorder", b"little")
        for key, array in enumerate(arrays):
            add(f"data/{key}", np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        add("version", b"3\n")


class _Archive:
    """The zip archive of a PyTorch file, mapped into memory."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            raise UserError(f"{path}: {_why_no_archive(path, error)}") from None
        self._bytes = np.memmap(path, np.uint8, mode="r")
        self._entries = {entry.filename: entry for entry in entries}
        pickles = [
            name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")
        ]
        if len(self._entries) < len(entries) or len(pickles) != 1:
            raise UserError(f"{path}: a zip archive, but not one that torch.save writes")
        self._root = pickles[0].removesuffix("data.pkl")
        self._checked: dict[str, np.ndarray] = {}

    def pickle(self) -> bytes:
        """The description of what is in the file."""
        byteorder = f"{self._root}byteorder"
        if byteorder in self._entries and self._part(byteorder).tobytes() != b"little":
            raise ValueError("it was written on a big-endian machine; save it again on another")
        description = self._part(f"{self._root}data.pkl")
        if len(description) > LARGEST_PICKLE:
            raise ValueError(
                f"its pickle has {len(description):,} bytes, too many for a state dict"
            )
        return description.tobytes()

    def tensor(self, view: torch_pickle.View) -> np.ndarray:
        """The tensor that a view describes, in place."""
        name = f"{self._root}data/{view.storage.key}"
        storage = self._part(name)
        size = view.storage.dtype.itemsize
        if len(storage) != view.storage.count * size:
            raise ValueError(
                f"{name} has {len(storage):,} bytes where {view.storage.count:,} numbers of {size} "
                "are described"
            )
        strides = tuple(stride * size for stride in view.strides)
        if 0 in view.shape:
            return np.empty(view.shape, view.storage.dtype)
        return np.ndarray(view.shape, view.storage.dtype, storage, view.offset * size, strides)

    def _part(self, name: str) -> np.ndarray:
        """The bytes of an entry, found whole by their checksum where the file has one."""
        if name in self._checked:
            return self._checked[name]
        entry = self._entries.get(name)
        if entry is None:
            raise ValueError(f"{name} is missing in it")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 0x1:
            raise ValueError(f"{name} is compressed or encrypted, which torch.save does not do")
        start = entry.header_offset + _LOCAL_HEADER.size
        header = self._bytes[entry.header_offset : start].tobytes()
        if len(header) < _LOCAL_HEADER.size:
            raise ValueError(f"{name} lies outside of the file")
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        data = start + name_length + extra_length
        part = np.asarray(self._bytes[data : data + entry.file_size])
        if signature != b"PK\x03\x04" or len(part) != entry.file_size:
            raise ValueError(f"{name} lies outside of the file")
        if entry.CRC and zlib.crc32(part.data) != entry.CRC:  # torch can be told to leave it at 0
            raise ValueError(f"{name} is damaged: its checksum differs")
        self._checked[name] = part
        return part


def _why_no_archive(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(len(_LEGACY))
    again = "load it where PyTorch is installed and save it again as .pt or .safetensors"
    if start == _LEGACY:
        return f"written in the format of before PyTorch 1.6, which only unpickling reads; {again}"
    if start.startswith(b"PK"):
        return f"a damaged or cut off zip archive ({error})"
    if start.startswith(b"\x80"):
        return f"a bare pickle, not a file of torch.save, and not opened; {again}"
    return "not a file of torch.save"
