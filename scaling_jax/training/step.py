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
from scaling_jax.models import transformer
from scaling_jax.models.loss import token_loss
from scaling_jax.models.transformer import Params
from scaling_jax.training import optimizer
from scaling_jax.training.optimizer import Hyperparameters
from scaling_jax.training.state import TrainState, abstract

Rows = Int[Array, "batch length+1"]


class Metrics(NamedTuple):
    """What one step reports. Laws are fitted on `loss`, which holds no z-loss."""

    loss: Float32[Array, ""]
    z_loss: Float32[Array, ""]
    gradient_norm: Float32[Array, ""]
    learning_rate: Float32[Array, ""]


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
    return updated, Metrics(loss, z_loss, norm, rate)


@functools.cache
def compiled(model: ModelConfig, batch_size: int, microbatches: int, mesh: Mesh) -> TrainStep:
    """`train_step` compiled for a mesh; the old state's memory is reused for the new one.

    Raises:
      UserError: the batch cannot be split evenly over the mesh.
    """
    check_batch(mesh, batch_size, microbatches)
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract(model, mesh))
    replicated = meshes.sharding(mesh, ())
    rows = meshes.sharding(mesh, ("batch", "length"))
    step = jax.jit(
        functools.partial(train_step, model, microbatches),
        in_shardings=(layout, rows, replicated),
        out_shardings=(layout, replicated),
        donate_argnums=0,
    )

    def run(state: TrainState, rows: Rows, hyper: Hyperparameters) -> tuple[TrainState, Metrics]:
        with jax.set_mesh(mesh):
            return step(state, rows, hyper)

    return run


def check_batch(mesh: Mesh, batch_size: int, microbatches: int) -> None:
    """Raises a UserError unless each microbatch splits evenly over the mesh's batch axes."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (parts * microbatches):
        raise UserError(
            f"batch_size={batch_size} is not divisible by data x fsdp x microbatches = "
            f"{mesh.shape['data']} x {mesh.shape['fsdp']} x {microbatches}"
        )


def _mean_gradient(
    model: ModelConfig, microbatches: int, params: Params, rows: Rows, hyper: Hyperparameters
) -> tuple[tuple[Array, Array], Params]:
    """Mean losses and gradient over the batch, in `microbatches` equal parts one after another."""

    def losses(params: Params, rows: Rows) -> tuple[Array, tuple[Array, Array]]:
        scores = token_loss(transformer.bind(model, params)(rows[:, :-1]), rows[:, 1:])
        loss = scores.cross_entropy.mean()
        z_loss = hyper.z_loss_weight * jnp.square(scores.log_normalizer).mean()
        return loss + z_loss, (loss, z_loss)

    def part(rows: Rows) -> tuple[tuple[Array, Array], Params]:
        (_, parts), gradients = jax.value_and_grad(losses, has_aux=True)(params, rows)
        return parts, gradients

    if microbatches == 1:
        return part(rows)
    # Strided parts: each holds rows of every device, so none has to move.
    split = rows.reshape(-1, microbatches, rows.shape[1]).swapaxes(0, 1)
    split = meshes.constrain(split, "layer", "batch", "length")
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(part, rows))

    def add(total, rows: Rows):
        return jax.tree.map(jnp.add, total, part(rows)), None

    total, _ = jax.lax.scan(add, zero, split)
    return jax.tree.map(lambda leaf: leaf / microbatches, total)
