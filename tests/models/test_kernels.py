"""Every platform's kernels against the plain forms, as far as they run without the platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from scaling_jax.config import MeshConfig
from scaling_jax.mesh import make_mesh
from scaling_jax.models import blockwise, kernels, tpu_kernels


def draw(*shape, dtype=jnp.float32, count=4):
    random = np.random.default_rng(0)
    return [jnp.asarray(random.standard_normal(shape), dtype) for _ in range(count)]


def value_and_gradients(function, query, key, value, slope):
    mixed, pull_back = jax.vjp(function, query, key, value)
    return mixed, *pull_back(slope)


def splash(query, key, value):
    return tpu_kernels.attention(query, key, value, interpret=True)


def deviation(found, expected):
    found, expected = np.float64(found), np.float64(expected)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.slow
@pytest.mark.parametrize("head", [24, 72, 128])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)], ids=["float32", "bfloat16"]
)
def test_splash_attention_and_its_gradients_are_those_of_the_plain_form(head, dtype, tolerance):
    """A length that is no multiple of a block: it is filled up."""
    arrays = draw(1, 200, 2, head, dtype=dtype)
    expected = value_and_gradients(kernels.PLAIN.attention, *arrays)
    for one, other in zip(value_and_gradients(splash, *arrays), expected, strict=True):
        assert one.dtype == dtype
        assert deviation(one, other) < tolerance


@pytest.mark.slow
def test_splash_attention_of_long_sequences_makes_each_gradient_by_itself(monkeypatch):
    monkeypatch.setattr(tpu_kernels, "LONGEST_FUSED", 128)
    arrays = draw(1, 256, 1, 24)
    expected = value_and_gradients(kernels.PLAIN.attention, *arrays)
    for one, other in zip(value_and_gradients(splash, *arrays), expected, strict=True):
        assert deviation(one, other) < 2e-6


@pytest.mark.slow
def test_splash_attention_is_split_over_rows_and_heads():
    query, key, value, _ = draw(2, 128, 4, 16)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=1, tensor=4))):
        found = jax.jit(splash)(query, key, value)
    assert "tensor" in str(found.sharding.spec)
    assert deviation(found, kernels.PLAIN.attention(query, key, value)) < 2e-6


def test_the_kernels_for_cpu_compute_the_same():
    arrays = draw(2, 70, 2, 8)
    expected = value_and_gradients(kernels.PLAIN.attention, *arrays)
    for one, other in zip(
        value_and_gradients(kernels.CPU.attention, *arrays), expected, strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_attention_in_float32_on_gpu_is_the_plain_one():
    arrays = draw(2, 70, 2, 8)
    expected = value_and_gradients(kernels.PLAIN.attention, *arrays)
    for one, other in zip(
        value_and_gradients(kernels.GPU.attention, *arrays), expected, strict=True
    ):
        assert np.array_equal(one, other)


def test_in_bfloat16_on_gpu_cudnn_is_asked_where_it_can(monkeypatch):
    asked = []

    def record(query, key, value, *, is_causal, implementation):
        asked.append((query.shape[-1], query.dtype, is_causal, implementation))
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    for dtype, head in ((jnp.bfloat16, 72), (jnp.bfloat16, 12), (jnp.float32, 64)):
        kernels.GPU.attention(*draw(1, 8, 2, head, dtype=dtype, count=3))
    assert asked == [(72, jnp.bfloat16, True, "cudnn")]


@pytest.mark.parametrize(
    "length",
    [100, pytest.param(40, marks=pytest.mark.slow), pytest.param(64, marks=pytest.mark.slow)],
)
def test_attention_by_blocks_and_its_gradients_are_those_of_the_plain_form(monkeypatch, length):
    monkeypatch.setattr(blockwise, "BLOCK", 32)
    arrays = draw(2, length, 2, 8)
    expected = value_and_gradients(kernels.PLAIN.attention, *arrays)
    for one, other in zip(value_and_gradients(blockwise.attention, *arrays), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("platform", [kernels.CPU, kernels.GPU], ids=["cpu", "gpu"])
def test_long_sequences_are_attended_by_blocks(monkeypatch, platform):
    monkeypatch.setattr(kernels, "LONGEST_WHOLE", 64)
    monkeypatch.setattr(blockwise, "attention", lambda query, key, value: 0 * query)
    assert jnp.any(platform.attention(*draw(1, 64, 2, 8, count=3)))
    assert not jnp.any(platform.attention(*draw(1, 65, 2, 8, count=3)))


@pytest.mark.parametrize(
    ("platform", "wanted"),
    [("cpu", kernels.CPU), ("tpu", kernels.TPU), ("gpu", kernels.GPU), ("cuda", kernels.GPU)],
)
def test_the_platform_of_the_mesh_chooses(platform, wanted):
    assert kernels.chosen() is kernels.CPU
    device = make_mesh(MeshConfig()).abstract_mesh.abstract_device
    assert device is not None
    other = type(device)("any", num_cores=1, platform=platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("data",), abstract_device=other)):
        assert kernels.chosen() is wanted
