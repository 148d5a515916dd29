import dataclasses
import json
import os
import shutil
import signal
import time
import warnings

import jax
import numpy as np
import pytest
import yaml

from scaling_jax.config import CheckpointConfig, HealthConfig, MeshConfig
from scaling_jax.errors import Interrupted, NonFiniteLossError, UserError
from scaling_jax.training import checkpoint, goodput, loop
from scaling_jax.training.checkpoint import Checkpoints
from scaling_jax.training.curve import GrowingCurve
from scaling_jax.training.profiling import Window

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore:walk. .* tokens need the data"),
]
STEPS = 12


class CrashError(Exception):
    """Stands for a machine that goes down."""


def crash_at(step):
    def report(progress):
        if progress.step == step:
            raise CrashError

    return report


def flip_largest(folder):
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(found, expected):
    for one, other in zip(*map(jax.tree.leaves, (found.state, expected.state)), strict=True):
        assert np.array_equal(one, other)
    assert found.curve.keys() == expected.curve.keys()
    for name, column in expected.curve.items():
        assert np.array_equal(found.curve[name], column)
    assert found.budget == expected.budget


@pytest.fixture(scope="module")
def often(config):
    return dataclasses.replace(config, checkpoint=CheckpointConfig(every_steps=4))


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture(scope="module")
def heard():
    return []


@pytest.fixture(scope="module")
def whole(config, whole_folder, heard):
    """The run without any interruption."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "walk: 1,536 tokens need the data")
        return loop.train(config, whole_folder, heard.append)


@pytest.fixture
def finished(whole, whole_folder, tmp_path):
    """A copy of the finished run's folder."""
    return shutil.copytree(whole_folder, tmp_path / "run")


@pytest.fixture
def crashed(often, tmp_path):
    """A run that went down in step 10, with checkpoints of steps 4 and 8."""
    with pytest.raises(CrashError):
        loop.train(often, tmp_path / "run", crash_at(10))
    assert checkpoint.latest_step(tmp_path / "run" / "checkpoints") == 8
    return tmp_path / "run"


def test_a_run_trains_on_exactly_its_budget(config, whole, whole_folder):
    assert whole.budget.steps == STEPS
    assert whole.budget.tokens == config.tokens == STEPS * 16 * 8
    assert int(whole.state["step"]) == STEPS
    assert whole.curve["step"].tolist() == list(range(1, STEPS + 1))
    assert whole.curve["tokens"].tolist() == [step * 16 * 8 for step in range(1, STEPS + 1)]
    saved = json.loads((whole_folder / "checkpoints/12/meta/metadata").read_text())
    assert saved["next_row"] == STEPS * 16


def test_a_run_learns(whole):
    assert whole.curve["loss"][0] == pytest.approx(np.log(40), abs=1)
    assert whole.curve["loss"][-3:].mean() < whole.curve["loss"][0] - 0.3


def test_every_step_is_told_and_written_once(whole, whole_folder, heard):
    written = lines(whole_folder)
    assert [line["step"] for line in written] == list(range(1, STEPS + 1))
    for name in ("loss", "z_loss", "gradient_norm", "learning_rate"):
        assert np.array_equal(
            np.array([line[name] for line in written], np.float32), whole.curve[name]
        )
    assert [progress.step for progress in heard] == list(range(1, STEPS + 1))
    assert [progress.loss for progress in heard] == [line["loss"] for line in written]
    assert {progress.steps for progress in heard} == {STEPS}
    assert heard[-1].seconds_left == 0
    assert all(progress.tokens_per_second > 0 for progress in heard[1:])
    assert all(progress.model_flops_utilization > 0 for progress in heard[1:])


