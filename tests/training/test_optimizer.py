import dataclasses
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling_jax.models import transformer
from scaling_jax.training import budget, optimizer
from scaling_jax.training.optimizer import Hyperparameters

pytestmark = pytest.mark.usefixtures("quick_compilation")

HYPER = Hyperparameters(
    learning_rate=3e-3,
    minimum_learning_rate=3e-5,
    learning_rate_floor=0.0,
    warmup_steps=10.0,
    total_steps=50.0,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.95,
    epsilon=1e-8,
    gradient_clip_norm=1.0,
    z_loss_weight=1e-4,
)


def reference_rate(step, total, warmup, peak, low):
    """open_lm's `cosine_lr`, written down from its description."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return low + 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) * (peak - low)


def rates(hyper, steps):
    return np.asarray(optimizer.learning_rate(hyper, jnp.arange(400)))[:steps]


@given(total=st.integers(1, 400), warmup=st.integers(0, 500))
def test_rates_follow_the_formula(total, warmup):
    hyper = HYPER._replace(total_steps=float(total), warmup_steps=float(warmup))
    expected = [reference_rate(step, total, warmup, 3e-3, 3e-5) for step in range(total)]
    np.testing.assert_allclose(rates(hyper, total), expected, rtol=1e-4)


def test_rates_at_the_boundaries():
    found = rates(HYPER, 50)
    assert found[0] == pytest.approx(3e-4, rel=1e-6)
    assert found[9] == pytest.approx(3e-3, rel=1e-6)
    assert found[10] == pytest.approx(3e-3, rel=1e-6)
    assert found[30] == pytest.approx((3e-3 + 3e-5) / 2, rel=1e-5)
    last = 3e-5 + 0.5 * (1 - math.cos(math.pi / 40)) * (3e-3 - 3e-5)
    assert found[49] == pytest.approx(last, rel=1e-4)
    assert found[49] > 3e-5
    assert np.argmax(found) in (9, 10)
    assert np.all(np.diff(found[10:]) < 0)


def test_a_warm_up_longer_than_the_run_only_rises():
    found = rates(HYPER._replace(warmup_steps=400.0, total_steps=376.0), 376)
    np.testing.assert_allclose(found, 3e-3 * np.arange(1, 377) / 400, rtol=1e-5)


def test_no_warm_up_starts_at_the_peak():
    found = rates(HYPER._replace(warmup_steps=0.0), 50)
    assert found[0] == pytest.approx(3e-3, rel=1e-6)
    assert np.all(np.diff(found) < 0)


def test_a_floor_cuts_off_the_cosine_but_not_the_warm_up():
    free, found = (rates(HYPER._replace(learning_rate_floor=floor), 50) for floor in (0.0, 1e-3))
    assert np.array_equal(found[:10], free[:10])
    assert found[0] < 1e-3
    assert np.array_equal(found[10:], np.maximum(free[10:], np.float32(1e-3)))
    assert free[-1] < 1e-3


SHAPES = {"linear": lambda part: 1 - part, "one_minus_sqrt": lambda part: 1 - math.sqrt(part)}


@given(
    total=st.integers(2, 400),
    warmup=st.integers(0, 100),
    decay=st.integers(1, 300),
    shape=st.sampled_from(sorted(SHAPES)),
)
def test_warm_up_stable_and_decay_follow_their_formulas(total, warmup, decay, shape):
    decay = min(decay, total)
    warmup = min(warmup, total - decay)
    start = total - decay
    found = rates(
        HYPER._replace(
            total_steps=float(total),
            warmup_steps=float(warmup),
            decay_start=float(start),
            decay_shape=float(optimizer.DECAY_SHAPES.index(shape)),
        ),
        total,
    )
    expected = [3e-5 + SHAPES[shape](k / decay) * (3e-3 - 3e-5) for k in range(decay)]
    np.testing.assert_allclose(found[start:], expected, rtol=1e-4)
    np.testing.assert_allclose(found[:warmup], 3e-3 * np.arange(1, warmup + 1) / warmup, rtol=1e-6)
    assert np.all(found[warmup:start] == np.float32(3e-3))


@given(low=st.floats(0, 3e-3), total=st.integers(50, 400), shape=st.integers(0, 2))
def test_rates_before_the_decay_depend_on_nothing_that_follows(low, total, shape):
    hyper = HYPER._replace(minimum_learning_rate=low, total_steps=float(total), decay_start=40.0)
    found = rates(hyper._replace(decay_shape=float(shape)), 40)
    constant = HYPER._replace(total_steps=40.0, decay_start=40.0)
    assert np.array_equal(found, rates(constant, 40))


def schedule_rates(config, **chosen):
    run = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, warmup_steps=2, **chosen)
    )
    plan = budget.plan(run)
    return rates(optimizer.hyperparameters(run, plan), plan.steps)


def test_the_schedule_of_a_config_is_the_one_that_it_names(config):
    """Twelve steps to 0.01; the minimum is 3e-5."""
    half, way = [0.005, 0.01], 0.01 - 3e-5
    constant = schedule_rates(config, schedule="constant")
    np.testing.assert_allclose(constant, half + [0.01] * 10, rtol=1e-6)
    linear = schedule_rates(config, schedule="warmup_stable_decay", decay_fraction=0.25)
    falling = [0.01, 3e-5 + way * 2 / 3, 3e-5 + way / 3]
    np.testing.assert_allclose(linear, half + [0.01] * 7 + falling, rtol=1e-5)
    root = schedule_rates(config, schedule="warmup_stable_decay", decay_shape="one_minus_sqrt")
    np.testing.assert_allclose(
        root, half + [0.01] * 9 + [3e-5 + way * (1 - math.sqrt(1 / 2))], rtol=1e-5
    )
    cosine = schedule_rates(config, decay_fraction=0.9, decay_shape="linear")
    assert np.array_equal(cosine, schedule_rates(config))
    assert cosine[7] == pytest.approx((0.01 + 3e-5) / 2, rel=1e-5)


def test_rates_are_those_that_open_lm_used(golden):
    run = golden.run("data")
    hyper = optimizer.hyperparameters(run, budget.plan(run))
    steps = golden.settings.steps
    np.testing.assert_allclose(rates(hyper, steps), golden.arrays["lr"], rtol=2e-5)


def random_tree(random, scale=1.0):
    return {
        "matrix": (scale * random.standard_normal((5, 7))).astype(np.float32),
        "norm": {"gain": (scale * random.standard_normal(6)).astype(np.float32)},
    }


# The last is so small that the 1e-6 counts.
@pytest.mark.parametrize(("scale", "most"), [(0.01, 0.5), (1, 0.5), (100, 0.5), (1e-6, 1e-6)])
def test_clipping_is_torchs(scale, most):
    """`torch.nn.utils.clip_grad_norm_`: the coefficient max_norm / (norm + 1e-6), at most 1."""
    gradients = random_tree(np.random.default_rng(0), scale)
    norm = math.sqrt(sum((np.float64(leaf) ** 2).sum() for leaf in jax.tree.leaves(gradients)))
    coefficient = min(1.0, most / (norm + 1e-6))
    hyper = HYPER._replace(gradient_clip_norm=most)
    found = optimizer.clip(gradients, optax.tree.norm(gradients), hyper)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(one, coefficient * other, rtol=1e-5)
    assert (coefficient == 1) == (scale == 0.01)


@pytest.fixture(scope="module")
def trajectory():
    """Start, gradients and every later value of parameters under our AdamW, for 12 steps."""
    random = np.random.default_rng(1)
    start = random_tree(random)
    gradients = [random_tree(random, scale=10.0 ** -(step % 4)) for step in range(12)]
    params, moments, path = start, optimizer.initial_moments(start), []
    for step, gradient in enumerate(gradients):
        rate = optimizer.learning_rate(HYPER, step)
        directions, moments = optimizer.adam(HYPER).update(gradient, moments)
        params = optimizer.apply(params, directions, rate, HYPER)  # pyright: ignore[reportArgumentType]
        path.append(params)
    return start, gradients, path


def test_updates_are_those_of_torchs_adamw(trajectory):
    """A re-implementation in float64; every leaf decays."""
    start, gradients, path = trajectory
    for name in ("matrix", "gain"):

        def leaf(tree, name=name):
            return np.float64(tree["matrix"] if name == "matrix" else tree["norm"]["gain"])

        param, first, second = leaf(start), 0.0, 0.0
        for step, (gradient, found) in enumerate(zip(gradients, path, strict=True)):
            rate = reference_rate(step, 50, 10, 3e-3, 3e-5)
            first = 0.9 * first + 0.1 * leaf(gradient)
            second = 0.95 * second + 0.05 * leaf(gradient) ** 2
            param = param * (1 - rate * 0.1)
            root = np.sqrt(second) / math.sqrt(1 - 0.95 ** (step + 1))
            param = param - rate / (1 - 0.9 ** (step + 1)) * first / (root + 1e-8)
            np.testing.assert_allclose(leaf(found), param, rtol=1e-6, atol=1e-6)


def test_updates_are_those_of_optax_adamw(trajectory):
    start, gradients, path = trajectory
    optax_adamw = optax.adamw(
        lambda count: optimizer.learning_rate(HYPER, jnp.asarray(count)),
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.1,
    )
    params, state = start, optax_adamw.init(start)
    for gradient, found in zip(gradients, path, strict=True):
        updates, state = optax_adamw.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_without_gradients_every_parameter_of_the_model_decays(model):
    layout = jax.eval_shape(lambda: transformer.initialize(model, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), layout)

    @jax.jit
    def update(params):
        zero = jax.tree.map(jnp.zeros_like, params)
        directions, _ = optimizer.adam(HYPER).update(zero, optimizer.initial_moments(params))
        return optimizer.apply(params, directions, jnp.float32(0.01), HYPER)  # pyright: ignore[reportArgumentType]

    for leaf in jax.tree.leaves(update(params)):
        np.testing.assert_allclose(leaf, 1 - 0.01 * 0.1, rtol=1e-6)


def test_hyperparameters_are_those_of_the_config(config):
    chosen = dataclasses.replace(
        config.optimizer,
        weight_decay=0.2,
        beta1=0.8,
        beta2=0.99,
        epsilon=1e-6,
        warmup_steps=7,
        learning_rate_floor=1e-4,
    )
    run = dataclasses.replace(config, optimizer=chosen, z_loss_weight=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = optimizer.hyperparameters(run, budget.plan(run))
    schedule = ("schedule", "decay_fraction", "decay_shape")
    numbers = {key: value for key, value in vars(chosen).items() if key not in schedule}
    assert found._asdict() == numbers | {
        "total_steps": 12.0,
        "z_loss_weight": 0.5,
        "decay_start": 0.0,
        "decay_shape": 0.0,
        "loss_limit": math.inf,
    }
