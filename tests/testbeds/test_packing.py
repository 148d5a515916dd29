"""Which runs are packed, in how many slots; a packed testbed records what runs alone do."""

import dataclasses
import json

import numpy as np
import pytest

from scaling_jax import config as configs
from scaling_jax.claims import Holder, Timing
from scaling_jax.config import TestbedConfig
from scaling_jax.errors import UserError
from scaling_jax.testbeds import failures, grid, packing, runner

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore:walk. .* tokens need the data"),
]
# One size of Gadre et al. 2024: token multipliers of three datasets, in quarters.
PAPER = sorted([1, 2, 4, 8, 16, 32, 64, 128] * 3, reverse=True)


@pytest.fixture(scope="module")
def content(data_folder):
    model = {"width": 16, "layers": 1, "heads": 2, "vocabulary_size": 40, "sequence_length": 8}
    return {
        "name": "column",
        "run": {
            "model": model,
            "data": {"validation": ["walk"], "folder": str(data_folder)},
            "batch_size": 16,
            "tokens": None,
            "optimizer": {"warmup_steps": 2, "learning_rate": 0.01},
            "evaluation": {"sequences": 16, "batch_size": 8, "bootstrap_samples": 10},
        },
        "sizes": {"s": {}, "t": {"model": {"width": 8}}},
        "grid": [
            {
                "role": "fit",
                "datasets": ["walk"],
                "sizes": ["s"],
                "token_multipliers": [0.05, 0.1],
                "seeds": [0, 1, 2],
            },
            {"role": "held_out", "datasets": ["walk"], "sizes": ["t"], "token_multipliers": [0.1]},
        ],
    }


@pytest.fixture(scope="module")
def runs(content):
    return expand(content)


def expand(content, **optimizer):
    run = content["run"] | {"optimizer": content["run"]["optimizer"] | optimizer}
    return grid.expand(configs.build(TestbedConfig, content | {"run": run}, source="column.yaml"))


def plan(runs, out, slots=None):
    return packing.plan([runner.status(run, out) for run in runs], slots)


@pytest.mark.parametrize(
    ("slots", "percent"), [(2, 99.9), (4, 99.6), (5, 95.6), (6, 99.6), (8, 74.7), (16, 37.4)]
)
def test_occupancy_is_that_of_the_longest_run_first(slots, percent):
    """By hand: no schedule of these runs in 6 slots or more takes less than the longest three."""
    assert 100 * packing.occupancy(PAPER, slots, slots) == pytest.approx(percent, abs=0.05)


def test_a_group_of_devices_takes_its_slots_in_turns():
    assert packing.occupancy([4, 4, 4, 4], 4, 2) == 1
    # The fifth has a group to itself at last, and the other group waits.
    assert packing.occupancy([4, 4, 4, 4, 4], 4, 2) == pytest.approx(20 / (2 * 12))
    # Two of three in one group: it needs two steps' time while the other needs one.
    assert packing.occupancy([6, 3, 3], 4, 2) == pytest.approx(12 / (2 * 9))


def test_runs_of_one_shape_are_packed_the_longest_first(runs, tmp_path):
    found = plan(runs, tmp_path)
    (group,) = found.groups
    steps = [run.budget.steps for run in group.runs]
    assert steps == sorted(steps, reverse=True)
    assert {run.name for run in group.runs} == {run.name for run in runs if "-s-" in run.name}
    assert [each.run.name for each in found.alone] == ["walk-t-m0.1"]
    assert "its shape" in str(found.alone[0])
    assert 8 % group.slots == 0
    assert group.slots * group.slot_devices == 8
    assert group.occupancy == packing.occupancy(steps, group.slots, group.slots)


def test_slots_that_would_idle_are_not_used(runs, tmp_path):
    long, *_, short = sorted((run for run in runs if "-s-" in run.name), key=steps_of)[::-1]
    longer = dataclasses.replace(
        long, budget=dataclasses.replace(long.budget, steps=10 * short.budget.steps)
    )
    found = plan([short, longer], tmp_path)
    assert not found.groups
    assert "slots would be busy 55% of the time at most" in str(found.alone[0])
    assert plan([short, longer], tmp_path, slots=2).groups[0].occupancy == pytest.approx(0.55)


