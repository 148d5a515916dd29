"""From a seqio task to token shards on disk; a program of its own, since it imports TensorFlow.

    python -m scaling_jax.data.prepare --task python_code --out data --vocabulary bytes

writes data/python_code/train and data/python_code/validation (`scaling_jax.data.shards`). A split
that is there already, whole and from the same source, is kept.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from scaling_jax import atomic
from scaling_jax.data import corpora, texts, zipf_markov
from scaling_jax.data.corpora import SPLITS
from scaling_jax.data.shards import DTYPES, INDEX_FILE, Index, ShardEntry, Shards
from scaling_jax.data.vocabularies import ByteVocabulary, Vocabulary
from scaling_jax.data.vocabularies import vocabulary as find_vocabulary
from scaling_jax.errors import UserError

# Raised whenever the same source and vocabulary would give other tokens.
FORMAT_VERSION = "1"
PACKAGES = ("seqio", "tensorflow-datasets", "tokenizers", "sentencepiece")
DOCUMENTS_AT_ONCE = 64


class Progress(NamedTuple):
    """How far one split has come; `index` is there once it is finished."""

    task: str
    split: str
    documents: int
    tokens: int
    index: Index | None


class Tokens(NamedTuple):
    """Token ids of one document, the end of text last, and the size of its text."""

    ids: np.ndarray
    text_bytes: int


def prepare(
    task: str,
    *,
    out: Path,
    vocabulary: str = "bytes",
    shards: int = 1,
    data_dir: Path | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Index]:
    """Prepares both splits of an embedded corpus or of the user's own texts.

    Args:
      task: name of an embedded corpus, or path of a .txt or .jsonl file or of a folder of those.
      out: the splits are written to `out`/<name>/train and `out`/<name>/validation, where the name
        of a path is its last part.
      vocabulary: as `data.vocabularies.vocabulary` takes it.
      shards: how many files a split is spread over, document by document in turn.
      data_dir: where tensorflow-datasets keeps what it builds; by default in `out`.
      progress: hears of every document.

    Returns:
      The index of each split.

    Raises:
      UserError: no such source or vocabulary, text that cannot be read, or an empty split.
    """
    if shards < 1:
        raise UserError(f"shards={shards}: give 1 or more")
    encoder = find_vocabulary(vocabulary)
    name, source = _identify(task)
    data_dir = data_dir or out / "tensorflow_datasets"
    indices: dict[str, Index] = {}
    for split in SPLITS:
        folder = out / name / split
        draft = _draft(name, split, source, vocabulary, encoder)
        index = _finished(folder, draft, shards)
        if index is None:
            documents = _reported(_tokenized(task, split, encoder, data_dir), name, split, progress)
            index = _write(documents, folder, draft, shards)
        progress(Progress(name, split, index.documents, index.tokens, index))
        indices[split] = index
    return indices


def prepare_apart(tasks: Sequence[str], *, out: Path, vocabulary: str = "bytes") -> None:
    """`prepare` for each of `tasks` in a process of its own, so that TensorFlow stays out of this.

    Raises:
      UserError: as `prepare`; the child has said why.
    """
    command = [sys.executable, "-m", "scaling_jax.data.prepare", "--out", str(out)]
    command += ["--vocabulary", vocabulary]
    command += [part for task in tasks for part in ("--task", task)]
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"the data could not be prepared in {out}")


def _identify(task: str) -> tuple[str, str]:
    """The name of a source and of its content; a user's texts are read through and checked."""
    if task in corpora.CORPORA:
        return task, corpora.version(task)
    path = Path(task)
    return texts.dataset_name(path), texts.version(path)


def _draft(name: str, split: str, source: str, vocabulary: str, encoder: Vocabulary) -> Index:
    """The index of a split before anything is written: all that its content depends on."""
    known_entropy = name == "zipf_markov" and isinstance(encoder, ByteVocabulary)
    return Index(
        task=name,
        split=split,
        source=source,
        vocabulary=vocabulary,
        vocabulary_size=encoder.size,
        vocabulary_sha256=encoder.sha256,
        end_of_text=encoder.end_of_text,
        dtype="u16" if encoder.size <= 1 << 16 else "u32",
        documents=0,
        text_bytes=0,
        shards=(),
        entropy_rate=zipf_markov.entropy_rate() if known_entropy else None,
        versions={"format": FORMAT_VERSION}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
    )


