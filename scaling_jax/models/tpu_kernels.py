"""Attention on TPU: JAX's splash kernel, which never holds the scores of a whole sequence.

Source: `jax.experimental.pallas.ops.tpu.splash_attention`, after Dao et al. 2022, FlashAttention.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Array, Float

from scaling_jax.mesh import on_each_device

Heads = Float[Array, "batch length heads head"]
AXES = ("batch", "length", "heads", "activation")

# The kernel works on blocks of so many positions, the largest that the length is a multiple of.
BLOCKS = (512, 256, 128)
# Up to here one kernel makes all gradients; it keeps a copy of the query's for each block of keys.
LONGEST_FUSED = 2048


def attention(query: Heads, key: Heads, value: Heads, *, interpret: bool = False) -> Heads:
    """Causal softmax attention, as `jax.nn.dot_product_attention(..., is_causal=True)`.

    Any length: it is filled up to a multiple of a block with positions that none before them sees.
    The compiler cannot split the kernel, so each device runs it on its own rows and heads.
    `interpret` runs it where there is no TPU, slowly.
    """
    local = functools.partial(_attend, interpret=interpret)
    return on_each_device(local, (AXES, AXES, AXES), AXES)(query, key, value)


def _attend(query: Heads, key: Heads, value: Heads, *, interpret: bool) -> Heads:
    length, heads, head = query.shape[1:]
    filled = math.ceil(length / BLOCKS[-1]) * BLOCKS[-1]
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((filled, filled))] * heads)
    kernel = splash_attention.make_splash_mha_single_device(
        mask, block_sizes=_block_sizes(filled), interpret=interpret
    )
    filling = [(0, 0), (0, 0), (0, filled - length), (0, 0)]
    query = query * (1 / math.sqrt(head))
    query, key, value = (jnp.pad(x.swapaxes(1, 2), filling) for x in (query, key, value))
    mixed = jnp.asarray(jax.vmap(kernel)(query, key, value))
    return mixed[:, :, :length].swapaxes(1, 2)


def _block_sizes(length: int) -> splash_attention.BlockSizes:
    block = next(size for size in BLOCKS if length % size == 0)
    fused = length <= LONGEST_FUSED
    return splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )
