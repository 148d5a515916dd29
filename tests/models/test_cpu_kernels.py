"""The hand-written gradients against those JAX derives of the plain forms, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from scaling_jax.config import MeshConfig
from scaling_jax.mesh import make_mesh
from scaling_jax.models import cpu_kernels, kernels


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
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130, 256, 259])
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
def test_project_and_its_gradients_are_those_of_the_plain_form(out):
    x, weight, slope = draw(2, 5, 6), draw(6, *out, seed=1), draw(2, 5, *out, seed=2)
    expected = value_and_gradients(lambda x, weight: jnp.tensordot(x, weight, 1), slope, x, weight)
    found = value_and_gradients(cpu_kernels.project, slope, x, weight)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-12, atol=1e-12)


def test_the_platform_of_the_mesh_chooses():
    assert kernels.chosen() is kernels.CPU
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        assert kernels.chosen() is kernels.CPU
    device = mesh.abstract_mesh.abstract_device
    assert device is not None
    tpu = AbstractMesh(
        (2,), ("data",), abstract_device=type(device)("TPU v5", num_cores=1, platform="tpu")
    )
    with jax.sharding.use_abstract_mesh(tpu):
        assert kernels.chosen() is kernels.PLAIN


def test_the_plain_kernels_compute_the_same():
    query, key, value, slope = (draw(2, 70, 2, 8, seed=seed) for seed in range(4))
    expected, found = (
        value_and_gradients(each.attention, slope, query, key, value)
        for each in (kernels.PLAIN, kernels.CPU)
    )
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
