"""Documents from files of many formats, one at a time, and what is wrong with those that are none.

    text           a .txt file is one document
    jsonl          each line a JSON object with a field that holds the text
    parquet        each row, with a column that holds the text
    array_record   each record a tf.train.Example, with a feature that holds the text

Text and JSON may be compressed (.gz, .zst); files may lie wherever fsspec reaches. A fault, such as
a corrupt line, is reported in its place and the next document follows. Nothing here imports
TensorFlow.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

from scaling_jax.data.files import CORRUPT, opened
from scaling_jax.errors import UserError, nearest

ROWS_AT_ONCE = 256

# The kinds of fault, and how a line or row that has one is described.
NOT_UTF8 = "not UTF-8"
NOT_JSON = "not JSON"
NO_TEXT = "no text"
EMPTY = "empty"
CUT_SHORT = "cut short"
BROKEN = frozenset({NOT_UTF8, NOT_JSON, NO_TEXT, CUT_SHORT})


class Piece(NamedTuple):
    """A part of a source that is read in one go: `start` to `stop` in bytes of a file."""

    file: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Bytes, as they lie in the file."""
        return self.stop - self.start


class Fields(NamedTuple):
    """Which field holds the text, and which one draws the split ("": the text itself)."""

    text: str
    key: str


class Record(NamedTuple):
    """A document, or (where `fault` is not empty) a place that should have held one.

    Attributes:
      text: of the document; "" where there is a fault.
      text_bytes: its length in UTF-8.
      key: what decides on the split: a function of the content.
      read: bytes of the piece that have been read so far.
      fault: one of the kinds of fault.
      place: file, line and fault in words.
    """

    text: str
    text_bytes: int
    key: bytes
    read: int
    fault: str = ""
    place: str = ""


Reader = Callable[[Piece, Fields], Iterator[Record]]


def format_of(file: str) -> str | None:
    """The format that a file's name stands for; None if it stands for none."""
    file = file.lower()
    name = re.sub(r"\.(gz|zst)$", "", file)
    if name.endswith(".txt"):
        return "text"
    if name.endswith((".jsonl", ".json")):
        return "jsonl"
    if file.endswith(".parquet"):
        return "parquet"
    # tensorflow-datasets writes name.array_record-00000-of-00008
    return "array_record" if re.search(r"\.array_?record(-\d+-of-\d+)?$", file) else None


def can_be_split(file: str, kind: str) -> bool:
    """Whether a file can be read from the middle: lines that are not compressed."""
    return kind == "jsonl" and not file.lower().endswith((".gz", ".zst"))


def read_text(piece: Piece, fields: Fields) -> Iterator[Record]:
    """The one document of a text file, to the byte: no newline is translated."""
    del fields
    with opened(piece.file) as (_, content):
        try:
            raw = content.read()
        except CORRUPT as error:
            yield _fault(piece.file.encode(), piece.size, CUT_SHORT, f"{piece.file}: {error}")
            return
    yield _checked(raw, None, piece.size, lambda what: f"{piece.file}: {what}")


def read_jsonl(piece: Piece, fields: Fields) -> Iterator[Record]:
    """The documents on the lines that begin in the piece; blank lines hold none."""
    with opened(piece.file) as (raw, lines):
        position = _to_first_line(lines, piece.start)
        limit = piece.stop if lines is raw else float("inf")
        number = 0
        while position < limit:
            try:
                line = lines.readline()
            except CORRUPT as error:
                place = f"{piece.file}: after line {number}: {error}"
                yield _fault(piece.file.encode(), piece.size, CUT_SHORT, place)
                return
            if not line:
                return
            position += len(line)
            number += 1
            if line.strip():
                yield _line_record(line, fields, raw.tell() - piece.start, piece, number)


