import time
import types

import jax
import pytest

from scaling_jax.training import throughput
from scaling_jax.training.throughput import Speedometer


@pytest.fixture
def clock(monkeypatch):
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now.seconds)
    return now


def test_speed_counts_from_the_first_report_on(clock):
    """The first step holds the compilation, which says nothing about the speed."""
    speed = Speedometer()
    clock.seconds += 60
    assert speed.tokens_per_second(500) == 0
    clock.seconds += 2
    assert speed.tokens_per_second(1500) == 500
    clock.seconds += 2
    assert speed.tokens_per_second(3500) == 750


def test_a_resumed_run_is_measured_by_what_it_does_itself(clock):
    speed = Speedometer()
    speed.tokens_per_second(1_000_000)
    clock.seconds += 1
    assert speed.tokens_per_second(1_000_300) == 300


@pytest.fixture
def forget():
    throughput.peak_flops.cache_clear()
    yield
    throughput.peak_flops.cache_clear()


@pytest.mark.usefixtures("forget")
@pytest.mark.parametrize(("kind", "peak"), [("TPU v5p", 459e12), ("NVIDIA H100 80GB HBM3", 989e12)])
def test_the_peak_of_known_devices_is_in_the_table(monkeypatch, kind, peak):
    devices = [types.SimpleNamespace(device_kind=kind)] * 16
    monkeypatch.setattr(jax, "devices", lambda: devices)
    assert throughput.peak_flops() == 16 * peak


@pytest.mark.usefixtures("forget")
def test_the_peak_of_other_devices_is_measured_on_a_matrix_product(monkeypatch):
    """A clock that goes 0.5 s at each look: every product seems to take half a second."""
    looks = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: 0.5 * next(looks))
    assert throughput.peak_flops() == 2 * 1024**3 / 0.5
