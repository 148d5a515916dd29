"""Our vocabularies as seqio wants them, inside tf.data pipelines too. Imports TensorFlow."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from scaling_jax.data.vocabularies import Vocabulary


class SeqioVocabulary(seqio.Vocabulary):
    """Encodes and decodes through `vocabulary`, in Python and, by way of Python, in TensorFlow."""

    def __init__(self, vocabulary: Vocabulary):
        super().__init__()
        self._vocabulary = vocabulary

    @property
    def eos_id(self) -> int:
        """The id after every document."""
        return self._vocabulary.end_of_text

    @property
    def bos_id(self) -> int:
        """The id before every document: the one after the document before."""
        return self.eos_id

    @property
    def pad_id(self) -> int:
        """An id that is not the end of text, which for GPT-NeoX is 0, seqio's own padding."""
        return 1 if self.eos_id == 0 else 0

    @property
    def unk_id(self) -> int | None:
        """There is none."""
        return None

    @property
    def _base_vocab_size(self) -> int:
        return self._vocabulary.size

    def _encode(self, s: str) -> list[int]:
        return self._vocabulary.encode(s)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._vocabulary.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        @tf.autograph.experimental.do_not_convert
        def encode(text: Any) -> np.ndarray:
            # bytes in a tf.data pipeline, an array of no dimension outside
            content = text if isinstance(text, bytes) else text.item()
            return np.asarray(self._encode(content.decode("utf-8")), np.int32)

        ids = tf.numpy_function(encode, [tf.convert_to_tensor(s)], tf.int32, stateful=False)
        ids.set_shape([None])
        return ids

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        @tf.autograph.experimental.do_not_convert
        def decode(ids: np.ndarray) -> bytes:
            return self._decode(ids.tolist()).encode("utf-8")

        return tf.numpy_function(decode, [ids], tf.string, stateful=False)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, SeqioVocabulary)
            and self._vocabulary.sha256 == other._vocabulary.sha256
        )

    def __hash__(self) -> int:
        return hash(self._vocabulary.sha256)
