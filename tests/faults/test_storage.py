"""Full disks, read-only folders and clocks that jump, met by the command line itself."""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from scaling_jax.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)
from scaling_jax.training import checkpoint, loop

pytestmark = pytest.mark.filterwarnings("ignore:walk. .* tokens need the data")


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system in memory of so many bytes at `folder`."""
    folder.mkdir()
    options = f"size={size}"
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def command(*arguments):
    """What the command line prints and its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "scaling_jax.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
    )
    assert "Traceback" not in done.stderr
    return done


def is_told(done, text):
    """One line that says what the storage says, exit code 2."""
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert last.startswith("error: ")
    assert text in last
    assert "the same command goes on from there" in last


def left_behind(folder):
    """A copy of a run's folder: what is left when its process, orbax's threads too, has ended."""
    unfinished = shutil.ignore_patterns("*.orbax-checkpoint-tmp")
    return shutil.copytree(folder, folder.with_name("left"), ignore=unfinished)


@pytest.fixture(scope="module")
def config(data_folder):
    model = ModelConfig(width=16, layers=1, heads=2, vocabulary_size=40, sequence_length=8)
    return RunConfig(
        model=model,
        data=DataConfig(dataset="walk", validation=("walk",), folder=str(data_folder)),
        batch_size=16,
        tokens=12 * 16 * 8,
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=3),
        checkpoint=CheckpointConfig(every_steps=2),
    )


@pytest.fixture(scope="module")
def file(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config)))))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("size", ["64k", "400k"])
def test_a_full_disk_stops_training_and_more_room_lets_it_go_on(file, tmp_path, size):
    assert command("train", file, "--out", tmp_path / "whole").returncode == 0
    with small_disk(tmp_path / "disk", size) as disk:
        is_told(command("train", file, "--out", disk / "run"), "No space left on device")
        remount(disk, "size=50m")
        done = command("train", file, "--out", disk / "run")
        assert done.returncode == 0, done.stderr
        found = checkpoint.read_curve(disk / "run" / "checkpoints")
        lines = (disk / "run" / "metrics.jsonl").read_text().splitlines()
    whole = checkpoint.read_curve(tmp_path / "whole" / "checkpoints")
    assert all(np.array_equal(found[name], column) for name, column in whole.items())
    assert [json.loads(line)["loss"] for line in lines] == whole["loss"].tolist()


@pytest.mark.slow
def test_a_full_disk_stops_preparing_and_fitting(tmp_path):
    table = "params,tokens,loss/a\n" + "".join(
        f"{n},{20 * n},{2 + 30 * n**-0.2}\n" for n in (1e6, 2e6, 4e6, 8e6, 2e7, 5e7)
    )
    (tmp_path / "runs.csv").write_text(table)
    with small_disk(tmp_path / "disk", "100k") as disk:
        is_told(command("data", "prepare", "zipf_markov", "--out", disk), "No space left")
        assert not list(disk.rglob("index.json"))
        used = os.statvfs(disk)
        (disk / "filler").write_bytes(b"x" * used.f_bavail * used.f_frsize)
        is_told(command("fit", tmp_path / "runs.csv", "--out", disk / "f.json"), "No space left")
        assert not (disk / "f.json").exists()
        assert not list(disk.glob(".*.tmp"))


@pytest.mark.slow
def test_a_read_only_folder_is_told(file, tmp_path):
    with small_disk(tmp_path / "disk", "10m") as disk:
        assert command("train", file, "--out", disk / "run").returncode == 0
        remount(disk, "ro")
        is_told(command("train", file, "--out", disk / "new"), "Read-only file system")
        is_told(command("evaluate", disk / "run"), "Read-only file system")
        is_told(command("data", "prepare", "zipf_markov", "--out", disk), "Read-only file system")


@pytest.mark.slow
def test_the_checkpoints_of_another_run_are_refused(file, tmp_path):
    assert command("train", file, "--out", tmp_path / "run").returncode == 0
    done = command("train", file, "seed=5", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "belongs to another run" in done.stderr.splitlines()[-1]
    assert checkpoint.latest_step(tmp_path / "run" / "checkpoints") == 12


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("jump", [1e6, pytest.param(-1e6, marks=pytest.mark.slow)])
def test_a_clock_that_jumps_changes_no_result(config, tmp_path, monkeypatch, jump):
    whole = loop.train(config, tmp_path / "whole")
    told = []
    with monkeypatch.context() as patch:

        def report(progress):
            told.append(progress)
            if progress.step == 5:
                real = time.time
                patch.setattr(time, "time", lambda: real() + jump)

        with contextlib.suppress(TimeoutError):  # of a checkpoint that was being written
            loop.train(config, tmp_path / "jumping", report)
    assert told[-1].step >= 5
    found = loop.train(config, left_behind(tmp_path / "jumping"))
    for name, column in whole.curve.items():
        assert np.array_equal(found.curve[name], column)
    assert all(0 <= progress.seconds_left < 1e5 for progress in told[1:])


@pytest.mark.usefixtures("quick_compilation")
def test_a_clock_that_never_rests_stops_a_run_that_goes_on_later(config, tmp_path, monkeypatch):
    real, calls = time.time, itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + 1e6 * next(calls))
        with pytest.raises(TimeoutError, match="was not saved in time") as caught:
            loop.train(config, tmp_path / "run")
        assert "\n" not in str(caught.value)
    found = loop.train(config, left_behind(tmp_path / "run"))
    assert found.curve["step"].tolist() == list(range(1, 13))
