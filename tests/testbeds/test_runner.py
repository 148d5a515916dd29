"""A testbed of branches, in any number of sittings, records what separate runs do."""

import contextlib
import dataclasses
import math
import shutil

import numpy as np
import pandas as pd
import pytest

from scaling_jax import claims
from scaling_jax import config as configs
from scaling_jax.claims import Timing
from scaling_jax.config import HealthConfig, LawsConfig, TestbedConfig
from scaling_jax.errors import HeldError
from scaling_jax.testbeds import grid, runner
from scaling_jax.training import checkpoint, goodput
from scaling_jax.training.curve import GrowingCurve

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore:walk. .* tokens need the data"),
]
# 4, 8 and 12 steps, of which the last quarter decays: 1, 2 and 3 steps.
STEPS = {"walk-s-m1": 4, "walk-s-m2": 8, "walk-s-m3": 12}


class CrashError(Exception):
    """Stands for a machine that goes down."""


@pytest.fixture(scope="module")
def runs(data_folder):
    model = {"width": 16, "layers": 1, "heads": 2, "vocabulary_size": 40, "sequence_length": 8}
    content = {
        "name": "column",
        "run": {
            "model": model,
            "data": {"validation": ["walk"], "folder": str(data_folder)},
            "batch_size": 8,
            "optimizer": {
                "schedule": "warmup_stable_decay",
                "decay_fraction": 0.25,
                "warmup_steps": 2,
                "learning_rate": 0.01,
            },
            "evaluation": {"sequences": 16, "batch_size": 8, "bootstrap_samples": 10},
        },
        "sizes": {"s": {}},
        "grid": [
            {"role": "held_out", "datasets": ["walk"], "sizes": ["s"], "token_multipliers": [3]},
            {"role": "fit", "datasets": ["walk"], "sizes": ["s"], "token_multipliers": [2, 1]},
        ],
    }
    testbed = configs.build(TestbedConfig, content, source="column.yaml")
    params = grid.expand(testbed)[0].budget.params
    content["run"]["batch_size"] = 8 * round(params / 4 / 8 / 8)
    runs = grid.expand(configs.build(TestbedConfig, content, source="column.yaml"))
    assert {run.name: run.budget.steps for run in runs} == STEPS
    return runs


@pytest.fixture(scope="module")
def separate(runs, tmp_path_factory):
    """The records of the same runs, each trained alone."""
    out = tmp_path_factory.mktemp("separate")
    alone = [dataclasses.replace(run, trunk=None) for run in runs]
    assert all(done.now for done in runner.run_all(alone, out))
    return runner.write_table(alone, out)


def test_records_say_which_runs_were_healthy(runs, separate, tmp_path, monkeypatch):
    assert set(separate["health"]) == {"ok"}
    assert "health" not in runner.brief(separate, LawsConfig())
    (short,) = (run for run in runs if run.budget.steps == 8)
    strict = HealthConfig(spike="skip")
    limits = {3: 0.0, 4: 0.0}  # which any loss is above
    monkeypatch.setattr(GrowingCurve, "loss_limit", lambda _, step: limits.get(step, math.inf))
    wild = dataclasses.replace(
        short, config=dataclasses.replace(short.config, health=strict), trunk=None
    )
    assert all(done.now for done in runner.run_all([wild], tmp_path))
    (found,) = runner.write_table([wild], tmp_path)["health"]
    assert found == "skipped 2, spiked 2"
    assert goodput.seconds(wild.folder(tmp_path))["evaluation"] > 0


def test_records_count_what_is_not_repeated_and_bits_per_byte(runs, separate):
    """4, 8 and 12 steps of one batch size read the 100 rows of `walk` again and again."""
    table = separate.set_index("run").loc[list(STEPS)]
    batch_size = runs[0].config.batch_size
    expected = [min(steps * batch_size, 100) * 8 for steps in STEPS.values()]
    assert table["unique_tokens"].tolist() == expected
    bits = table["loss/walk"] / np.log(2) * 333 / 332
    np.testing.assert_allclose(table["bits_per_byte/walk"], bits)


def trained(runs, out, crash_at=None):
    """Brings the runs to their end and says which steps were trained, run by run."""
    told = []

    def report(run, progress):
        told.append((run.name, progress.step))
        if told[-1] == crash_at:
            raise CrashError

    with contextlib.suppress(CrashError):
        list(runner.run_all(runs, out, report))
    return told


EVERY_STEP_ONCE = [
    *(("walk-s-m1", step) for step in range(1, 5)),
    *(("walk-s-m2", step) for step in range(4, 9)),
    *(("walk-s-m3", step) for step in range(7, 13)),
]


def test_branches_give_the_records_of_separate_runs(runs, separate, tmp_path):
    assert trained(runs, tmp_path) == EVERY_STEP_ONCE
    pd.testing.assert_frame_equal(runner.write_table(runs, tmp_path), separate, check_exact=True)
    assert trained(runs, tmp_path) == []


