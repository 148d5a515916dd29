"""Runs side by side are the runs alone: same curves, budgets, folders and checkpoints."""

import dataclasses
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import jax.monitoring
import numpy as np
import pytest

from scaling_jax import mesh as meshes
from scaling_jax.claims import Holder, Timing, Watcher
from scaling_jax.config import CheckpointConfig, HealthConfig, MeshConfig
from scaling_jax.errors import Interrupted, NonFiniteLossError, UserError
from scaling_jax.training import checkpoint, loop, packed, packed_step
from scaling_jax.training.packed import Job
from scaling_jax.training.packed_step import Program, Shape

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore:walk. .* tokens need the data"),
    pytest.mark.filterwarnings("ignore:warm-up of 3 steps"),
]
# Seed, steps, learning rate, weight decay of each run.
RUNS = [
    (0, 12, 0.01, 0.033),
    (1, 9, 0.02, 0.0),
    (0, 7, 0.03, 0.1),
    (2, 5, 0.01, 0.033),
    (3, 3, 0.01, 0.033),
]


class CrashError(Exception):
    """Stands for a machine that goes down."""


@pytest.fixture(scope="module")
def configs(config):
    def make(seed, steps, rate, decay):
        numbers = {"learning_rate": rate, "weight_decay": decay}
        return dataclasses.replace(
            config,
            seed=seed,
            tokens=steps * 16 * 8,
            optimizer=dataclasses.replace(config.optimizer, **numbers),
        )

    return [make(*run) for run in RUNS]


@pytest.fixture(scope="module")
def alone(configs, tmp_path_factory):
    """Each run trained by itself, on all devices."""
    folder = tmp_path_factory.mktemp("alone")
    return [loop.train(each, folder / str(number)) for number, each in enumerate(configs)]


def jobs_in(folder, configs):
    return [Job(each, folder / str(number)) for number, each in enumerate(configs)]


def assert_same_run(found, expected):
    assert found.curve.keys() == expected.curve.keys()
    for name, column in expected.curve.items():
        # What is far from a loss feels rounding more.
        tolerance = {"loss": 1e-5, "z_loss": 1e-4, "gradient_norm": 2e-4}.get(name, 0.0)
        np.testing.assert_allclose(found.curve[name], column, rtol=tolerance, err_msg=name)
    assert found.budget == expected.budget
    assert int(found.state["step"]) == expected.budget.steps
    # Adam turns rounding in a gradient near 0 into a step of any size up to the rate.
    pairs = zip(
        *map(jax.tree.leaves, (found.state["params"], expected.state["params"])), strict=True
    )
    for one, other in pairs:
        assert np.linalg.norm(one - np.asarray(other)) < 1e-3 * np.linalg.norm(other)


