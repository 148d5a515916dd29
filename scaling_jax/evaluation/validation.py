"""Loss and top-1 next-token error on held-out data, with 95 % bounds over sequences.

Bits per byte are those of the whole split: the mean loss of the scored tokens, in bits, times the
split's tokens per byte of text, which `prepare` has counted exactly (an end of text is a token
without bytes). What is estimated is the loss alone: the first token of a row has none, nor have the
tails of shards and the rows that are not scored.
"""

import functools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from scaling_jax import mesh as meshes
from scaling_jax import sealed
from scaling_jax.config import ModelConfig, RunConfig
from scaling_jax.data.shards import Index, Shards
from scaling_jax.errors import UserError
from scaling_jax.models import head, transformer
from scaling_jax.models.transformer import Params
from scaling_jax.training import distributed

BOOTSTRAP_SEED = 0


class SetScore(TypedDict):
    """Scores of one validation set; `low` and `high` are 95 % bootstrap bounds over sequences."""

    loss: float
    loss_low: float
    loss_high: float
    error: float
    error_low: float
    error_high: float
    # None where the split does not say how long its text is.
    bits_per_byte: float | None
    sequences: int
    tokens: int


Scores = dict[str, SetScore]


def evaluate(config: RunConfig, params: Params) -> Scores:
    """Scores `params` on every validation set of `config`.

    The rows are spread evenly over each set and are the same for every run.

    Raises:
      UserError: a set is missing, or holds no row of the model's sequence length.
    """
    mesh = meshes.make_mesh(config.mesh)
    return {name: _score_set(config, params, name, mesh) for name in config.data.validation}


def path(folder: Path, step: int) -> Path:
    """Where the scores after `step` of the run in `folder` are kept."""
    return folder / "evaluations" / f"step-{step:08d}.json"


def write(scores: Scores, folder: Path, step: int) -> None:
    """Keeps `scores` beside the run, atomically."""
    sealed.write(path(folder, step), {"step": step, "sets": scores}, indent=1)


def read(folder: Path, step: int) -> Scores | None:
    """The scores kept after `step`; None if there are none, or (with a warning) damaged ones."""
    file = path(folder, step)
    try:
        content = sealed.read(file)
        if content["step"] != step:
            raise ValueError(f"it is of step {content['step']}")
        return content["sets"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError) as error:
        warnings.warn(f"{file}: damaged and not used: {error}", stacklevel=2)
        return None


def bootstrap_bounds(
    values: Float[np.ndarray, "sequences"], samples: int, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bounds of the mean of `values`, resampled with replacement."""
    means = _resampling(len(values), samples) @ values / len(values)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@functools.lru_cache(maxsize=4)
def _resampling(count: int, samples: int) -> Float[np.ndarray, "samples count"]:
    """How often each of `count` values is drawn in each resample; the same for every run."""
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    drawn = generator.multinomial(count, np.full(count, 1 / count), samples)
    return drawn.astype(np.float64)


def _score_set(config: RunConfig, params: Params, name: str, mesh: Mesh) -> SetScore:
    length, wanted = config.model.sequence_length, config.evaluation.sequences
    dataset, _, split = name.partition("/")
    shards = Shards.open(Path(config.data.folder) / dataset / (split or "validation"))
    shards.check_vocabulary(config.model.vocabulary_size)
    available = shards.row_count(length)
    if available == 0:
        raise UserError(f"{shards.folder}: holds no row of sequence_length={length}")
    chosen = np.unique(
        np.linspace(0, available - 1, min(wanted, available)).round().astype(np.int64)
    )
    losses, errors = _score_rows(config, params, shards.rows(chosen, length), mesh)
    samples = config.evaluation.bootstrap_samples
    loss_low, loss_high = bootstrap_bounds(losses, samples)
    error_low, error_high = bootstrap_bounds(errors, samples)
    return SetScore(
        loss=float(losses.mean()),
        loss_low=loss_low,
        loss_high=loss_high,
        error=float(errors.mean()),
        error_low=error_low,
        error_high=error_high,
        bits_per_byte=_bits_per_byte(float(losses.mean()), shards.index),
        sequences=len(chosen),
        tokens=len(chosen) * length,
    )


def _bits_per_byte(loss: float, index: Index) -> float | None:
    """`loss` in nats per token as bits per UTF-8 byte of a split's text."""
    if not index.text_bytes:
        return None
    return loss / math.log(2) * index.tokens / index.text_bytes


def _score_rows(
    config: RunConfig, params: Params, rows: Int[np.ndarray, "rows length+1"], mesh: Mesh
) -> tuple[Float[np.ndarray, "rows"], Float[np.ndarray, "rows"]]:
    """Mean loss and error of each row, in float64."""
    parts = meshes.batch_parts(mesh)
    batch_size = math.ceil(min(config.evaluation.batch_size, len(rows)) / parts) * parts
    score = _compiled(config.model, mesh)
    sharding = meshes.sharding(mesh, ("batch", "length"))
    results = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        # The last batch is filled up with a row already scored, so that no shape is new.
        padded = np.concatenate([batch, np.repeat(batch[:1], batch_size - len(batch), axis=0)])
        placed = jax.make_array_from_callback(padded.shape, sharding, padded.__getitem__)
        losses, errors = score(params, placed)
        results.append(np.stack([losses, errors])[:, : len(batch)])
    losses, errors = np.concatenate(results, axis=1).astype(np.float64)
    return losses, errors


@functools.cache
def _compiled(
    model: ModelConfig, mesh: Mesh
) -> Callable[[Params, Array], tuple[Float[Array, "batch"], Float[Array, "batch"]]]:
    # Replicated: every process reads all of them.
    @functools.partial(jax.jit, out_shardings=meshes.sharding(mesh, ()))
    def score(params: Params, rows: Int[Array, "batch length+1"]) -> tuple[Array, Array]:
        bound = transformer.bind(model, params)
        tokens = head.score(bound.hidden(rows[:, :-1]), bound.output[...], rows[:, 1:])
        return tokens.cross_entropy.mean(axis=1), 1 - tokens.correct.mean(axis=1)

    program = distributed.together(score)

    def run(params: Params, rows: Array) -> tuple[Array, Array]:
        with jax.set_mesh(mesh):
            return program(params, rows)

    return run
