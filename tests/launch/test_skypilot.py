"""SkyPilot's tasks: what they hold, what their commands become, and what SkyPilot says to them."""

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "launch" / "skypilot"
TASKS = ("run", "testbed")
# Codes on which a run goes on from its last checkpoint, and those that no restart mends.
RESTART, FINAL = {75, 130, 134, 143}, {0, 1, 2}
RESERVED = 137  # SkyPilot uses it itself
ENVIRONMENT = {
    "BUCKET": "my-bucket",
    "CONFIG": "my configs/a b.yaml",
    "SKYPILOT_JOB_RANK": "3",
    "SKYPILOT_NUM_JOBS": "8",
    "HOME": "/home/someone",
}


def load(name: str) -> dict:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", TASKS)
def test_it_runs_on_spot_slices_and_is_restarted_on_the_right_codes(name):
    task = load(name)
    assert set(task) == {
        *("name", "resources", "envs", "workdir", "file_mounts", "setup", "run"),
    }
    resources = task["resources"]
    assert resources["use_spot"] is True
    assert resources["infra"] == "gcp"
    assert resources["accelerators"].startswith("tpu-v")
    codes = set(resources["job_recovery"]["recover_on_exit_codes"])
    assert codes == RESTART
    assert not codes & {*FINAL, RESERVED}


@pytest.mark.parametrize("name", TASKS)
def test_bucket_and_config_have_to_be_given(name):
    task = load(name)
    assert task["envs"] == {"BUCKET": None, "CONFIG": None}
    assert task["file_mounts"] == {"/bucket": {"source": "gs://${BUCKET}", "mode": "MOUNT"}}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "run",
            "train 'my configs/a b.yaml' data.folder=/bucket/data --out '/bucket/runs/a b'",
        ),
        (
            "testbed",
            "testbed run 'my configs/a b.yaml' run.data.folder=/bucket/data "
            "--out '/bucket/testbeds/a b' --index 4/8",
        ),
    ],
)
def test_the_command_that_a_job_runs(name, expected):
    program = "~/scaling_jax_env/bin/scaling-jax"
    run = load(name)["run"]
    assert run.count(program) == 1
    done = subprocess.run(
        ["sh", "-euc", "printf '%s\\n' " + run.replace(program, "")],
        env=ENVIRONMENT | {"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == shlex.split(expected)


@pytest.mark.parametrize("name", TASKS)
def test_the_setup_is_good_shell(name):
    subprocess.run(["sh", "-n", "-c", load(name)["setup"]], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_skypilot_reads_it(name):
    sky = pytest.importorskip("sky", reason="SkyPilot is not installed")
    overrides = [("BUCKET", "my-bucket"), ("CONFIG", "x.yaml")]
    task = sky.Task.from_yaml_config(load(name), env_overrides=overrides)
    (resources,) = task.resources
    assert resources.use_spot
    assert set(resources.job_recovery["recover_on_exit_codes"]) == RESTART
    assert task.storage_mounts["/bucket"].source == "gs://my-bucket"
    with pytest.raises(ValueError, match="BUCKET"):
        sky.Task.from_yaml_config(load(name))
