"""From the last hidden vectors to the loss, without the logits of a batch ever being there at once.

They would be the largest array by far. Each device works on its own rows and its own part of the
vocabulary, some positions at a time; what they have in common is added up over the mesh in float32.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from scaling_jax import mesh as meshes
from scaling_jax.models import kernels, parameters
from scaling_jax.models.loss import TokenLoss

# Bytes of logits that a device makes at a time.
MOST_LOGITS = 2**28
VECTORS, TABLE, ROWS = (
    ("batch", "length", "activation"),
    ("embed", "vocabulary"),
    ("batch", "length"),
)


@jax.custom_vjp
def mean_loss(
    hidden: Float[Array, "batch length width"],
    output: Float[Array, "width vocabulary"],
    targets: Int[Array, "batch length"],
    z_loss_weight: Float[Array, ""] | float,
) -> tuple[Float32[Array, ""], tuple[Float32[Array, ""], Float32[Array, ""]]]:
    """Mean loss to be minimised, and its parts: cross-entropy and z-loss, without a gradient.

    With logits z of a position, L = log(sum(exp(z))) and weight w, the loss is L - z[target] +
    w L^2, so that its gradient is (1 + 2 w L) exp(z - L), less 1 at the target. It is made in the
    forward pass, while the logits are there: they are computed once.
    """
    scores = score(hidden, output, targets)
    loss = scores.cross_entropy.mean()
    z_loss = z_loss_weight * jnp.square(scores.log_normalizer).mean()
    return loss + z_loss, (loss, z_loss)


def score(
    hidden: Float[Array, "batch length width"],
    output: Float[Array, "width vocabulary"],
    targets: Int[Array, "batch length"],
) -> TokenLoss:
    """`token_loss` of the logits `hidden` x `output`."""
    spread = _Spread.here()

    def local(hidden: Array, output: Array, targets: Array) -> tuple[Array, ...]:
        weight = spread.gather(output.astype(hidden.dtype))

        def one(_: None, rows: Array, wanted: Array) -> tuple[None, tuple[Array, ...]]:
            logits = _logits(rows, weight)
            softmax = _softmax(logits, wanted, spread)
            best = spread.first_id(logits) + jnp.argmax(logits, axis=-1)
            # The first of the highest, wherever it is.
            best = jnp.where(logits.max(axis=-1) == softmax.highest, best, jnp.iinfo(jnp.int32).max)
            correct = spread.lowest(best) == wanted
            return None, (softmax.cross_entropy, softmax.log_normalizer, correct)

        _, scores = _in_parts(one, None, hidden, targets, weight.shape[1])
        return scores

    on_devices = meshes.on_each_device(local, (VECTORS, TABLE, ROWS), (ROWS, ROWS, ROWS))
    return TokenLoss(*on_devices(hidden, output, targets))


class _Spread(NamedTuple):
    """The mesh axes over which rows, rows of the output matrix and the vocabulary are split."""

    batch: tuple[str, ...]
    embed: tuple[str, ...]
    vocabulary: tuple[str, ...]

    @classmethod
    def here(cls) -> "_Spread":
        return cls(*(meshes.free_axes(name) for name in ("batch", "embed", "vocabulary")))

    def gather(self, weight: Array) -> Array:
        """All rows of the output matrix."""
        if not self.embed:
            return weight
        return jax.lax.all_gather(weight, self.embed, axis=0, tiled=True)

    def scatter(self, gradient: Array) -> Array:
        """The sum of the devices' gradients of the output matrix, of the rows kept here."""
        return parameters.add_up(gradient, 0, self.batch, self.embed)

    def over_batch(self, x: Any) -> Any:
        return jax.lax.psum(x, self.batch) if self.batch else x

    def over_vocabulary(self, x: Array) -> Array:
        return jax.lax.psum(x, self.vocabulary) if self.vocabulary else x

    def highest(self, x: Array) -> Array:
        return jax.lax.pmax(x, self.vocabulary) if self.vocabulary else x

    def lowest(self, x: Array) -> Array:
        return jax.lax.pmin(x, self.vocabulary) if self.vocabulary else x

    def first_id(self, logits: Array) -> Array | int:
        """The token of the first of the logits that are here."""
        return jax.lax.axis_index(self.vocabulary) * logits.shape[1] if self.vocabulary else 0


class _Softmax(NamedTuple):
    """Of each position, over the whole vocabulary; `powers` are of the logits that are here."""

    highest: Float32[Array, "position"]
    powers: Float32[Array, "position vocabulary"]
    total: Float32[Array, "position"]
    log_normalizer: Float32[Array, "position"]
    cross_entropy: Float32[Array, "position"]


