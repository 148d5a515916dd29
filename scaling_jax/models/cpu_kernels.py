"""Attention and matrix products with gradients written by hand, in the forms XLA on CPU does fast.

A core there reaches its peak in matrix products whose operands lie as they are read; what costs is
each further pass over an array that has left the cache: a transposed copy, a padded sum, a
reduction along rows.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

Heads = Float[Array, "batch length heads head"]
ByHead = Float[Array, "batch heads length head"]

# Queries go in this many blocks, each past the keys that come after it: of 8 parts of the scores
# 5 are computed. Blocks that are too small would cost more than they save.
BLOCKS, SMALLEST_BLOCK = 4, 64


@jax.custom_vjp
def attention(query: Heads, key: Heads, value: Heads) -> Heads:
    """Causal softmax attention, as `jax.nn.dot_product_attention(..., is_causal=True)`.

    With S = Q K' / sqrt(head) where allowed, L = log(sum(exp(S))) of each row, P = exp(S - L) and
    the result O = P V, the gradients of a loss with dO = d loss / d O are

        dV = P' dO,   dS = P * (dO V' - rowsum(dO * O)),   dQ = dS K / sqrt,   dK = dS' Q / sqrt.

    Only O and L are kept for them. The row sum runs over a head, not over the keys (Dao et al.
    2022, FlashAttention, eq. 4), and P and S are computed transposed, as dV and dK read them.
    """
    return _attend(query, key, value)[0]


def weight_gradient(
    x: Float[Array, "*batch width"], slope: Float[Array, "..."], dtype: DTypeLike
) -> Float[Array, "width *out"]:
    """Gradient x' dy = (dy' x)' of the weight in y = x w, of shape width x out.

    The factor that is transposed is copied for that, so the narrower of x and dy is.
    """
    batch = tuple(range(x.ndim - 1))
    if x.shape[-1] <= math.prod(slope.shape[x.ndim - 1 :]):
        return jnp.tensordot(x, slope, (batch, batch), preferred_element_type=dtype)
    transposed = jnp.tensordot(slope, x, (batch, batch), preferred_element_type=dtype)
    # Without the barrier the compiler would change it back.
    return jnp.moveaxis(jax.lax.optimization_barrier(transposed), -1, 0)


def _attend(query: Heads, key: Heads, value: Heads):
    query, key, value = (_by_head(part) for part in (query, key, value))
    exact = jnp.promote_types(query.dtype, jnp.float32)
    mixed, logs = [], []
    for block, seen in _blocks(query.shape[2]):
        scores = jnp.einsum(
            "bhqd,bhkd->bhqk", query[:, :, block], key[:, :, seen], preferred_element_type=exact
        )
        allowed = jnp.arange(block.start, block.stop)[:, None] >= jnp.arange(seen.stop)
        scores = jnp.where(allowed, scores * _scale(query), -jnp.inf)
        highest = scores.max(axis=-1, keepdims=True)
        powers = jnp.exp(scores - highest)
        total = powers.sum(axis=-1, keepdims=True)
        sums = jnp.matmul(
            powers.astype(value.dtype), value[:, :, seen], preferred_element_type=exact
        )
        mixed.append((sums / total).astype(value.dtype))
        logs.append((highest + jnp.log(total))[..., 0])
    result = jnp.concatenate(mixed, axis=2)
    return _by_head(result), (query, key, value, result, jnp.concatenate(logs, axis=2))


def _attend_backward(kept, slope: Heads) -> tuple[Heads, Heads, Heads]:
    query, key, value, result, logs = kept
    slope = _by_head(slope)
    rowsum = jnp.sum(slope * result, axis=-1, dtype=logs.dtype)
    length, scale = query.shape[2], _scale(query)
    d_query, d_key, d_value = [], jnp.zeros_like(key), jnp.zeros_like(value)
    for block, seen in _blocks(length):
        queries, slopes = query[:, :, block], slope[:, :, block]
        keys, values = key[:, :, seen], value[:, :, seen]
        scores, d_weights = (
            jnp.einsum("bhkd,bhqd->bhkq", *pair, preferred_element_type=logs.dtype)
            for pair in ((keys, queries), (values, slopes))
        )
        allowed = jnp.arange(block.start, block.stop) >= jnp.arange(seen.stop)[:, None]
        weights = jnp.where(allowed, jnp.exp(scores * scale - logs[:, :, None, block]), 0)
        d_scores = weights * (d_weights - rowsum[:, :, None, block]) * scale
        weights, d_scores = weights.astype(value.dtype), d_scores.astype(value.dtype)
        d_query.append(jnp.einsum("bhkq,bhkd->bhqd", d_scores, keys))
        d_key += _extend(d_scores @ queries, length)
        d_value += _extend(weights @ slopes, length)
    return _by_head(jnp.concatenate(d_query, axis=2)), _by_head(d_key), _by_head(d_value)


def _blocks(length: int) -> list[tuple[slice, slice]]:
    """Blocks of queries, and the keys that at least one query of each may see."""
    size = max(math.ceil(length / BLOCKS), SMALLEST_BLOCK)
    ends = [min(start + size, length) for start in range(0, length, size)]
    return [(slice(start, end), slice(end)) for start, end in zip([0, *ends], ends, strict=False)]


def _by_head(x: Array) -> Array:
    """Swaps the axes of positions and heads."""
    return x.swapaxes(1, 2)


def _scale(query: ByHead) -> float:
    return 1 / math.sqrt(query.shape[-1])


def _extend(x: ByHead, length: int) -> ByHead:
    return jnp.pad(x, [(0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)])


attention.defvjp(_attend, _attend_backward)
