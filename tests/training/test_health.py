import math

import numpy as np
import pytest

from scaling_jax.config import HealthConfig
from scaling_jax.errors import NonFiniteLossError
from scaling_jax.training import health
from scaling_jax.training.budget import Budget
from scaling_jax.training.curve import STEPS_IN_FLIGHT, GrowingCurve
from scaling_jax.training.step import Metrics

BUDGET = Budget(params=1, tokens_asked=1, steps=10**6, tokens_per_step=2, decay_start=0)
SHORT = HealthConfig(spike_window=16)


def metrics(loss, skipped=0.0, norm=1.0):
    return Metrics(*(np.float32(value) for value in (loss, 0, norm, 0.1, skipped)))  # pyright: ignore[reportArgumentType]


def grow(losses, config=SHORT, curve=None):
    curve = curve or GrowingCurve(config)
    for loss in losses:
        curve.append(metrics(loss), BUDGET)
    return curve


def noisy(count, seed=0):
    return 3 + 0.1 * np.random.default_rng(seed).standard_normal(count)


def test_the_limit_is_so_many_deviations_above_the_mean_of_the_window():
    losses = noisy(40).tolist()
    recent = np.array(losses[-16:])
    expected = recent.mean() + 6 * recent.std()
    assert health.loss_limit(losses, SHORT) == pytest.approx(expected, rel=1e-6)
    wider = HealthConfig(spike_window=16, spike_deviations=9)
    assert health.loss_limit(losses, wider) > expected


def test_there_is_no_limit_before_half_a_window_is_known_or_where_spikes_are_ignored():
    losses = noisy(40).tolist()
    assert health.loss_limit(losses[:7], SHORT) == math.inf
    assert health.loss_limit(losses[:8], SHORT) < math.inf
    assert health.loss_limit(losses, HealthConfig(spike="ignore")) == math.inf
    assert health.loss_limit([math.nan] * 16, SHORT) == math.inf


def test_a_leap_is_marked_and_told_and_nothing_else_is(caplog):
    curve = grow([*noisy(30), 9.0, *noisy(5)])
    assert np.flatnonzero(curve.arrays()["spiked"]).tolist() == [30]
    (record,) = caplog.records
    assert "step 31: loss 9" in record.message
    assert health.describe(curve.arrays()) == "spiked 1"
    assert health.describe(grow(noisy(200)).arrays()) == "ok"


def test_a_steadily_falling_loss_is_no_leap():
    assert health.describe(grow(9 * 0.99 ** np.arange(500)).arrays()) == "ok"


def test_after_the_loss_has_settled_on_a_higher_level_nothing_leaps_any_more():
    curve = grow([*noisy(30), *(noisy(60) + 2)])
    assert curve.arrays()["spiked"][50:].sum() == 0


def test_the_limit_is_known_before_the_step_and_the_same_after_a_restart():
    losses = noisy(60)
    whole = grow(losses)
    for cut in (20, 35, 59):
        again = grow(losses[cut:], curve=GrowingCurve(SHORT, grow(losses[:cut]).arrays()))
        assert again.rows() == whole.rows()
        early = grow(losses[: cut - STEPS_IN_FLIGHT])
        assert early.loss_limit(cut + 1) == whole.loss_limit(cut + 1)


def test_a_loss_that_is_not_finite_stops_a_run_unless_it_is_to_be_skipped():
    with pytest.raises(NonFiniteLossError, match="step 1: loss nan"):
        grow([math.nan])
    with pytest.raises(NonFiniteLossError, match="gradient norm inf"):
        GrowingCurve(SHORT).append(metrics(1.0, norm=math.inf), BUDGET)
    curve = GrowingCurve(HealthConfig(nonfinite="skip"))
    curve.append(metrics(math.nan, skipped=1), BUDGET)
    assert health.describe(curve.arrays()) == "skipped 1"


def test_a_run_of_which_step_after_step_is_skipped_is_stopped():
    curve = GrowingCurve(HealthConfig(nonfinite="skip"))
    for _ in range(49):
        curve.append(metrics(math.nan, skipped=1), BUDGET)
    with pytest.raises(NonFiniteLossError, match="50 steps in a row were skipped"):
        curve.append(metrics(math.nan, skipped=1), BUDGET)
