"""Jobs spread over processes: whoever starts them hears of their progress and can stop them."""

import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, MutableSequence, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from typing import Any, NamedTuple, TypeVar

from scaling_jax.errors import UserError

LISTEN_EVERY_SECONDS = 0.2


class Work(NamedTuple):
    """Some of the work that has been done; amounts are to be added up."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    # Of the source: what pieces are measured in.
    source_bytes: int = 0


Report = Callable[[Work], None]
Job = TypeVar("Job")
Result = TypeVar("Result")


def run(
    function: Callable[[Job, Report], Result], jobs: Sequence[Job], count: int, report: Report
) -> list[Result]:
    """`function(job, report)` of each job, in `count` processes; in this one if that is 1.

    Args:
      function: can be pickled; the work that it reports in its process is reported here.
      jobs: can be pickled.
      count: processes.
      report: called in this process, some times a second.

    Raises:
      UserError: one that the function raised, or a process was killed. The others are stopped.
    """
    count = min(count, len(jobs))
    if count <= 1:
        return [function(job, report) for job in jobs]
    context = multiprocessing.get_context("spawn")
    # Each process adds up its work in a row of its own, so that none has to wait for another.
    table = context.RawArray("q", count * len(Work._fields))
    stop = context.Event()
    arguments = (context.Value("i", 0), table, stop)
    with ProcessPoolExecutor(count, context, _start_process, arguments) as pool:
        futures = [pool.submit(_call, function, job) for job in jobs]
        try:
            _listen(futures, table, report)
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed (out of memory?); what is finished is kept: give the "
                "same command again, perhaps with fewer workers"
            ) from None
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


class _Stopped(Exception):  # noqa: N818 - it is a wish, not an error
    """The caller no longer wants the result."""


def _listen(futures: Sequence[Future[Any]], table: Sequence[int], report: Report) -> None:
    """Reports until all jobs are done or one has failed."""
    width = len(Work._fields)
    before = Work()
    pending = set(futures)
    while pending:
        done, pending = wait(pending, LISTEN_EVERY_SECONDS, return_when=FIRST_EXCEPTION)
        now = Work(*(sum(table[field::width]) for field in range(width)))
        report(Work(*(new - old for new, old in zip(now, before, strict=True))))
        before = now
        if any(future.exception() for future in done):
            return


# Of a worker process: adds up what it has done, and raises when it is to stop.
_report: Report


def _start_process(number: Any, table: MutableSequence[int], stop: Event) -> None:
    with number.get_lock():
        row = number.value
        number.value += 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller hears Ctrl-C and says stop
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # One process, one core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    global _report
    _report = functools.partial(_add, table, row, stop)


def _add(table: MutableSequence[int], row: int, stop: Event, work: Work) -> None:
    for place, amount in enumerate(work, start=row * len(Work._fields)):
        table[place] += amount
    if stop.is_set():
        raise _Stopped


def _end_with_parent() -> None:
    """A caller that is killed can say nothing; its workers must not go on for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _call(function: Callable[[Job, Report], Result], job: Job) -> Result:
    return function(job, _report)
