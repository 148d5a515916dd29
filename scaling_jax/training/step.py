"""One training step: loss, gradient, clipping, AdamW; compiled once for each size and mesh."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int

from scaling_jax import mesh as meshes
from scaling_jax.config import ModelConfig
from scaling_jax.errors import UserError
from scaling_jax.models import counting, head, kernels, transformer
from scaling_jax.models.transformer import Params
from scaling_jax.training import distributed, optimizer
from scaling_jax.training.optimizer import Hyperparameters
from scaling_jax.training.state import TrainState, abstract

Rows = Int[Array, "batch length+1"]


class Metrics(NamedTuple):
    """What one step reports. Laws are fitted on `loss`, which holds no z-loss."""

    loss: Float32[Array, ""]
    z_loss: Float32[Array, ""]
    gradient_norm: Float32[Array, ""]
    learning_rate: Float32[Array, ""]
    # 1 if the update was not made, which only a guarded step can do.
    skipped: Float32[Array, ""]


# Cross-entropy and z-loss, and the gradient of their sum.
Gradient = tuple[tuple[Float32[Array, ""], Float32[Array, ""]], Params]
TrainStep = Callable[[TrainState, Rows, Hyperparameters], tuple[TrainState, Metrics]]


def train_step(
    model: ModelConfig, microbatches: int, state: TrainState, rows: Rows, hyper: Hyperparameters
) -> tuple[TrainState, Metrics]:
    """Trains on `rows` once. Metrics are those of the parameters before the update."""
    (loss, z_loss), gradients = _mean_gradient(model, microbatches, state["params"], rows, hyper)
    norm = optax.tree.norm(gradients)
    rate = optimizer.learning_rate(hyper, state["step"])
    clipped = optimizer.clip(gradients, norm, hyper)
    directions, moments = optimizer.adam(hyper).update(clipped, state["moments"])
    params = optimizer.apply(state["params"], directions, rate, hyper)  # pyright: ignore[reportArgumentType]
    updated = TrainState(params=params, moments=moments, step=state["step"] + 1)
    return updated, Metrics(loss, z_loss, norm, rate, jnp.zeros((), jnp.float32))


def guarded_step(
    model: ModelConfig, microbatches: int, state: TrainState, rows: Rows, hyper: Hyperparameters
) -> tuple[TrainState, Metrics]:
    """As `train_step`, but parameters and moments stay as they were where the step goes wrong.

    That is where loss or gradient are not finite, or the loss is above `hyper.loss_limit`.
    """
    updated, metrics = train_step(model, microbatches, state, rows, hyper)
    finite = jnp.isfinite(metrics.loss) & jnp.isfinite(metrics.gradient_norm)
    good = finite & (metrics.loss <= hyper.loss_limit)
    kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), updated, state)
    kept = TrainState(params=kept["params"], moments=kept["moments"], step=updated["step"])
    return kept, metrics._replace(skipped=1 - good.astype(jnp.float32))


@functools.cache
def compiled(
    model: ModelConfig, batch_size: int, microbatches: int, mesh: Mesh, guarded: bool = False
) -> TrainStep:
    """The step compiled for a mesh; the old state's memory is reused for the new one.

    Raises:
      UserError: the batch or a parameter cannot be split evenly over the mesh.
    """
    check_batch(mesh, batch_size, microbatches)
    step = distributed.together(_jitted(model, microbatches, mesh, guarded))

    def run(state: TrainState, rows: Rows, hyper: Hyperparameters) -> tuple[TrainState, Metrics]:
        with jax.set_mesh(mesh):
            return step(state, rows, hyper)

    return run


def lower(model: ModelConfig, batch_size: int, microbatches: int, mesh: Mesh) -> jax.stages.Lowered:
    """The program of `compiled`, from shapes alone: the mesh's devices need not be attached.

    Raises:
      UserError: the batch or a parameter cannot be split evenly over the mesh.
    """
    check_batch(mesh, batch_size, microbatches)
    rows = jax.ShapeDtypeStruct((batch_size, model.sequence_length + 1), jnp.int32)
    number = jax.ShapeDtypeStruct((), jnp.float32)
    hyper = Hyperparameters(*(number for _ in Hyperparameters._fields))  # pyright: ignore[reportArgumentType]
    with jax.set_mesh(mesh):
        return _jitted(model, microbatches, mesh).lower(abstract(model, mesh), rows, hyper)


def check_batch(mesh: Mesh, batch_size: int, microbatches: int) -> None:
    """Raises a UserError unless each microbatch splits evenly over the mesh's batch axes."""
    if batch_size % (meshes.batch_parts(mesh) * microbatches):
        parts = meshes.splits(mesh, "batch") | {"microbatches": microbatches}
        raise UserError(
            f"batch_size={batch_size} is not divisible by {' x '.join(parts)} = "
            f"{' x '.join(map(str, parts.values()))}"
        )


