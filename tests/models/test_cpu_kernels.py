"""The hand-written gradients against those JAX derives of the plain forms, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_jax.models import cpu_kernels


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def plain_attention(query, key, value):
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    scores = jnp.where(np.tri(query.shape[1], dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), value)


def value_and_gradients(function, slope, *arguments):
    value, pull_back = jax.vjp(function, *arguments)
    return value, *pull_back(slope)


# One block, whole blocks, a last block that is cut short; a single position.
@pytest.mark.parametrize(
    "length",
    [1, 63, 65, 256, *(pytest.param(more, marks=pytest.mark.slow) for more in (2, 64, 130, 259))],
)
def test_attention_and_its_gradients_are_those_of_the_plain_form(length):
    query, key, value, slope = (3 * draw(2, length, 3, 4, seed=seed) for seed in range(4))
    expected = value_and_gradients(plain_attention, slope, query, key, value)
    found = value_and_gradients(cpu_kernels.attention, slope, query, key, value)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-9, atol=1e-11)


def test_attention_is_finite_where_scores_are_huge():
    query, key, value, slope = (100 * draw(1, 70, 2, 8, seed=seed) for seed in range(4))
    found = value_and_gradients(cpu_kernels.attention, slope, query, key, value)
    assert all(np.isfinite(each).all() for each in found)


def test_attention_in_bfloat16_is_near_and_stays_in_bfloat16():
    exact = [draw(2, 130, 2, 8, seed=seed) for seed in range(4)]
    query, key, value, slope = (each.astype(jnp.bfloat16) for each in exact)
    expected = value_and_gradients(plain_attention, exact[3], *exact[:3])
    found = value_and_gradients(cpu_kernels.attention, slope, query, key, value)
    for one, other in zip(expected, found, strict=True):
        assert other.dtype == jnp.bfloat16
        assert np.linalg.norm(other - one) < 0.02 * np.linalg.norm(one)


@pytest.mark.parametrize("out", [(3,), (7,), (2, 9)])
def test_the_gradient_of_a_weight_is_that_of_the_plain_form(out):
    x, weight, slope = draw(2, 5, 6), draw(6, *out, seed=1), draw(2, 5, *out, seed=2)
    _, pull_back = jax.vjp(lambda weight: jnp.tensordot(x, weight, 1), weight)
    found = cpu_kernels.weight_gradient(x, slope, jnp.float64)
    np.testing.assert_allclose(found, pull_back(slope)[0], rtol=1e-12, atol=1e-12)
