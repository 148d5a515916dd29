"""What happens to activations between matrix products, with gradients written by hand.

LayerNorm without a bias, RMSNorm and the gate of SwiGLU would each, left to differentiation, keep
several arrays for the backward pass and go over them one by one. These keep what they were given.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scaling_jax.mesh import constrain

NORM_EPSILON = 1e-5


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def normalize(
    x: Float[Array, "*batch width"], gain: Float[Array, "width"], centred: bool
) -> Float[Array, "*batch width"]:
    """Brings the last axis to mean square 1, times `gain` in the type of `x`; float32 inside.

    Where `centred`, the mean is taken away first (LayerNorm); else it is not (RMSNorm, Zhang and
    Sennrich 2019). With n the normalised x and s its scale, the gradients of a loss with g = gain *
    d loss / d y are dx = s (g - mean(g) - n mean(g n)), the first mean only where centred, and
    d gain = sum(n * d loss / d y), which is not rounded.
    """
    return _normalize(x, gain, centred)[0]


def _normalize(x: Array, gain: Array, centred: bool):
    exact = x.astype(jnp.float32)
    mean = exact.mean(axis=-1, keepdims=True) if centred else jnp.zeros((), jnp.float32)
    scale = jax.lax.rsqrt(jnp.square(exact - mean).mean(axis=-1, keepdims=True) + NORM_EPSILON)
    rounded = gain.astype(x.dtype).astype(jnp.float32)
    return ((exact - mean) * scale * rounded).astype(x.dtype), (x, rounded, mean, scale)


def _normalize_backward(centred: bool, kept: tuple[Array, ...], slope: Array):
    x, gain, mean, scale = kept
    normal = (x.astype(jnp.float32) - mean) * scale
    slope = slope.astype(jnp.float32)
    d_gain = jnp.sum(slope * normal, axis=range(x.ndim - 1))
    slope = slope * gain
    shared = normal * jnp.mean(slope * normal, axis=-1, keepdims=True)
    if centred:
        shared = shared + jnp.mean(slope, axis=-1, keepdims=True)
    return (scale * (slope - shared)).astype(x.dtype), constrain(d_gain, "gain")


@jax.custom_vjp
def gate(both: Float[Array, "*batch 2 hidden"]) -> Float[Array, "*batch hidden"]:
    """SwiGLU's silu(gate) * up, of the gate and the up that lie on the last axis but one.

    The gradients are d gate = dy up s (1 + gate (1 - s)) and d up = dy gate s, with s the sigmoid
    of the gate.
    """
    opening, up = (both[..., place, :].astype(jnp.float32) for place in (0, 1))
    return (opening * _sigmoid(opening) * up).astype(both.dtype)


def _gate_backward(both: Array, slope: Array) -> tuple[Array]:
    # With the barrier the sigmoid is computed again: as fast as reading it, and nothing is kept.
    exact = jax.lax.optimization_barrier(both).astype(jnp.float32)
    opening, up = exact[..., 0, :], exact[..., 1, :]
    share = _sigmoid(opening)
    slope = slope.astype(jnp.float32) * share
    slopes = slope * up * (1 + opening * (1 - share)), slope * opening
    return (jnp.stack(slopes, axis=-2).astype(both.dtype),)


def _sigmoid(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """1 / (1 + exp(-x)) by way of tanh, which XLA on CPU does faster."""
    return 0.5 + 0.5 * jnp.tanh(0.5 * x)


normalize.defvjp(_normalize, _normalize_backward)
gate.defvjp(lambda both: (gate(both), both), _gate_backward)
