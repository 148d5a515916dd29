"""The loss in parts and over devices against the plain form on whole logits."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_jax import mesh as meshes
from scaling_jax.config import MeshConfig
from scaling_jax.models import head
from scaling_jax.models.loss import token_loss
from scaling_jax.planning.collectives import array_shapes

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH, LENGTH, WIDTH, VOCABULARY, Z_LOSS_WEIGHT = 8, 24, 16, 40, 0.01
MESHES = {
    "none": None,
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=1, tensor=8),
    "all": MeshConfig(slices=2, data=1, fsdp=2, tensor=2),
}
# Bytes of logits at a time: all, parts that divide the positions, and such that do not.
MOST_LOGITS = {"whole": 2**28, "parts": 4 * VOCABULARY * 8, "filled": 4 * VOCABULARY * 128}


@pytest.fixture(scope="module")
def arrays():
    random = np.random.default_rng(0)
    hidden = random.standard_normal((BATCH, LENGTH, WIDTH)).astype(np.float32)
    output = random.standard_normal((WIDTH, VOCABULARY)).astype(np.float32)
    return hidden, output, random.integers(0, VOCABULARY, (BATCH, LENGTH))


def plain(hidden, output, targets):
    scores = token_loss((hidden @ output.astype(hidden.dtype)).astype(jnp.float32), targets)
    loss = scores.cross_entropy.mean()
    z_loss = Z_LOSS_WEIGHT * jnp.square(scores.log_normalizer).mean()
    return loss + z_loss, (loss, z_loss)


def in_parts(hidden, output, targets):
    return head.mean_loss(hidden, output, targets, Z_LOSS_WEIGHT)


def gradients(function):
    return jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))


def in_force(mesh):
    config = MESHES[mesh]
    return jax.set_mesh(meshes.make_mesh(config)) if config else contextlib.nullcontext()


def deviations(found, expected):
    pairs = zip(*map(jax.tree.leaves, (found, expected)), strict=True)
    return [np.linalg.norm(one - np.asarray(other)) / np.linalg.norm(other) for one, other in pairs]


@pytest.mark.parametrize(
    ("mesh", "parts"),
    [
        *((mesh, "parts") for mesh in MESHES),
        ("none", "whole"),
        ("all", "whole"),
        ("none", "filled"),
    ],
)
def test_losses_and_gradients_are_those_of_the_plain_form(arrays, monkeypatch, mesh, parts):
    monkeypatch.setattr(head, "MOST_LOGITS", MOST_LOGITS[parts])
    expected = gradients(plain)(*arrays)
    with in_force(mesh):
        losses, slopes = gradients(in_parts)(*arrays)
    assert max(deviations(losses, expected[0])) < 1e-6
    assert max(deviations(slopes, expected[1])) < 1e-5


@pytest.mark.parametrize("mesh", ["none", "tensor", "all"])
def test_scores_are_those_of_the_plain_form(arrays, monkeypatch, mesh):
    monkeypatch.setattr(head, "MOST_LOGITS", MOST_LOGITS["parts"])
    hidden, output, targets = arrays
    expected = token_loss(hidden @ output, targets)
    with in_force(mesh):
        found = jax.jit(head.score)(*arrays)
    np.testing.assert_allclose(found.cross_entropy, expected.cross_entropy, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.log_normalizer, expected.log_normalizer, rtol=1e-6)
    assert np.array_equal(found.correct, expected.correct)
    assert 0 < found.correct.mean() < 1


def test_of_equal_logits_the_first_counts_as_the_prediction(arrays):
    hidden, output, targets = arrays
    with in_force("tensor"):
        found = jax.jit(head.score)(hidden, 0 * output, targets)
    assert np.array_equal(found.correct, targets == 0)
    np.testing.assert_allclose(found.cross_entropy, np.log(VOCABULARY), rtol=1e-6)


def test_gradients_in_bfloat16_are_near_and_those_of_the_weights_stay_in_float32(arrays):
    hidden, output, targets = arrays
    _, expected = gradients(plain)(*arrays)
    _, (d_hidden, d_output) = gradients(in_parts)(
        jnp.asarray(hidden, jnp.bfloat16), output, targets
    )
    assert (d_hidden.dtype, d_output.dtype) == (jnp.bfloat16, jnp.float32)
    assert max(deviations((d_hidden, d_output), expected)) < 2e-2


def test_the_loss_is_scaled_as_what_is_made_of_it(arrays):
    hidden, output, targets = arrays
    doubled = jax.grad(lambda output: 2 * in_parts(hidden, output, targets)[0])(output)
    alone = jax.grad(lambda output: in_parts(hidden, output, targets)[0])(output)
    np.testing.assert_allclose(doubled, 2 * alone, rtol=1e-6)


def test_the_logits_are_never_there_at_once(arrays, monkeypatch):
    monkeypatch.setattr(head, "MOST_LOGITS", MOST_LOGITS["parts"])
    compiled = [gradients(each).lower(*arrays).compile() for each in (plain, in_parts)]
    largest = [
        max(
            np.prod(shape[:-1])
            for shape in array_shapes(each.as_text() or "", "f32")
            if shape[-1:] == (40,)
        )
        for each in compiled
    ]
    assert largest == [BATCH * LENGTH, WIDTH]
