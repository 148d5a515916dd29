"""The state of a run: parameters, optimiser moments and step, and how they are laid on the mesh."""

from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from scaling_jax import mesh as meshes
from scaling_jax.config import ModelConfig
from scaling_jax.models import transformer
from scaling_jax.models.transformer import Params
from scaling_jax.training import optimizer


class TrainState(TypedDict):
    """Everything that the next step depends on besides its batch."""

    params: Params
    moments: optax.OptState
    step: Int[Array, ""]


def create(config: ModelConfig, seed: int, mesh: Mesh) -> TrainState:
    """A fresh state, made where it will live; the same numbers on every mesh.

    Raises:
      UserError: a parameter axis cannot be split evenly over the mesh.
    """
    layout = abstract(config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, layout)
    return jax.jit(_initial, static_argnums=0, out_shardings=shardings)(
        config, jax.random.key(seed)
    )


def abstract(config: ModelConfig, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the state, without any array.

    Raises:
      UserError: a parameter axis cannot be split evenly over the mesh.
    """
    meshes.check_divisible(mesh, "width", config.width, "embed")
    meshes.check_divisible(mesh, "heads", config.heads, "heads")
    meshes.check_divisible(mesh, "hidden width", config.hidden_width, "mlp")
    meshes.check_divisible(mesh, "vocabulary_size", config.vocabulary_size, "vocabulary")
    shapes = jax.eval_shape(lambda: _initial(config, jax.random.key(0)))
    axes = transformer.parameter_axes(config)
    params = jax.tree.map(
        lambda leaf, names: _placed(leaf, meshes.sharding(mesh, names)), shapes["params"], axes
    )
    structure = jax.tree.structure(params)

    def place_moments(part: Any) -> Any:
        if jax.tree.structure(part) == structure:
            return jax.tree.map(lambda leaf, like: _placed(leaf, like.sharding), part, params)
        return _placed(part, meshes.sharding(mesh, ()))

    moments = jax.tree.map(
        place_moments,
        shapes["moments"],
        is_leaf=lambda part: jax.tree.structure(part) == structure,
    )
    step = _placed(shapes["step"], meshes.sharding(mesh, ()))
    return TrainState(params=params, moments=moments, step=step)  # pyright: ignore[reportArgumentType]


def _initial(config: ModelConfig, key: jax.Array) -> TrainState:
    params = transformer.initialize(config, key)
    moments = optimizer.initial_moments(params)
    return TrainState(params=params, moments=moments, step=jnp.zeros((), jnp.int32))


def _placed(leaf: Any, sharding: jax.sharding.NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