def assert_all_same(jobs, alone):
    """What is in the folders is at its end and as it is alone; nothing is trained for that."""

    def untouched(_):
        raise AssertionError("trained again")

    for job, expected in zip(jobs, alone, strict=True):
        assert_same_run(loop.train(job.config, job.folder, untouched), expected)
        lines = (job.folder / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        assert steps == list(range(1, expected.budget.steps + 1))


def saved_step(job):
    return checkpoint.latest_step(job.folder / "checkpoints") or 0


def claim_elsewhere(job, **changes):
    """A claim of a process on another host, of which nothing is known."""
    theirs = dataclasses.replace(Holder.here(), place="another boot", **changes)
    path = job.folder / "claims" / "000001.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(theirs)))


def interrupt_at(step, number):
    def report(job, progress):
        if job.folder.name == number and progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return report


@pytest.mark.parametrize(
    "slots", [4, pytest.param(8, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_runs_side_by_side_are_the_runs_alone(configs, alone, tmp_path, slots):
    """One device a run; two; three runs in turns on all eight. The last two refill slots."""
    jobs, told, ended, compiled = jobs_in(tmp_path, configs), [], {}, []

    def count(event, duration_secs, **_):
        compiled.extend([event] if "backend_compile" in event else [])

    def end(job, failure):
        assert failure is None
        ended[job.folder.name] = len(compiled)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        packed.train(
            jobs, slots, Watcher(), lambda job, seen: told.append((job.folder.name, seen)), end
        )
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert_all_same(jobs, alone)
    # Shorter ones end earlier and make room; then nothing is compiled any more.
    assert sorted(ended) == ["0", "1", "2", "3", "4"]
    assert len(set(ended.values())) == 1
    for number, expected in enumerate(alone):
        heard = [seen.step for name, seen in told if name == str(number)]
        assert heard == list(range(1, expected.budget.steps + 1))


@pytest.mark.slow
def test_a_run_is_finished_packed_or_alone_whoever_began_it(configs, alone, tmp_path):
    jobs = jobs_in(tmp_path, configs)

    def stop(progress):
        if progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        loop.train(jobs[0].config, jobs[0].folder, stop)
    with pytest.raises(
        Interrupted, match=r"stopped and saved: 0 after step .* of 12, 1 after step"
    ):
        packed.train(jobs, 4, Watcher(), interrupt_at(3, "1"))
    begun = {job.folder.name: saved_step(job) for job in jobs[:4]}
    # All were saved where they stood: the first had two to four steps more.
    assert begun == {"0": begun["1"] + 4, "1": 5, "2": 5, "3": 5}
    assert_same_run(loop.train(jobs[2].config, jobs[2].folder), alone[2])
    packed.train(jobs, 4, Watcher())
    assert_all_same(jobs, alone)


def test_runs_that_went_down_go_on_from_their_last_checkpoints(configs, alone, tmp_path):
    often = [
        dataclasses.replace(each, checkpoint=CheckpointConfig(every_steps=4)) for each in configs
    ]
    jobs = jobs_in(tmp_path, often)

    def crash(job, progress):
        if job.folder.name == "0" and progress.step == 6:
            raise CrashError

    with pytest.raises(CrashError):
        packed.train(jobs, 4, Watcher(), crash)
    saved = [saved_step(job) for job in jobs]
    assert saved == [4, 4, 4, 5, 0]  # the last one has just taken the slot of the fourth
    told = []
    packed.train(
        jobs, 4, Watcher(), lambda job, seen: told.append((int(job.folder.name), seen.step))
    )
    expected = {(run, step) for run in range(5) for step in range(saved[run] + 1, RUNS[run][1] + 1)}
    assert sorted(told) == sorted(expected)
    assert_all_same(jobs, alone)


def test_a_run_without_a_finite_loss_ends_alone(configs, alone, tmp_path):
    wild = dataclasses.replace(configs[1].optimizer, learning_rate=1e30, warmup_steps=0)
    jobs = jobs_in(tmp_path, [dataclasses.replace(configs[1], optimizer=wild), *configs[2:]])
    failures = {}
    packed.train(
        jobs, 4, Watcher(), ended=lambda job, failure: failures.setdefault(job.folder, failure)
    )
    failure = failures.pop(jobs[0].folder)
    assert isinstance(failure, NonFiniteLossError)
    assert "loss nan" in str(failure)
    assert checkpoint.latest_step(jobs[0].folder / "checkpoints") is None
    assert set(failures.values()) == {None}
    assert_all_same(jobs[1:], alone[2:])


@pytest.mark.slow
def test_steps_are_skipped_as_alone(configs, tmp_path):
    """Limits so tight, and rates so small, that every other loss leaps; each run has its own."""
    strict = HealthConfig(nonfinite="skip", spike="skip", spike_deviations=0.1, spike_window=4)
    slow = dataclasses.replace(configs[0].optimizer, learning_rate=1e-4)
    guarded = [dataclasses.replace(each, health=strict, optimizer=slow) for each in configs[:2]]
    jobs = jobs_in(tmp_path / "packed", guarded)
    packed.train(jobs, 8, Watcher())
    expected = [
        loop.train(each, tmp_path / "alone" / str(number)) for number, each in enumerate(guarded)
    ]
    assert sum(run.curve["skipped"].sum() for run in expected) > 0
    assert_all_same(jobs, expected)


def test_a_run_that_another_process_is_seen_to_work_on_is_passed_over(configs, alone, tmp_path):
    jobs = jobs_in(tmp_path, configs)[3:]
    quick = Timing(beat=0.05, look=0.1, stale=60)
    theirs = Watcher(quick).take(jobs[0].folder)
    assert theirs is not None
    ended, heard = [], []
    packed.train(
        jobs,
        4,
        Watcher(quick),
        ended=lambda job, _: ended.append(job),
        waiting=lambda job, holder: heard.append((job.folder, holder.pid)),
    )
    theirs.release()
    assert ended == jobs[1:]
    assert set(heard) == {(jobs[0].folder, os.getpid())}
    assert checkpoint.latest_step(jobs[0].folder / "checkpoints") is None
    # Ours are free again.
    assert Watcher().take(jobs[1].folder) is not None
    assert_all_same(jobs[1:], alone[4:])


def test_runs_of_a_host_that_is_gone_are_trained_once_their_claims_are_stale(
    configs, alone, tmp_path
):
    jobs, looks = jobs_in(tmp_path, configs)[3:], []

    class Counting(Watcher):
        def take(self, folder):
            looks.append(folder)
            return super().take(folder)

    for job in jobs:
        claim_elsewhere(job)
    begun = time.monotonic()
    packed.train(jobs, 4, Counting(Timing(look=0.1, stale=0.45)), lambda *_: looks.append("a step"))
    assert time.monotonic() - begun > 0.45
    # First seen, then quiet for five times the time between looks; nobody asks in between.
    before = looks[: looks.index("a step")]
    assert len(before) <= 7 * len(jobs)
    assert_all_same(jobs, alone[3:])


def test_slots_go_on_while_a_run_is_waited_for_and_take_it_once_it_is_released(
    configs, alone, tmp_path
):
    jobs, told = jobs_in(tmp_path, [configs[4], configs[0]]), []
    claim_elsewhere(jobs[0])

    def report(job, progress):
        told.append((job.folder.name, progress.step))
        if told[-1] == ("1", 3):
            claim_elsewhere(jobs[0], released=True)

    packed.train(jobs, 4, Watcher(Timing(look=0.0)), report)
    assert told[:3] == [("1", 1), ("1", 2), ("1", 3)]
    assert told.index(("0", 1)) < told.index(("1", RUNS[0][1]))
    assert_all_same(jobs, [alone[4], alone[0]])


def test_a_request_to_stop_before_the_first_step_is_followed(configs, tmp_path):
    """No more runs are opened, and of those that have made no step there is nothing to save."""
    jobs = jobs_in(tmp_path, configs[:3])

    class Asked(Watcher):
        def take(self, folder):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().take(folder)

    with pytest.raises(Interrupted, match=r"stopped and saved: 0 after step 0 of 12$"):
        packed.train(jobs, 4, Asked())
    assert saved_step(jobs[0]) == 0
    assert not jobs[1].folder.exists()
    assert Watcher().take(jobs[0].folder) is not None


@pytest.mark.slow
def test_what_is_wrong_with_a_later_run_does_not_cost_the_others(configs, alone, tmp_path):
    missing = dataclasses.replace(configs[4].data, dataset="nowhere")
    jobs = jobs_in(tmp_path, [*configs[2:4], dataclasses.replace(configs[4], data=missing)])
    with pytest.raises(UserError, match="nowhere"):
        packed.train(jobs, 2, Watcher())
    assert checkpoint.latest_step(jobs[0].folder / "checkpoints") == RUNS[3][1]
    packed.train(jobs[:2], 2, Watcher())
    assert_all_same(jobs[:2], alone[2:4])


def test_a_mistake_that_is_found_before_the_first_step_is_all_that_is_told(configs, tmp_path):
    missing = dataclasses.replace(configs[1].data, dataset="nowhere")
    jobs = jobs_in(tmp_path, [configs[0], dataclasses.replace(configs[1], data=missing)])
    with pytest.raises(UserError, match="nowhere"):
        packed.train(jobs, 2, Watcher())
    assert saved_step(jobs[0]) == 0


@pytest.mark.slow
def test_damaged_rows_of_a_run_do_not_cost_the_others(configs, alone, tmp_path):
    """They are found when the run has got its slot and the others are under way."""
    data = damaged_copy(Path(configs[0].data.folder) / "walk", tmp_path / "data")
    broken = dataclasses.replace(configs[4], data=dataclasses.replace(configs[4].data, folder=data))
    jobs = jobs_in(tmp_path, [configs[2], configs[3], broken, configs[0]])
    with pytest.raises(UserError, match="tokens-00000"):
        packed.train(jobs, 2, Watcher())
    # The first one has run beside the second, and not a step further.
    assert [saved_step(job) for job in jobs] == [5, 5, 0, 0]
    good = [jobs[0], jobs[1], jobs[3]]
    packed.train(good, 2, Watcher())
    assert_all_same(good, [alone[2], alone[3], alone[0]])


def damaged_copy(dataset, folder):
    """A data folder with a dataset whose first shard of training data has a wrong byte."""
    shutil.copytree(dataset, folder / dataset.name)
    shard = min((folder / dataset.name / "train").glob("tokens-00000*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return str(folder)


def test_a_slot_without_a_run_stays_as_it_is(config):
    program = program_of(config, slots=4)
    one = packed_step.states.create(config.model, 7, program.mesh)
    states = program.put(program.empty(), 2, one)
    rows = np.ones(program.rows_shape, np.int32)
    hyper = loop.optimizer.hyperparameters(config, loop.budgets.plan(config))
    hyper = program.place(jax.tree.map(lambda number: np.full(4, number, np.float32), hyper))
    busy = program.place(np.arange(4) == 3)
    states, metrics = program.step(states, rows, hyper, busy)
    assert np.flatnonzero(metrics.loss).tolist() == [3]
    for kept, given in zip(*map(jax.tree.leaves, (program.take(states, 2), one)), strict=True):
        assert np.array_equal(kept, given)
        assert kept.sharding == given.sharding
    assert int(program.take(states, 3)["step"]) == 1


@pytest.mark.parametrize(("slots", "mesh", "talk"), [(8, {}, 1), (4, {}, 2), (2, {"fsdp": 2}, 4)])
def test_devices_of_different_slots_never_talk(config, slots, mesh, talk):
    program = program_of(dataclasses.replace(config, mesh=MeshConfig(**mesh)), slots)
    text = program.lower().compile().as_text() or ""
    lines = [line for line in text.splitlines() if COLLECTIVE.search(line)]
    assert bool(lines) == (talk > 1)
    for line in lines:
        for group in device_groups(line):
            assert len({device // talk for device in group}) == 1, line


COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)[\w-]*\("
)


def program_of(config, slots):
    whole = meshes.make_mesh(config.mesh)
    return Program(Shape.of(config), packed_step.make_mesh(whole, slots), slots)


def device_groups(line):
    """Which devices a collective joins, in the notations that XLA has for them."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return groups_of(pairs[1])
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return groups_of(listed[1])
    counted = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    assert counted, line
    devices = np.arange(np.prod(numbers(counted[2]))).reshape(numbers(counted[2]))
    order = numbers(counted[3]) if counted[3] else None
    return devices.transpose(order).reshape(numbers(counted[1])).tolist()


def numbers(text):
    return [int(number) for number in text.split(",")]


def groups_of(text):
    return [numbers(group) for group in re.findall(r"\{([\d,]+)", text)]
