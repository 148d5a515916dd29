"""Several processes on one testbed, as a user starts them; one is killed in the middle."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from scaling_jax import claims
from scaling_jax.training import checkpoint

pytestmark = pytest.mark.slow

NAMES = [f"walk-{size}-m{multiplier}" for size in "sml" for multiplier in (2, 4, 8)]
EXIT_HELD = 75


def config(data_folder: Path) -> dict:
    return {
        "name": "crowded",
        "run": {
            "model": {"layers": 1, "vocabulary_size": 40, "sequence_length": 8},
            "data": {"validation": ["walk"], "folder": str(data_folder)},
            "batch_size": 8,
            "checkpoint": {"every_steps": 20},
            "optimizer": {
                "schedule": "warmup_stable_decay",
                "learning_rate": 0.01,
                "warmup_steps": 2,
            },
            "evaluation": {"sequences": 16, "batch_size": 8, "bootstrap_samples": 10},
        },
        "sizes": {
            "s": {"model": {"width": 8, "heads": 1}},
            "m": {"model": {"width": 12, "heads": 1}},
            "l": {"model": {"width": 16, "heads": 1}},
        },
        "grid": [
            {
                "role": "fit",
                "datasets": ["walk"],
                "sizes": ["s", "m", "l"],
                "token_multipliers": [2, 4, 8],
            },
        ],
        "laws": {"loss": ["over_training"], "error": []},
    }


@pytest.fixture(scope="module")
def grid(data_folder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("crowd") / "crowded.yaml"
    path.write_text(yaml.safe_dump(config(data_folder)))
    return path


def start(*words: str | Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", "from scaling_jax.cli import main; main()", *map(str, words)],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "PYTHONUNBUFFERED": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(child: subprocess.Popen, code: int = 0) -> str:
    output, errors = child.communicate(timeout=600)
    assert child.returncode == code, errors
    assert "Empty DataFrame" not in output
    return output + errors


def wait_until(condition, child: subprocess.Popen):
    """What `condition` returns once it is true."""
    while not (found := condition()):
        assert child.poll() is None, child.communicate()
        time.sleep(0.005)
    return found


def training(out: Path, child: subprocess.Popen) -> Path | None:
    """The run that a process has claimed and trained some steps of."""
    for folder in out.glob("runs/*"):
        holder, metrics = claims.holder(folder), folder / "metrics.jsonl"
        if holder and holder.pid == child.pid and metrics.exists() and metrics.stat().st_size:
            return folder
    return None


def trained_by(output: str) -> list[str]:
    """The runs that a process has finished itself, by what it printed."""
    return re.findall(r"^\[\d+/\d+\] (\S+): (?!.*\(was done\))", output, re.MULTILINE)


@pytest.fixture(scope="module")
def alone(grid) -> Path:
    """The same testbed by a single process that nobody disturbs."""
    out = grid.parent / "alone"
    assert sorted(trained_by(end(start("testbed", "run", grid, "--out", out)))) == sorted(NAMES)
    return out


def assert_same_runs(out: Path, alone: Path) -> None:
    assert (out / "records.csv").read_bytes() == (alone / "records.csv").read_bytes()
    folders = sorted(folder.name for folder in alone.glob("runs/*"))
    assert sorted(folder.name for folder in out.glob("runs/*")) == folders
    for name in folders:
        here, there = (path / "runs" / name / "checkpoints" for path in (out, alone))
        assert checkpoint.latest_step(here) == checkpoint.latest_step(there)
        prints = [checkpoint.read_meta(folder)["fingerprints"] for folder in (here, there)]
        assert prints[0] == prints[1]
        curve = checkpoint.read_curve(there)
        for column, values in checkpoint.read_curve(here).items():
            np.testing.assert_array_equal(values, curve[column])
        lines = (here.parent / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == curve["step"].tolist()


def test_workers_of_which_one_is_killed_do_each_run_once(grid, alone):
    out, workers = grid.parent / "crowd", 3
    children = [
        start("testbed", "run", grid, "--out", out, "--index", f"{index}/{workers}")
        for index in range(1, workers + 1)
    ]
    victim = children[1]
    left_behind = wait_until(lambda: training(out, victim), victim)
    victim.send_signal(signal.SIGKILL)
    outputs = [end(children[0]), end(victim, -signal.SIGKILL), end(children[2])]
    assert left_behind.name.rpartition("-")[0] not in trained_by(outputs[1])
    assert sorted(name for text in outputs for name in trained_by(text)) == sorted(NAMES)
    for folder in out.glob("runs/*"):
        started = len(list((folder / "claims").iterdir()))
        assert started == (2 if folder == left_behind else 1)
    assert_same_runs(out, alone)
    assert [(out / "report.html").exists(), "report:" in outputs[0]] == [True, True]
    assert "worker 1/3 writes the report" in outputs[2]


def test_workers_with_only_their_share_leave_the_rest(grid, alone):
    out = grid.parent / "shared"
    begin = ("testbed", "run", grid, "--out", out, "--only_share", "--index")
    first = end(start(*begin, "1/2"))
    assert "of 9 runs are not done yet" in first
    assert not (out / "records.csv").exists()
    second = end(start(*begin, "2/2"))
    assert sorted(trained_by(first) + trained_by(second)) == sorted(NAMES)
    assert trained_by(end(start("testbed", "run", grid, "--out", out))) == []
    assert_same_runs(out, alone)


def test_a_second_train_says_who_has_the_run_and_a_stopped_one_gives_it_back(grid):
    content = yaml.safe_load(grid.read_text())
    run = content["run"] | {"tokens": 10**8, "seed": 1}
    run["model"] |= content["sizes"]["s"]["model"]
    run["data"] |= {"dataset": "walk"}
    path, out = grid.parent / "long.yaml", grid.parent / "long"
    path.write_text(yaml.safe_dump(run))
    first = start("train", path, "--out", out)
    metrics = out / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size, first)
    message = end(start("train", path, "--out", out), EXIT_HELD)
    assert f"process {first.pid} on" in message.splitlines()[-1]
    assert "Traceback" not in message
    first.terminate()
    assert "stopped and saved" in end(first, 128 + signal.SIGTERM)
    assert claims.holder(out) is None
