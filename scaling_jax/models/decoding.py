"""Text from a model, one token after another, greedy or sampled.

The prompts pass through the model once; after that only the newest token of each row does, and the
keys and values of those before it come from a cache. Rows may differ in length: each writes to the
cache at its own positions, and sees no position after its own.

A model knows no position beyond its sequence length, so that is where generation ends, unless the
window is asked to slide: then each token is predicted anew from the sequence_length tokens before
it, as in training, and nothing can be cached.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from scaling_jax.config import ModelConfig
from scaling_jax.errors import UserError
from scaling_jax.models import transformer
from scaling_jax.models.transformer import Block, Params


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its logits.

    Attributes:
      temperature: divides the logits; 0 takes the most probable token.
      top_k: only so many of the most probable tokens may be drawn.
      top_p: only the most probable tokens that together reach this probability may be drawn
        (Holtzman et al. 2020), after temperature and `top_k`.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature}: give 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k}: give 1 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: give a number above 0, at most 1")


GREEDY = Sampling(temperature=0.0)


class Cache(NamedTuple):
    """Keys, turned by their positions, and values of every layer."""

    keys: Float[Array, "layer batch length heads head"]
    values: Float[Array, "layer batch length heads head"]


class _Rows(NamedTuple):
    """Rows being written: `lengths` counts the tokens of each, the prompt's too."""

    tokens: Int[Array, "batch room"]
    lengths: Int[Array, "batch"]
    ended: Bool[Array, "batch"]


