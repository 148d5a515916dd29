import os
import signal
import time

import pytest

from scaling_jax.data.workers import Report, Work, run
from scaling_jax.errors import UserError


def double(job: int, report: Report) -> int:
    report(Work(documents=1, tokens=job))
    return 2 * job


def fail_at_3(job: int, report: Report) -> int:
    if job == 3:
        raise UserError("job 3 cannot be done")
    for _ in range(1000):  # unless it is stopped, for a long time
        time.sleep(0.05)
        report(Work())
    return job


def die(job: int, report: Report) -> None:
    del job, report
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("count", [1, 2])
def test_results_come_in_order_and_work_is_added_up(count):
    heard: list[Work] = []
    assert run(double, range(50), count, heard.append) == [2 * job for job in range(50)]
    assert sum(work.documents for work in heard) == 50
    assert sum(work.tokens for work in heard) == sum(range(50))


def test_one_failure_stops_the_others():
    start = time.monotonic()
    with pytest.raises(UserError, match="job 3"):
        run(fail_at_3, range(3, 9), 2, lambda _: None)
    assert time.monotonic() - start < 40


def test_a_process_that_is_killed():
    with pytest.raises(UserError, match="a worker process was killed"):
        run(die, range(4), 2, lambda _: None)


def test_nothing_to_do():
    assert run(double, [], 4, lambda _: None) == []
