"""Documents from tensorflow-datasets, through seqio. Imports TensorFlow, but only when it reads."""

import dataclasses
import functools
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from scaling_jax.data import files, zipf_markov
from scaling_jax.data.corpora import SPLITS
from scaling_jax.data.readers import BROKEN, Piece, Record, checked_text
from scaling_jax.data.sources import Source

if TYPE_CHECKING:
    import seqio

DOCUMENTS_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class TfdsSource(Source):
    """A prepared dataset of tensorflow-datasets; the synthetic corpus is prepared when needed.

    Attributes:
      builder: "name:version" or "name/config:version".
      data_dir: where the prepared dataset lies, as tensorflow-datasets wants it: a path or gs://.
      slices: which part of the dataset each split is, in the words of tensorflow-datasets.
      text: the feature that holds the text.
    """

    name: str
    builder: str
    data_dir: str
    slices: tuple[tuple[str, str], ...] = tuple(zip(SPLITS, SPLITS, strict=True))
    text: str = "text"
    fatal: frozenset[str] = BROKEN

    @property
    def splits(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The splits that slices are given for."""
        return tuple(split for split, _ in self.slices)

    @property
    def about(self) -> str:
        """The builder."""
        return self.builder

    @property
    def origin(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The builder, of any version."""
        return (f"tfds:{self.builder.partition(':')[0]}",)

    def pieces(self, split: str, count: int | None = None) -> list[Piece]:
        """The files of the split; they cannot be cut more finely.

        Raises:
          UserError: the dataset is not there.
        """
        shards = self.seqio_source().list_shards(split)
        return [Piece(file, 0, files.size(file)) for file in shards]

    def read(self, split: str, piece: Piece) -> Iterator[Record]:
        """The documents of one of the files."""
        import seqio

        source = self.seqio_source()
        shards = list(source.list_shards(split))
        which = seqio.ShardInfo(shards.index(piece.file), len(shards))
        dataset = source.get_dataset(split, shuffle=False, shard_info=which)
        texts = dataset.map(lambda example: example[self.text]).batch(DOCUMENTS_AT_ONCE)
        number = 0
        for batch in texts.as_numpy_iterator():
            for text in batch:
                number += 1
                yield checked_text(text, 0, f"{piece.file}: example {number}")

    def fingerprint(self, piece: Piece) -> str:
        """The sha256 of the file."""
        with files.opened(piece.file) as (raw, _):
            return hashlib.file_digest(raw, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]

    def rule(self, split: str) -> str:
        """The builder, the slice and the feature."""
        return f"{self.builder} {dict(self.slices)[split]} {self.text}"

    def seqio_source(self) -> "seqio.TfdsDataSource":
        """What seqio reads the dataset with; without shuffling, one file after the other.

        Raises:
          UserError: the dataset is not there.
        """
        tfds_reading = _tfds_reading()
        if self.name == "zipf_markov":
            tfds_reading.build_zipf_markov(self.data_dir)
        return tfds_reading.source(self.builder, self.data_dir, dict(self.slices))


def zipf_markov_source(data_dir: Path) -> TfdsSource:
    """The synthetic corpus, which its first use builds in `data_dir`."""
    return TfdsSource("zipf_markov", f"zipf_markov:{zipf_markov.VERSION}", str(data_dir))


@functools.cache
def _tfds_reading() -> ModuleType:
    """Imports TensorFlow, with messages that no setting stops kept off stderr, and off the GPU."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        from scaling_jax.data import tfds_reading
    finally:
        os.dup2(saved, 2)
        os.close(saved)
    tfds_reading.stay_on_cpu()
    return tfds_reading
