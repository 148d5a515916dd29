"""`scaling-jax data`: fetch public data, prepare and inspect token shards."""

import os
from pathlib import Path

import cyclopts

from scaling_jax.commands import parts
from scaling_jax.errors import UserError

app = cyclopts.App(name="data", help="Fetch public data; prepare and inspect token shards.")


@app.command(name="fetch")
def fetch_data(name: str, *, out: Path = Path("data"), url: str | None = None) -> None:
    """Download a public data set, check it by its content and put it into OUT/NAME.

    Args:
      name: gadre2024, chinchilla, chinchilla_kyo or olmo_ladder, which are testbeds; icl, the
        files of the downstream tasks of gadre2024; tokenizer, GPT-NeoX-20B's.
      out: folder for the data set's folder.
      url: another place to get it from: https://, http:// or file://.
    """
    from scaling_jax.data.fetch import DATASETS, fetch
    from scaling_jax.terminal import say

    folder = fetch(name, out, url)
    say(f"{folder}: {DATASETS[name].about}; checksum right")


@app.command(name="prepare")
def prepare_data(
    *tasks: str,
    out: Path = Path("data"),
    vocabulary: str = "bytes",
    shards: int | None = None,
    workers: int = 1,
    shard: str = "1/1",
    data_dir: Path | None = None,
) -> None:
    """Turn documents into token shards: OUT/NAME/train and OUT/NAME/validation.

    An embedded corpus also gets questions about its validation split, OUT/NAME/questions.

    What is finished is kept: the same command goes on where it was stopped.

    Args:
      tasks: python_code, python_docs, zipf_markov; paths or URLs of .txt, .jsonl (.gz, .zst),
        .parquet or .array_record files or of a folder of those; tfds:NAME:VERSION; data configs,
        such as c4, c4_tfds, refinedweb, redpajama or your own YAML; and key=value changes to those.
      out: folder for the shards.
      vocabulary: bytes, a SentencePiece file.model or a Hugging Face tokenizer.json.
      shards: how many files a split is spread over; by default by its size. The tokens are the
        same for any number.
      workers: processes.
      shard: i/n, on machine i of n that share OUT: it makes every n-th file.
      data_dir: where tensorflow-datasets keeps what it builds, and looks for tfds:NAME.
    """
    from scaling_jax.data import catalog, corpora, corpus_questions, prepare
    from scaling_jax.data.meter import Meter
    from scaling_jax.terminal import say

    overrides = [task for task in tasks if _is_setting(task)]
    names = [task for task in tasks if not _is_setting(task)]
    if not names:
        raise UserError("data prepare: name at least one task")
    if len(names) > 1:
        catalog.check_names(names, overrides, data_dir or out / "tensorflow_datasets")
    machine = parts.parse(shard, "shard")
    for name in names:
        with Meter(name) as meter:
            indices = prepare.prepare(
                name,
                out=out,
                vocabulary=vocabulary,
                overrides=overrides,
                shards=shards,
                workers=workers,
                machine=machine,
                data_dir=data_dir,
                begin=meter.begin,
                report=meter.report,
            )
        for index in indices:
            say(prepare.describe(index))
        if name in corpora.CORPORA:
            say(f"questions: {corpus_questions.write(name, out)}")
        if not indices:
            say(f"{name}: part {shard} is done; the split is there when all parts are")


@app.command(name="inspect")
def inspect_data(
    *folders: Path,
    sequence_length: int = 256,
    samples: int = 3,
    limit: int = 10**9,
    verify: bool = False,
) -> None:
    """Look into prepared splits: sizes, document lengths, duplicates, decoded rows.

    Args:
      folders: of splits, such as data/python_code/train; of several, the share of each is told.
      sequence_length: of the rows.
      samples: how many rows to decode.
      limit: lengths and duplicates are those of so many tokens from the beginning.
      verify: read every shard whole and hold it to its checksum.
    """
    from scaling_jax.data.inspect import inspect
    from scaling_jax.data.shards import Shards
    from scaling_jax.terminal import say

    if not folders:
        raise UserError("data inspect: name the folder of a split, such as data/python_code/train")
    total = sum(Shards.open(folder).token_count for folder in folders)
    for folder in folders:
        found = inspect(folder, sequence_length, samples, limit, verify)
        share = f", {found.tokens / total:.2%} of all" if len(folders) > 1 else ""
        say(f"{found.task} {found.split}: {found.documents:,} documents, {found.tokens:,} tokens")
        say(f"text: {found.text_bytes:,} bytes, {found.bytes_per_token:.3f} a token{share}")
        for kind, count in found.skipped.items():
            say(f"left out, {kind}: {count:,} documents")
        if found.entropy_rate is not None:
            say(f"entropy rate: {found.entropy_rate:.4f} nats per token")
        if found.tokens_read < found.tokens:
            say(f"of the first {found.tokens_read:,} tokens:")
        lengths = ", ".join(f"{q:.0%}: {n:,}" for q, n in found.document_lengths.items())
        say(f"document lengths in tokens, by quantile: {lengths}")
        for line in _bars(found.length_histogram):
            say(line)
        say(f"rows of {sequence_length}: {found.rows:,}, duplicates {found.duplicate_rows:.2%}")
        if verify:
            say(f"every shard has its checksum: {folder}")
        for sample in found.samples:
            say(f"--- row\n{sample}")


def _is_setting(task: str) -> bool:
    """Whether this is key=value; the name of a file may have a = in it, too."""
    key, equals, _ = task.partition("=")
    return bool(equals) and "/" not in key and not os.path.exists(task)  # noqa: PTH110 - of any text


def _bars(histogram: dict[int, int]) -> list[str]:
    """A line for each range of lengths: how many documents, and a bar as long as that is many."""
    most = max(histogram.values())
    return [
        f"{least:>12,} to {2 * least - 1:>11,}  {count:>11,}  {'#' * round(40 * count / most)}"
        for least, count in histogram.items()
    ]
