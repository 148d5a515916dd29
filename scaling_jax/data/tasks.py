"""seqio tasks: source -> text -> token ids, the end-of-text id last. Imports TensorFlow.

`zipf_markov` is read from a tensorflow-datasets builder, the other embedded corpora and the user's
own texts from function sources.
"""

import contextlib
import io
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from scaling_jax.data import corpora, texts, zipf_markov
from scaling_jax.data.corpora import SPLITS, Document
from scaling_jax.data.vocabularies import Vocabulary

DOCUMENTS_AT_ONCE = 256


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


def register(task: str, vocabulary: Vocabulary, data_dir: Path) -> seqio.Task:
    """Registers and returns the seqio task of an embedded corpus or of a path to texts.

    Its examples hold `targets`, the token ids with the end of text, and `text_bytes`, the length of
    the text in UTF-8.

    Args:
      task: name of a corpus, or path.
      vocabulary: becomes part of the registered name.
      data_dir: where tensorflow-datasets keeps what it builds.
    """
    name = re.sub(r"\W", "_", f"{Path(task).name}_{vocabulary.sha256[:12]}")
    if name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(name)
    targets = seqio.Feature(vocabulary=vocabulary.as_seqio(), add_eos=True, dtype=tf.int32)
    return seqio.TaskRegistry.add(
        name,
        source=_source(task, data_dir),  # pyright: ignore[reportArgumentType]
        preprocessors=[
            _text_to_targets,
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos,
        ],
        output_features={"targets": targets},
    )


def _source(task: str, data_dir: Path) -> seqio.DataSource:
    if task == "zipf_markov":
        return _zipf_markov_source(data_dir)
    if task in corpora.CORPORA:
        return _function_source(lambda split: corpora.documents(task, split))
    return _function_source(lambda split: texts.documents(Path(task), split))


def _zipf_markov_source(data_dir: Path) -> seqio.DataSource:
    """Builds the dataset if it is not in `data_dir` yet."""
    tfds.disable_progress_bar()
    builder = ZipfMarkov(data_dir=str(data_dir))
    with contextlib.redirect_stdout(io.StringIO()):  # it announces a download that is none
        builder.download_and_prepare()
    return seqio.TfdsDataSource(
        tfds_name=f"{builder.name}:{zipf_markov.VERSION}",
        tfds_data_dir=str(data_dir),
        splits=SPLITS,
    )


def _function_source(documents: Callable[[str], Iterator[Document]]) -> seqio.DataSource:
    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed  # the order is that of the documents
        return tf.data.Dataset.from_generator(
            lambda: _groups(documents(split)),
            output_signature=tf.TensorSpec((None,), tf.string),  # pyright: ignore[reportArgumentType, reportCallIssue]
        ).unbatch()

    return seqio.FunctionDataSource(dataset, splits=SPLITS)


def _groups(documents: Iterator[Document]) -> Iterator[list[str]]:
    """Texts by the hundred: handing them to TensorFlow one by one would cost more than the rest."""
    while group := [document.text for document in itertools.islice(documents, DOCUMENTS_AT_ONCE)]:
        yield group


@tf.autograph.experimental.do_not_convert
def _text_to_targets(dataset: tf.data.Dataset) -> tf.data.Dataset:
    def keep(example: Any) -> dict[str, tf.Tensor]:
        text = example["text"] if isinstance(example, dict) else example
        return {"targets": text, "text_bytes": tf.strings.length(text)}

    return dataset.map(keep)
