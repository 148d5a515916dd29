"""The estimate of a step's time in cases that can be worked out by hand."""

import dataclasses

import pytest

from scaling_jax.config import MeshConfig, ModelConfig
from scaling_jax.models import counting
from scaling_jax.planning import estimate, memory, slices

MODEL = ModelConfig(
    width=1024,
    layers=24,
    heads=8,
    vocabulary_size=50432,
    sequence_length=2048,
    compute_dtype="bfloat16",
)
CHIP = slices.find("v5e-16").chip


def time(mesh, model=MODEL, batch=64, microbatches=1, mfu=0.5):
    return estimate.step_time(model, batch, microbatches, mesh, CHIP, mfu)


def test_one_chip_only_computes():
    found = time(MeshConfig(1, 1, 1))
    operations = counting.flops_model_per_token(MODEL) * 64 * 2048
    assert found.compute == pytest.approx(operations / (0.5 * 197e12))
    assert found.collectives == 0


def test_compute_is_divided_by_chips_and_by_mfu():
    one = time(MeshConfig(1, 1, 1)).compute
    for mesh in (MeshConfig(16, 1, 1), MeshConfig(4, 2, 2), MeshConfig(1, 1, 1, slices=16)):
        assert time(mesh).compute == pytest.approx(one / 16)
    assert time(MeshConfig(1, 1, 1), mfu=0.25).compute == pytest.approx(2 * one)


def test_gradients_over_a_ring_go_round_twice_in_float32(monkeypatch):
    monkeypatch.setattr(estimate, "LEAST_SECONDS", 0.0)
    gradients = 2 * 4 * memory.matrix_weights(MODEL)
    assert time(MeshConfig(16, 1, 1)).collectives == pytest.approx(gradients * 15 / 16 / 100e9)
    network = time(MeshConfig(1, 1, 1, slices=2)).collectives
    assert network == pytest.approx(gradients / 2 / 3.125e9)
    # However many microbatches: `test_copies_add_up_their_gradients_once_a_step`.
    in_two = time(MeshConfig(16, 1, 1), microbatches=2).collectives
    assert in_two == pytest.approx(gradients * 15 / 16 / 100e9)


def test_computing_layers_again_costs_a_third_of_them():
    layers = MODEL.layers * memory.layer_weights(MODEL)
    attention = MODEL.layers * 2 * MODEL.width * (MODEL.sequence_length + 1) / 2
    head = MODEL.vocabulary_size * MODEL.width
    once = time(MeshConfig(1, 1, 1)).compute
    block = time(MeshConfig(1, 1, 1), dataclasses.replace(MODEL, remat="block")).compute
    dots = time(MeshConfig(1, 1, 1), dataclasses.replace(MODEL, remat="dots")).compute
    whole = 3 * (layers + attention + head)
    assert block / once == pytest.approx((whole + layers + attention) / whole)
    assert dots / once == pytest.approx((whole + attention) / whole)
