import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling_jax.config import ModelConfig
from scaling_jax.models import counting, kernels, transformer

# Gadre et al. 2024, table 3: width, layers, heads, parameters; and open_lm's own models, counted.
PAPER = [
    (96, 8, 4, 10_569_312, 10_570_848),
    (512, 8, 4, 78_914_048, 78_922_240),
    (576, 24, 8, 153_677_376, 153_705_024),
    (1024, 24, 8, 411_616_256, 411_665_408),
    (2048, 24, 16, 1_439_795_200, 1_439_893_504),
    (4096, 32, 32, 6_889_410_560, 6_889_672_704),
]


def parameters(config):
    layout = jax.eval_shape(lambda: transformer.initialize(config, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(layout))


@pytest.mark.parametrize(("width", "layers", "heads", "nominal", "actual"), PAPER)
def test_counts_are_the_published_ones(width, layers, heads, nominal, actual):
    config = ModelConfig(
        width=width, layers=layers, heads=heads, vocabulary_size=50_432, sequence_length=2048
    )
    assert counting.nominal_params(config) == nominal
    assert counting.actual_params(config) == actual
    assert parameters(config) == actual


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize(("width", "layers", "heads"), [(16, 1, 1), (24, 2, 3), (100, 3, 2)])
def test_actual_params_counts_what_is_initialised(width, layers, heads, qk_norm):
    config = ModelConfig(
        width=width,
        layers=layers,
        heads=heads,
        vocabulary_size=37,
        sequence_length=8,
        qk_norm=qk_norm,
    )
    assert counting.actual_params(config) == parameters(config)
    assert counting.actual_params(config) - counting.nominal_params(config) == (
        2 * layers * width * qk_norm
    )


@given(width=st.integers(1, 20_000).map(lambda half: 2 * half))
def test_hidden_width_is_open_lms_formula(width):
    config = ModelConfig(width=width, layers=1, heads=1, vocabulary_size=2, sequence_length=2)
    assert config.hidden_width == 256 * ((int(2 * 4 * width / 3) + 255) // 256)
    assert 0 <= config.hidden_width - 8 * width / 3 < 256 + 1


def test_flops_of_the_laws():
    """The paper's 1.4B model on 28.8B tokens: 2.4e20 (Gadre et al. 2024, section 1)."""
    assert counting.flops_6nd(3, 5) == 90
    assert counting.flops_6nd(1_439_795_200, 20 * 1_439_795_200) == pytest.approx(2.49e20, rel=0.01)


@pytest.mark.parametrize("layers", [1, 3, 6])
def test_model_flops_are_the_matrix_products_of_the_gradient(monkeypatch, layers):
    """Counted in the traced program, which does the whole square of attention, not half."""
    # The kernels for CPU leave out products that the causal mask would zero.
    monkeypatch.setattr(kernels, "chosen", lambda: kernels.PLAIN)
    length, batch = 12, 2
    config = ModelConfig(
        width=32, layers=layers, heads=2, vocabulary_size=40, sequence_length=length
    )
    params = jax.eval_shape(lambda: transformer.initialize(config, jax.random.key(0)))
    tokens = jnp.zeros((batch, length), jnp.int32)

    def total(params):
        return transformer.bind(config, params)(tokens).sum()

    counted = matrix_product_flops(jax.make_jaxpr(jax.grad(total))(params).jaxpr)
    # Query times key and score times value, 2 operations each, forward and twice backward.
    per_key = 3 * 2 * 2 * 32 * layers
    left_out = per_key * sum(length - position for position in range(1, length + 1)) / length
    assert counted / (batch * length) == counting.flops_model_per_token(config) + left_out


def test_model_flops_approach_six_a_parameter_in_wide_models():
    config = ModelConfig(
        width=4096, layers=32, heads=32, vocabulary_size=50_432, sequence_length=2048
    )
    read = counting.nominal_params(config) - 50_432 * 4096  # the embedding is only looked up
    assert counting.flops_model_per_token(config) == pytest.approx(6 * read, rel=0.05)
    longer = dataclasses.replace(config, sequence_length=4096)
    more = counting.flops_model_per_token(longer) - counting.flops_model_per_token(config)
    assert more == 6 * 32 * 2 * 4096 * 2048 / 2


def matrix_product_flops(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = math.prod(shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += repeats * matrix_product_flops(inner)
    return total
