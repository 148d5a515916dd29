"""seqio tasks and mixtures of sources: text -> token ids, the end-of-text id last.

Imports TensorFlow. `data prepare` writes what these tasks stream; they are for small runs on the
fly, and for pipelines of your own.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from scaling_jax.data.readers import Record
from scaling_jax.data.sources import Source
from scaling_jax.data.tfds_source import TfdsSource
from scaling_jax.data.vocabularies import Vocabulary

DOCUMENTS_AT_ONCE = 256


class PieceSource(seqio.DataSource):
    """A source as seqio sees one: its shards are the pieces of the source, in order."""

    def __init__(self, source: Source):
        super().__init__(splits=source.splits)
        self._source = source

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """No: by pieces only."""
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        """The pieces by name."""
        pieces = self._source.pieces(split)
        return [f"{piece.file}:{piece.start}-{piece.stop}" for piece in pieces]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **_: Any,
    ) -> tf.data.Dataset:
        """Examples with `text`. Pieces are shuffled if asked for; those of a shard are every n-th.

        Raises:
          UserError: while it is read, at a fault that is fatal.
        """
        pieces = self._source.pieces(split)
        if shuffle:
            order = np.random.default_rng(seed).permutation(len(pieces))
            pieces = [pieces[number] for number in order]
        if shard_info is not None:
            pieces = pieces[shard_info.index :: shard_info.num_shards]
        groups = tf.data.Dataset.from_generator(
            lambda: _groups(self._source.documents(split, pieces)),
            output_signature=tf.TensorSpec((None,), tf.string),  # pyright: ignore[reportArgumentType, reportCallIssue]
        )
        return groups.unbatch().map(_named_text)


def register(source: Source, vocabulary: Vocabulary, in_rows: bool = False) -> seqio.Task:
    """Registers and returns the seqio task of a source, called <name>_<start of a hash>.

    Its examples hold `targets`: the ids of a document, with its end of text. With `in_rows` they
    are the rows that training reads instead: the documents' ids one after the other, cut into rows
    of as many as the `targets` of seqio's sequence_length. Use seqio.PassThroughFeatureConverter:
    seqio's others take id 0, which is GPT-NeoX's end of text, for padding.

    Args:
      source: of the documents.
      vocabulary: encodes them.
      in_rows: whether examples are rows.
    """
    name = _identifier(source.name, vocabulary)
    if name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(name)
    targets = seqio.Feature(vocabulary=vocabulary.as_seqio(), add_eos=True, dtype=tf.int32)
    field = source.text if isinstance(source, TfdsSource) else "text"
    steps = [_text_to_targets(field), seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
    return seqio.TaskRegistry.add(
        name,
        source=_seqio_source(source),  # pyright: ignore[reportArgumentType]
        preprocessors=[*steps, cut_into_rows] if in_rows else steps,
        output_features={"targets": targets},
    )


def register_mixture(
    name: str, sources: Iterable[Source], rates: Mapping[str, float], vocabulary: Vocabulary
) -> seqio.Mixture:
    """Registers the tasks of the parts, in rows, and their mixture at these rates."""
    parts = {source.name: register(source, vocabulary, in_rows=True) for source in sources}
    name = _identifier(name, vocabulary)
    if name in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.remove(name)
    return seqio.MixtureRegistry.add(
        name, [(task.name, float(rates[part])) for part, task in parts.items()]
    )


def cut_into_rows(dataset: tf.data.Dataset, sequence_length: Mapping[str, int]) -> tf.data.Dataset:
    """A seqio preprocessor: all `targets` as one stream, cut into rows; the last part row is lost.

    As open_lm's data were made (Gadre et al. 2024): disjoint rows of sequence length + 1.
    """
    ids = dataset.map(_only_targets).unbatch()
    return ids.batch(sequence_length["targets"], drop_remainder=True).map(_named_targets)


def _seqio_source(source: Source) -> seqio.DataSource:
    return source.seqio_source() if isinstance(source, TfdsSource) else PieceSource(source)


def _identifier(name: str, vocabulary: Vocabulary) -> str:
    return re.sub(r"\W", "_", f"{name}_{vocabulary.sha256[:12]}")


def _groups(documents: Iterator[Record]) -> Iterator[list[str]]:
    """Texts by the hundred: handing them to TensorFlow one by one would cost more than the rest."""
    group: list[str] = []
    for document in documents:
        group.append(document.text)
        if len(group) == DOCUMENTS_AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def _text_to_targets(field: str) -> Any:
    @tf.autograph.experimental.do_not_convert
    def rename(dataset: tf.data.Dataset) -> tf.data.Dataset:
        texts = dataset.map(lambda example: {"targets": example[field]})
        return texts.filter(lambda example: tf.strings.length(example["targets"]) > 0)

    return rename


@tf.autograph.experimental.do_not_convert
def _named_text(text: tf.Tensor) -> dict[str, tf.Tensor]:
    return {"text": text}


@tf.autograph.experimental.do_not_convert
def _only_targets(example: Mapping[str, tf.Tensor]) -> tf.Tensor:
    return example["targets"]


@tf.autograph.experimental.do_not_convert
def _named_targets(ids: tf.Tensor) -> dict[str, tf.Tensor]:
    return {"targets": ids}
