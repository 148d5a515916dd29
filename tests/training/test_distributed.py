"""Several real processes on one machine, four simulated devices among them."""

import dataclasses
import json
import shutil
import signal
import socket
import time

import numpy as np
import pytest
from joined_processes import DEVICES, Job, lines, printed

from scaling_jax import config as configs
from scaling_jax.config import CheckpointConfig
from scaling_jax.errors import TRY_AGAIN, PeerError, UserError
from scaling_jax.training import checkpoint, distributed

STEPS = 90


@pytest.fixture
def start(jobs, config_file, tmp_path):
    def make(processes, *words, folder=None, **others):
        return jobs(config_file, folder or tmp_path / "run", processes, *words, **others)

    return make


@pytest.fixture(scope="module")
def config_file(config, tmp_path_factory):
    longer = dataclasses.replace(
        config, tokens=STEPS * 16 * 8, checkpoint=CheckpointConfig(every_steps=20)
    )
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    configs.write(longer, path)
    return path


@pytest.fixture(scope="module")
def whole(config_file, tmp_path_factory):
    """The curve of two undisturbed processes, and what each printed."""
    job = Job(config_file, tmp_path_factory.mktemp("whole") / "run", 2)
    ends = job.ends()
    assert [code for code, *_ in ends] == [0, 0], ends
    return curve(job), [out for _, out, _ in ends]


def curve(job):
    return checkpoint.read_curve(job.folder / "checkpoints")


def assert_same_curve(found, expected):
    assert all(np.array_equal(found[name], column) for name, column in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])
def test_any_number_of_processes_trains_the_same_run(start, whole, processes):
    job = start(processes)
    ends = job.ends()
    assert [code for code, *_ in ends] == [0] * processes, ends
    np.testing.assert_allclose(curve(job)["loss"], whole[0]["loss"], rtol=0, atol=1e-6)
    assert [line["step"] for line in lines(job.folder)] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_only_the_first_process_prints(whole):
    first, second = whole[1]
    assert "trained: loss" in first
    assert "goodput" in first
    assert not printed(second)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_the_rerun_ends_the_same(start, whole, victim):
    job = start(2)
    job.wait_for_step(50)
    job.processes[victim].kill()
    killed = time.monotonic()
    code, _, err = job.end(1 - victim)
    assert time.monotonic() - killed < distributed.HEARTBEAT_SECONDS
    assert code == TRY_AGAIN
    assert err.splitlines()[-1] == (
        f"error: lost process {victim} of this run; the same command goes on from the last "
        "checkpoint"
    )
    again = start(2, folder=job.folder)
    ends = again.ends()
    assert [code for code, *_ in ends] == [0, 0], ends
    assert_same_curve(curve(again), whole[0])
    assert [line["step"] for line in lines(again.folder)] == list(range(1, STEPS + 1))
    calls = json.loads((job.folder / "goodput.json").read_text())["calls"]
    assert len(calls) == 2
    assert calls[1]["seconds"]["repeated"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_frozen_process_ends_the_other(start, victim):
    job = start(2)
    job.wait_for_step(30)
    job.processes[victim].send_signal(signal.SIGSTOP)
    try:
        frozen = time.monotonic()
        code, _, err = job.end(1 - victim)
        assert time.monotonic() - frozen < 3 * distributed.HEARTBEAT_SECONDS
        assert code == TRY_AGAIN
        assert "stands still or is gone" in err.splitlines()[-1]
    finally:
        job.processes[victim].kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "asked"), [(signal.SIGTERM, 0), (signal.SIGTERM, 1), (signal.SIGINT, 1)]
)
def test_asked_to_stop_one_process_has_all_save_the_same_step(start, whole, number, asked):
    job = start(2)
    job.wait_for_step(30)
    job.processes[asked].send_signal(number)
    ends = job.ends()
    assert ends[asked][0] == 128 + number
    assert ends[1 - asked][0] == 128 + signal.SIGTERM
    step = checkpoint.latest_step(job.folder / "checkpoints")
    assert step is not None
    assert 30 < step < STEPS
    for _, _, err in ends:
        assert err.splitlines()[-1].startswith(f"stopped and saved after step {step} of {STEPS}")
    ends = start(2, folder=job.folder).ends()
    assert [code for code, *_ in ends] == [0, 0], ends
    assert_same_curve(curve(job), whole[0])


