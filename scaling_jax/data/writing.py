"""One shard of tokens: made from its pieces of a source, or found to be there already."""

import dataclasses
import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pydantic

from scaling_jax import atomic, storage
from scaling_jax.data.readers import Piece, Record
from scaling_jax.data.shards import ShardEntry
from scaling_jax.data.sources import Source
from scaling_jax.data.vocabularies import Vocabulary
from scaling_jax.data.workers import Report, Work
from scaling_jax.errors import UserError

# Raised whenever the same source and vocabulary would give other tokens.
FORMAT_VERSION = "3"
BATCH_BYTES = 1 << 19
TYPE_CODES = {"u16": "H", "u32": "I"}


@dataclasses.dataclass(frozen=True)
class Job:
    """A shard to be made: which pieces of which split go into which file.

    `recipe` names all that the tokens depend on, except the documents.
    """

    source: Source
    split: str
    pieces: tuple[Piece, ...]
    path: Path
    dtype: str
    recipe: str

    @property
    def receipt(self) -> Path:
        """Where the shard's entry for the index is kept until there is one."""
        return self.path.with_suffix(".json")

    @property
    def source_bytes(self) -> float:
        """The size of the pieces, or of the part of them that belongs to the split."""
        return sum(piece.size for piece in self.pieces) * self.source.share(self.split)


def find(job: Job, known: ShardEntry | None) -> ShardEntry | None:
    """The entry of a shard that is there, whole, and what the job would make; None otherwise.

    Args:
      job: the shard.
      known: its entry in an index; None looks for a receipt.
    """
    entry = known or read_receipt(job)
    if entry is None or entry.source != _fingerprint(job):
        return None
    if job.source.fatal & entry.skipped.keys():
        return None
    try:
        with job.path.open("rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
    except OSError:
        return None
    return entry if whole else None


def make(job: Job, vocabulary: Vocabulary, report: Report) -> ShardEntry:
    """Encodes the job's documents, each followed by the end of text, and writes the shard.

    Args:
      job: the shard.
      vocabulary: encodes.
      report: hears of every batch of documents; may raise to stop.

    Raises:
      UserError: a document cannot be read, or the shard cannot be written. The file is not there
        then.
    """
    fingerprint = _fingerprint(job)
    _remove_temporaries(job)
    documents, skipped = 0, Counter[str]()
    tokens = text_bytes = ends = 0
    digest = hashlib.sha256()
    try:
        with atomic.replacing(job.path) as temporary, temporary.open("wb") as file:
            for batch, source_bytes in _batches(job, skipped):
                ids = _encode([record.text for record in batch], vocabulary, job.dtype)
                content = ids.tobytes()
                file.write(content)
                digest.update(content)
                size = sum(record.text_bytes for record in batch)
                documents += len(batch)
                tokens += len(ids)
                ends += ids.count(vocabulary.end_of_text)
                text_bytes += size
                report(Work(len(batch), len(ids), size, source_bytes))
        entry = ShardEntry(
            file=job.path.name,
            tokens=tokens,
            sha256=digest.hexdigest(),
            documents=documents,
            text_bytes=text_bytes,
            spelled_ends=ends - documents,
            skipped=dict(sorted(skipped.items())),
            recipe=job.recipe,
            source=fingerprint,
        )
        write_receipt(job.receipt, entry)
    except OSError as error:
        if error.errno not in storage.LASTING:
            raise
        raise UserError(
            f"{job.path}: cannot be written ({error.strerror}); what is finished is kept, and the "
            "same command goes on from there"
        ) from None
    return entry


def write_receipt(path: Path, entry: ShardEntry) -> None:
    """Keeps the entry of a finished shard, atomically."""
    atomic.write_text(path, json.dumps(dataclasses.asdict(entry), indent=1) + "\n")  # pyright: ignore[reportArgumentType]


def grouped(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Documents in batches of BATCH_BYTES of text or a little more."""
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += record.text_bytes
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def read_receipt(job: Job) -> ShardEntry | None:
    """The entry of a shard that is finished, by the job's recipe; None if there is none."""
    try:
        entry = pydantic.TypeAdapter(ShardEntry).validate_json(job.receipt.read_bytes())
    except (OSError, ValueError):
        return None
    return entry if entry.recipe == job.recipe else None


def _fingerprint(job: Job) -> str:
    """Names the content that the shard is made from."""
    parts = [job.source.fingerprint(piece) for piece in job.pieces]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _batches(job: Job, skipped: Counter[str]) -> Iterator[tuple[list[Record], int]]:
    """Documents by the half megabyte, and the bytes of the source that were read for them."""
    share = job.source.share(job.split)
    for piece in job.pieces:
        reported = 0
        for batch in grouped(job.source.documents(job.split, [piece], skipped)):
            # A reader may have looked further ahead than the piece goes.
            read = max(min(batch[-1].read, piece.size), reported)
            yield batch, int((read - reported) * share)
            reported = read
        yield [], int((piece.size - reported) * share)


def _encode(texts: list[str], vocabulary: Vocabulary, dtype: str) -> array:
    """The ids of all texts, each with the end of text after it."""
    ids = array(TYPE_CODES[dtype])
    for row in vocabulary.encode_batch(texts):
        ids.fromlist(row)
        ids.append(vocabulary.end_of_text)
    return ids


def _remove_temporaries(job: Job) -> None:
    """What an earlier attempt at this shard, killed, has left behind."""
    for stale in job.path.parent.glob(f".{job.path.stem}.*.tmp"):
        stale.unlink(missing_ok=True)
