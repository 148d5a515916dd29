"""What suits each platform, in how to compute a step: the one place that knows platforms.

On TPU attention is the splash kernel (`scaling_jax.models.tpu_kernels`), on GPU cuDNN's; neither
ever holds all scores. XLA's compiler for CPU loses time on the plain forms, above all in their
gradients, and gets forms of its own (`scaling_jax.models.cpu_kernels`), which for long sequences
give way to one that holds few scores (`scaling_jax.models.blockwise`). All forms compute the same
numbers up to rounding.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from scaling_jax.models import blockwise, cpu_kernels, tpu_kernels

Heads = Float[Array, "batch length heads head"]

# Up to here all scores of a head may be there at once where no kernel does without them.
LONGEST_WHOLE = 2048


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The operations that take nearly all of a step's time, and how much is done at once.

    Attributes:
      attention: query, key, value -> what each position has mixed from itself and those before it.
      weight_gradient: x, d loss / d y and a type -> d loss / d w, in that type, where y = x w.
      most_activations: numbers that a device should make in one layer at a time; a batch that makes
        more is done in parts, so that what a layer writes is still in the cache when it is read.
      most_unrolled: models of up to so many layers are written out, the layers of deeper ones are
        scanned: that compiles faster and takes less memory, but stacks what it keeps.
    """

    attention: Callable[[Heads, Heads, Heads], Heads]
    weight_gradient: Callable[
        [Float[Array, "*batch width"], Float[Array, "..."], DTypeLike],
        Float[Array, "width *out"],
    ]
    most_activations: float = math.inf
    most_unrolled: int = 4


def chosen() -> Kernels:
    """The kernels for the platform of the mesh in force; without one, for JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return {"cpu": CPU, "tpu": TPU, "gpu": GPU, "cuda": GPU}.get(platform, PLAIN)


def _weight_gradient(x: Array, slope: Array, dtype: DTypeLike) -> Array:
    batch = tuple(range(x.ndim - 1))
    return jnp.tensordot(x, slope, (batch, batch), preferred_element_type=dtype)


def _cpu_attention(query: Heads, key: Heads, value: Heads) -> Heads:
    whole = query.shape[1] <= LONGEST_WHOLE
    return (cpu_kernels if whole else blockwise).attention(query, key, value)


def _gpu_attention(query: Heads, key: Heads, value: Heads) -> Heads:
    """cuDNN's where it takes the type and the width of the heads."""
    if query.dtype == jnp.bfloat16 and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128:
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation="cudnn"
        )
    whole = query.shape[1] <= LONGEST_WHOLE
    return (PLAIN if whole else blockwise).attention(query, key, value)


PLAIN = Kernels(
    attention=functools.partial(jax.nn.dot_product_attention, is_causal=True),
    weight_gradient=_weight_gradient,
)
CPU = Kernels(
    attention=_cpu_attention,
    weight_gradient=cpu_kernels.weight_gradient,
    most_activations=2**22,  # 16 MB in float32
    most_unrolled=8,
)
GPU = Kernels(attention=_gpu_attention, weight_gradient=_weight_gradient)
TPU = Kernels(attention=tpu_kernels.attention, weight_gradient=_weight_gradient)