@pytest.fixture(scope="module")
def sharded(config_file, tmp_path_factory):
    """A run of which each process has saved its own part, and the words that make it so."""
    words = ("mesh.data=1", f"mesh.fsdp={DEVICES}", f"tokens={24 * 16 * 8}", "checkpoint.keep=2")
    words += ("checkpoint.every_steps=10",)
    job = Job(config_file, tmp_path_factory.mktemp("sharded") / "run", 2, *words)
    ends = job.ends()
    assert [code for code, *_ in ends] == [0, 0], ends
    return job.folder, words


@pytest.mark.slow
@pytest.mark.parametrize("reader", [0, 1])
def test_damage_that_one_process_finds_sets_the_step_aside_for_all(
    start, sharded, tmp_path, reader
):
    whole, words = sharded
    folder = shutil.copytree(whole, tmp_path / "run")
    arrays = (folder / "checkpoints" / "24" / "state" / f"ocdbt.process_{reader}" / "d").iterdir()
    largest = max(arrays, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    job = start(2, *words, folder=folder)
    ends = job.ends()
    assert [code for code, *_ in ends] == [0, 0], ends
    assert all("step 24 is damaged and set aside" in err for *_, err in ends)
    assert (folder / "checkpoints" / "24.damaged").is_dir()
    assert_same_curve(curve(job), checkpoint.read_curve(whole / "checkpoints"))


@pytest.mark.slow
def test_what_does_not_fit_ends_all_with_the_users_code(start):
    ends = start(2, "batch_size=6").ends()
    assert [code for code, *_ in ends] == [2, 2]
    assert all("batch_size=6 is not divisible" in err.splitlines()[-1] for *_, err in ends)


@pytest.mark.slow
def test_a_mistake_of_one_process_ends_all_with_its_code(start):
    """Or launchers would start the others again and again."""
    (code, _, first), (own_code, _, last) = start(2, own="seed=7").ends()
    assert (code, own_code) == (2, 2)
    assert "process 1: its config or data is not that of process 0" in last
    assert first.splitlines()[-1] == "error: process 1 has ended with exit code 2"


@pytest.mark.slow
def test_a_peer_that_does_not_come_is_one_line(start, tmp_path):
    job = start(2, "--patience=3")
    job.processes[1].kill()
    code, _, err = job.end(0)
    assert code == TRY_AGAIN
    assert "not all processes of this run came within 3 s" in err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "host:1"}, "together"),
        ({"processes": 2}, "together"),
        ({"coordinator": "host", "processes": 2, "process_id": 0}, "give HOST:PORT"),
        ({"coordinator": "host:99999", "processes": 2, "process_id": 0}, "give HOST:PORT"),
        ({"coordinator": "host:1", "processes": 2, "process_id": 2}, "process_id 2 of processes 2"),
        ({"coordinator": "host:1", "processes": 0, "process_id": 0}, "process_id 0 of processes 0"),
        ({"patience": 0}, "patience 0"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_named(given, message):
    with pytest.raises(UserError, match=message) as caught, distributed.joined(**given):
        raise AssertionError
    assert "\n" not in str(caught.value)


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(UserError, match=f"port {port} of this machine: .*in use"),
            distributed.joined(f"localhost:{port}", processes=2, process_id=0),
        ):
            raise AssertionError


def test_alone_nothing_is_joined():
    with distributed.joined(processes=1):
        assert distributed.is_first()
        assert not distributed.several()
        assert distributed.from_first((3, 4)) == (3, 4)
        distributed.check_same("config", "text")
    assert not issubclass(PeerError, UserError)
