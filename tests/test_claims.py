"""One process at a time has a run, whatever happens to the others."""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
import time

import pytest

from scaling_jax import claims
from scaling_jax.claims import Timing, Watcher
from scaling_jax.errors import HeldError, UserError

QUICK = Timing(beat=0.05, look=0.02, stale=0.6)
START = multiprocessing.get_context("spawn")


def newest(folder):
    return max((folder / "claims").iterdir())


def read(folder):
    return json.loads(newest(folder).read_text())


def change(folder, **values):
    """Rewrites the newest claim as another process might have left it."""
    newest(folder).write_text(json.dumps(read(folder) | values))


@pytest.fixture
def elsewhere(tmp_path):
    """A run claimed by a process of another host, of which nothing is heard any more."""
    claim = Watcher(Timing(beat=1000)).take(tmp_path)
    assert claim is not None
    change(tmp_path, host="pod-7", place="another boot", token="other")
    return tmp_path


@pytest.fixture
def checked_at_once(monkeypatch):
    monkeypatch.setattr(claims, "SECONDS_BETWEEN_CHECKS", 0.0)


def test_a_run_is_held_until_it_is_released(tmp_path):
    assert claims.holder(tmp_path) is None
    with claims.held(tmp_path) as claim:
        (tmp_path / "config.yaml").touch()
        claim.check()
        found = claims.holder(tmp_path)
        assert found is not None
        assert (found.pid, found.released) == (os.getpid(), False)
        assert str(os.getpid()) in str(found)
        assert found.host in str(found)
        assert Watcher().take(tmp_path) is None
    assert claims.holder(tmp_path) is None
    assert read(tmp_path)["released"] is True
    with claims.held(tmp_path):
        assert newest(tmp_path).name == "000002.json"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_errors_and_interrupts_release_it(tmp_path, error):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(error), claims.held(tmp_path):
        raise error
    assert claims.holder(tmp_path) is None


def test_where_nothing_was_written_no_folder_is_left(tmp_path):
    with contextlib.suppress(ValueError), claims.held(tmp_path / "runs" / "one"):
        raise ValueError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_where_a_file_is_in_the_way_it_is_named(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file.*: not a folder"):
        claims.held(tmp_path / name).__enter__()


def test_a_second_one_says_who_has_it_once_that_one_beats(tmp_path):
    told = []
    with claims.held(tmp_path, timing=QUICK):
        with pytest.raises(HeldError, match=f"process {os.getpid()} on"):
            claims.held(tmp_path, told.append, timing=QUICK).__enter__()
        assert [holder.pid for holder in told] == [os.getpid()]


def test_silence_for_long_is_taken_over_and_not_before(elsewhere):
    began = time.monotonic()
    with claims.held(elsewhere, timing=QUICK):
        assert time.monotonic() - began >= QUICK.stale
        assert read(elsewhere)["pid"] == os.getpid()
        assert newest(elsewhere).name == "000002.json"


def test_clocks_that_jump_make_nothing_stale(elsewhere, monkeypatch):
    """Neither the time of day, nor file times, nor a machine that slept between two looks."""
    watcher = Watcher(QUICK)
    assert watcher.take(elsewhere) is None
    later = time.monotonic() + 1e6
    monkeypatch.setattr(time, "monotonic", lambda: later)
    monkeypatch.setattr(time, "time", lambda: 1e12)
    os.utime(newest(elsewhere), (0, 0))
    assert watcher.take(elsewhere) is None
    assert watcher.take(elsewhere) is None


def test_a_beat_starts_the_count_anew(elsewhere):
    watcher = Watcher(QUICK)
    assert watcher.take(elsewhere) is None
    for beat in range(1, 6):
        time.sleep(QUICK.stale / 4)
        change(elsewhere, beat=beat)
        assert watcher.take(elsewhere) is None
    assert watcher.alive(elsewhere)


@pytest.mark.usefixtures("checked_at_once")
def test_who_was_taken_over_notices_before_it_writes(tmp_path):
    (tmp_path / "config.yaml").touch()
    frozen = Watcher(Timing(beat=1000)).take(tmp_path)  # its heart stands still
    assert frozen is not None
    frozen.check()
    change(tmp_path, place="another boot")
    with claims.held(tmp_path, timing=QUICK) as claim:
        with pytest.raises(HeldError, match="lost the run to process"):
            frozen.check()
        frozen.release()
        claim.check()
        assert claims.holder(tmp_path) is not None
    with pytest.raises(HeldError, match="which has ended"):
        frozen.check()


@pytest.mark.usefixtures("checked_at_once")
def test_a_folder_that_was_removed_and_claimed_anew_is_lost(tmp_path):
    claim = Watcher(Timing(beat=1000)).take(tmp_path)
    assert claim is not None
    newest(tmp_path).unlink()
    with pytest.raises(HeldError):
        claim.check()
    with claims.held(tmp_path), pytest.raises(HeldError):
        claim.check()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"pid": 1}', '{"pid": "x", "released": true}', "null", "\x00" * 99]
)
def test_a_claim_that_makes_no_sense_is_held_until_it_is_stale(elsewhere, text):
    newest(elsewhere).write_text(text)
    assert claims.holder(elsewhere) is not None
    assert Watcher().take(elsewhere) is None
    with claims.held(elsewhere, timing=QUICK):
        assert read(elsewhere)["pid"] == os.getpid()


