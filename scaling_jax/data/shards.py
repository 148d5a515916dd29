"""Prepared tokens on disk: `tokens-KKKKK-of-NNNNN.u16` (or `.u32`) and an `index.json`.

The shards, one after the other, are one long row of little-endian token ids, each document followed
by the end-of-text id. Training reads rows of sequence_length + 1 tokens: disjoint chunks of it, so
that less than a row is left over at the end, whatever the number of shards. A shard is held to its
sha256 when its first row is read (`data.verification`). Nothing here imports TensorFlow.
"""

import dataclasses
import functools
import hashlib
import json
import mmap
import resource
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic
from jaxtyping import Int, Int32
from pydantic import ConfigDict

from scaling_jax import sealed
from scaling_jax.data import verification
from scaling_jax.errors import UserError, nearest

INDEX_FILE = "index.json"
OTHER_OPEN_FILES = 512  # more than a run needs besides
DTYPES = {"u16": np.dtype("<u2"), "u32": np.dtype("<u4")}


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ShardEntry:
    """One shard file."""

    file: str
    tokens: pydantic.NonNegativeInt
    sha256: str
    documents: pydantic.NonNegativeInt = 0
    # UTF-8 bytes of the documents' text, ends of text not counted.
    text_bytes: pydantic.NonNegativeInt = 0
    # Ends of text that the documents' own text spells out.
    spelled_ends: pydantic.NonNegativeInt = 0
    # How many documents were left out, by what was wrong with them.
    skipped: dict[str, pydantic.PositiveInt] = dataclasses.field(default_factory=dict)
    # What the content depends on, as sha256: how it was made, and what from.
    recipe: str = ""
    source: str = ""


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Index:
    """What `index.json` says about a prepared split."""

    task: str
    split: str
    # In a few words; the shards' entries name its content.
    source: str
    # As it was given: "bytes" or a path.
    vocabulary: str
    vocabulary_size: pydantic.PositiveInt
    vocabulary_sha256: str
    end_of_text: pydantic.NonNegativeInt
    dtype: Literal["u16", "u32"]
    documents: pydantic.NonNegativeInt
    # UTF-8 bytes of the documents' text, ends of text not counted.
    text_bytes: pydantic.NonNegativeInt
    shards: tuple[ShardEntry, ...]
    # Nats per token of the source, where it is known in closed form for this vocabulary.
    entropy_rate: float | None
    versions: dict[str, str]

    def __post_init__(self) -> None:
        for shard in self.shards:
            if Path(shard.file).name != shard.file:
                raise ValueError(f"shard '{shard.file}' does not lie beside the index")

    @property
    def tokens(self) -> int:
        """Tokens of all shards, ends of text included."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def skipped(self) -> dict[str, int]:
        """How many documents were left out, by what was wrong with them."""
        return dict(sum((Counter(shard.skipped) for shard in self.shards), Counter[str]()))


@dataclasses.dataclass(frozen=True, eq=False)
class Shards:
    """The token shards of one prepared split, mapped into memory."""

    folder: Path
    index: Index
    index_sha256: str
    arrays: tuple[np.ndarray, ...]

    @classmethod
    def open(cls, folder: str | Path) -> "Shards":
        """Opens a prepared split.

        Raises:
          UserError: the folder, its index or a shard is missing, malformed or of the wrong size, or
            there are more shards than this process may have files open.
        """
        folder = Path(folder)
        content, index = read_index(folder)
        _allow_open_files(len(index.shards), folder)
        arrays = tuple(_map(folder, shard, index.dtype) for shard in index.shards)
        return cls(folder, index, hashlib.sha256(content).hexdigest(), arrays)

    @property
    def token_count(self) -> int:
        """Tokens of all shards, ends of text included."""
        return self.index.tokens

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest possible id."""
        return self.index.vocabulary_size

    @property
    def token_bytes(self) -> int:
        """Size of one token on disk."""
        return DTYPES[self.index.dtype].itemsize

    @property
    def entropy_rate(self) -> float | None:
        """Nats per token of the source, where it is known in closed form."""
        return self.index.entropy_rate

    def check_vocabulary(self, size: int) -> None:
        """Raises a UserError if ids would lie outside a model's vocabulary of `size`."""
        if self.vocabulary_size > size:
            raise UserError(
                f"{self.folder}: prepared with {self.vocabulary_size} token ids, but "
                f"model.vocabulary_size is {size}"
            )

    def row_count(self, sequence_length: int) -> int:
        """How many rows of sequence_length + 1 tokens there are."""
        return self.token_count // (sequence_length + 1)

    def content(self, shard: int) -> Int[np.ndarray, "tokens"]:
        """The tokens of one shard.

        Raises:
          UserError: they are not what was written.
        """
        if shard not in self._verified:
            entry = self.index.shards[shard]
            path = self.folder / entry.file
            verification.verify_once(path, self.arrays[shard], entry.sha256)
            self._verified.add(shard)
        return self.arrays[shard]

    def rows(
        self, indices: Int[np.ndarray, "n"], sequence_length: int
    ) -> Int32[np.ndarray, "n length+1"]:
        """The rows with these indices, in this order.

        Raises:
          IndexError: an index is negative, or not below `row_count`.
          UserError: a shard that they lie in is not what was written.
        """
        width = sequence_length + 1
        rows = np.empty((len(indices), width), np.int32)
        if not len(indices):
            return rows
        if indices.min() < 0 or indices.max() >= self.row_count(sequence_length):
            raise IndexError(f"row indices go from 0 to {self.row_count(sequence_length) - 1}")
        which = np.searchsorted(self._starts, indices * width, side="right") - 1
        by_shard = np.argsort(which, kind="stable")
        changes = np.flatnonzero(np.diff(which[by_shard])) + 1
        for wanted in np.split(by_shard, changes):
            shard = int(which[wanted[0]])
            first = -(-self._starts[shard] // width)  # the first row that begins in the shard
            skipped = first * width - self._starts[shard]
            count = (self._starts[shard + 1] - first * width) // width
            table = self.content(shard)[skipped : skipped + count * width].reshape(count, width)
            whole = indices[wanted] - first < count
            rows[wanted[whole]] = table[indices[wanted[whole]] - first]
            for row in wanted[~whole]:  # begins in the shard and runs on in the next
                rows[row] = self._across(int(indices[row]) * width, width)
        return rows

    def read_ahead(self, first: int, count: int, sequence_length: int) -> None:
        """Asks the operating system for `count` rows from `first` on, in one piece; does not wait.

        Without it each row is read for itself, and much around it that nobody needs.
        """
        width = sequence_length + 1
        start, stop = first * width, (first + count) * width
        begun, ended = np.searchsorted(self._starts, [start, stop - 1], side="right") - 1
        for shard in range(begun, ended + 1):
            array = self.arrays[shard]
            content = getattr(array.base, "obj", None)
            if not isinstance(content, mmap.mmap):  # an empty shard
                continue
            first_byte = max(start - self._starts[shard], 0) * array.itemsize
            last_byte = min(stop - self._starts[shard], len(array)) * array.itemsize
            page = int(first_byte) // mmap.PAGESIZE * mmap.PAGESIZE
            content.madvise(mmap.MADV_WILLNEED, page, int(last_byte) - page)

    def verify(self) -> None:
        """Recomputes every checksum, whatever is known of earlier ones.

        Raises:
          UserError: naming the first shard whose content is not what was written.
        """
        for entry, array in zip(self.index.shards, self.arrays, strict=True):
            verification.verify(self.folder / entry.file, array, entry.sha256)

    def _across(self, start: int, width: int) -> Int[np.ndarray, "width"]:
        """`width` tokens from `start` on, in the shards one after the other."""
        parts = [
            self.content(shard)[max(start - begin, 0) : max(start + width - begin, 0)]
            for shard, (begin, array) in enumerate(zip(self._starts, self.arrays, strict=False))
            if begin < start + width and begin + len(array) > start
        ]
        return np.concatenate(parts)

    @functools.cached_property
    def _verified(self) -> set[int]:
        """The shards that have been held to their checksum."""
        return set()

    @functools.cached_property
    def _starts(self) -> Int[np.ndarray, "shards+1"]:
        """How many tokens come before each shard; last of all, the number of tokens."""
        tokens = [shard.tokens for shard in self.index.shards]
        return np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)]).astype(np.int64)


