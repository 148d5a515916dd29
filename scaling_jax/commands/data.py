"""`scaling-jax data`: fetch public data, prepare and inspect token shards."""

from pathlib import Path

import cyclopts

from scaling_jax.errors import UserError

app = cyclopts.App(name="data", help="Fetch public data; prepare and inspect token shards.")


@app.command(name="fetch")
def fetch_data(name: str, *, out: Path = Path("data"), url: str | None = None) -> None:
    """Download a public data set, check it by its content and put it into OUT/NAME.

    Args:
      name: gadre2024, chinchilla, chinchilla_kyo or olmo_ladder, which are testbeds; tokenizer,
        GPT-NeoX-20B's.
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
    shards: int = 1,
    data_dir: Path | None = None,
) -> None:
    """Turn corpora into token shards: OUT/TASK/train and OUT/TASK/validation.

    Args:
      tasks: python_code, python_docs, zipf_markov, or paths to your own .txt or .jsonl text.
      out: folder for the shards.
      vocabulary: bytes, a SentencePiece file.model or a Hugging Face tokenizer.json.
      shards: how many files a split is spread over.
      data_dir: where tensorflow-datasets keeps what it builds.
    """
    from scaling_jax.data import prepare

    if not tasks:
        raise UserError("data prepare: name at least one task")
    for task in tasks:
        prepare.prepare(
            task,
            out=out,
            vocabulary=vocabulary,
            shards=shards,
            data_dir=data_dir,
            progress=prepare.print_finished,
        )


@app.command(name="inspect")
def inspect_data(folder: Path, *, sequence_length: int = 256, samples: int = 3) -> None:
    """Look into a prepared split: sizes, document lengths, duplicates, decoded rows.

    Args:
      folder: of the split, such as data/python_code/train.
      sequence_length: of the rows.
      samples: how many rows to decode.
    """
    from scaling_jax.data.inspect import inspect
    from scaling_jax.terminal import say

    found = inspect(folder, sequence_length, samples)
    lengths = ", ".join(f"{q:.0%}: {n:,}" for q, n in found.document_lengths.items())
    say(f"{found.task} {found.split}: {found.documents:,} documents, {found.tokens:,} tokens")
    say(f"bytes per token: {found.bytes_per_token:.3f}")
    say(f"document lengths in tokens, by quantile: {lengths}")
    say(f"rows of {sequence_length}: {found.rows:,}, duplicates {found.duplicate_rows:.2%}")
    if found.entropy_rate is not None:
        say(f"entropy rate: {found.entropy_rate:.4f} nats per token")
    for sample in found.samples:
        say(f"--- row\n{sample}")
