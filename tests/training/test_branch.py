"""A run that takes over its first steps is the run trained from step 0, bit for bit."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from scaling_jax import config as configs
from scaling_jax.config import CheckpointConfig, RunConfig
from scaling_jax.errors import UserError
from scaling_jax.training import checkpoint, loop

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore:walk. .* tokens need the data"),
]
STEP = 16 * 8


class CrashError(Exception):
    """Stands for a machine that goes down."""


def crash_at(step):
    def report(progress):
        if progress.step == step:
            raise CrashError

    return report


def steps_saved(folder):
    return checkpoint.steps(folder / "checkpoints")


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_run(found, expected):
    for one, other in zip(*map(jax.tree.leaves, (found.state, expected.state)), strict=True):
        assert np.array_equal(one, other)
    assert found.curve.keys() == expected.curve.keys()
    for name, column in expected.curve.items():
        assert np.array_equal(found.curve[name], column)


@pytest.fixture(scope="module")
def make(config):
    """A run of so many steps, of which the last quarter is decay."""

    def make(steps, schedule="warmup_stable_decay", keep=2, every=None, **changes) -> RunConfig:
        optimizer = dataclasses.replace(
            config.optimizer, schedule=schedule, decay_fraction=0.25, **changes.pop("optimizer", {})
        )
        return dataclasses.replace(
            config,
            tokens=steps * STEP,
            optimizer=optimizer,
            checkpoint=CheckpointConfig(every_steps=every, keep=keep),
            **changes,
        )

    return make


@pytest.fixture(scope="module")
def alone(make, tmp_path_factory):
    """Twelve steps from step 0; the decay starts after the ninth."""
    return loop.train(make(12), tmp_path_factory.mktemp("alone") / "run")


@pytest.fixture(scope="module")
def short_folder(make, tmp_path_factory):
    """Eight steps; the decay starts after the sixth."""
    folder = tmp_path_factory.mktemp("short") / "run"
    loop.train(make(8), folder)
    return folder


@pytest.fixture
def short(short_folder, tmp_path):
    return shutil.copytree(short_folder, tmp_path / "short")


def test_a_branch_of_a_shorter_run_is_the_run_alone(make, alone, short, tmp_path):
    before, told = content(short), []
    found = loop.train(make(12, branch_from=str(short)), tmp_path / "run", told.append)
    assert_same_run(found, alone)
    assert (found.branched_at, alone.branched_at) == (6, 0)
    assert [progress.step for progress in told] == list(range(7, 13))
    assert content(short) == before


def test_a_branch_is_the_same_run_as_the_run_alone(make, short):
    branch = make(12, branch_from=str(short))
    assert branch.identity == make(12).identity
    assert branch.identity != make(8).identity


def test_a_branch_of_a_longer_constant_run_is_the_run_alone(make, alone, tmp_path):
    """Other ends do not matter: the trunk has another length, schedule, minimum and decay."""
    optimizer = {"minimum_learning_rate": 1e-3, "decay_shape": "one_minus_sqrt"}
    loop.train(make(14, "constant", 9, 3, optimizer=optimizer), tmp_path / "trunk")
    assert steps_saved(tmp_path / "trunk") == [3, 6, 9, 12, 14]
    found = loop.train(make(12, branch_from=str(tmp_path / "trunk")), tmp_path / "run")
    assert_same_run(found, alone)
    assert found.branched_at == 9


def test_a_branch_that_went_down_goes_on_without_its_trunk(make, alone, short, tmp_path):
    branch = make(12, branch_from=str(short))
    with pytest.raises(CrashError):
        loop.train(branch, tmp_path / "run", crash_at(8))
    assert steps_saved(tmp_path / "run") == [6]
    shutil.rmtree(short)
    found = loop.train(branch, tmp_path / "run")
    assert_same_run(found, alone)
    assert found.branched_at == 6
    again = loop.train(branch, tmp_path / "run", crash_at(12))
    assert_same_run(again, alone)
    assert again.branched_at == 6


def test_branches_of_branches(make, alone, short, tmp_path):
    loop.train(make(10, branch_from=str(short)), tmp_path / "middle")
    assert 8 in steps_saved(tmp_path / "middle")
    found = loop.train(make(12, branch_from=str(tmp_path / "middle")), tmp_path / "run")
    assert_same_run(found, alone)
    assert found.branched_at == 8


def test_a_constant_run_may_be_taken_over_whole(make, tmp_path):
    trunk = loop.train(make(9, "constant", every=3), tmp_path / "trunk")
    short = make(6, "constant", branch_from=str(tmp_path / "trunk"))
    found = loop.train(short, tmp_path / "run", crash_at(1))
    assert found.branched_at == 6
    assert np.array_equal(found.curve["loss"], trunk.curve["loss"][:6])
    assert steps_saved(tmp_path / "run") == [6]
    assert int(loop.restore(short, tmp_path / "run").state["step"]) == 6


def test_every_step_of_a_branch_has_a_line_and_those_of_the_trunk_have_no_speed(
    make, alone, short, tmp_path
):
    loop.train(make(12, branch_from=str(short)), tmp_path / "run")
    written = lines(tmp_path / "run")
    assert [line["step"] for line in written] == list(range(1, 13))
    assert [line["loss"] for line in written] == alone.curve["loss"].tolist()
    assert ["tokens_per_second" in line for line in written] == [False] * 6 + [True] * 6
    assert configs.load(RunConfig, tmp_path / "run" / "config.yaml").branch_from == str(short)
    assert checkpoint.read_meta(tmp_path / "run" / "checkpoints")["branched_at"] == 6


def test_the_step_before_the_decay_is_kept_beside_the_latest(make, tmp_path):
    loop.train(make(8, keep=1, every=1), tmp_path)
    assert steps_saved(tmp_path) == [6, 8]


# Orbax leaves tasks behind that it has given up.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_passed_over_and_stays(make, alone, tmp_path):
    trunk = tmp_path / "trunk"
    loop.train(make(14, "constant", 9, 4), trunk)
    state = [path for path in (trunk / "checkpoints" / "8" / "state").rglob("*") if path.is_file()]
    largest = max(state, key=lambda path: path.stat().st_size)
    largest.write_bytes(b"\0" * largest.stat().st_size)
    found = loop.train(make(12, branch_from=str(trunk)), tmp_path / "run")
    assert_same_run(found, alone)
    assert found.branched_at == 4
    assert steps_saved(trunk) == [4, 8, 12, 14]
    shutil.rmtree(trunk / "checkpoints" / "4")
    with pytest.raises(UserError, match="every checkpoint up to step 9 is damaged"):
        loop.train(make(12, branch_from=str(trunk)), tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "not a trunk of this run: seed is 0 there, 1 here"),
        ({"z_loss_weight": 0.5}, r"z_loss_weight is 0\.0001 there, 0\.5 here"),
        ({"batch_size": 8}, "batch_size is 16 there, 8 here"),
        ({"optimizer": {"learning_rate": 0.5}}, r"optimizer\.learning_rate is 0\.01 there, 0\.5"),
        ({"optimizer": {"warmup_steps": 2}}, r"optimizer\.warmup_steps is 3 there, 2 here"),
        ({"steps": 6}, r"no checkpoint of the first 4 steps, .* \(it has 6, 8\)"),
    ],
    ids=str,
)
def test_what_is_no_trunk_is_refused_in_one_line_and_nothing_is_written(
    make, short_folder, tmp_path, changes, message
):
    branch = make(**{"steps": 12, "branch_from": str(short_folder), **changes})
    with pytest.raises(UserError, match=message) as caught:
        loop.train(branch, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert str(short_folder) in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_finished_cosine_run_is_no_trunk(make, short, tmp_path):
    text = (short / "config.yaml").read_text()
    (short / "config.yaml").write_text(text.replace("warmup_stable_decay", "cosine"))
    with pytest.raises(UserError, match=r"its optimizer\.schedule is cosine, so that every step"):
        loop.train(make(12, branch_from=str(short)), tmp_path / "run")


def test_other_data_and_no_run_at_all_are_refused(make, short, data_folder, tmp_path):
    moved = shutil.copytree(data_folder, tmp_path / "moved")
    index = moved / "walk" / "train" / "index.json"
    index.write_text(index.read_text().replace('"source": "test"', '"source": "other"'))
    branch = make(12, branch_from=str(short))
    data = dataclasses.replace(branch.data, folder=str(moved))
    with pytest.raises(UserError, match="is of other token shards: data_sha256"):
        loop.train(dataclasses.replace(branch, data=data), tmp_path / "run")
    with pytest.raises(UserError, match=r"not the folder of a run: it holds no config\.yaml"):
        loop.train(make(12, branch_from=str(moved)), tmp_path / "run")
    shutil.rmtree(short / "checkpoints")
    with pytest.raises(UserError, match=r"which the runs share \(it has none\)"):
        loop.train(branch, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_cosine_run_cannot_branch(make):
    content = dataclasses.asdict(make(12, "cosine")) | {"branch_from": "trunk"}
    with pytest.raises(UserError, match=r"branch_from: with optimizer\.schedule cosine") as caught:
        configs.build(RunConfig, content, source="run.yaml")
    assert "\n" not in str(caught.value)
