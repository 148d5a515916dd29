"""From a seqio task to token shards on disk, over processes and machines.

    scaling-jax data prepare c4 folder=gs://bucket/c4 --vocabulary 20B_tokenizer.json --workers 96

writes OUT/c4/train and OUT/c4/validation (`scaling_jax.data.shards`). Each shard takes a run of the
source's pieces, so that all shards one after the other are what the task streams: the same for any
number of workers and machines. A shard appears when it is whole, with a receipt beside it; when all
are there, the receipts become the index that makes the split valid. What is there already is kept
if its content, the source's and the vocabulary's are what they were.

The documents are read as the task's source reads them and encoded here, many at a time, without a
tf.data pipeline for each; tests hold the result to what the task streams.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from scaling_jax import sealed
from scaling_jax.data import catalog, workers, writing, zipf_markov
from scaling_jax.data.shards import INDEX_FILE, Index, ShardEntry, read_index, write_index
from scaling_jax.data.sources import Source, dealt
from scaling_jax.data.vocabularies import ByteVocabulary, Vocabulary
from scaling_jax.data.vocabularies import vocabulary as find_vocabulary
from scaling_jax.data.workers import Report
from scaling_jax.data.writing import FORMAT_VERSION, Job
from scaling_jax.errors import UserError

PACKAGES = ("seqio", "tensorflow-datasets", "tokenizers", "sentencepiece")
# Where the number of shards is not given: about so much of the source goes into one.
SHARD_SOURCE_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class Plan:
    """A split to be prepared: its folder, the index it will have but for its shards, the jobs.

    `origin` is that of its source.
    """

    folder: Path
    draft: Index
    jobs: tuple[Job, ...]
    origin: tuple[str, ...]

    @property
    def index_file(self) -> Path:
        """The file that makes the split valid."""
        return self.folder / INDEX_FILE

    @property
    def origin_file(self) -> Path:
        """The file that says where the source was."""
        return self.folder / "origin.json"


class Todo(NamedTuple):
    """What a preparation is about to do: shards to make, shards that are kept, source bytes."""

    shards: int
    kept: int
    source_bytes: float


def prepare(
    task: str,
    *,
    out: Path,
    vocabulary: str = "bytes",
    overrides: Sequence[str] = (),
    shards: int | None = None,
    workers: int = 1,
    machine: tuple[int, int] = (0, 1),
    data_dir: Path | None = None,
    begin: Callable[[Todo], None] = lambda _: None,
    report: Report = lambda _: None,
) -> list[Index]:
    """Prepares all splits of a dataset, or of all parts of a mixture.

    Args:
      task: as `data.catalog.find` takes it.
      out: the splits are written to `out`/<name of the dataset>/<split>.
      vocabulary: as `data.vocabularies.vocabulary` takes it.
      overrides: `key=value` settings of the source's config.
      shards: how many files a split is spread over; by default one for every SHARD_SOURCE_BYTES of
        the source, if it has so many pieces. The tokens in them are the same for any number.
      workers: how many processes read and encode.
      machine: this machine's number, from 0, and how many share the work and the folder.
      data_dir: where tensorflow-datasets keeps what it builds; by default in `out`.
      begin: hears what is to be done.
      report: hears of the work that has been done.

    Returns:
      The index of each split that is complete: with several machines, perhaps not all. A
      validation split without documents is left out, with a warning.

    Raises:
      UserError: no such source or vocabulary, text that cannot be read, no document to train on, no
        room, or `out` has a dataset of the same name from another source. No index has been written
        then; finished shards are kept.
    """
    if shards is not None and shards < 1:
        raise UserError(f"shards={shards}: give 1 or more")
    if workers < 1:
        raise UserError(f"workers={workers}: give 1 or more")
    encoder = find_vocabulary(vocabulary)
    sources = catalog.find(task, overrides, data_dir or out / "tensorflow_datasets")
    _make_folder(out)
    plans = [
        _plan(source, split, out / source.name / split, shards, vocabulary, encoder)
        for source in sources
        for split in source.splits
    ]
    _make_missing(plans, machine, encoder, workers, begin, report)
    made = [(plan, found) for plan in plans if (found := _entries(plan)) is not None]
    holding = [pair for pair in made if _has_documents(*pair)]
    return [_finish(*pair) for pair in holding]


def prepare_apart(tasks: Sequence[str], *, out: Path, vocabulary: str = "bytes") -> None:
    """`prepare` for `tasks` in a process of its own, so that TensorFlow stays out of this one.

    Raises:
      UserError: as `prepare`; the child has said why.
    """
    command = [sys.executable, "-m", "scaling_jax.cli", "data", "prepare", *tasks]
    command += ["--out", str(out), "--vocabulary", vocabulary]
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"the data could not be prepared in {out}")


def describe(index: Index) -> str:
    """A finished split in one line."""
    skipped = ", ".join(f"{count:,} {kind}" for kind, count in index.skipped.items())
    spelled = sum(shard.spelled_ends for shard in index.shards)
    return (
        f"{index.task} {index.split}: {index.documents:,} documents, {index.text_bytes:,} bytes, "
        f"{index.tokens:,} tokens"
        + (f"; left out: {skipped}" if skipped else "")
        + (f"; their text spells out {spelled:,} ends of text" if spelled else "")
    )


def _plan(
    source: Source,
    split: str,
    folder: Path,
    shards: int | None,
    vocabulary: str,
    encoder: Vocabulary,
) -> Plan:
    pieces = source.pieces(split, shards)
    for piece in pieces:
        if piece.file.startswith(f"{folder.absolute()}/"):
            raise UserError(f"{piece.file}: is to be written, and to be read; give another --out")
    if shards is None:
        wanted = -(-sum(piece.size for piece in pieces) // SHARD_SOURCE_BYTES)
        shards = max(min(wanted, len(pieces)), 1)
    known_entropy = source.name == "zipf_markov" and isinstance(encoder, ByteVocabulary)
    draft = Index(
        task=source.name,
        split=split,
        source=source.about,
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
    names = [f"tokens-{number:05d}-of-{shards:05d}.{draft.dtype}" for number in range(shards)]
    recipe = _recipe(draft, source.rule(split))
    jobs = (
        Job(source, split, tuple(run), folder / name, draft.dtype, recipe)
        for name, run in zip(names, dealt(pieces, shards), strict=True)
    )
    return Plan(folder, draft, tuple(jobs), source.origin)


def _recipe(draft: Index, rule: str) -> str:
    """Names all that a split depends on, except its documents, wherever those and the words lie."""
    content = dataclasses.asdict(draft) | {"vocabulary": "", "rule": rule}  # pyright: ignore[reportArgumentType]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _make_missing(
    plans: Sequence[Plan],
    machine: tuple[int, int],
    encoder: Vocabulary,
    count: int,
    begin: Callable[[Todo], None],
    report: Report,
) -> None:
    """Makes those of the machine's shards that are not there as they should be."""
    number, machines = machine
    indices = [_read_index(plan) for plan in plans]
    jobs = [
        (job, entry)
        for plan, index in zip(plans, indices, strict=True)
        for job, entry in zip(
            plan.jobs, index.shards if index else (None,) * len(plan.jobs), strict=True
        )
    ][number::machines]
    there = [(job, entry) for job, entry in jobs if job.path.exists()]
    good = workers.run(_is_there, there, count, lambda _: None)
    kept = {job.path for (job, _), whole in zip(there, good, strict=True) if whole}
    missing = [job for job, _ in jobs if job.path not in kept]
    unfinished = [
        (plan, index)
        for plan, index in zip(plans, indices, strict=True)
        if index is None or any(job.path.parent == plan.folder for job in missing)
    ]
    for plan, _ in unfinished:
        _check_same_source(plan)
    begin(Todo(len(missing), len(kept), sum(job.source_bytes for job in missing)))
    for plan, index in unfinished:
        _make_folder(plan.folder)
        _reopen(plan, index)
    workers.run(functools.partial(_make, encoder), missing, count, report)