def _logits(
    rows: Float[Array, "position width"], weight: Float[Array, "width vocabulary"]
) -> Float32[Array, "position vocabulary"]:
    return jnp.tensordot(rows, weight, 1).astype(jnp.float32)


def _softmax(
    logits: Float32[Array, "position vocabulary"], wanted: Int[Array, "position"], spread: _Spread
) -> _Softmax:
    highest = spread.highest(logits.max(axis=-1))
    powers = jnp.exp(logits - highest[:, None])
    total = spread.over_vocabulary(powers.sum(axis=-1))
    normalizer = highest + jnp.log(total)
    place = wanted - spread.first_id(logits)
    chosen = jnp.take_along_axis(logits, place[:, None], axis=-1, mode="clip")[:, 0]
    here = (place >= 0) & (place < logits.shape[1])
    chosen = spread.over_vocabulary(jnp.where(here, chosen, 0))
    return _Softmax(highest, powers, total, normalizer, normalizer - chosen)


def _in_parts(
    one: Callable[[Any, Array, Array], tuple[Any, Any]],
    start: Any,
    hidden: Float[Array, "batch length width"],
    targets: Int[Array, "batch length"],
    vocabulary: int,
) -> tuple[Any, Any]:
    """`one` for some positions after others: the last carry, and the results put together.

    The last part may be filled up with positions of target -1.
    """
    positions = targets.size
    most = 2 ** int(math.log2(max(MOST_LOGITS // (4 * vocabulary), 1)))
    count = math.ceil(positions / most)
    size = math.ceil(positions / count)
    filling = count * size - positions
    rows = jnp.pad(hidden.reshape(positions, -1), [(0, filling), (0, 0)])
    wanted = jnp.pad(targets.reshape(positions), (0, filling), constant_values=-1)
    if count == 1:
        carry, results = one(start, rows, wanted)
    else:
        carry, results = jax.lax.scan(
            lambda carry, part: one(carry, *part),
            start,
            (rows.reshape(count, size, -1), wanted.reshape(count, size)),
        )
        results = jax.tree.map(lambda leaf: leaf.reshape(count * size, *leaf.shape[2:]), results)
    shape = targets.shape
    return carry, jax.tree.map(
        lambda leaf: leaf[:positions].reshape(*shape, *leaf.shape[1:]), results
    )


def _mean_loss_forward(hidden: Array, output: Array, targets: Array, z_loss_weight: Any):
    spread, positions = _Spread.here(), targets.size

    def local(hidden: Array, output: Array, targets: Array, z_loss_weight: Array):
        weight = spread.gather(output.astype(hidden.dtype))

        def one(total: tuple[Array, ...], rows: Array, wanted: Array):
            logits = _logits(rows, weight)
            softmax = _softmax(logits, wanted, spread)
            share = jnp.where(wanted < 0, 0, 1 / positions)
            loss = (softmax.cross_entropy * share).sum()
            z_loss = (z_loss_weight * jnp.square(softmax.log_normalizer) * share).sum()
            factor = (1 + 2 * z_loss_weight * softmax.log_normalizer) * share / softmax.total
            ids = spread.first_id(logits) + jnp.arange(logits.shape[1])
            at_target = jnp.where(ids == wanted[:, None], share[:, None], 0)
            slope = (softmax.powers * factor[:, None] - at_target).astype(rows.dtype)
            d_weight = kernels.chosen().weight_gradient(rows, slope, output.dtype)
            total = jax.tree.map(jnp.add, total, (loss, z_loss, d_weight))
            return total, jnp.tensordot(slope, weight, (1, 1))

        zero = jnp.zeros((), jnp.float32)
        start = (zero, zero, jnp.zeros(weight.shape, output.dtype))
        (loss, z_loss, d_output), d_hidden = _in_parts(one, start, hidden, targets, weight.shape[1])
        losses = spread.over_batch((loss, z_loss))
        return losses, spread.over_vocabulary(d_hidden), spread.scatter(d_output)

    on_devices = meshes.on_each_device(
        local, (VECTORS, TABLE, ROWS, ()), (((), ()), VECTORS, TABLE)
    )
    weight = jnp.asarray(z_loss_weight, jnp.float32)
    (loss, z_loss), d_hidden, d_output = on_devices(hidden, output, targets, weight)
    return (loss + z_loss, (loss, z_loss)), (d_hidden, d_output)


def _mean_loss_backward(kept: tuple[Array, Array], slopes: tuple[Array, Any]):
    return *(each * slopes[0].astype(each.dtype) for each in kept), None, None


mean_loss.defvjp(_mean_loss_forward, _mean_loss_backward)
