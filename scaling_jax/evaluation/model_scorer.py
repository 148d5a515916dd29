"""The program's own transformer as a scorer of token rows, over all devices, in float32.

Rows may branch: each branch sees the prefix and itself, at the positions that it would have right
after the prefix. Mathematically that is the same as one row for each branch.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Int32

from scaling_jax import mesh as meshes
from scaling_jax.config import ModelConfig
from scaling_jax.evaluation.scoring import TargetScores
from scaling_jax.mesh import constrain
from scaling_jax.models import transformer
from scaling_jax.models.transformer import Block, Params
from scaling_jax.training import distributed


class TransformerScorer:
    """A scorer that computes with `params`, rows spread over the devices of `mesh`.

    Several processes whose devices these are score the same rows together.
    """

    def __init__(self, config: ModelConfig, params: Params, mesh: Mesh):
        model = dataclasses.replace(config, compute_dtype="float32")
        self._score = functools.partial(_compiled(model, mesh), params)
        self._mesh = mesh

    def __call__(
        self,
        tokens: Int32[np.ndarray, "rows length"],
        positions: Int32[np.ndarray, "rows asked"],
        targets: Int32[np.ndarray, "rows asked"],
    ) -> TargetScores:
        """Scores rows without branches (scaling_jax.evaluation.scoring.Scorer)."""
        places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        return self.score_branches(tokens, places, np.zeros_like(tokens), positions, targets)

    def score_branches(
        self,
        tokens: Int32[np.ndarray, "rows length"],
        places: Int32[np.ndarray, "rows length"],
        branches: Int32[np.ndarray, "rows length"],
        positions: Int32[np.ndarray, "rows asked"],
        targets: Int32[np.ndarray, "rows asked"],
    ) -> TargetScores:
        """Scores rows with branches (scaling_jax.evaluation.scoring.BranchScorer)."""
        rows = len(tokens)
        devices = meshes.batch_parts(self._mesh)
        lacking = math.ceil(rows / devices) * devices - rows
        sharding = meshes.sharding(self._mesh, ("batch", "length"))
        inputs = (tokens, places, branches, positions, targets)
        padded = (np.pad(each, ((0, lacking), (0, 0))) for each in inputs)
        placed = (
            jax.make_array_from_callback(each.shape, sharding, each.__getitem__) for each in padded
        )
        with jax.set_mesh(self._mesh), jax.default_matmul_precision("float32"):
            chosen, likeliest = self._score(*placed)
        return TargetScores(np.asarray(chosen).T[:rows], np.asarray(likeliest).T[:rows])


@functools.cache
def _compiled(model: ModelConfig, mesh: Mesh) -> Callable[..., Any]:
    # Replicated: every process reads all of them.
    score = functools.partial(_score, model)
    return distributed.together(jax.jit(score, out_shardings=meshes.sharding(mesh, ())))


def _score(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "rows length"],
    places: Int[Array, "rows length"],
    branches: Int[Array, "rows length"],
    positions: Int[Array, "rows asked"],
    targets: Int[Array, "rows asked"],
) -> tuple[Float[Array, "asked rows"], Int[Array, "asked rows"]]:
    """Log-probability of each target, and the likeliest token in its place.

    Only the asked positions are unembedded, one of each row at a time: the logits of all of them
    at once would not fit into memory.
    """
    hidden = _hidden(config, params, tokens, places, branches)
    asked = jnp.take_along_axis(hidden, positions[..., None], axis=1)

    def unembed(
        each: tuple[Float[Array, "rows width"], Int[Array, "rows"]],
    ) -> tuple[Float[Array, "rows"], Int[Array, "rows"]]:
        vectors, wanted = each
        logits = constrain(vectors @ params["output"], "batch", "vocabulary")
        chosen = jnp.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), logits.argmax(axis=-1)

    return jax.lax.map(unembed, (asked.swapaxes(0, 1), targets.T))


def _hidden(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "rows length"],
    places: Int[Array, "rows length"],
    branches: Int[Array, "rows length"],
) -> Float[Array, "rows length width"]:
    """`Transformer.hidden` of rows with branches."""
    model = transformer.bind(config, params)
    graph, layers = nnx.split(model.blocks)
    length = tokens.shape[1]
    cosine, sine = (table[places] for table in transformer.rotation_tables(config, length))
    before = jnp.tril(jnp.ones((length, length), bool))
    of_prefix = branches[:, None, :] == 0
    seen = (before & (of_prefix | (branches[:, None, :] == branches[..., None])))[:, None]

    def apply_block(
        x: Float[Array, "rows length width"], layer: nnx.State
    ) -> tuple[Float[Array, "rows length width"], None]:
        block: Block = nnx.merge(graph, layer)
        parts = block.attention.split(block.attention_norm(x), (cosine, sine))
        x = x + block.attention.join(jax.nn.dot_product_attention(*parts, mask=seen))
        x = x + block.feed_forward(block.feed_forward_norm(x))
        return constrain(x, "batch", "length", "activation"), None

    table = constrain(model.embedding[...], "vocabulary", "activation")
    x = constrain(table[tokens], "batch", "length", "activation")
    x, _ = jax.lax.scan(apply_block, x, layers)
    return model.norm(x)