def test_the_cost_counts_each_step_once(runs, tmp_path):
    step = runs[0].budget.flops_6nd / 4

    def cost():
        return runner.cost([runner.status(run, tmp_path) for run in runs])

    assert cost() == runner.Cost(spent=0, whole=15 * step, separate=24 * step)
    trained(runs, tmp_path, crash_at=("walk-s-m2", 8))
    assert cost().spent == pytest.approx((4 + 3) * step)  # saved before the decay: step 6
    trained(runs, tmp_path)
    assert cost().spent == cost().whole == pytest.approx(15 * step)
    assert cost().saved == pytest.approx(9 / 24)


@pytest.mark.parametrize(
    "crash_at",
    [
        ("walk-s-m2", 5),
        pytest.param(("walk-s-m1", 4), marks=pytest.mark.slow),
        pytest.param(("walk-s-m3", 11), marks=pytest.mark.slow),
    ],
)
def test_a_testbed_that_went_down_goes_on(runs, separate, tmp_path, crash_at):
    trained(runs, tmp_path, crash_at)
    states = [runner.status(run, tmp_path).word for run in runs]
    place = list(STEPS).index(crash_at[0])
    assert states == ["done"] * place + ["started"] + ["waiting"] * (2 - place)
    again = trained(runs, tmp_path)
    assert again[0][0] == crash_at[0]
    assert again[0][1] > runs[place].shared_steps
    pd.testing.assert_frame_equal(runner.write_table(runs, tmp_path), separate, check_exact=True)


def test_a_damaged_checkpoint_of_one_run_stops_no_testbed(runs, separate, tmp_path, caplog):
    trained(runs, tmp_path, crash_at=("walk-s-m2", 7))
    folder = runs[1].folder(tmp_path) / "checkpoints"
    (folder / "6" / "meta" / "metadata").write_text("{}")
    found = runner.status(runs[1], tmp_path)
    assert found.word == "started"
    assert (found.step, found.branched_at) == (3, 3)
    assert "checkpoint of step 6 is damaged or gone" in caplog.text
    trained(runs, tmp_path)
    pd.testing.assert_frame_equal(runner.write_table(runs, tmp_path), separate, check_exact=True)


def test_where_a_trunk_was_removed_its_branch_is_trained_alone(runs, separate, tmp_path):
    trained(runs[:2], tmp_path)
    shutil.rmtree(runs[1].folder(tmp_path) / "checkpoints" / "6")
    assert trained(runs, tmp_path)[0] == ("walk-s-m3", 1)
    assert runner.status(runs[2], tmp_path).branched_at == 0
    statuses = [runner.status(run, tmp_path) for run in runs]
    assert runner.cost(statuses).saved == pytest.approx(3 / 24)
    pd.testing.assert_frame_equal(runner.write_table(runs, tmp_path), separate, check_exact=True)


def test_each_run_keeps_what_a_longer_one_can_branch_from(runs, tmp_path):
    trained(runs[:1], tmp_path)
    assert checkpoint.steps(runs[0].folder(tmp_path) / "checkpoints") == [3, 4]


def test_a_run_that_was_taken_over_is_left_to_the_other_before_anything_is_written(
    runs, tmp_path, monkeypatch
):
    monkeypatch.setattr(claims, "SECONDS_BETWEEN_CHECKS", 0.0)
    folder = runs[0].folder(tmp_path)

    def take_over(_, progress):
        if progress.step == 2:  # as another host does while this process stands still
            (folder / "claims" / "000002.json").touch()

    with pytest.raises(HeldError, match="stood still and lost the run"):
        list(runner.run_all(runs[:1], tmp_path, take_over))
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert not (folder / "evaluations").exists()
    assert runner.status(runs[0], tmp_path).holder is not None


def test_a_branch_waits_for_the_trunk_that_another_process_trains(runs, separate, tmp_path):
    """Once the other process has ended, trunk and branch are trained here, each step once."""
    quick = Timing(beat=0.05, look=0.02, stale=0.3)
    other = claims.Watcher(Timing(beat=1000)).take(runs[0].folder(tmp_path))
    assert other is not None
    path = runs[0].folder(tmp_path) / "claims" / "000001.json"
    path.write_text(path.read_text().replace('"place": "', '"place": "another host, '))
    told, waited = [], []
    for done in runner.run_all(
        runs,
        tmp_path,
        lambda run, progress: told.append((run.name, progress.step)),
        lambda run, holder: waited.append(run.name),
        timing=quick,
    ):
        assert done.now
    assert set(waited) == {"walk-s-m1"}
    assert told == EVERY_STEP_ONCE
    pd.testing.assert_frame_equal(runner.write_table(runs, tmp_path), separate, check_exact=True)
