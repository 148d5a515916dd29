"""Attention for long sequences where no kernel is at hand: one block of queries after another."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Heads = Float[Array, "batch length heads head"]

BLOCK = 512


def attention(query: Heads, key: Heads, value: Heads) -> Heads:
    """Causal softmax attention, as `jax.nn.dot_product_attention(..., is_causal=True)`.

    Only the scores of a block are there at a time; the gradient makes them again.
    """
    length, (batch, _, heads, head) = query.shape[1], query.shape
    count = math.ceil(length / BLOCK)
    filled = jnp.pad(query, [(0, 0), (0, count * BLOCK - length), (0, 0), (0, 0)])
    blocks = filled.reshape(batch, count, BLOCK, heads, head).swapaxes(0, 1)
    exact = jnp.promote_types(query.dtype, jnp.float32)

    @jax.checkpoint
    def attend(block: tuple[Heads, Int[Array, ""]]) -> Heads:
        queries, first = block
        scores = jnp.einsum("bqhd,bkhd->bhqk", queries, key, preferred_element_type=exact)
        allowed = first + jnp.arange(BLOCK)[:, None] >= jnp.arange(length)
        scores = jnp.where(allowed, scores / math.sqrt(head), -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, value)

    mixed = jax.lax.map(attend, (blocks, BLOCK * jnp.arange(count)))
    return mixed.swapaxes(0, 1).reshape(filled.shape)[:, :length]
