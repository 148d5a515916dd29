"""Which code computes attention and matrix products: the one place where the platform decides.

The plain forms are left to the compilers of accelerators. XLA's for CPU loses time on them, above
all in their gradients, and gets forms of its own (`scaling_jax.models.cpu_kernels`). All forms
compute the same numbers up to rounding.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scaling_jax.models import cpu_kernels

Heads = Float[Array, "batch length heads head"]


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The operations that take nearly all of a step's time.

    Attributes:
      attention: query, key, value -> what each position has mixed from itself and those before it.
      project: x and a weight -> the product over the last axis of `x`, the first of the weight.
    """

    attention: Callable[[Heads, Heads, Heads], Heads]
    project: Callable[
        [Float[Array, "batch length width"], Float[Array, "width *out"]],
        Float[Array, "batch length *out"],
    ]


PLAIN = Kernels(
    attention=functools.partial(jax.nn.dot_product_attention, is_causal=True),
    project=functools.partial(jnp.tensordot, axes=1),
)
CPU = Kernels(attention=cpu_kernels.attention, project=cpu_kernels.project)


def chosen() -> Kernels:
    """The kernels for the platform of the mesh in force; without one, for JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return CPU if platform == "cpu" else PLAIN
