"""Prepared tokens on disk: `tokens-KKKKK-of-NNNNN.u16` (or `.u32`) and an `index.json`.

A shard is one long row of little-endian token ids, each document followed by the end-of-text id.
Training reads rows of sequence_length + 1 tokens: disjoint chunks, cut shard by shard, so that only
each shard's tail is left over. Nothing here imports TensorFlow.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic
from jaxtyping import Int, Int32
from pydantic import ConfigDict

from scaling_jax.errors import UserError, nearest

INDEX_FILE = "index.json"
DTYPES = {"u16": np.dtype("<u2"), "u32": np.dtype("<u4")}


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ShardEntry:
    """One shard file."""

    file: str
    tokens: pydantic.NonNegativeInt
    sha256: str


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Index:
    """What `index.json` says about a prepared split."""

    task: str
    split: str
    # Names the content of the source: the same words, the same documents.
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
          UserError: the folder, its index or a shard is missing, malformed or of the wrong size.
        """
        folder = Path(folder)
        file = folder / INDEX_FILE
        if not file.is_file():
            raise UserError(f"{file}: not found; prepare the data with `scaling-jax data prepare`")
        content = file.read_bytes()
        index = _parse(content, file)
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
        return int(self._first_rows(sequence_length)[-1])

    def rows(
        self, indices: Int[np.ndarray, "n"], sequence_length: int
    ) -> Int32[np.ndarray, "n length+1"]:
        """The rows with these indices, in this order.

        Raises:
          IndexError: an index is negative, or not below `row_count`.
        """
        width = sequence_length + 1
        first = self._first_rows(sequence_length)
        if len(indices) and (indices.min() < 0 or indices.max() >= first[-1]):
            raise IndexError(f"row indices go from 0 to {first[-1] - 1}")
        which = np.searchsorted(first, indices, side="right") - 1
        starts = (indices - first[which]) * width
        rows = np.empty((len(indices), width), np.int32)
        for row, shard, start in zip(rows, which, starts, strict=True):
            row[:] = self.arrays[shard][start : start + width]
        return rows

    def verify(self) -> None:
        """Recomputes every checksum.

        Raises:
          UserError: naming the first shard whose content is not what was written.
        """
        for shard in self.index.shards:
            path = self.folder / shard.file
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard.sha256:
                raise UserError(f"{path}: sha256 is {found}, the index says {shard.sha256}")

    def _first_rows(self, sequence_length: int) -> Int[np.ndarray, "shards+1"]:
        """Index of each shard's first row; last of all, the number of rows."""
        counts = [shard.tokens // (sequence_length + 1) for shard in self.index.shards]
        return np.cumsum([0, *counts])


def _parse(content: bytes, file: Path) -> Index:
    try:
        return pydantic.TypeAdapter(Index).validate_python(json.loads(content))
    except pydantic.ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "unexpected_keyword_argument":
            fields = ShardEntry if key.startswith("shards.") else Index
            known = [field.name for field in dataclasses.fields(fields)]
            message = f"unknown key, {nearest(key.rpartition('.')[2], known)}"
        raise UserError(f"{file}: not an index of token shards ({key}: {message})") from None
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from None


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
    # As a plain array: slicing a memmap object costs several times as much.
    return np.asarray(np.memmap(path, DTYPES[dtype], mode="r"))