def _finished(folder: Path, draft: Index, shards: int) -> Index | None:
    """The index of what is in `folder`, if that is whole and what the draft would become."""
    try:
        found = Shards.open(folder)
        found.verify()
    except UserError:
        return None
    index = found.index
    expected = dataclasses.replace(
        draft,
        vocabulary=index.vocabulary,  # the same content may have moved
        documents=index.documents,
        text_bytes=index.text_bytes,
        shards=index.shards,
    )
    return index if index == expected and len(index.shards) == shards else None


def _tokenized(task: str, split: str, encoder: Vocabulary, data_dir: Path) -> Iterator[Tokens]:
    """What the seqio task streams, document by document."""
    with _quiet_start_up():
        from scaling_jax.data import tasks

        tasks.stay_on_cpu()
    dataset = tasks.register(task, encoder, data_dir).get_dataset(split=split, shuffle=False)
    for batch in dataset.ragged_batch(DOCUMENTS_AT_ONCE):
        ids, sizes = batch["targets"], batch["text_bytes"].numpy()
        rows = np.split(ids.flat_values.numpy(), ids.row_splits.numpy()[1:-1])
        yield from map(Tokens, rows, sizes.tolist())


def _reported(
    documents: Iterable[Tokens], name: str, split: str, progress: Callable[[Progress], None]
) -> Iterator[Tokens]:
    tokens = 0
    for count, document in enumerate(documents, start=1):
        yield document
        tokens += len(document.ids)
        progress(Progress(name, split, count, tokens, None))


def _write(documents: Iterable[Tokens], folder: Path, draft: Index, shards: int) -> Index:
    """Writes the shards and, last of all, the index that makes them valid."""
    (folder / INDEX_FILE).unlink(missing_ok=True)
    for stale in folder.glob("tokens-*-of-*"):
        stale.unlink()
    names = [f"tokens-{number:05d}-of-{shards:05d}.{draft.dtype}" for number in range(shards)]
    count = text_bytes = 0
    with contextlib.ExitStack() as stack:
        writers = []
        for name in names:
            file = stack.enter_context(atomic.replacing(folder / name))
            writers.append(_ShardWriter(stack.enter_context(file.open("wb")), DTYPES[draft.dtype]))
        for document in documents:
            writers[count % shards].append(document.ids)
            count += 1
            text_bytes += document.text_bytes
    entries = tuple(
        ShardEntry(name, writer.tokens, writer.digest.hexdigest())
        for name, writer in zip(names, writers, strict=True)
    )
    index = dataclasses.replace(draft, documents=count, text_bytes=text_bytes, shards=entries)
    content = json.dumps(dataclasses.asdict(index), indent=1) + "\n"  # pyright: ignore[reportArgumentType]
    atomic.write_text(folder / INDEX_FILE, content)
    return index


class _ShardWriter:
    """Appends ids to a file and keeps count and checksum of what went into it."""

    def __init__(self, file: BinaryIO, dtype: np.dtype):
        self._file = file
        self._dtype = dtype
        self.tokens = 0
        self.digest = hashlib.sha256()

    def append(self, ids: np.ndarray) -> None:
        content = ids.astype(self._dtype).tobytes()
        self._file.write(content)
        self.digest.update(content)
        self.tokens += len(ids)


@contextlib.contextmanager
def _quiet_start_up() -> Iterator[None]:
    """Keeps TensorFlow off the GPU, and off stderr the messages that no setting stops."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def print_finished(progress: Progress) -> None:
    """Prints a line when a split is finished."""
    if progress.index is not None:
        print(
            f"{progress.task} {progress.split}: {progress.documents:,} documents, "
            f"{progress.index.text_bytes:,} bytes, {progress.tokens:,} tokens",
            flush=True,
        )


def main() -> None:
    """Command line of this module; prints one line for each finished split."""
    parser = argparse.ArgumentParser(
        prog="python -m scaling_jax.data.prepare",
        description="Prepare token shards from embedded corpora or your own texts.",
    )
    parser.add_argument(
        "--task", action="append", required=True, help="corpus or path; may be repeated"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--vocabulary", default="bytes", help="bytes, FILE.model or FILE.json")
    parser.add_argument("--shards", type=int, default=1, help="files a split is spread over")
    parser.add_argument("--data-dir", type=Path, help="where tensorflow-datasets builds")
    options = parser.parse_args()
    try:
        for task in options.task:
            prepare(
                task,
                out=options.out,
                vocabulary=options.vocabulary,
                shards=options.shards,
                data_dir=options.data_dir,
                progress=print_finished,
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
