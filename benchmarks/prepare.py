"""How fast `data prepare` is, beside the tokenizer that it spends its time in.

    python benchmarks/prepare.py 20B_tokenizer.json texts.jsonl.gz

Two things are timed on one core, in turn: the tokenizer's own `encode_batch` over the texts, which
are in memory by then and in batches as `prepare` makes them; and the whole of `prepare`, from the
file on disk to the shard on disk: loading the vocabulary, unpacking, JSON, the split, checksums of
the source and the shard. A ratio of 1 would mean that all of this costs nothing. Processor time is
what is compared, so that other programs on the machine disturb little.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import tokenizers

from scaling_jax.data import catalog, prepare, writing


def main() -> None:
    """Prints tokens a second of both, and the ratio."""
    parser = argparse.ArgumentParser(description="Speed of data prepare, per core.")
    parser.add_argument("tokenizer", help="a Hugging Face tokenizer.json")
    parser.add_argument("texts", help="a file, or a folder of those, as data prepare takes it")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    batches = _batches(options.texts)
    tokenizer = tokenizers.Tokenizer.from_file(options.tokenizer)
    alone, whole = [], []
    for _ in range(options.repeats):
        start = time.process_time()
        tokens = sum(len(row.ids) for batch in batches for row in tokenizer.encode_batch(batch))
        alone.append(tokens / (time.process_time() - start))
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            (index,) = prepare.prepare(
                options.texts,
                out=Path(folder),
                vocabulary=options.tokenizer,
                overrides=["held_out_share=0"],
                shards=1,
            )
            whole.append(index.tokens / (time.process_time() - start))
    ratio = statistics.median(new / old for new, old in zip(whole, alone, strict=True))
    print(f"texts: {index.documents:,} documents, {index.text_bytes:,} bytes, {tokens:,} tokens")
    print(f"encode_batch alone:  {statistics.median(alone):,.0f} tokens per second of one core")
    print(f"data prepare:        {statistics.median(whole):,.0f} tokens per second of one core")
    print(f"ratio: {ratio:.3f} (median of {options.repeats})")


def _batches(texts: str) -> list[list[str]]:
    (source,) = catalog.find(texts, ["held_out_share=0"])
    records = source.documents("train", source.pieces("train"))
    return [[record.text for record in batch] for batch in writing.grouped(records)]


if __name__ == "__main__":
    main()
