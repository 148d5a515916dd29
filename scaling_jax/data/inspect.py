"""A look into a prepared split: what its rows read like, and figures that give odd data away."""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Int

from scaling_jax.data.shards import Shards
from scaling_jax.data.vocabularies import END_OF_TEXT_PIECE, Vocabulary, vocabulary
from scaling_jax.errors import UserError

SAMPLE_SEED = 0
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
    document_lengths: dict[float, int]
    rows: int
    # Share of the rows whose tokens are those of an earlier row.
    duplicate_rows: float
    entropy_rate: float | None
    samples: tuple[str, ...]


def inspect(folder: str | Path, sequence_length: int = 256, samples: int = 3) -> Inspection:
    """Reads a prepared split through, and decodes some of its rows, ends of text spelled out.

    Raises:
      UserError: the split cannot be opened, its vocabulary is not where it was or has changed, or
        it holds no end of text.
    """
    shards = Shards.open(folder)
    index = shards.index
    words = vocabulary(index.vocabulary)
    if words.sha256 != index.vocabulary_sha256:
        raise UserError(f"{folder}: '{index.vocabulary}' has changed since the split was prepared")
    lengths = _document_lengths(shards)
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
        document_lengths={q: int(np.quantile(lengths, q, method="nearest")) for q in QUANTILES},
        rows=rows,
        duplicate_rows=_duplicate_share(shards, sequence_length),
        entropy_rate=index.entropy_rate,
        samples=tuple(_decode(row, words) for row in shards.rows(chosen, sequence_length)),
    )


def _document_lengths(shards: Shards) -> Int[np.ndarray, "documents"]:
    """Tokens of each document, its end of text included; documents do not run on across shards."""
    end = shards.index.end_of_text
    ends = [np.flatnonzero(array == end) for array in shards.arrays]
    return np.concatenate([np.diff(places, prepend=-1) for places in ends])


def _duplicate_share(shards: Shards, sequence_length: int) -> float:
    """By a hash of each row: equal rows have equal hashes, others practically never."""
    width = sequence_length + 1
    seen: set[int] = set()
    rows = 0
    for array in shards.arrays:
        for start in range(0, len(array) - width + 1, width):
            seen.add(hash(array[start : start + width].tobytes()))
            rows += 1
    return 1 - len(seen) / rows if rows else 0.0


def _decode(row: Int[np.ndarray, "length"], words: Vocabulary) -> str:
    pieces = np.split(row, np.flatnonzero(row == words.end_of_text) + 1)
    return END_OF_TEXT_PIECE.join(words.decode_batch(pieces))
