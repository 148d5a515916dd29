"""Cross-entropy of next-token logits, and the quantity that the z-loss holds near zero."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int


class TokenLoss(NamedTuple):
    """Per predicted token: cross-entropy in nats, log of the softmax's sum, top-1 hit or not."""

    cross_entropy: Float32[Array, "batch length"]
    log_normalizer: Float32[Array, "batch length"]
    correct: Bool[Array, "batch length"]


def token_loss(
    logits: Float32[Array, "batch length vocabulary"], targets: Int[Array, "batch length"]
) -> TokenLoss:
    """Scores `logits` against the tokens that came next."""
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    correct = jnp.argmax(logits, axis=-1) == targets
    return TokenLoss(log_normalizer - chosen, log_normalizer, correct)
