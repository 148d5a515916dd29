"""The formulas of memory against what JAX keeps and what XLA allocates."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from scaling_jax import mesh as meshes
from scaling_jax.config import MeshConfig, ModelConfig
from scaling_jax.models import counting, head, kernels, tpu_kernels, transformer
from scaling_jax.planning import memory
from scaling_jax.training import step

SMALL = ModelConfig(
    width=64, layers=6, heads=4, vocabulary_size=512, sequence_length=128, compute_dtype="bfloat16"
)
MESHES = [
    MeshConfig(2, 2, 2),
    pytest.param(MeshConfig(8, 1, 1), marks=pytest.mark.slow),
    pytest.param(MeshConfig(1, 8, 1), marks=pytest.mark.slow),
    pytest.param(MeshConfig(1, 2, 4), marks=pytest.mark.slow),
    pytest.param(MeshConfig(2, 2, 1, slices=2), marks=pytest.mark.slow),
]


def test_numbers_of_the_model_are_counted_whole():
    for qk_norm in (True, False):
        model = dataclasses.replace(SMALL, qk_norm=qk_norm)
        counted = memory.matrix_weights(model) + memory.gains(model)
        assert counted == counting.actual_params(model)


def test_the_sizes_of_parts_are_those_of_the_kernels():
    assert memory.MOST_LOGITS == head.MOST_LOGITS
    assert tpu_kernels.BLOCKS[0] == memory.BLOCK
    assert memory.LONGEST_FUSED == tpu_kernels.LONGEST_FUSED


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_arguments_are_those_of_the_compiled_step(mesh):
    compiled = step.lower(SMALL, 16, 2, meshes.make_mesh(mesh)).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    measured = analysis.argument_size_in_bytes
    # Besides, a few numbers: step, Adam's count, hyper-parameters.
    assert 0 <= measured - memory.estimate(SMALL, 16, 2, mesh).arguments < 1024


@pytest.mark.parametrize("remat", ["none", "dots", "block"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_activations_are_what_the_backward_pass_keeps(monkeypatch, remat, dtype, qk_norm):
    monkeypatch.setattr(kernels, "chosen", lambda: kernels.PLAIN)
    model = dataclasses.replace(SMALL, remat=remat, compute_dtype=dtype, qk_norm=qk_norm)
    batch, length = 2, model.sequence_length
    measured = _kept_by_jax(model, batch) / (model.layers * batch * length)
    # Unlike the kernel for TPU, plain attention keeps its result once, not by heads as well.
    once = memory.BYTES[dtype] * model.width if remat == "none" else 0
    assert memory.kept_per_position(model, lanes=1) - once == pytest.approx(measured, rel=0.03)


def test_more_of_everything_takes_more():
    mesh = MeshConfig(2, 1, 1)
    base = memory.estimate(SMALL, 16, 1, mesh).peak
    for wider in ({"width": 256}, {"layers": 12}, {"vocabulary_size": 1024}):
        assert memory.estimate(dataclasses.replace(SMALL, **wider), 16, 1, mesh).peak > base
    assert memory.estimate(SMALL, 32, 1, mesh).peak > base
    assert memory.estimate(SMALL, 16, 1, MeshConfig(4, 1, 1)).peak < base
    assert memory.estimate(SMALL, 16, 1, mesh).least <= base
    kept = [
        memory.kept_per_position(dataclasses.replace(SMALL, remat=remat), lanes=1)
        for remat in ("block", "dots", "none")
    ]
    assert kept == sorted(kept)


def _kept_by_jax(model: ModelConfig, batch: int) -> float:
    """Bytes of the arrays of all layers and positions that JAX keeps from the forward pass."""
    params = jax.eval_shape(lambda: transformer.initialize(model, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((batch, model.sequence_length), jnp.int32)

    def kept(params, tokens):
        return jax.vjp(lambda params: transformer.bind(model, params).hidden(tokens), params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(kept, params, tokens))
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in leaves
        if leaf.shape[:2] == (model.layers, batch) and model.sequence_length in leaf.shape
    )
