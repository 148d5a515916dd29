"""AdamW and its learning rate, exactly as open_lm has them, with every number as data.

Learning rate, budget and all other hyper-parameters enter the compiled step as arguments, so runs
of one size share one compilation.

Source: open_lm `scheduler.py`, `main.py`; torch.optim.AdamW. Warm-up, stable, decay: Hu et al.,
"MiniCPM" (2024); decay linear or as 1 - sqrt: Hägele et al., "Scaling laws and compute-optimal
training beyond fixed training durations" (2024).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from scaling_jax.config import RunConfig
from scaling_jax.models.transformer import Params
from scaling_jax.training.budget import Budget

Scalar = Float[Array, ""] | float

# Hyperparameters.decay_shape is a place in this list.
DECAY_SHAPES = ("cosine", "linear", "one_minus_sqrt")


class Hyperparameters(NamedTuple):
    """The numbers of a run that change its steps but not their shapes."""

    learning_rate: Scalar
    minimum_learning_rate: Scalar
    learning_rate_floor: Scalar
    warmup_steps: Scalar
    total_steps: Scalar
    weight_decay: Scalar
    beta1: Scalar
    beta2: Scalar
    epsilon: Scalar
    gradient_clip_norm: Scalar
    z_loss_weight: Scalar
    # The rate falls from here on, but not before the warm-up is over.
    decay_start: Scalar = 0.0
    decay_shape: Scalar = 0.0
    # A guarded step whose loss is above this is skipped.
    loss_limit: Scalar = math.inf


def hyperparameters(config: RunConfig, budget: Budget) -> Hyperparameters:
    """The hyper-parameters of a run of `budget` steps."""
    optimizer = config.optimizer
    shape = "cosine" if optimizer.schedule == "cosine" else optimizer.decay_shape
    return Hyperparameters(
        learning_rate=optimizer.learning_rate,
        minimum_learning_rate=optimizer.minimum_learning_rate,
        learning_rate_floor=optimizer.learning_rate_floor,
        warmup_steps=float(optimizer.warmup_steps),
        total_steps=float(budget.steps),
        weight_decay=optimizer.weight_decay,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        epsilon=optimizer.epsilon,
        gradient_clip_norm=optimizer.gradient_clip_norm,
        z_loss_weight=config.z_loss_weight,
        decay_start=float(budget.decay_start),
        decay_shape=float(DECAY_SHAPES.index(shape)),
    )


def learning_rate(hyper: Hyperparameters, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """Rate used by the update that follows `step` finished updates.

    Linear warm-up whose first rate is peak / warmup_steps, the peak until the decay starts, then
    half a cosine or another shape. The minimum lies one step beyond the last, so it is never quite
    reached. The floor cuts off what follows the warm-up, not the warm-up.
    """
    step = jnp.asarray(step, jnp.float32)
    peak, low, warmup = hyper.learning_rate, hyper.minimum_learning_rate, hyper.warmup_steps
    rising = peak * (step + 1) / jnp.maximum(warmup, 1)
    start = jnp.maximum(hyper.decay_start, warmup)
    progress = (step - start) / jnp.maximum(hyper.total_steps - start, 1)
    falling = low + _remaining(progress, hyper.decay_shape) * (peak - low)
    # The peak itself, not low + 1 x (peak - low), which may round to another number.
    stable_or_falling = jnp.where(step < start, peak, falling)
    return jnp.where(
        step < warmup, rising, jnp.maximum(stable_or_falling, hyper.learning_rate_floor)
    )


def adam(hyper: Hyperparameters) -> optax.GradientTransformation:
    """Bias-corrected Adam directions; the state does not depend on the hyper-parameters."""
    return optax.scale_by_adam(b1=hyper.beta1, b2=hyper.beta2, eps=hyper.epsilon)  # pyright: ignore[reportArgumentType]


def initial_moments(params: Params) -> optax.OptState:
    """Zero first and second moments."""
    return optax.scale_by_adam().init(params)


def clip(gradients: Params, norm: Float[Array, ""], hyper: Hyperparameters) -> Params:
    """Scales gradients of global norm `norm` down to at most the clip norm, as torch does."""
    factor = jnp.minimum(1.0, hyper.gradient_clip_norm / (norm + 1e-6))
    return jax.tree.map(lambda gradient: gradient * factor, gradients)


def apply(
    params: Params, directions: Params, rate: Float[Array, ""], hyper: Hyperparameters
) -> Params:
    """One update: every parameter, gains and embeddings too, decays by rate x weight_decay."""
    return jax.tree.map(
        lambda param, direction: param - rate * (direction + hyper.weight_decay * param),
        params,
        directions,
    )


def _remaining(progress: Float[Array, "*steps"], shape: Scalar) -> Float[Array, "*steps"]:
    """The part of the way from the peak to the minimum that is left, after `progress` of the decay.

    All shapes are computed, so that runs of different schedules share one compilation.
    """
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
    root = 1 - jnp.sqrt(jnp.maximum(progress, 0))
    return jnp.select(
        [shape == place for place in range(len(DECAY_SHAPES))], [cosine, 1 - progress, root]
    )