def read_parquet(piece: Piece, fields: Fields) -> Iterator[Record]:
    """The documents of the rows of a Parquet file, row group by row group.

    Raises:
      UserError: a column is missing.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with opened(piece.file) as (_, content):
        try:
            table = pq.ParquetFile(content)
            columns = [name for name in dict.fromkeys(fields) if name]
            for name in columns:
                if name not in table.schema_arrow.names:
                    hint = nearest(name, table.schema_arrow.names)
                    raise UserError(f"{piece.file}: there is no column '{name}' ({hint})")
            number, rows = 0, max(table.metadata.num_rows, 1)
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=columns):
                values = [batch.column(name).cast(pa.binary()).to_pylist() for name in columns]
                for text, key in zip(values[0], values[-1], strict=True):
                    number += 1
                    yield _checked(
                        text,
                        key if fields.key else None,
                        piece.size * number // rows,
                        lambda what, number=number: f"{piece.file}: row {number} {what}",
                    )
        except (pa.ArrowException, OSError) as error:
            place = f"{piece.file}: not a whole Parquet file ({error})"
            yield _fault(piece.file.encode(), piece.size, CUT_SHORT, place)


def read_array_record(piece: Piece, fields: Fields) -> Iterator[Record]:
    """The documents of the records of a local ArrayRecord file, in their order."""
    from array_record.python.array_record_module import ArrayRecordReader
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        reader = ArrayRecordReader(piece.file)
        if not reader.ok():  # it would say that there are no records
            reader.read_all()
        count = reader.num_records()
        for start in range(0, count, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, count)
            for number, record in enumerate(reader.read(start, stop), start=start + 1):
                features = tf_example_pb2.Example.FromString(record).features.feature  # pyright: ignore[reportAttributeAccessIssue]
                text, key = (
                    next(iter(features[name].bytes_list.value), None) if name in features else None
                    for name in fields
                )
                place = f"{piece.file}: record {number}"
                yield _checked(
                    text,
                    key if fields.key else None,
                    piece.size * number // count,
                    lambda what, place=place: f"{place} {what}",
                )
    except (RuntimeError, ValueError, OSError) as error:
        place = f"{piece.file}: not a whole ArrayRecord file ({error})"
        yield _fault(piece.file.encode(), piece.size, CUT_SHORT, place)


READERS: dict[str, Reader] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "array_record": read_array_record,
}


def checked_text(text: bytes, read: int, place: str) -> Record:
    """The record of a text that comes without a key."""
    return _checked(text, None, read, lambda what: f"{place} {what}")


def _to_first_line(lines: IO[bytes], start: int) -> int:
    """Moves on to the first line that begins at `start` or later; returns where that is."""
    if start == 0:
        return 0
    lines.seek(start - 1)
    return start - 1 + len(lines.readline())


def _line_record(line: bytes, fields: Fields, read: int, piece: Piece, number: int) -> Record:
    def place(what: str) -> str:
        return f"{piece.file}: line {_lines_before(piece) + number} {what}"

    try:
        content = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 ({error.reason} {error.object[error.start]:#x})"
        return _fault(line, read, NOT_UTF8, place(what))
    except (ValueError, RecursionError):
        return _fault(line, read, NOT_JSON, place("is not a JSON object"))
    try:
        text = content[fields.text].encode("utf-8")
        key = str(content[fields.key]).encode("utf-8") if fields.key else None
    except (KeyError, TypeError, AttributeError, ValueError):
        # ValueError: JSON can spell half a surrogate pair, which is no text
        wanted = " and a ".join(f'"{name}"' for name in fields if name)
        what = f"is not a JSON object with a {wanted}"
        return _fault(line, read, NO_TEXT, place(what))
    return _checked(text, key, read, place)


def _checked(
    text: bytes | None, key: bytes | None, read: int, place: Callable[[str], str]
) -> Record:
    if text is None:
        return _fault(key or b"", read, NO_TEXT, place("has no text"))
    if not text:
        return _fault(key or b"", read, EMPTY, place("has an empty text"))
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 ({error.reason} {error.object[error.start]:#x})"
        return _fault(text, read, NOT_UTF8, place(what))
    return Record(decoded, len(text), text if key is None else key, read)


def _fault(key: bytes, read: int, kind: str, place: str) -> Record:
    return Record("", 0, key, read, kind, place)


@functools.lru_cache(maxsize=1)
def _lines_before(piece: Piece) -> int:
    """How many lines of the file begin before the piece: only asked for when one is at fault."""
    if piece.start == 0:
        return 0
    lines, left = 1, piece.start - 1
    with opened(piece.file) as (_, content):
        while chunk := content.read(min(left, 1 << 20)):
            lines += chunk.count(b"\n")
            left -= len(chunk)
    return lines