def read_index(folder: Path) -> tuple[bytes, Index]:
    """The index of a prepared split, as it lies and as it reads; its shards are not looked at.

    Raises:
      UserError: there is none, or it is malformed, or not what was written.
    """
    file = folder / INDEX_FILE
    if not file.is_file():
        raise UserError(f"{file}: not found; prepare the data with `scaling-jax data prepare`")
    content = file.read_bytes()
    return content, _parse(content, file)


def write_index(folder: Path, index: Index) -> None:
    """Writes the index that makes a split valid, atomically and with a checksum of itself."""
    sealed.write(folder / INDEX_FILE, dataclasses.asdict(index), indent=1)  # pyright: ignore[reportArgumentType]


def _parse(content: bytes, file: Path) -> Index:
    try:
        found = json.loads(content)
        if isinstance(found, dict) and sealed.KEY in found:  # one made by hand may have none
            found = sealed.unseal(found)
        return pydantic.TypeAdapter(Index).validate_python(found)
    except pydantic.ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "unexpected_keyword_argument":
            fields = ShardEntry if key.startswith("shards.") else Index
            known = [field.name for field in dataclasses.fields(fields)]
            message = f"unknown key, {nearest(key.rpartition('.')[2], known)}"
        raise UserError(f"{file}: not an index of token shards ({key}: {message})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file}: damaged or not JSON ({error}); `scaling-jax data prepare` makes it again"
        ) from None


def _allow_open_files(count: int, folder: Path) -> None:
    """Raises the limit of this process as far as it may: a mapped shard keeps its file open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_OPEN_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise UserError(
            f"{folder}: {count:,} shards are mapped at once, but a process may have no more than "
            f"{hard:,} files open here: raise that limit (ulimit -Hn) or prepare fewer shards"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _map(folder: Path, shard: ShardEntry, dtype: str) -> np.ndarray:
    path = folder / shard.file
    expected = shard.tokens * DTYPES[dtype].itemsize
    if not path.is_file():
        raise UserError(f"{path}: the shard is missing; prepare the data again")
    found = path.stat().st_size
    if found != expected:
        raise UserError(
            f"{path}: the shard is {found} bytes long, the index says {expected}; "
            "prepare the data again"
        )
    if expected == 0:  # nothing to map
        return np.zeros(0, DTYPES[dtype])
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(content, DTYPES[dtype])
