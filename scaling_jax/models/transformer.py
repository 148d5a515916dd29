"""The decoder-only transformer of open_lm, in Flax NNX: layers stacked on a leading axis, scanned.

Pre-norm blocks with gain-only LayerNorm, rotary positions, LayerNorm over the whole query and key
vectors before the heads are split, SwiGLU, and an output matrix of its own; with `norm: rms_norm`
and without `qk_norm` that of Llama. Parameters are kept in float32; `ModelConfig.compute_dtype` is
the type of activations and of the parameters inside matrix products. Each parameter carries the
logical names of its axes (`scaling_jax.mesh.RULES`).

Source: github.com/mlfoundations/open_lm, `open_lm/model.py`; Gadre et al. 2024, appendix B.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int

from scaling_jax.config import ModelConfig
from scaling_jax.mesh import constrain
from scaling_jax.models import activations, kernels, parameters

# What remat calls the matrix products with weights.
PRODUCT = "product"

Params = dict[str, Any]
Rotation = tuple[Float[Array, "*batch length half_head"], Float[Array, "*batch length half_head"]]
Heads = kernels.Heads


class Norm(nnx.Module):
    """Brings the last axis to mean square 1, times a gain; statistics in float32.

    `layer_norm` takes the mean away first; `rms_norm` does not (Zhang and Sennrich 2019).
    """

    def __init__(self, config: ModelConfig):
        self.centred = config.norm == "layer_norm"
        self.gain = nnx.Param(jnp.ones(config.width), out_sharding=("gain",))

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Normalises `x`."""
        return activations.normalize(x, self.gain[...], self.centred)


class Attention(nnx.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, key: jax.Array, depth: Int[Array, ""]):
        width = config.width
        key_in, key_out = jax.random.split(key)
        self.config = config
        # Query, key and value on an axis of their own, so that `heads` alone is split.
        self.qkv = _normal(key_in, (width, 3, width), _scale(width), ("embed", "qkv", "heads"))
        self.out = _normal(key_out, (width, width), _scale(width, depth), ("heads", "embed"))
        if config.qk_norm:
            self.query_norm = Norm(config)
            self.key_norm = Norm(config)

    def __call__(
        self, x: Float[Array, "batch length width"], rotation: Rotation
    ) -> Float[Array, "batch length width"]:
        """Mixes each position of `x` with those before it."""
        query, key, value = self.split(x, rotation)
        return self.join(kernels.chosen().attention(query, key, value))

    def split(self, x: Float[Array, "batch length width"], rotation: Rotation) -> tuple[Heads, ...]:
        """Query, key and value of each head; the first two turned by their positions."""
        # Left in the order the product has them: moving the axis of three would copy everything.
        qkv = _project(x, self.qkv)
        qkv = constrain(qkv, "batch", "length", "qkv", "heads")
        # Not by indexing, whose gradient is a padded sum of three; that of a split is one array.
        query, key, value = (part[:, :, 0] for part in jnp.split(qkv, 3, axis=2))
        if self.config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        split = (*x.shape[:2], self.config.heads, self.config.head_width)
        query, key, value = (part.reshape(split) for part in (query, key, value))
        return rotate(query, rotation), rotate(key, rotation), value

    def join(self, mixed: Heads) -> Float[Array, "batch length width"]:
        """From what each head has mixed to one vector a position."""
        return _project(mixed.reshape(*mixed.shape[:2], -1), self.out)


class FeedForward(nnx.Module):
    """SwiGLU: silu(gate) * up, projected down."""

    def __init__(self, config: ModelConfig, key: jax.Array, depth: Int[Array, ""]):
        width, hidden = config.width, config.hidden_width
        key_in, key_out = jax.random.split(key)
        self.gate_up = _normal(
            key_in, (width, 2, hidden), _scale(width), ("embed", "gate_up", "mlp")
        )
        self.down = _normal(key_out, (hidden, width), _scale(hidden, depth), ("mlp", "embed"))

    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        """Transforms each position of `x` by itself."""
        both = _project(x, self.gate_up)
        both = constrain(both, "batch", "length", "gate_up", "mlp")
        return _project(activations.gate(both), self.down)


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, key: jax.Array, depth: Int[Array, ""]):
        key_attention, key_feed_forward = jax.random.split(key)
        self.attention_norm = Norm(config)
        self.attention = Attention(config, key_attention, depth)
        self.feed_forward_norm = Norm(config)
        self.feed_forward = FeedForward(config, key_feed_forward, depth)

    def __call__(
        self, x: Float[Array, "batch length width"], rotation: Rotation
    ) -> Float[Array, "batch length width"]:
        """Passes `x` through the layer."""
        x = x + self.attention(self.attention_norm(x), rotation)
        x = x + self.feed_forward(self.feed_forward_norm(x))
        return constrain(x, "batch", "length", "activation")


