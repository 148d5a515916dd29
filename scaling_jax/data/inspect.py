"""A look into a prepared split: what its rows read like, and figures that give odd data away."""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Int

from scaling_jax.data.shards import Shards
from scaling_jax.data.vocabularies import END_OF_TEXT_PIECE, Vocabulary, vocabulary
from scaling_jax.errors import UserError

SAMPLE_SEED = 0
TOKENS_AT_ONCE = 1 << 24
ROWS_AT_ONCE = 1024
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `inspect` finds. `document_lengths` maps quantiles to tokens, ends of text included."""

    task: str
    split: str
    documents: int
    tokens: int
    text_bytes: int
    bytes_per_token: float
    # How many documents were left out, by what was wrong with them.
    skipped: dict[str, int]
    # Tokens at the beginning of the split that what follows is about.
    tokens_read: int
    document_lengths: dict[float, int]
    # How many documents have at least so many tokens, but less than twice as many.
    length_histogram: dict[int, int]
    rows: int
    # Share of the rows whose tokens are those of an earlier row.
    duplicate_rows: float
    entropy_rate: float | None
    samples: tuple[str, ...]


def inspect(
    folder: str | Path,
    sequence_length: int = 256,
    samples: int = 3,
    limit: int = 10**9,
    verify: bool = False,
) -> Inspection:
    """Reads up to `limit` tokens of a prepared split, and decodes some rows from all of it.

    Ends of text are spelled out in those. `verify` recomputes the checksum of every shard first.

    Raises:
      UserError: the split cannot be opened, a shard is damaged, its vocabulary is not where it was
        or has changed, it holds no end of text, or a number makes no sense.
    """
    _check_least(sequence_length=(sequence_length, 1), samples=(samples, 0), limit=(limit, 1))
    shards = Shards.open(folder)
    if verify:
        shards.verify()
    index = shards.index
    words = vocabulary(index.vocabulary)
    if words.sha256 != index.vocabulary_sha256:
        raise UserError(f"{folder}: '{index.vocabulary}' has changed since the split was prepared")
    read = min(limit, shards.token_count)
    lengths = _document_lengths(shards, read)
    if not len(lengths) and read < shards.token_count:
        raise UserError(
            f"{folder}: the first {read:,} tokens hold no end of a document: raise limit"
        )
    if not len(lengths):
        raise UserError(f"{folder}: holds no document that ends")
    rows = shards.row_count(sequence_length)
    generator = np.random.default_rng(SAMPLE_SEED)
    chosen = np.sort(generator.choice(rows, min(samples, rows), replace=False))
    return Inspection(
        task=index.task,
        split=index.split,
        documents=index.documents,
        tokens=index.tokens,
        text_bytes=index.text_bytes,
        bytes_per_token=index.text_bytes / index.tokens,
        skipped=index.skipped,
        tokens_read=read,
        document_lengths={q: int(np.quantile(lengths, q, method="nearest")) for q in QUANTILES},
        length_histogram=_histogram(lengths),
        rows=rows,
        duplicate_rows=_duplicate_share(shards, read // (sequence_length + 1), sequence_length),
        entropy_rate=index.entropy_rate,
        samples=tuple(_decode(row, words) for row in shards.rows(chosen, sequence_length)),
    )


def _check_least(**numbers: tuple[int, int]) -> None:
    for name, (number, least) in numbers.items():
        if number < least:
            raise UserError(f"{name}={number}: give {least} or more")


def _document_lengths(shards: Shards, limit: int) -> Int[np.ndarray, "documents"]:
    """Tokens of each document among the first `limit` tokens, its end of text included."""
    end = shards.index.end_of_text
    ends = [np.array([-1])]
    before = 0
    for number in range(len(shards.arrays)):
        if before >= limit:
            break
        array = shards.content(number)
        for start in range(0, min(len(array), limit - before), TOKENS_AT_ONCE):
            part = array[start : min(start + TOKENS_AT_ONCE, limit - before)]
            ends.append(np.flatnonzero(part == end) + before + start)
        before += len(array)
    return np.diff(np.concatenate(ends))


def _histogram(lengths: Int[np.ndarray, "documents"]) -> dict[int, int]:
    powers = np.bincount(np.log2(lengths).astype(int))
    shortest = int(np.flatnonzero(powers)[0])
    return {2**power: int(powers[power]) for power in range(shortest, len(powers))}


def _duplicate_share(shards: Shards, rows: int, sequence_length: int) -> float:
    """By a hash of each row: equal rows have equal hashes, others practically never."""
    seen: set[int] = set()
    for start in range(0, rows, ROWS_AT_ONCE):
        some = shards.rows(np.arange(start, min(start + ROWS_AT_ONCE, rows)), sequence_length)
        seen.update(hash(row.tobytes()) for row in some)
    return 1 - len(seen) / rows if rows else 0.0


def _decode(row: Int[np.ndarray, "length"], words: Vocabulary) -> str:
    pieces = np.split(row, np.flatnonzero(row == words.end_of_text) + 1)
    return END_OF_TEXT_PIECE.join(words.decode_batch(pieces))