def _is_there(job: tuple[Job, ShardEntry | None], report: Report) -> bool:
    del report
    return writing.find(*job) is not None


def _make(vocabulary: Vocabulary, job: Job, report: Report) -> ShardEntry:
    return writing.make(job, vocabulary, report)


def _read_index(plan: Plan) -> Index | None:
    """The index in the folder, if it is of what the plan would make."""
    try:
        _, found = read_index(plan.folder)
    except UserError:
        return None
    expected = dataclasses.replace(
        plan.draft,
        vocabulary=found.vocabulary,  # the same content may have moved
        documents=found.documents,
        text_bytes=found.text_bytes,
        shards=found.shards,
    )
    names = [job.path.name for job in plan.jobs]
    same = found == expected and [entry.file for entry in found.shards] == names
    return found if same else None


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made a folder ({error.strerror})") from None


def _check_same_source(plan: Plan) -> None:
    """Raises a UserError if the folder's split is of a source that lay elsewhere.

    That stands beside the index, which does not depend on where things are.
    """
    try:
        origin = sealed.read(plan.origin_file)["origin"]
    except (OSError, ValueError, KeyError):  # nobody knows
        return
    if not set(origin) & set(plan.origin):
        raise UserError(
            f"{plan.folder}: holds what was prepared from {origin[0]}, not from {plan.origin[0]}: "
            "give this one another name (name=...), or remove that folder"
        )


