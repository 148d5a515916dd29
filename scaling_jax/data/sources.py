"""Where documents come from, and which split each is in: a source reads them piece by piece.

The documents of a split are those of its pieces, one after the other, in an order that never
changes; pieces can be read apart, by any process. Nothing here imports TensorFlow.
"""

import abc
import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from scaling_jax.data import corpora, files
from scaling_jax.data.corpora import SPLITS
from scaling_jax.data.readers import (
    BROKEN,
    EMPTY,
    READERS,
    Fields,
    Piece,
    Record,
    can_be_split,
    format_of,
)
from scaling_jax.errors import UserError

# A file of lines that are not packed is read in pieces of at most this size.
LARGEST_PIECE_BYTES = 1 << 28
READ_BYTES = 1 << 20
DEFAULT_FIELDS = Fields("text", key="")


class Source(abc.ABC):
    """Documents under a name, in the splits of `splits`. Sources can be pickled.

    Attributes:
      name: of the dataset; folders and seqio tasks are called after it.
      splits: of "train" and "validation", those that it has.
      about: the source in a few words, for the index of what is prepared from it.
      origin: where its documents come from, whatever they hold: sources that have nothing of it in
        common are different ones, even of the same name.
      fatal: the kinds of fault that end the reading; what has another is left out and counted.
    """

    name: str
    splits: tuple[str, ...]
    about: str
    origin: tuple[str, ...]
    fatal: frozenset[str] = BROKEN

    @abc.abstractmethod
    def pieces(self, split: str, count: int | None = None) -> list[Piece]:
        """All of a split in order, in `count` pieces or more if it can be cut so finely."""

    @abc.abstractmethod
    def read(self, split: str, piece: Piece) -> Iterator[Record]:
        """The documents of the piece that belong to the split, and the faults among them."""

    @abc.abstractmethod
    def fingerprint(self, piece: Piece) -> str:
        """Names the content of a piece: equal for equal content, wherever it lies."""

    @abc.abstractmethod
    def rule(self, split: str) -> str:
        """Names all else that `read` depends on."""

    def share(self, split: str) -> float:
        """About which part of what its pieces hold belongs to the split."""
        del split
        return 1.0

    def documents(
        self, split: str, pieces: Iterable[Piece], skipped: Counter[str] | None = None
    ) -> Iterator[Record]:
        """What is no fault in these pieces; faults that are not fatal are counted in `skipped`.

        Raises:
          UserError: at the first fault of a kind in `fatal`, with file, line and what is wrong.
        """
        for piece in pieces:
            for record in self.read(split, piece):
                if not record.fault:
                    yield record
                elif record.fault in self.fatal:
                    setting = "on_empty" if record.fault == EMPTY else "on_error"
                    raise UserError(f"{record.place}; {setting}=skip leaves out what is so")
                elif skipped is not None:
                    skipped[record.fault] += 1


