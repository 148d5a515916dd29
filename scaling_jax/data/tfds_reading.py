"""How seqio reads tensorflow-datasets here: in order; and the synthetic corpus as a builder.

Imports TensorFlow.
"""

import contextlib
import functools
import io
import itertools
from collections.abc import Iterator
from typing import Any

import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from scaling_jax.data import corpora, zipf_markov
from scaling_jax.data.corpora import SPLITS
from scaling_jax.errors import UserError


class InOrder(seqio.TfdsDataSource):
    """A prepared dataset whose files are read one after the other, not sixteen at a time."""

    def __init__(self, builder: str, data_dir: str, slices: dict[str, str]):
        super().__init__(builder, data_dir, slices, read_only=True)
        self._arguments = builder, data_dir, slices

    @functools.cached_property
    def tfds_dataset(self) -> seqio.utils.LazyTfdsLoader:
        """The loader."""
        builder, data_dir, slices = self._arguments
        return _InOrderLoader(builder, data_dir=data_dir, split_map=slices, read_only=True)


class _InOrderLoader(seqio.utils.LazyTfdsLoader):
    @property
    def read_config(self) -> tfds.ReadConfig:
        return tfds.ReadConfig(interleave_cycle_length=1)


class ZipfMarkov(tfds.core.GeneratorBasedBuilder):
    """The synthetic corpus as a tensorflow-datasets builder."""

    VERSION = tfds.core.Version(zipf_markov.VERSION)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {"id": tfds.features.Text(), "text": tfds.features.Text()}
        )
        return tfds.core.DatasetInfo(
            builder=self,
            features=features,
            description="An order-2 Markov chain with Zipf-distributed symbols and known entropy.",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, str]]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        for number, document in enumerate(corpora.documents("zipf_markov", split)):
            yield number, {"id": document.identifier, "text": document.text}


def stay_on_cpu() -> None:
    """Keeps TensorFlow off accelerators, which are JAX's."""
    tf.config.set_visible_devices([], "GPU")


def build_zipf_markov(data_dir: str) -> None:
    """Builds the synthetic corpus in `data_dir`, unless it is there."""
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # it announces a download that is none
        ZipfMarkov(data_dir=data_dir).download_and_prepare()


def source(builder: str, data_dir: str, slices: dict[str, str]) -> InOrder:
    """The seqio source of a prepared dataset.

    Raises:
      UserError: there is no such dataset in `data_dir`, or it lies there in a format that seqio
        does not read, or a slice is not one of it.
    """
    try:
        found = tfds.builder(builder, data_dir=data_dir)
        prepared = found.is_prepared()
    except (tfds.core.DatasetNotFoundError, OSError, ValueError) as error:
        raise UserError(f"tfds:{builder}: not in {data_dir} ({_first_line(error)})") from None
    if not prepared:
        raise UserError(f"tfds:{builder}: {data_dir} holds no prepared copy of it")
    if found.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"tfds:{builder}: seqio does not read the ArrayRecord files that it is made of; "
            f"name them as files, with format array_record: {found.data_dir}"
        )
    for piece in slices.values():
        try:
            found.info.splits[piece]
        except (KeyError, ValueError) as error:
            raise UserError(f"tfds:{builder}: no split {piece} ({_first_line(error)})") from None
    return InOrder(builder, data_dir, slices)


def _first_line(error: Exception) -> str:
    return next(itertools.chain(str(error).strip("'\"").splitlines(), [""]))
