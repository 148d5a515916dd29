import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from scaling_jax.models.loss import token_loss

# XLA takes subnormal numbers for 0.
NUMBERS = st.floats(-50, 50, width=32, allow_subnormal=False)
LOGITS = arrays.arrays(np.float32, (2, 3, 5), elements=NUMBERS)
TARGETS = arrays.arrays(np.int32, (2, 3), elements=st.integers(0, 4))


@given(logits=LOGITS, targets=TARGETS)
def test_cross_entropy_is_minus_the_log_softmax_of_the_target(logits, targets):
    scores = [np.asarray(part) for part in token_loss(jnp.asarray(logits), jnp.asarray(targets))]
    cross_entropy, log_normalizer, correct = scores
    expected = -scipy.special.log_softmax(np.float64(logits), axis=-1)
    for place in np.ndindex(2, 3):
        wanted = expected[(*place, targets[place])]
        assert cross_entropy[place] == pytest.approx(wanted, rel=1e-5, abs=2e-5)
        total = math.log(math.fsum(math.exp(logit) for logit in logits[place].tolist()))
        assert log_normalizer[place] == pytest.approx(total, rel=1e-5, abs=1e-5)
        assert correct[place] == (np.argmax(logits[place]) == targets[place])


def test_equal_logits_lose_the_log_of_the_vocabulary():
    scores = token_loss(jnp.zeros((1, 4, 50)), jnp.arange(4)[None])
    np.testing.assert_allclose(scores.cross_entropy, math.log(50), rtol=1e-6)
    assert scores.correct.tolist() == [[True, False, False, False]]


def test_a_shift_of_all_logits_moves_the_normalizer_alone():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 7)), jnp.float32)
    targets = jnp.ones((2, 3), jnp.int32)
    before, after = token_loss(logits, targets), token_loss(logits + 8, targets)
    np.testing.assert_allclose(after.cross_entropy, before.cross_entropy, atol=1e-5)
    np.testing.assert_allclose(after.log_normalizer, before.log_normalizer + 8, rtol=1e-6)


def test_huge_logits_do_not_overflow():
    logits = jnp.asarray([[[3e4, -3e4], [-3e4, 3e4]]])
    scores = token_loss(logits, jnp.asarray([[0, 0]]))
    assert scores.cross_entropy.tolist() == [[0, 6e4]]
    assert scores.log_normalizer.tolist() == [[3e4, 3e4]]