class Transformer(nnx.Module):
    """Token ids to next-token logits."""

    # Axis names are only labels here: the sharding is applied by whoever places the arrays.
    @nnx.use_eager_sharding(False)
    def __init__(self, config: ModelConfig, key: jax.Array):
        key_embedding, key_blocks, key_output = jax.random.split(key, 3)
        vocabulary, width, layers = config.vocabulary_size, config.width, config.layers
        self.config = config
        self.embedding = _normal(
            key_embedding, (vocabulary, width), _scale(width), ("vocabulary", "embed")
        )
        stack = nnx.vmap(
            functools.partial(Block, config),
            in_axes=(0, 0),
            transform_metadata={nnx.PARTITION_NAME: "layer"},
        )
        self.blocks = stack(jax.random.split(key_blocks, layers), jnp.arange(layers))
        self.norm = Norm(config)
        self.output = _normal(
            key_output, (width, vocabulary), _scale(width), ("embed", "vocabulary")
        )

    def hidden(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length width"]:
        """The normalised vectors from which the logits are read."""
        config = self.config
        x = parameters.look_up(self.embedding[...], tokens, config.compute_dtype)
        x = constrain(x, "batch", "length", "activation")  # pyright: ignore[reportArgumentType]
        rotation = rotation_tables(config, tokens.shape[1])
        graph, layers = nnx.split(self.blocks)

        def apply_block(
            x: Float[Array, "batch length width"], layer: nnx.State
        ) -> tuple[Float[Array, "batch length width"], None]:
            return nnx.merge(graph, layer)(x, rotation), None

        unroll = config.layers <= kernels.chosen().most_unrolled
        x, _ = jax.lax.scan(_remat(apply_block, config.remat), x, layers, unroll=unroll)
        return self.norm(x)

    def __call__(
        self, tokens: Int[Array, "batch length"]
    ) -> Float32[Array, "batch length vocabulary"]:
        """Logits of the token that follows each position."""
        hidden = self.hidden(tokens)
        logits = _project(hidden, self.output)
        return constrain(logits, "batch", "length", "vocabulary").astype(jnp.float32)


def initialize(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters, as nested dictionaries of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, key), nnx.Param))


def bind(config: ModelConfig, params: Params) -> Transformer:
    """The model that computes with `params`."""
    graph, state = _abstract(config)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def parameter_axes(config: ModelConfig) -> Params:
    """The logical axis names of each parameter, nested as the parameters are."""
    _, state = _abstract(config)
    return nnx.to_pure_dict(
        jax.tree.map(
            lambda variable: variable.replace(variable.get_metadata()["out_sharding"]),
            state,
            is_leaf=lambda node: isinstance(node, nnx.Variable),
        )
    )


def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef[Transformer], nnx.State]:
    """The model's structure, and its parameters with shapes in place of numbers."""
    # Not nnx.eval_shape: under a mesh that takes the axis names for those of the mesh.
    return jax.eval_shape(lambda: nnx.split(Transformer(config, jax.random.key(0)), nnx.Param))


def rotation_tables(config: ModelConfig, length: int) -> Rotation:
    """Cosines and sines of the rotary angles, in the compute dtype.

    With `rope_frequency_dtype: bfloat16` the frequencies are rounded first, as in the paper's runs:
    that turns late positions by up to 2.5 rad.
    """
    half = config.head_width // 2
    frequencies = config.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    frequencies = frequencies.astype(config.rope_frequency_dtype).astype(jnp.float32)
    angles = jnp.outer(jnp.arange(length, dtype=jnp.float32), frequencies)
    dtype = config.compute_dtype
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: Heads, rotation: Rotation) -> Heads:
    """Turns each (first half, second half) pair of a head by its position's angle (GPT-NeoX)."""
    cosine, sine = (table[..., None, :] for table in rotation)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], axis=-1
    )


def _project(
    x: Float[Array, "batch length width"], weight: nnx.Param
) -> Float[Array, "batch length *out"]:
    """`x` times a weight."""
    values = weight[...]
    # Inside the scan the axis of layers is gone, but its name is not.
    names = weight.get_metadata()["out_sharding"][-values.ndim :]
    return checkpoint_name(parameters.project(x, values, names), PRODUCT)


def _scale(fan_in: int, depth: Int[Array, ""] | None = None) -> Float[Array, ""] | float:
    """Standard deviation of an initial weight; outputs to the residual shrink with depth."""
    scale = 1 / math.sqrt(fan_in)
    return scale if depth is None else scale / jnp.sqrt(2 * (depth + 1.0))


def _normal(
    key: jax.Array, shape: tuple[int, ...], scale: Float[Array, ""] | float, axes: tuple[str, ...]
) -> nnx.Param:
    """Normal weights cut off at 3 standard deviations, not corrected for the cut."""
    return nnx.Param(scale * jax.random.truncated_normal(key, -3, 3, shape), out_sharding=axes)


def _remat(function, policy: str):
    """`function` that keeps for its backward pass only what `policy` says (ModelConfig.remat)."""
    if policy == "none":
        return function
    keep = {
        # By name: inside a gradient written by hand no policy sees the product itself.
        "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
        "block": jax.checkpoint_policies.nothing_saveable,
    }[policy]
    return jax.checkpoint(function, policy=keep, prevent_cse=False)