def _reopen(plan: Plan, index: Index | None) -> None:
    """Makes the split one that is being prepared: receipts, no index, no files of another plan."""
    ours = {file for job in plan.jobs for file in (job.path.name, job.receipt.name)}
    if index is not None:
        for job, entry in zip(plan.jobs, index.shards, strict=True):
            writing.write_receipt(job.receipt, entry)
    plan.index_file.unlink(missing_ok=True)
    for file in [*plan.folder.glob("tokens-*-of-*"), *plan.folder.glob(".*.tmp")]:
        written = file.name.lstrip(".").rsplit(".", 2)[0] if file.suffix == ".tmp" else file.name
        if written not in ours:
            file.unlink(missing_ok=True)


def _entries(plan: Plan) -> list[ShardEntry] | None:
    """The entries of all shards; None if some are still to be made, here or elsewhere."""
    if not all(job.path.exists() for job in plan.jobs):
        return None
    entries = [writing.read_receipt(job) for job in plan.jobs]
    if all(entries):
        return [entry for entry in entries if entry]
    index = _read_index(plan)
    return list(index.shards) if index else None


def _finish(plan: Plan, entries: Sequence[ShardEntry]) -> Index:
    """Writes the index that makes the split valid, unless it is there; receipts are over then."""
    index = _read_index(plan)
    if index is None or list(index.shards) != entries:
        index = dataclasses.replace(
            plan.draft,
            documents=sum(entry.documents for entry in entries),
            text_bytes=sum(entry.text_bytes for entry in entries),
            shards=tuple(entries),
        )
        sealed.write(plan.origin_file, {"origin": plan.origin})
        write_index(plan.folder, index)
    for job in plan.jobs:
        job.receipt.unlink(missing_ok=True)
    return index


def _has_documents(plan: Plan, entries: Sequence[ShardEntry]) -> bool:
    """False, with a warning, for an empty validation split: of few documents none may be held out.

    Raises:
      UserError: for any other empty split.
    """
    if any(entry.documents for entry in entries):
        return True
    if plan.draft.split != "validation":
        raise UserError(_nothing_in(plan, entries))
    warnings.warn(_nothing_in(plan, entries), stacklevel=3)
    return False


def _nothing_in(plan: Plan, entries: Sequence[ShardEntry]) -> str:
    skipped = sum((Counter(entry.skipped) for entry in entries), Counter[str]())
    faults = ", ".join(f"{count} {kind}" for kind, count in skipped.items())
    return (
        f"{plan.draft.task}: no document falls into the {plan.draft.split} split"
        f"{f' ({faults})' if faults else ''}; give more documents, or a folder that has both "
        "train/ and validation/"
    )