def generate(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | None = None,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    end_of_text: int | None = None,
    vocabulary_size: int | None = None,
    slide: bool = False,
) -> list[list[int]]:
    """Continues each prompt.

    Args:
      prompts: token ids; each row gets random numbers of its own.
      max_tokens: how many to add; None fills the model's sequence length.
      end_of_text: the token that ends a row early; it is not among those returned.
      vocabulary_size: ids from here on are padding of the model's tables and never chosen.
      slide: go on beyond the sequence length, each token predicted from the last tokens only.

    Returns:
      The new tokens of each prompt.

    Raises:
      UserError: a prompt is empty, has an unknown id, or it or what is asked for does not fit into
        the sequence length.
    """
    longest, length = max(map(len, prompts)), config.sequence_length
    _check_prompts(config, prompts)
    # The last token is only predicted: it needs no position.
    room = length + 1 - longest
    count = room if max_tokens is None else max_tokens
    if room < 1 and (not slide or max_tokens is None):
        raise UserError(f"a prompt of {longest} tokens fills sequence_length={length} already")
    if count < 1:
        raise UserError(f"max_tokens={max_tokens}: give 1 or more")
    if count > room and not slide:
        raise UserError(
            f"a prompt of {longest} tokens and max_tokens={count} go beyond sequence_length="
            f"{length}, where the model was never trained: at most {room} fit without slide"
        )
    tokens = np.zeros((len(prompts), longest + count), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    limit = vocabulary_size or config.vocabulary_size
    rows = _Rows(jnp.asarray(tokens), jnp.asarray(lengths), jnp.zeros(len(prompts), bool))
    written = _write(
        config,
        (longest, max(min(count, room), 0), count),
        params,
        rows,
        jax.random.key(seed),
        (
            sampling.temperature,
            min(sampling.top_k or limit, limit),
            # Rounding must not cut off the tail where nothing is to be cut off.
            sampling.top_p if sampling.top_p < 1 else float("inf"),
        ),
        -1 if end_of_text is None else end_of_text,
        limit,
    )
    new = jax.device_get(written)
    ends = new.lengths - new.ended
    return [
        row[start:end].tolist() for row, start, end in zip(new.tokens, lengths, ends, strict=True)
    ]


def empty_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """A cache for `length` positions, in the compute dtype."""
    shape = (config.layers, batch, length, config.heads, config.head_width)
    return Cache(*(jnp.zeros(shape, config.compute_dtype) for _ in range(2)))


def advance(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    tokens: Int[Array, "batch new"],
    positions: Int[Array, "batch new"],
) -> tuple[Float[Array, "batch new width"], Cache]:
    """Passes new tokens through the model; the cache must hold all positions before theirs.

    Returns:
      The normalised vectors from which `read_logits` reads, and the cache with the new tokens.
    """
    model = transformer.bind(config, params)
    graph, layers = nnx.split(model.blocks)
    length = cache.keys.shape[2]
    cosine, sine = (table[positions] for table in transformer.rotation_tables(config, length))
    seen = (jnp.arange(length) <= positions[..., None])[:, None]
    rows = jnp.arange(len(tokens))[:, None]

    def apply_block(carry, numbered):
        x, cache = carry
        number, layer = numbered
        block: Block = nnx.merge(graph, layer)
        query, key, value = block.attention.split(block.attention_norm(x), (cosine, sine))
        cache = Cache(
            cache.keys.at[number, rows, positions].set(key),
            cache.values.at[number, rows, positions].set(value),
        )
        mixed = jax.nn.dot_product_attention(
            query, cache.keys[number], cache.values[number], mask=seen
        )
        x = x + block.attention.join(mixed)
        return (x + block.feed_forward(block.feed_forward_norm(x)), cache), None

    x = model.embedding[...].astype(config.compute_dtype)[tokens]
    numbered = (jnp.arange(config.layers), layers)
    (x, cache), _ = jax.lax.scan(apply_block, (x, cache), numbered)
    return model.norm(x), cache


def read_logits(
    params: Params, hidden: Float[Array, "batch width"]
) -> Float32[Array, "batch vocabulary"]:
    """Logits of the token after the one that `hidden` stands for."""
    return (hidden @ params["output"].astype(hidden.dtype)).astype(jnp.float32)


def choose(
    logits: Float32[Array, "batch vocabulary"],
    keys: Key[Array, "batch"],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, "batch"]:
    """One token a row, drawn with the row's own key as `Sampling` says."""
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)
    ordered = jnp.sort(scaled, axis=-1, descending=True)
    inside = jnp.arange(logits.shape[-1]) < top_k
    probabilities = jax.nn.softmax(jnp.where(inside, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = jnp.sum(inside & (before < top_p), axis=-1, keepdims=True)
    least = jnp.take_along_axis(ordered, kept - 1, axis=-1)
    drawn = jax.vmap(jax.random.categorical)(keys, jnp.where(scaled >= least, scaled, -jnp.inf))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _write(
    config: ModelConfig,
    plan: tuple[int, int, int],
    params: Params,
    rows: _Rows,
    key: Key[Array, ""],
    sampling: tuple[Float[Array, ""], Int[Array, ""], Float[Array, ""]],
    end_of_text: Int[Array, ""],
    limit: Int[Array, ""],
) -> _Rows:
    """Fills `rows`. The plan: the longest prompt, how many tokens are written by the cache, all."""
    longest, cached, count = plan
    every = jnp.arange(len(rows.tokens))
    streams = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, every)
    allowed = jnp.arange(config.vocabulary_size) < limit

    def append(rows: _Rows, hidden: Float[Array, "batch width"], step: Int[Array, ""]) -> _Rows:
        logits = jnp.where(allowed, read_logits(params, hidden), -jnp.inf)
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(streams, step)
        token = choose(logits, keys, *sampling)
        going = ~rows.ended
        tokens = rows.tokens.at[every, rows.lengths].set(
            jnp.where(going, token, end_of_text), mode="drop"
        )
        return _Rows(tokens, rows.lengths + going, rows.ended | (token == end_of_text))

    def before(last: int):
        return lambda carry: (carry[0] < last) & ~carry[1].ended.all()

    def from_cache(carry):
        step, rows, cache = carry
        latest = (rows.lengths - 1)[:, None]
        hidden, cache = advance(config, params, cache, rows.tokens[every[:, None], latest], latest)
        return step + 1, append(rows, hidden[:, 0], step), cache

    def from_window(carry):
        step, rows = carry
        starts = jnp.maximum(rows.lengths - config.sequence_length, 0)
        window = starts[:, None] + jnp.arange(config.sequence_length)
        hidden = transformer.bind(config, params).hidden(rows.tokens[every[:, None], window])
        return step + 1, append(rows, hidden[every, rows.lengths - starts - 1], step)

    step = jnp.int32(0)
    if cached:
        positions = jnp.broadcast_to(jnp.arange(longest), (len(every), longest))
        cache = empty_cache(config, len(every), longest + cached - 1)
        hidden, cache = advance(config, params, cache, rows.tokens[:, :longest], positions)
        rows, step = append(rows, hidden[every, rows.lengths - 1], step), step + 1
        step, rows, _ = jax.lax.while_loop(before(cached), from_cache, (step, rows, cache))
    return jax.lax.while_loop(before(count), from_window, (step, rows))[1]


def _check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]]) -> None:
    for prompt in prompts:
        if not len(prompt):
            raise UserError("the prompt is empty: give at least one token")
        if not 0 <= min(prompt) <= max(prompt) < config.vocabulary_size:
            raise UserError(
                f"the prompt's ids go from {min(prompt)} to {max(prompt)}, those of the model "
                f"from 0 to {config.vocabulary_size - 1}"
            )