@pytest.mark.parametrize("damaged", ["digit", "cut", "bytes", "missing"])
def test_damaged_lines_of_the_metrics_are_those_of_the_curve_again(often, whole, crashed, damaged):
    path = crashed / "metrics.jsonl"
    content = path.read_bytes().splitlines(keepends=True)
    third = json.loads(content[2])
    content[2] = {
        "digit": json.dumps(third | {"loss": third["loss"] + 1e-6}).encode() + b"\n",
        "cut": content[2][:20] + b"\n",
        "bytes": b"\xff\xfe\x00\n",
        "missing": b"",
    }[damaged]
    path.write_bytes(b"".join(content))
    loop.train(often, crashed)
    assert [line["step"] for line in lines(crashed)] == list(range(1, STEPS + 1))
    losses = np.array([line["loss"] for line in lines(crashed)], np.float32)
    assert np.array_equal(losses, whole.curve["loss"])


def test_the_folder_describes_the_run(config, whole, whole_folder):
    content = yaml.safe_load((whole_folder / "config.yaml").read_text())
    assert content == json.loads(json.dumps(dataclasses.asdict(config)))
    assert list((whole_folder / "tensorboard").iterdir())
    curve = checkpoint.read_curve(whole_folder / "checkpoints")
    assert all(np.array_equal(curve[name], column) for name, column in whole.curve.items())


def test_a_run_that_went_down_goes_on_bit_for_bit(often, whole, crashed):
    told = []
    found = loop.train(often, crashed, told.append)
    assert_same_run(found, whole)
    assert [progress.step for progress in told] == [9, 10, 11, 12]
    assert [line["step"] for line in lines(crashed)] == list(range(1, STEPS + 1))


def test_a_run_goes_on_from_before_a_damaged_checkpoint(often, whole, crashed):
    flip_largest(crashed / "checkpoints" / "8" / "state")
    told = []
    assert_same_run(loop.train(often, crashed, told.append), whole)
    assert told[0].step == 5
    assert [line["step"] for line in lines(crashed)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", [1, 6, STEPS])
def test_an_interrupted_run_is_saved_and_finished_by_a_second_call(
    config, whole, tmp_path, number, when
):
    def interrupt(progress):
        if progress.step == when:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match=f"after step .* of {STEPS}") as caught:
        loop.train(config, tmp_path, interrupt)
    assert caught.value.signal == number
    stopped = checkpoint.latest_step(tmp_path / "checkpoints")
    assert stopped == min(when + loop.STEPS_IN_FLIGHT, STEPS)
    assert f"after step {stopped} of" in str(caught.value)
    assert len(lines(tmp_path)) == stopped
    assert_same_run(loop.train(config, tmp_path), whole)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, STEPS + 1))


def test_a_request_that_comes_late_in_a_step_is_not_lost(config, monkeypatch, tmp_path):
    """Never `Interrupted` without a checkpoint, wherever between two lines the signal falls."""

    class LateRequest(loop.interrupt.StopRequest):
        looks = 0

        @property
        def asked(self):
            self.looks += 1
            seen = super().asked
            if self.looks == 3:
                self.signal = signal.SIGTERM
            return seen

    monkeypatch.setattr(loop.interrupt, "StopRequest", LateRequest)
    with pytest.raises(Interrupted):
        loop.train(config, tmp_path)
    assert checkpoint.latest_step(tmp_path / "checkpoints") == 4


def test_what_is_done_is_not_done_again(config, whole, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    found = loop.train(config, finished, crash_at(STEPS))
    assert_same_run(found, whole)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"tokens": 2 * STEPS * 16 * 8},
        {"z_loss_weight": 0.0},
        {"model": {"width": 32}},
        {"model": {"layers": 1}},
    ],
    ids=str,
)
def test_the_folder_of_another_run_is_refused_and_left_alone(config, finished, changes):
    nested = {
        name: dataclasses.replace(config.model, **value) if name == "model" else value
        for name, value in changes.items()
    }
    other = dataclasses.replace(config, **nested)
    with pytest.raises(UserError, match=r"belongs to another run .*identity") as caught:
        loop.train(other, finished)
    assert str(finished) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="belongs to another run"):
        loop.restore(other, finished)
    assert int(loop.restore(config, finished).state["step"]) == STEPS