def steps_of(run):
    return run.budget.steps


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (1, "slots=1: 2 or more"),
        (-3, "slots=-3: 2 or more"),
        (5, r"slots=5: in each, batch_size=12 is not divisible by data .* = 8"),
    ],
)
def test_impossible_slots_are_refused(runs, tmp_path, slots, message):
    odd = [
        dataclasses.replace(run, config=dataclasses.replace(run.config, batch_size=12))
        for run in runs
    ]
    with pytest.raises(UserError, match=message):
        plan(odd, tmp_path, slots)


def test_more_devices_than_a_batch_has_rows_are_used_by_packing(runs, tmp_path):
    """Alone such a run would be refused, so even slots that idle are worth having."""
    few = [
        dataclasses.replace(run, config=dataclasses.replace(run.config, batch_size=4))
        for run in runs
        if "-s-" in run.name
    ]
    (group,) = plan(few, tmp_path).groups
    assert group.slot_devices <= 4


@pytest.mark.slow
def test_runs_of_a_host_that_is_gone_are_packed(content, tmp_path):
    """They were in its slots; that it is gone is seen only after a while."""
    few = [run for run in expand(content) if run.name.startswith("walk-s-m0.05")]
    theirs = dataclasses.replace(Holder.here(), place="another boot", host="gone")
    for run in few:
        claim = run.folder(tmp_path) / "claims" / "000001.json"
        claim.parent.mkdir(parents=True)
        claim.write_text(json.dumps(dataclasses.asdict(theirs)))
    found = plan(few, tmp_path, slots=8)
    assert not found.alone
    trained, heard = [], []
    packing.train(
        found,
        tmp_path,
        trained=trained.append,
        waiting=lambda run, holder: heard.append((run.name, holder.host)),
        timing=Timing(look=0.05, stale=0.2),
    )
    assert {run.name for run in trained} == {run.name for run in few}
    assert set(heard) == {(run.name, "gone") for run in few}


@pytest.fixture(scope="module")
def stable(content):
    """Branches: each of three columns of seeds has a trunk and one that goes on from it."""
    return expand(content, schedule="warmup_stable_decay", decay_fraction=0.25)


def test_branches_come_after_their_trunks(stable, tmp_path):
    found = plan(stable, tmp_path)
    assert [[bool(run.trunk) for run in group.runs] for group in found.groups] == [
        [False] * 3,
        [True] * 3,
    ]


@pytest.mark.slow
def test_a_packed_testbed_records_what_runs_alone_do(stable, tmp_path):
    told, trained = [], []
    packing.train(
        plan(stable, tmp_path / "packed"),
        tmp_path / "packed",
        lambda run, progress: told.append((run.name, progress.step)),
        trained.append,
    )
    assert {run.name for run in trained} == {run.name for run in stable if "-s-" in run.name}
    branch = next(run for run in stable if run.trunk)
    first = min(step for name, step in told if name == branch.name)
    assert first == branch.shared_steps + 1
    # Nothing is left to pack, and only the run alone is left to train.
    assert not plan(stable, tmp_path / "packed").groups
    trained_after = []
    list(runner.run_all(stable, tmp_path / "packed", lambda run, _: trained_after.append(run.name)))
    assert set(trained_after) == {"walk-t-m0.1"}
    list(runner.run_all(stable, tmp_path / "alone"))
    tables = [runner.write_table(stable, tmp_path / way) for way in ("packed", "alone")]
    numbers = [table.select_dtypes("number") for table in tables]
    assert list(tables[0].columns) == list(tables[1].columns)
    np.testing.assert_allclose(numbers[0], numbers[1], rtol=1e-5)


def test_a_run_that_goes_wrong_is_given_up(content, tmp_path):
    wild = expand(content, learning_rate=1e30, warmup_steps=0)
    calm = [run for run in expand(content) if run.name in ("walk-s-m0.1", "walk-s-m0.1-s1")]
    one = next(run for run in wild if run.name == "walk-s-m0.1-s2")
    packing.train(plan([*calm, one], tmp_path, slots=8), tmp_path)
    assert "nan" in (failures.reason(one.folder(tmp_path)) or "")
    assert plan([*calm, one], tmp_path) == packing.Packing((), ())
    assert all(runner.status(run, tmp_path).word == "trained" for run in calm)
