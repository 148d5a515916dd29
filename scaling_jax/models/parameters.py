"""Parameters at work: read in the type of the activations, their gradients kept in their own.

A parameter that is split over `fsdp` is put together where it is used, in the compute type, once
in the forward and once in the backward pass. Its gradient is made in the parameter's type, so that
devices add up float32 numbers also where the activations are bfloat16, as open_lm does. Left to
itself the compiler would add up the rounded parts.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from scaling_jax.mesh import constrain, free_axes, on_each_device
from scaling_jax.models import kernels


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(
    x: Float[Array, "batch length width"], weight: Float[Array, "width *out"], names: Sequence[str]
) -> Float[Array, "batch length *out"]:
    """Product over the last axis of `x` and the first of `weight`, in the type of `x`.

    `names` are those of the weight's axes. The gradients are dx = dy w' and dw = x' dy.
    """
    return jnp.tensordot(x, _gather(weight, x.dtype, names), 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(
    table: Float[Array, "vocabulary width"], tokens: Int[Array, "batch length"], dtype: DTypeLike
) -> Float[Array, "batch length width"]:
    """The rows of `table` for `tokens`, in `dtype`."""
    # Gathering from a table that is split along both axes would make the compiler replicate it.
    return _gather(table, dtype, ("vocabulary", "embed"))[tokens]


def add_up(gradient: Array, along: int, batch: tuple[str, ...], embed: tuple[str, ...]) -> Array:
    """On each device, the sum of all devices' gradients: of its own part of axis `along`.

    `batch` and `embed` are the mesh axes that split the rows and that axis.
    """
    if embed:
        gradient = jax.lax.psum_scatter(gradient, embed, scatter_dimension=along, tiled=True)
    # The smaller part is what then crosses to the other slices.
    rest = tuple(axis for axis in batch if axis not in embed)
    return jax.lax.psum(gradient, rest) if rest else gradient


def _gather(weight: Array, dtype: DTypeLike, names: Sequence[str]) -> Array:
    """All of a weight along `embed`."""
    whole = ["activation" if name == "embed" else name for name in names]
    # The parts are said to be rounded first, or else float32 numbers would be sent.
    return constrain(constrain(weight.astype(dtype), *names), *whole)


def _project_forward(x: Array, weight: Array, names: Sequence[str]):
    return project(x, weight, names), (x, weight)


def _project_backward(
    names: Sequence[str], kept: tuple[Array, Array], slope: Array
) -> tuple[Array, Array]:
    x, weight = kept
    whole, out = _gather(weight, x.dtype, names), slope
    if not any(map(free_axes, names[1:])):
        # With one axis to sum over, the compiler for CPU reads the weight as it lies.
        whole, out = whole.reshape(len(whole), -1), slope.reshape(*x.shape[:-1], -1)
    summed = tuple(range(x.ndim - 1, out.ndim)), tuple(range(1, whole.ndim))
    d_x = jnp.tensordot(out, whole, summed)
    d_weight = kernels.chosen().weight_gradient(x, slope, weight.dtype)
    return d_x, constrain(d_weight, *names)


def _look_up_forward(table: Array, tokens: Array, dtype: DTypeLike):
    return look_up(table, tokens, dtype), (table, tokens)


def _look_up_backward(
    dtype: DTypeLike, kept: tuple[Array, Array], slope: Array
) -> tuple[Array, None]:
    table, tokens = kept
    batch, embed, vocabulary = (free_axes(name) for name in ("batch", "embed", "vocabulary"))

    def local(tokens: Array, slope: Array) -> Array:
        size = table.shape[0] // math.prod(map(jax.lax.axis_size, vocabulary))
        first = jax.lax.axis_index(vocabulary) * size if vocabulary else 0
        # A token of another device's part goes to a row that is none.
        place = jnp.where(tokens < first, size, tokens - first)
        zero = jnp.zeros((size, table.shape[1]), table.dtype)
        d_table = zero.at[place].add(slope.astype(table.dtype), mode="drop")
        return add_up(d_table, 1, batch, embed)

    # Left to the compiler, every device would be sent the slopes of all rows.
    rows = ("batch", "length")
    spread = on_each_device(local, (rows, (*rows, "activation")), ("vocabulary", "embed"))
    return spread(tokens, slope), None


project.defvjp(_project_forward, _project_backward)
look_up.defvjp(_look_up_forward, _look_up_backward)