def test_a_run_is_not_continued_on_other_data(config, finished, data_folder, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(data_folder, moved)
    at_moved = dataclasses.replace(config, data=dataclasses.replace(config.data, folder=str(moved)))
    loop.train(at_moved, finished)  # the same data elsewhere are the same data
    index = moved / "walk" / "train" / "index.json"
    index.write_text(index.read_text().replace('"source": "test"', '"source": "other"'))
    with pytest.raises(UserError, match="belongs to other token shards: data_sha256"):
        loop.train(at_moved, finished)


@pytest.mark.slow
def test_mesh_microbatches_and_remat_may_change_on_the_way(often, whole, crashed):
    moved = dataclasses.replace(
        often,
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        microbatches=2,
        model=dataclasses.replace(often.model, remat="block", name="tiny"),
    )
    found = loop.train(moved, crashed)
    np.testing.assert_allclose(found.curve["loss"], whole.curve["loss"], rtol=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(config, tmp_path):
    wild = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e30, warmup_steps=9),
        checkpoint=CheckpointConfig(every_steps=1, keep=20),
    )
    with pytest.raises(NonFiniteLossError, match=r"step \d+: loss .*nan") as caught:
        loop.train(wild, tmp_path)
    step = int(str(caught.value).split()[1].rstrip(":"))
    assert "\n" not in str(caught.value)
    assert 1 < step < STEPS
    assert checkpoint.latest_step(tmp_path / "checkpoints") == step - 1
    assert len(lines(tmp_path)) == step - 1
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path))
    assert np.all(np.isfinite(checkpoint.read_curve(tmp_path / "checkpoints")["loss"]))
    with pytest.raises(NonFiniteLossError, match=f"step {step}:"):
        loop.train(wild, tmp_path)


