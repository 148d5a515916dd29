"""Runs that cannot fit are refused before anything is allocated."""

import sys

import jax
import pytest

from scaling_jax import cli
from scaling_jax import config as configs
from scaling_jax.config import MeshConfig, RunConfig
from scaling_jax.errors import UserError
from scaling_jax.planning import devices, memory


def run(width, batch_size=16, **mesh) -> RunConfig:
    model = {"width": width, "layers": 32, "heads": 8, "vocabulary_size": 512}
    content = {
        "model": model | {"sequence_length": 64},
        "data": {"dataset": "a", "validation": ["a"]},
        "batch_size": batch_size,
        "tokens": 10**6,
        "mesh": mesh,
    }
    return configs.build(RunConfig, content, source="test")


def test_a_small_run_passes_and_a_huge_one_is_one_line():
    devices.check_fits(run(64))
    with pytest.raises(UserError, match=r"cannot fit: .* GiB a device, .* it takes \d+ such"):
        devices.check_fits(run(65536))


@pytest.mark.parametrize(
    ("share", "mesh", "hint"),
    [
        (1 / 4, {}, "mesh.fsdp=8 may do"),
        (1 / 4, {"data": 4, "tensor": 2}, "mesh.fsdp=4 may do"),
        (1 / 2, {"data": 1, "fsdp": 8}, "it takes 16 such devices or more"),
    ],
)
def test_what_would_fit_is_said(monkeypatch, share, mesh, hint):
    """Devices that have so much of what a run needs of each in its mesh."""
    config = run(512, **mesh)
    axes = {"data": 8} | mesh
    needed = memory.estimate(config.model, 16, 1, MeshConfig(**axes)).least
    monkeypatch.setattr(devices, "memory_bytes", lambda _: int(needed * share) + 2**16)
    with pytest.raises(UserError, match=hint):
        devices.check_fits(config)


@pytest.mark.parametrize(
    ("room", "slots", "mesh", "hint"),
    [
        (4, 64, {}, "in 64 slots cannot fit: .*; slots=32 may do"),
        (2, 12, {"data": 2, "fsdp": 4}, "in 12 slots cannot fit: .*; slots=4 may do"),
        (1, 6, {"data": 1, "fsdp": 8}, "in 6 slots cannot fit: .*; one at a time"),
    ],
)
def test_a_device_has_to_hold_the_states_of_all_its_slots(monkeypatch, room, slots, mesh, hint):
    """Devices with room for so many states, and the gradients of one."""
    config = run(512, **mesh)
    needed = memory.estimate(config.model, 16, 1, MeshConfig(**({"data": 8} | mesh)))
    limit = int(room * needed.arguments + needed.gradients) + 2**16
    monkeypatch.setattr(devices, "memory_bytes", lambda _: limit)
    devices.check_fits(config, slots=room * (mesh or {"data": 8})["data"])
    with pytest.raises(UserError, match=hint):
        devices.check_fits(config, slots=slots)


def test_a_mesh_that_does_not_fit_the_devices_is_one_line():
    with pytest.raises(UserError, match="data=3, fsdp=1, tensor=1 makes 3 devices, but there are"):
        devices.check_fits(run(64, data=3))


def test_a_batch_that_cannot_be_split_is_one_line():
    with pytest.raises(UserError, match="batch_size=15 is not divisible by data x fsdp x micro"):
        devices.check_fits(run(64, batch_size=15))


def test_what_cpu_devices_share_is_divided():
    shares = [devices.memory_bytes(device) for device in jax.devices()]
    assert len(set(shares)) == 1
    assert 0 < sum(share or 0 for share in shares) < 2**50


def test_memory_that_a_device_does_not_tell_is_not_guessed():
    class Silent:
        platform = "other"

        def memory_stats(self):
            return None

    assert devices.memory_bytes(Silent()) is None


def test_a_testbed_with_a_run_that_cannot_fit_trains_none(monkeypatch, capsys, tmp_path):
    grid = "grid=[{role: fit, datasets: [rpj], sizes: [11m, 7b], token_multipliers: [20]}]"
    words = ["testbed", "run", "testbeds/gadre2024.yaml", grid, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["scaling-jax", *words])
    monkeypatch.setattr(devices, "memory_bytes", lambda _: 2**32)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "7b cannot fit" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_slots_that_cannot_fit_are_refused_before_the_first_run_is_trained(
    monkeypatch, capsys, tmp_path
):
    grid = "grid=[{role: fit, datasets: [rpj], sizes: [11m], token_multipliers: [20, 40]}]"
    words = ["testbed", "run", "testbeds/gadre2024.yaml", grid, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["scaling-jax", *words, "--pack", "--slots", "64"])
    monkeypatch.setattr(devices, "memory_bytes", lambda _: 2**29)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "11m in 64 slots cannot fit" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