def _jitted(
    model: ModelConfig, microbatches: int, mesh: Mesh, guarded: bool = False
) -> jax.stages.Wrapped:
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract(model, mesh))
    replicated = meshes.sharding(mesh, ())
    rows = meshes.sharding(mesh, ("batch", "length"))
    return jax.jit(
        functools.partial(guarded_step if guarded else train_step, model, microbatches),
        in_shardings=(layout, rows, replicated),
        out_shardings=(layout, replicated),
        donate_argnums=0,
    )


def _mean_gradient(
    model: ModelConfig, microbatches: int, params: Params, rows: Rows, hyper: Hyperparameters
) -> Gradient:
    """Mean losses and gradient over the batch, in equal parts one after another.

    There are `microbatches` of them, or a multiple where that is faster.
    """
    parts = microbatches * _parts_of(model, rows.shape[0] // microbatches)
    z_loss_weight = jnp.asarray(hyper.z_loss_weight, jnp.float32)
    if parts == 1:
        return _gradient(model, params, z_loss_weight, rows)

    def mean(params: Params, z_loss_weight: Array, rows: Rows) -> Gradient:
        # Strided parts: each holds rows of every device, so none has to move.
        split = rows.reshape(-1, parts, rows.shape[1]).swapaxes(0, 1)
        split = meshes.constrain(split, "layer", "batch", "length")
        one = functools.partial(_gradient, model, params, z_loss_weight)
        zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(one, split[0]))
        total, _ = jax.lax.scan(
            lambda total, rows: (jax.tree.map(jnp.add, total, one(rows)), None), zero, split
        )
        return jax.tree.map(lambda leaf: leaf / parts, total)

    # The devices' gradients are added up once, and not those of every part.
    over_copies = meshes.mean_over_copies(mean, ((), (), ("batch", "length")))
    return over_copies(params, z_loss_weight, rows)


def _gradient(
    model: ModelConfig, params: Params, z_loss_weight: Float32[Array, ""], rows: Rows
) -> Gradient:
    """Mean losses and gradient over `rows`."""

    def losses(params: Params) -> tuple[Array, tuple[Array, Array]]:
        bound = transformer.bind(model, params)
        hidden, targets = bound.hidden(rows[:, :-1]), rows[:, 1:]
        return head.mean_loss(hidden, bound.output[...], targets, z_loss_weight)

    (_, parts), gradients = jax.value_and_grad(losses, has_aux=True)(params)
    return parts, gradients


def _parts_of(model: ModelConfig, batch_size: int) -> int:
    """Into how many parts a microbatch is split, so that the platform works on as much as it likes.

    Each holds as many rows of every device.
    """
    rows = batch_size // meshes.free_parts("batch")
    made = rows * model.sequence_length * counting.activations_per_token(model)
    wanted = min(made / kernels.chosen().most_activations, rows)
    return next(parts for parts in range(1, rows + 1) if rows % parts == 0 and parts >= wanted)