@dataclasses.dataclass(frozen=True)
class EmbeddedSource(Source):
    """A corpus that every machine has."""

    name: str
    splits: tuple[str, ...] = SPLITS

    @property
    def about(self) -> str:
        """The version of the corpus."""
        return corpora.version(self.name)

    @property
    def origin(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The corpus."""
        return (self.name,)

    def pieces(self, split: str, count: int | None = None) -> list[Piece]:
        """Runs of documents, counted in documents."""
        total = sum(1 for _ in corpora.documents(self.name, split))
        ends = [total * number // (count or 1) for number in range((count or 1) + 1)]
        return [Piece(self.name, start, stop) for start, stop in itertools.pairwise(ends)]

    def read(self, split: str, piece: Piece) -> Iterator[Record]:
        """The documents of the piece."""
        chosen = itertools.islice(corpora.documents(self.name, split), piece.start, piece.stop)
        for number, document in enumerate(chosen, start=1):
            content = document.text.encode("utf-8")
            yield Record(document.text, len(content), content, number)

    def fingerprint(self, piece: Piece) -> str:
        """Which documents."""
        return f"{piece.start} {piece.stop}"

    def rule(self, split: str) -> str:
        """The corpus's name and version."""
        return f"{self.name} {self.about}"


@dataclasses.dataclass(frozen=True)
class FileSource(Source):
    """Files, local or remote.

    Attributes:
      folder: what the patterns start from: a path, or a URL of fsspec's such as gs://bucket/folder.
      files: glob patterns of the training files.
      validation_files: those of validation; if there are none, `held_out_share` of the documents in
        `files` are held out for it.
      format: one of `READERS`; "" goes by each file's name.
      fields: the field that holds the text, and the field whose hash decides what is held out.
    """

    name: str
    folder: str
    files: tuple[str, ...]
    validation_files: tuple[str, ...] = ()
    format: str = ""
    fields: Fields = DEFAULT_FIELDS
    held_out_share: float = 0.0
    fatal: frozenset[str] = BROKEN

    @property
    def splits(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The splits there are files for."""
        has_validation = bool(self.validation_files) or self.held_out_share > 0
        has = {"train": bool(self.files), "validation": has_validation}
        return tuple(split for split in SPLITS if has[split])

    @property
    def about(self) -> str:
        """The patterns."""
        return ", ".join((*self.files, *self.validation_files))

    @property
    def origin(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The patterns with the folder that they start from."""
        folder = self.folder if "://" in self.folder else str(Path(self.folder).resolve())
        patterns = (*self.files, *self.validation_files)
        return tuple(f"{folder.rstrip('/')}/{pattern}" for pattern in patterns)

    def pieces(self, split: str, count: int | None = None) -> list[Piece]:
        """Files, by pattern and name; lines that are not packed, in parts of files.

        Raises:
          UserError: no file is found, or a file's format is not known.
        """
        sizes = self._sizes(split)
        largest = LARGEST_PIECE_BYTES
        if count:
            largest = max(min(largest, -(-sum(sizes.values()) // count)), 1)
        return [
            Piece(file, start, min(start + largest, size) if cut else size)
            for file, size in sizes.items()
            for cut in [can_be_split(file, self._format(file))]
            for start in (range(0, size, largest) if cut else (0,))
        ]

    def read(self, split: str, piece: Piece) -> Iterator[Record]:
        """The documents of the piece that are not held out, or those that are."""
        share = self.held_out_share
        for record in READERS[self._format(piece.file)](piece, self.fields):
            if not share or split_of(record.key, share) == split:
                yield record

    def fingerprint(self, piece: Piece) -> str:
        """The sha256 of what is read: from start to stop, of lines to the end of the last one.

        Whether a line begins at start is for the byte before it to say.
        """
        lines = can_be_split(piece.file, self._format(piece.file))
        start = max(piece.start - 1, 0) if lines else piece.start
        digest, left, chunk = hashlib.sha256(), piece.stop - start, b""
        with files.opened(piece.file) as (raw, _):
            raw.seek(start)
            while left and (chunk := raw.read(min(left, READ_BYTES))):
                digest.update(chunk)
                left -= len(chunk)
            while lines and chunk and not chunk.endswith(b"\n"):
                chunk = raw.readline(READ_BYTES)
                digest.update(chunk)
        return f"{self._format(piece.file)} {piece.start} {piece.stop} {digest.hexdigest()}"

    def rule(self, split: str) -> str:
        """The fields, and what is held out."""
        return f"{self.fields.text} {self.fields.key} {self.held_out_share}"

    def share(self, split: str) -> float:
        """What is held out, or the rest."""
        return self.held_out_share if self._is_held_out(split) else 1 - self.held_out_share

    def _is_held_out(self, split: str) -> bool:
        return split == "validation" and not self.validation_files

    def _format(self, file: str) -> str:
        kind = self.format or format_of(file)
        if kind is None:
            raise UserError(
                f"{file}: its name does not say what it is; give format, one of "
                f"{', '.join(READERS)}"
            )
        return kind

    def _sizes(self, split: str) -> dict[str, int]:
        """The split's files by name, and their sizes in bytes."""
        patterns = self.validation_files if split == "validation" else ()
        patterns = patterns or self.files
        found: dict[str, int] = {}
        for pattern in patterns:
            found |= files.found(self.folder, pattern)
        return found


def split_of(key: bytes, share: float) -> str:
    """The split that a document belongs to: a function of its key and nothing else."""
    digest = hashlib.sha256(key).digest()
    return "validation" if int.from_bytes(digest[:8], "big") < share * 2**64 else "train"


def dealt(pieces: list[Piece], count: int) -> list[list[Piece]]:
    """The pieces in `count` runs of about equal size, in order."""
    sizes = np.array([piece.size for piece in pieces], np.float64)
    middles = np.cumsum(sizes) - sizes / 2
    runs = np.minimum(middles * count // max(sizes.sum(), 1.0), count - 1).astype(int)
    return [
        [piece for piece, run in zip(pieces, runs, strict=True) if run == number]
        for number in range(count)
    ]
