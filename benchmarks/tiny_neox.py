"""A tiny GPT-NeoX with weights drawn from a fixed seed: a model of another kind, to score with.

Vocabulary 50432, width 16, 2 layers, 2 heads, MLP 64 (exact GELU), parallel residual, LayerNorm
with bias, rotary positions on a quarter of each head. The weights are standard normals of
numpy.random.RandomState(20240131), in the order of `_shapes`, times a scale plus an offset, in
float32: nobody needs a file to have the same model.

Source: github.com/EleutherAI/gpt-neox as in Hugging Face transformers, GPTNeoXForCausalLM.
"""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from scaling_jax.evaluation.scoring import TargetScores

VOCABULARY, WIDTH, LAYERS, HEADS, HIDDEN, SEED = 50432, 16, 2, 2, 64, 20240131
HEAD, TURNED, EPSILON = WIDTH // HEADS, WIDTH // HEADS // 4, 1e-5

Weights = dict[str, Float[Array, "..."]]


class TinyNeoX:
    """A scorer (scaling_jax.evaluation.scoring)."""

    def __init__(self) -> None:
        self._weights = draw_weights()

    def __call__(
        self,
        tokens: Int32[np.ndarray, "rows length"],
        positions: Int32[np.ndarray, "rows asked"],
        targets: Int32[np.ndarray, "rows asked"],
    ) -> TargetScores:
        """Scores `targets` at `positions`, one row after the other."""
        rows = [_score(self._weights, *row) for row in zip(tokens, positions, targets, strict=True)]
        chosen, likeliest = zip(*rows, strict=True)
        return TargetScores(np.stack(chosen), np.stack(likeliest))


def draw_weights() -> Weights:
    """The model's weights by their names without "gpt_neox."."""
    random = np.random.RandomState(SEED)
    return {
        name: jnp.asarray(random.standard_normal(shape) * scale + offset, jnp.float32)
        for name, shape, scale, offset in _shapes()
    }


def _shapes() -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    """Name, shape, scale and offset of each weight, in the order in which they are drawn."""
    yield "embed_in.weight", (VOCABULARY, WIDTH), 1.0, 0.0
    for layer in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"layers.{layer}.{norm}.weight", (WIDTH,), 0.1, 1.0
            yield f"layers.{layer}.{norm}.bias", (WIDTH,), 0.1, 0.0
        for name, outputs, inputs, scale in (
            ("attention.query_key_value", 3 * WIDTH, WIDTH, 0.5),
            ("attention.dense", WIDTH, WIDTH, 0.5),
            ("mlp.dense_h_to_4h", HIDDEN, WIDTH, 0.5),
            ("mlp.dense_4h_to_h", WIDTH, HIDDEN, 0.25),
        ):
            yield f"layers.{layer}.{name}.weight", (outputs, inputs), scale, 0.0
            yield f"layers.{layer}.{name}.bias", (outputs,), 0.1, 0.0
    yield "final_layer_norm.weight", (WIDTH,), 0.1, 1.0
    yield "final_layer_norm.bias", (WIDTH,), 0.1, 0.0
    yield "embed_out.weight", (VOCABULARY, WIDTH), 0.7, 0.0


@jax.jit
def _score(
    weights: Weights,
    tokens: Int[Array, "length"],
    positions: Int[Array, "asked"],
    targets: Int[Array, "asked"],
) -> tuple[Float[Array, "asked"], Int[Array, "asked"]]:
    x = weights["embed_in.weight"][tokens]
    for layer in range(LAYERS):
        x = _block(weights, f"layers.{layer}.", x)
    hidden = _norm(weights, "final_layer_norm", x)[positions]
    logits = hidden @ weights["embed_out.weight"].T
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1), logits.argmax(axis=-1)


def _block(weights: Weights, layer: str, x: Float[Array, "length width"]) -> Array:
    """Attention and MLP side by side, each on its own norm of `x`."""
    length = len(x)
    split = _linear(
        weights,
        f"{layer}attention.query_key_value",
        _norm(weights, f"{layer}input_layernorm", x),
    ).reshape(length, HEADS, 3, HEAD)
    query, key, value = _rotate(split[:, :, 0]), _rotate(split[:, :, 1]), split[:, :, 2]
    scores = jnp.einsum("thd,shd->hts", query, key) / math.sqrt(HEAD)
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
    mixed = jnp.einsum("hts,shd->thd", jax.nn.softmax(scores, axis=-1), value)
    attended = _linear(weights, f"{layer}attention.dense", mixed.reshape(length, WIDTH))
    inside = _linear(
        weights, f"{layer}mlp.dense_h_to_4h", _norm(weights, f"{layer}post_attention_layernorm", x)
    )
    fed = _linear(weights, f"{layer}mlp.dense_4h_to_h", jax.nn.gelu(inside, approximate=False))
    return x + attended + fed


def _rotate(x: Float[Array, "length heads head"]) -> Float[Array, "length heads head"]:
    """Turns the first quarter of each head by its position's angles, (first, second) half pairs."""
    frequencies = 10_000.0 ** (-jnp.arange(0, TURNED, 2) / TURNED)
    angles = jnp.outer(jnp.arange(len(x)), frequencies)[:, None]
    first, second, rest = jnp.split(x, [TURNED // 2, TURNED], axis=-1)
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine, rest], axis=-1
    )


def _norm(weights: Weights, name: str, x: Array) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + EPSILON)
    return centred * scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _linear(weights: Weights, name: str, x: Array) -> Array:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
