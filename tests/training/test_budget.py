import dataclasses
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling_jax.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig
from scaling_jax.errors import UserError
from scaling_jax.training import budget

TINY = ModelConfig(width=16, layers=1, heads=1, vocabulary_size=32, sequence_length=10)


def run(model=TINY, batch_size=4, warmup_steps=0, **amount):
    return RunConfig(
        model=model,
        data=DataConfig(dataset="words", validation=("words",)),
        batch_size=batch_size,
        optimizer=OptimizerConfig(warmup_steps=warmup_steps),
        **amount,
    )


@given(wished=st.integers(40, 10**15), batch_size=st.integers(1, 4))
def test_whole_steps_that_fit_are_trained_and_counted_exactly(wished, batch_size):
    plan = budget.plan(run(batch_size=batch_size, tokens=wished))
    assert plan.tokens_per_step == batch_size * 10
    assert plan.tokens == plan.steps * batch_size * 10
    assert plan.tokens_asked == wished
    assert plan.tokens <= wished < plan.tokens + batch_size * 10


# Width, layers, heads, N, and steps at a quarter of Chinchilla's tokens (open_lm's logs).
@pytest.mark.parametrize(
    ("width", "layers", "heads", "params", "steps"),
    [(512, 8, 4, 78_914_048, 376), (1024, 24, 8, 411_616_256, 1962)],
)
def test_steps_are_those_of_the_papers_runs(width, layers, heads, params, steps):
    model = ModelConfig(
        width=width, layers=layers, heads=heads, vocabulary_size=50_432, sequence_length=2048
    )
    plan = budget.plan(run(model, batch_size=512, token_multiplier=20 * 0.25))
    assert (plan.params, plan.steps) == (params, steps)
    assert plan.tokens == steps * 512 * 2048
    assert plan.token_multiplier == plan.tokens / params
    assert plan.token_multiplier == pytest.approx(5, rel=1 / steps)
    assert plan.flops_6nd == 6 * params * plan.tokens


def test_a_budget_of_less_than_one_step_is_refused():
    assert budget.plan(run(tokens=40)).steps == 1
    with pytest.raises(UserError, match="39 tokens is less than one step of 40") as caught:
        budget.plan(run(tokens=39))
    assert "\n" not in str(caught.value)


def test_a_warm_up_that_never_ends_is_warned_of():
    with pytest.warns(UserWarning, match="warm-up of 10 steps is not shorter than the run of 10"):
        budget.plan(run(tokens=400, warmup_steps=10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        budget.plan(run(tokens=440, warmup_steps=10))


def with_schedule(steps, schedule, warmup_steps=0, decay_fraction=0.2):
    optimizer = OptimizerConfig(
        schedule=schedule, warmup_steps=warmup_steps, decay_fraction=decay_fraction
    )
    return dataclasses.replace(run(tokens=40 * steps), optimizer=optimizer)


def test_the_decay_starts_where_the_length_of_the_run_begins_to_matter():
    assert budget.plan(with_schedule(100, "cosine")).decay_start == 0
    assert budget.plan(with_schedule(100, "constant")).decay_start == 100
    assert budget.plan(with_schedule(100, "warmup_stable_decay")).decay_start == 80
    assert budget.plan(with_schedule(100, "warmup_stable_decay", 80)).decay_start == 80
    assert budget.plan(with_schedule(2, "warmup_stable_decay")).decay_start == 1


@given(steps=st.integers(1, 10**6), fraction=st.floats(0.001, 0.999))
def test_a_longer_run_never_starts_its_decay_earlier(steps, fraction):
    one, more = (
        budget.plan(with_schedule(each, "warmup_stable_decay", decay_fraction=fraction)).decay_start
        for each in (steps, steps + 1)
    )
    assert 0 <= one <= more < steps + 1
    assert one < steps


def test_a_warm_up_and_decay_longer_than_the_run_are_refused():
    with pytest.raises(
        UserError, match="warm-up of 81 steps and a decay of 20 do not fit into a run of 100"
    ) as caught:
        budget.plan(with_schedule(100, "warmup_stable_decay", 81))
    assert "\n" not in str(caught.value)


def test_the_multiplier_and_the_tokens_say_the_same():
    by_multiplier = run(token_multiplier=20.0)
    params = budget.plan(by_multiplier).params
    by_tokens = dataclasses.replace(by_multiplier, token_multiplier=None, tokens=20 * params)
    assert budget.plan(by_tokens) == budget.plan(by_multiplier)