def test_restore_says_what_is_wrong(config, finished, tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        loop.restore(config, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    flip_largest(finished / "checkpoints" / "12" / "state")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        loop.restore(config, finished)


def test_restore_gives_the_trained_parameters(config, whole, finished):
    restored = loop.restore(config, finished)
    for one, other in zip(*map(jax.tree.leaves, (restored.state, whole.state)), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 127}, "127 tokens is less than one step of 128"),
        ({"data": {"dataset": "wolk"}}, r"wolk/train/index\.json: not found"),
        ({"model": {"vocabulary_size": 32}}, "40 token ids, but model.vocabulary_size is 32"),
        ({"model": {"sequence_length": 1000}, "tokens": 10**6}, "hold no row of sequence_length"),
        ({"batch_size": 12}, "batch_size=12 is not divisible by"),
        ({"mesh": {"data": 3}}, "data=3, fsdp=1, tensor=1 makes 3 devices, but there are 8"),
        ({"mesh": {"tensor": 8}}, "heads=2 cannot be split evenly"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named_before_anything_is_written(config, tmp_path, changes, message):
    nested = {
        name: dataclasses.replace(getattr(config, name), **value)
        if isinstance(value, dict)
        else value
        for name, value in changes.items()
    }
    with pytest.raises(UserError, match=message) as caught:
        loop.train(dataclasses.replace(config, **nested), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_data_that_are_needed_more_than_once_are_warned_of(config, finished):
    with pytest.warns(UserWarning, match=r"need the data 1\.92 times: 736 of them are repeats"):
        loop.train(config, finished)


def test_unique_tokens_stand_in_the_checkpoint(whole_folder, whole):
    meta = checkpoint.read_meta(whole_folder / "checkpoints")
    assert (meta["next_row"], meta["unique_tokens"]) == (12 * 16, 100 * 8)


def test_the_wait_for_data_stands_in_the_metrics(whole_folder, whole):
    waited = [line["seconds_waited_for_data"] for line in lines(whole_folder)]
    assert waited == sorted(waited)
    assert waited[-1] > 0


def with_health(config, **changes):
    return dataclasses.replace(config, health=HealthConfig(**changes))


def test_a_run_that_may_skip_steps_but_need_not_is_the_same(config, whole, tmp_path):
    guarded = with_health(config, nonfinite="skip", spike="skip", spike_window=8)
    found = loop.train(guarded, tmp_path)
    # Gradients agree to the bit; the update is another program, which may round its last one.
    for one, other in zip(*map(jax.tree.leaves, (found.state, whole.state)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert found.curve.keys() == whole.curve.keys()
    for name, column in whole.curve.items():
        np.testing.assert_allclose(found.curve[name], column, rtol=1e-5)
    assert found.budget == whole.budget
    assert checkpoint.read_meta(tmp_path / "checkpoints")["health"] == "ok"


def test_skipped_steps_change_nothing_and_are_marked(config, tmp_path, monkeypatch):
    """The limit of steps 6 and 7 is below any loss: they are skipped, and resumed over as well."""
    skipping = dataclasses.replace(
        with_health(config, spike="skip"), checkpoint=CheckpointConfig(every_steps=1, keep=20)
    )
    limit = GrowingCurve.loss_limit
    monkeypatch.setattr(
        GrowingCurve,
        "loss_limit",
        lambda curve, number: 0.0 if number in (6, 7) else limit(curve, number),
    )
    found = loop.train(skipping, tmp_path / "run")
    assert np.flatnonzero(found.curve["skipped"]).tolist() == [5, 6]
    assert np.flatnonzero(found.curve["spiked"]).tolist() == [5, 6]
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=20, read_only=True) as saved:
        layout = jax.eval_shape(lambda: found.state)
        layout = jax.tree.map(
            lambda leaf, like: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=like.sharding),
            layout,
            found.state,
        )
        five, seven, eight = (saved.restore_latest(layout, last=step) for step in (5, 7, 8))
    assert five
    assert seven
    assert eight
    for name in ("params", "moments"):
        kept = [jax.tree.leaves(one.state[name]) for one in (five, seven, eight)]
        assert all(np.array_equal(one, other) for one, other in zip(*kept[:2], strict=True))
        assert not all(np.array_equal(one, other) for one, other in zip(*kept[1:], strict=True))
    assert int(seven.state["step"]) == 7
    meta = checkpoint.read_meta(tmp_path / "run" / "checkpoints")
    assert meta["health"] == "skipped 2, spiked 2"
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    for step in range(7, STEPS + 1):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / str(step))
    assert_same_run(loop.train(skipping, tmp_path / "cut"), found)


def test_steps_whose_loss_is_not_a_number_are_skipped_if_asked_for(config, tmp_path):
    wild = dataclasses.replace(
        with_health(config, nonfinite="skip"),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e30, warmup_steps=9),
    )
    found = loop.train(wild, tmp_path)
    bad = ~(np.isfinite(found.curve["loss"]) & np.isfinite(found.curve["gradient_norm"]))
    assert bad.any()
    assert np.array_equal(found.curve["skipped"], bad)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.state["params"]))
    written = lines(tmp_path)
    assert [line["loss"] is None for line in written] == list(~np.isfinite(found.curve["loss"]))


def test_the_time_of_a_run_is_accounted_for(config, whole, tmp_path):
    started = time.perf_counter()
    often = dataclasses.replace(config, checkpoint=CheckpointConfig(every_steps=4))
    with pytest.raises(CrashError):
        loop.train(often, tmp_path, crash_at(10), started=started)
    loop.train(often, tmp_path)
    wall = time.perf_counter() - started
    found = goodput.seconds(tmp_path)
    assert sum(found.values()) == pytest.approx(wall, rel=0.05)
    least = {"start_up", "restore", "compile", "data", "checkpoint", "repeated", "training"}
    assert found.keys() >= least
    assert found["repeated"] > 0


def test_a_profile_can_be_looked_at_and_changes_nothing(config, whole, tmp_path):
    found = loop.train(config, tmp_path, profile=Window(3, 5))
    assert_same_run(found, whole)
    (trace,) = (tmp_path / "tensorboard").glob("plugins/profile/*/*.xplane.pb")
    content = trace.read_bytes()
    assert b"train_step" in content
    assert b"step_num" in content
    assert_same_run(loop.train(config, tmp_path, profile=Window(3, 5)), whole)
    with pytest.raises(UserError, match="but the run has"):
        loop.train(config, tmp_path, profile=Window(3, 10**6))
