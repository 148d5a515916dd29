import errno
import json
import time

import pytest

from scaling_jax.training import goodput
from scaling_jax.training.goodput import Clock


def test_every_second_is_counted_once_in_the_innermost_part(tmp_path):
    start = time.perf_counter()
    with Clock(tmp_path) as clock:
        clock.begin()
        time.sleep(0.02)
        clock.enter("training")
        time.sleep(0.04)
        with clock.within("checkpoint"):
            time.sleep(0.03)
            with clock.within("restore"):
                time.sleep(0.01)
        for _ in clock.waiting("data", (time.sleep(0.01) for _ in range(3))):
            time.sleep(0.01)
    wall = time.perf_counter() - start
    found = goodput.seconds(tmp_path)
    assert sum(found.values()) == pytest.approx(wall, abs=0.01)
    least = {"start_up": 0.02, "training": 0.07, "checkpoint": 0.03, "restore": 0.01, "data": 0.03}
    assert found.keys() == least.keys()
    assert all(found[part] >= seconds - 0.001 for part, seconds in least.items())


def test_calls_add_up_and_the_line_names_what_was_lost(tmp_path):
    for _ in range(2):
        with goodput.spent(tmp_path, "evaluation"):
            time.sleep(0.01)
    calls = json.loads((tmp_path / "goodput.json").read_text())["calls"]
    assert len(calls) == 2
    assert goodput.seconds(tmp_path)["evaluation"] >= 0.02
    line = goodput.describe({"training": 75.0, "compile": 5.0, "repeated": 20.0})
    assert line == "goodput 75% of 100.0 s; lost to repeated steps 20.0 s, compile 5.0 s"
    assert goodput.describe({"training": 1.0}) == "goodput 100% of 1.0 s"


def test_the_account_is_kept_while_a_call_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(goodput, "SECONDS_BETWEEN_WRITES", 0.0)
    with Clock(tmp_path) as clock:
        clock.begin()
        time.sleep(0.01)
        clock.enter("training")  # a kill here loses what comes after
        assert goodput.seconds(tmp_path)["start_up"] >= 0.01


def test_a_call_that_finds_nothing_to_do_leaves_no_trace(tmp_path):
    with Clock(tmp_path):
        pass
    with goodput.spent(None, "evaluation"):
        pass
    assert not list(tmp_path.iterdir())
    assert goodput.seconds(tmp_path) == {}


@pytest.mark.parametrize("content", ["", "[1]", '{"calls": [{"seconds": 3}]}', "\x00\xff", "{}"])
def test_a_damaged_account_starts_anew(tmp_path, content):
    (tmp_path / "goodput.json").write_text(content)
    assert goodput.seconds(tmp_path) == {}
    with goodput.spent(tmp_path, "evaluation"):
        pass
    assert goodput.seconds(tmp_path).keys() == {"evaluation"}


def test_an_account_that_cannot_be_written_stops_no_run(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(goodput, "SECONDS_BETWEEN_WRITES", 0.0)
    monkeypatch.setattr(goodput.atomic, "write_text", fail)
    with Clock(tmp_path) as clock:
        clock.begin()
        clock.enter("training")
    assert goodput.seconds(tmp_path) == {}