def test_a_pid_that_was_given_to_a_later_process_is_dead(tmp_path):
    with claims.held(tmp_path):
        change(tmp_path, process_started="1")
        assert claims.holder(tmp_path) is None


def test_the_same_pid_in_another_container_is_not_judged(tmp_path):
    with claims.held(tmp_path):
        change(tmp_path, place="another place", process_started="1")
        assert claims.holder(tmp_path) is not None


def hold_for_ever(folder, ready):
    with claims.held(folder):
        ready.set()
        time.sleep(1000)


def test_a_process_killed_on_this_host_is_taken_over_at_once(tmp_path):
    ready = START.Event()
    child = START.Process(target=hold_for_ever, args=(tmp_path, ready))
    child.start()
    assert ready.wait(60)
    assert Watcher().take(tmp_path) is None
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    with claims.held(tmp_path):  # whether or not its parent has noticed
        assert newest(tmp_path).name == "000002.json"
    child.join()


def contend(folder, barrier, wins, rounds):
    """Takes each of so many runs if it can, on a slow disk; writes down what it got."""
    got, look = [], claims._newest

    def look_slowly(folder):
        found = look(folder)
        time.sleep(0.02)  # so that all of them have seen the same
        return found

    claims._newest = look_slowly
    for number in range(rounds):
        barrier.wait()
        claim = Watcher(Timing(beat=1000)).take(folder / str(number))
        if claim is not None:
            got.append(number)
    wins.put(got)
    barrier.wait()  # a process that ends gives its runs away


def test_of_many_at_once_one_wins(tmp_path):
    """Half of the runs are free, half were left behind by a process that is dead."""
    rounds, count = 60, 4
    for number in range(0, rounds, 2):
        claim = Watcher(Timing(beat=1000)).take(tmp_path / str(number))
        assert claim is not None
        change(tmp_path / str(number), process_started="1")
    barrier, wins = START.Barrier(count), START.Queue()
    children = [
        START.Process(target=contend, args=(tmp_path, barrier, wins, rounds)) for _ in range(count)
    ]
    for child in children:
        child.start()
    got = [wins.get(timeout=120) for _ in children]
    for child in children:
        child.join(60)
    assert sorted(itertools.chain(*got)) == list(range(rounds))


def test_the_default_timing_leaves_room():
    timing = dataclasses.asdict(claims.TIMING)
    assert timing["look"] <= timing["beat"] < timing["stale"] / 10
