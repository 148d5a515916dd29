"""Downstream tasks against the padded way: how many tokens are read, and how long that takes.

    python benchmarks/downstream.py --data DIR --tokenizer FILE [--tasks NAME ...]
    python benchmarks/downstream.py --data DIR --tokenizer FILE --tasks NAME --model models/11m.yaml

The padded way is that of LLM Foundry: every choice of every question is a row of its own, padded to
2048 tokens, and logits are computed at every position. Without --model only tokens are counted.
With it, a model of that size with random weights scores the first questions of each task both ways,
once to compile and once on the clock; the largest difference between their scores is printed, too.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import pandas as pd
from jaxtyping import Array, Float, Int, Int32

from scaling_jax import config as configs
from scaling_jax import mesh as meshes
from scaling_jax.config import MeshConfig, ModelConfig
from scaling_jax.data.vocabularies import vocabulary
from scaling_jax.errors import UserError
from scaling_jax.evaluation import prompts, scoring, tasks
from scaling_jax.evaluation.model_scorer import TransformerScorer
from scaling_jax.evaluation.prompts import Prompt
from scaling_jax.evaluation.scoring import TargetScores
from scaling_jax.models import transformer
from scaling_jax.models.loss import token_loss
from scaling_jax.models.transformer import Params

# LLM Foundry's device_eval_batch_size and max_seq_len for these tasks.
PADDED_ROWS, LENGTH = 4, 2048
# Of some files only a part can be had.
ENDS = (".jsonl", ".subset1000.jsonl")


class Timing(NamedTuple):
    """Seconds for the same questions both ways, and by how many nats per token they differ."""

    padded: float
    ours: float
    difference: float


class CountingScorer:
    """Counts the tokens that a model would read, and scores nothing."""

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(
        self,
        tokens: Int32[np.ndarray, "rows length"],
        positions: Int32[np.ndarray, "rows asked"],
        targets: Int32[np.ndarray, "rows asked"],
    ) -> TargetScores:
        """Rows without branches."""
        self.tokens += tokens.size
        return TargetScores(np.zeros(targets.shape), np.zeros(targets.shape, int))

    def score_branches(
        self,
        tokens: Int32[np.ndarray, "rows length"],
        places: Int32[np.ndarray, "rows length"],
        branches: Int32[np.ndarray, "rows length"],
        positions: Int32[np.ndarray, "rows asked"],
        targets: Int32[np.ndarray, "rows asked"],
    ) -> TargetScores:
        """Rows with branches."""
        return self(tokens, positions, targets)


class PaddedScorer:
    """Scores one choice a row, padded to `LENGTH`, with logits at every position."""

    def __init__(self, config: ModelConfig, params: Params):
        @jax.jit
        def losses(
            params: Params, tokens: Int[Array, "rows length"]
        ) -> Float[Array, "rows length-1"]:
            logits = transformer.bind(config, params)(tokens)
            return token_loss(logits[:, :-1], tokens[:, 1:]).cross_entropy

        self._losses, self._params = losses, params

    def nats_per_token(self, asked: Sequence[Prompt]) -> list[float]:
        """Of every choice of every question."""
        choices = [choice for prompt in asked for choice in prompt.choices]
        found = []
        for start in range(0, len(choices), PADDED_ROWS):
            part = choices[start : start + PADDED_ROWS]
            tokens = np.zeros((PADDED_ROWS, LENGTH), np.int32)
            for row, choice in zip(tokens, part, strict=False):
                ids = np.concatenate([choice.context, choice.tokens])
                row[: len(ids)] = ids
            losses = np.asarray(self._losses(self._params, tokens))
            for row, choice in zip(losses, part, strict=False):
                first = len(choice.context) - 1
                found.append(float(row[first : first + len(choice.tokens)].mean()))
        return found


def main() -> None:
    """Prints a line a task, and the totals."""
    parser = argparse.ArgumentParser(description="Counts tokens and seconds of downstream tasks.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks' files")
    parser.add_argument("--tokenizer", type=Path, required=True, help="GPT-NeoX's tokenizer.json")
    parser.add_argument("--tasks", nargs="*", default=[], help="all by default")
    parser.add_argument("--model", help="a model's YAML: time it, too")
    parser.add_argument("--questions", type=int, default=32, help="so many a task are timed")
    try:
        lines = list(measure(parser.parse_args()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    table = pd.DataFrame(lines)
    print(table.to_string(index=False))
    for what in ("tokens", "seconds"):
        if f"padded_{what}" in table:
            padded, ours = table[f"padded_{what}"].sum(), table[what].sum()
            print(f"{len(table)} tasks, {what}: {padded / ours:.2f} times fewer than padded")


def measure(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line of the table a task.

    Raises:
      UserError: a file is not what it should be.
    """
    config, ids = tasks.load("gadre2024"), vocabulary(str(given.tokenizer))
    timed = _scorers(configs.load(ModelConfig, given.model)) if given.model else None
    for name, task in tasks.select(config, given.tasks).items():
        stem = given.data / task.data.removesuffix(".jsonl")
        path = next((file for end in ENDS if (file := Path(f"{stem}{end}")).is_file()), None)
        if path is None:
            print(f"left out: {name}: {stem}{ENDS[0]} is not there", file=sys.stderr)
            continue
        asked = list(prompts.build(task, path, ids, LENGTH, config.seed))
        padded, ours = count(asked)
        line = {"task": name, "questions": len(asked), "padded_tokens": padded, "tokens": ours}
        line["fewer"] = round(padded / ours, 2)
        if timed:
            timing = clock(asked[: given.questions], *timed)
            line |= {"padded_seconds": timing.padded, "seconds": timing.ours}
            line |= {"faster": timing.padded / timing.ours, "difference": timing.difference}
        said = f"{name}: {line['fewer']} times fewer tokens"
        said += f", {line['faster']:.1f} times faster" if timed else ""
        print(said, file=sys.stderr, flush=True)
        yield line


def count(asked: Sequence[Prompt]) -> tuple[int, int]:
    """The tokens of all questions, padded and here; rows that only fill up a batch count too."""
    counting = CountingScorer()
    scoring.score(asked, counting)
    return sum(len(prompt.choices) for prompt in asked) * LENGTH, counting.tokens


def clock(asked: Sequence[Prompt], padded: PaddedScorer, ours: TransformerScorer) -> Timing:
    """Times both ways on the same questions, after a first time that compiles."""
    slow_seconds, slow = _timed(lambda: padded.nats_per_token(asked))
    fast_seconds, scores = _timed(lambda: scoring.score(asked, ours))
    fast = [choice.nats_per_token for choices in scores for choice in choices]
    return Timing(slow_seconds, fast_seconds, float(np.abs(np.subtract(slow, fast)).max()))


Found = TypeVar("Found")


def _timed(work: Callable[[], Found]) -> tuple[float, Found]:
    work()
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def _scorers(config: ModelConfig) -> tuple[PaddedScorer, TransformerScorer]:
    """The same random weights both ways, in float32 on one device."""
    config = dataclasses.replace(config, compute_dtype="float32")
    params = transformer.initialize(config, jax.random.key(0))
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    return PaddedScorer(config, params), TransformerScorer(config, params, mesh)


if __name__ == "__main__":
    main()
