import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_jax.models import activations

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(2, 3, (2, 5, 16))
GAIN = RANDOM.normal(1, 0.3, 16)
BOTH = RANDOM.normal(0, 4, (2, 5, 2, 16))
SLOPE = RANDOM.normal(0, 1, (2, 5, 16))


def plain_norm(x, gain, centred):
    if centred:
        x = x - x.mean(axis=-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * gain


def plain_gate(both):
    return both[..., 0, :] / (1 + jnp.exp(-both[..., 0, :])) * both[..., 1, :]


def results(function, dtype, *arrays):
    """The value, and the gradients of its product with SLOPE, all in the types they come in."""
    arrays = [jnp.asarray(array, kind) for array, kind in zip(arrays, dtype, strict=True)]
    value, backward = jax.vjp(function, *arrays)
    return value, *backward(jnp.asarray(SLOPE, value.dtype))


def expected(function, dtype, *arrays):
    """The same by differentiation of the plain formula in float64, from the rounded inputs."""
    with jax.enable_x64(True):
        exact = [
            jnp.asarray(np.asarray(jnp.asarray(array, kind), np.float64))
            for array, kind in zip(arrays, dtype, strict=True)
        ]
        value, backward = jax.vjp(function, *exact)
        return [np.asarray(each) for each in (value, *backward(jnp.asarray(SLOPE)))]


def relative(found, wanted):
    return np.linalg.norm(np.float64(found) - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("centred", [True, False], ids=["layer_norm", "rms_norm"])
def test_normalize_is_the_formula_and_its_gradient(centred):
    types = (jnp.float32, jnp.float32)
    found = results(lambda x, gain: activations.normalize(x, gain, centred), types, X, GAIN)
    wanted = expected(lambda x, gain: plain_norm(x, gain, centred), types, X, GAIN)
    assert all(relative(*pair) < 1e-6 for pair in zip(found, wanted, strict=True))


@pytest.mark.parametrize("centred", [True, False], ids=["layer_norm", "rms_norm"])
def test_normalize_in_bfloat16_rounds_only_what_goes_out(centred):
    types = (jnp.bfloat16, jnp.float32)
    found = results(lambda x, gain: activations.normalize(x, gain, centred), types, X, GAIN)
    rounded = np.asarray(jnp.asarray(GAIN, jnp.bfloat16), np.float64)
    wanted = expected(lambda x, gain: plain_norm(x, gain, centred), types, X, rounded)
    assert [each.dtype for each in found] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    assert all(relative(*pair) < 5e-3 for pair in zip(found, wanted, strict=True))


def test_a_row_of_equal_numbers_has_finite_gradients():
    found = results(
        lambda x, gain: activations.normalize(x, gain, True),
        (jnp.float32,) * 2,
        np.ones_like(X),
        GAIN,
    )
    assert all(np.isfinite(each).all() for each in found)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 5e-3)])
def test_gate_is_the_formula_and_its_gradient(dtype, tolerance):
    found = results(activations.gate, (dtype,), BOTH)
    wanted = expected(plain_gate, (dtype,), BOTH)
    assert all(each.dtype == dtype for each in found)
    assert all(relative(*pair) < tolerance for pair in zip(found, wanted, strict=True))


def test_gates_that_are_shut_or_wide_open_stay_finite():
    far = np.stack([np.full_like(X, -200), X], axis=-2)
    value, slope = results(activations.gate, (jnp.float32,), far)
    assert np.all(value == 0)
    assert np.isfinite(slope).all()
    value, slope = results(activations.gate, (jnp.float32,), -far)
    np.testing.assert_allclose(value, -200 * X, rtol=1e-6)
    assert np.isfinite(slope).all()
