"""The main job in miniature, as a user runs it: a process, its files, its second call."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from scaling_jax.data import zipf_markov
from scaling_jax.training import checkpoint

pytestmark = pytest.mark.slow

MINIATURE = {
    "name": "miniature",
    "run": {
        "model": {"vocabulary_size": 264, "sequence_length": 32, "layers": 1},
        "data": {"validation": ["zipf_markov"]},
        "batch_size": 8,
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 5},
        "evaluation": {"sequences": 64, "batch_size": 64, "tasks": {"config": "quickstart"}},
    },
    "sizes": {
        "s": {"model": {"width": 8, "heads": 1}},
        "m": {"model": {"width": 12, "heads": 1}},
        "l": {"model": {"width": 16, "heads": 2}},
    },
    "grid": [
        {"sizes": ["s", "m"], "token_multipliers": [1, 2, 4], "role": "fit"},
        {"sizes": ["l"], "token_multipliers": [4], "role": "held_out"},
    ],
    "laws": {"errors": ["{dataset}"]},
}
for block in MINIATURE["grid"]:
    block["datasets"] = ["zipf_markov"]


def command(out: Path, *more: str) -> list[str]:
    words = ("quickstart", "--config", str(out.parent / "miniature.yaml"), "--out", str(out), *more)
    return [sys.executable, "-c", "from scaling_jax.cli import main; main()", *words]


def environment(devices: int) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def quickstart(out: Path, *more: str, devices: int = 2) -> str:
    done = subprocess.run(
        command(out, *more), env=environment(devices), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "miniature.yaml").write_text(yaml.safe_dump(MINIATURE))
    return folder


@pytest.fixture(scope="module")
def finished(folder) -> tuple[Path, str]:
    out = folder / "first"
    return out, quickstart(out)


def test_it_leaves_records_fits_and_a_report(finished):
    out, printed = finished
    table = pd.read_csv(out / "records.csv")
    assert len(table) == 7
    assert (table["loss/zipf_markov/low"] < table["loss/zipf_markov"]).all()
    assert (table["loss/zipf_markov"] < table["loss/zipf_markov/high"]).all()
    assert (table["loss/zipf_markov"] > zipf_markov.entropy_rate()).all()
    # Questions of the one dataset that was prepared; a mean over all of them there is none.
    names = map(str, table.columns)
    errors = {name for name in names if name.startswith("error/") and name.count("/") == 1}
    of_tasks = {"error/zipf_markov_cloze", "error/zipf_markov_choice", "error/zipf_markov"}
    assert errors == of_tasks | {"error/next_token_zipf_markov"}
    assert table["error/zipf_markov_choice"].between(0.4, 0.85).all()
    fits = json.loads((out / "fits.json").read_text())["fits"]
    assert [fit["target"] for fit in fits if "loss" in fit] == ["error/zipf_markov"]
    assert {fit["law"] for fit in fits} == {"over_training", "chinchilla", "exponential"}
    for fit in fits:
        (held_out,) = fit["held_out"]
        row = table[table["run"] == held_out["run"]].iloc[0]
        assert held_out["measured"] == row[fit["target"]]
        expected = abs(held_out["predicted"] - held_out["measured"]) / held_out["measured"]
        assert held_out["relative_error"] == pytest.approx(expected)
    page = (out / "report.html").read_text()
    assert f"{zipf_markov.entropy_rate():.5g}" in page
    for name in ("records.csv", "fits.json", "report.html"):
        assert str(out / name) in printed


def test_every_run_keeps_its_config_metrics_and_curve(finished):
    out, _ = finished
    table = pd.read_csv(out / "records.csv")
    steps_of = dict(zip(table["run"], table["step"].astype(int), strict=True))
    folders = list((out / "runs").iterdir())
    assert len(folders) == 7
    for folder in folders:
        steps = steps_of[folder.name.rpartition("-")[0]]
        curve = checkpoint.read_curve(folder / "checkpoints")
        np.testing.assert_array_equal(curve["step"], np.arange(1, steps + 1))
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        np.testing.assert_allclose([json.loads(line)["loss"] for line in lines], curve["loss"])
        assert yaml.safe_load((folder / "config.yaml").read_text())["batch_size"] == 8


def test_a_second_call_trains_nothing(finished):
    out, _ = finished
    before = (out / "records.csv").read_bytes()
    changed = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")}
    assert quickstart(out).count("(was done)") == 7
    assert (out / "records.csv").read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")} == changed


def test_eight_devices_give_the_same_losses(finished, folder):
    out, _ = finished
    shutil.copytree(out / "data", folder / "eight" / "data")
    quickstart(folder / "eight", devices=8)
    one, eight = (pd.read_csv(path / "records.csv") for path in (out, folder / "eight"))
    np.testing.assert_allclose(one["loss/zipf_markov"], eight["loss/zipf_markov"], rtol=1e-4)


def test_ctrl_c_keeps_what_is_done_and_the_next_call_ends_the_same(finished, folder):
    out, _ = finished
    again = folder / "stopped"
    shutil.copytree(out / "data", again / "data")
    child = subprocess.Popen(
        command(again),
        env=environment(2),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("[2/7]"):
            child.send_signal(signal.SIGINT)
            break
    _, errors = child.communicate()
    assert child.returncode == 128 + signal.SIGINT
    assert "goes on from" in errors.splitlines()[-1]
    assert quickstart(again).count("(was done)") >= 2
    first, second = ((path / "records.csv").read_bytes() for path in (out, again))
    assert first == second


def test_fresh_removes_only_its_own_folder(finished, folder):
    out, _ = finished
    again = folder / "fresh"
    again.mkdir()
    (again / ".quickstart").touch()
    (again / "stale").touch()
    shutil.copytree(out / "data", folder / "data")
    assert "(was done)" not in quickstart(again, "--fresh")
    assert not (again / "stale").exists()
