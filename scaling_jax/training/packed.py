"""Training runs of one shape side by side: one program, a slot for each run that is training.

A run in a slot has its own folder, claim, curve, checkpoints and budget, all as when it is trained
alone (`training/loop.py`): what one has begun the other can finish. A run that is at its end makes
room for the next; one whose loss is not a number, or that is lost to another process, ends, and the
others go on. What the user has to mend ends them all, saved where they stand.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32

from scaling_jax import claims
from scaling_jax import mesh as meshes
from scaling_jax.claims import Claim, Holder, Watcher
from scaling_jax.config import RunConfig
from scaling_jax.data.row_feed import RowFeed
from scaling_jax.errors import HeldError, Interrupted, NonFiniteLossError, UserError
from scaling_jax.training import interrupt, optimizer
from scaling_jax.training.curve import STEPS_IN_FLIGHT
from scaling_jax.training.interrupt import StopRequest
from scaling_jax.training.journal import Journal, Progress
from scaling_jax.training.open_run import OpenRun
from scaling_jax.training.optimizer import Hyperparameters
from scaling_jax.training.packed_step import RUN, Program, Shape, make_mesh, next_slot, program
from scaling_jax.training.state import TrainState
from scaling_jax.training.step import Metrics

Failure = NonFiniteLossError | HeldError


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to be trained in its folder."""

    config: RunConfig
    folder: Path


def train(
    jobs: Sequence[Job],
    slots: int,
    watcher: Watcher,
    report: Callable[[Job, Progress], None] = lambda *_: None,
    ended: Callable[[Job, Failure | None], None] = lambda *_: None,
    waiting: Callable[[Job, Holder], None] = lambda *_: None,
) -> None:
    """Trains `jobs`, going on from what is in their folders; the first ones begin at once.

    All is done on the devices of this host. Runs that other processes have come last: taken over if
    that process has ended, passed over once it is seen to be alive.

    Args:
      jobs: of one `Shape`, in the order in which they get a slot.
      slots: how many are trained at a time.
      watcher: claims the runs.
      report: hears of every step of every run.
      ended: hears of each run that is trained to its end, or of what ended it.
      waiting: hears at every look who has a run, until it is known whether that process lives.

    Raises:
      UserError: the mesh, the data of a run, or what is in its folder does not fit its config. The
        runs in the slots are saved.
      Interrupted: on Ctrl-C or SIGTERM, after all runs in the slots are saved.
    """
    shape = Shape.of(jobs[0].config)
    assert all(Shape.of(job.config) == shape for job in jobs)
    packed = program(
        shape, make_mesh(meshes.make_mesh(shape.mesh, jax.local_devices()), slots), slots
    )
    queue = _Queue(jobs, watcher, waiting)
    with _Slots(packed, queue, report, ended) as training, interrupt.noticing() as stop:
        while not stop.asked and training.fill(stop):
            while not stop.asked:
                training.step()
                stop.look()
                if training.due:
                    break
            training.settle()
        if stop.asked:
            training.settle(save_all=True)
            assert stop.signal is not None
            raise Interrupted(f"stopped and saved: {training}", stop.signal)


class _Queue:
    """The runs that have had no slot yet; those that others have are looked at again."""

    def __init__(
        self, jobs: Sequence[Job], watcher: Watcher, waiting: Callable[[Job, Holder], None]
    ):
        self._watcher, self._waiting = watcher, waiting
        self._next = collections.deque(jobs)
        self._held: list[Job] = []
        self._looked = 0.0

    def __bool__(self) -> bool:
        """Whether any run is left."""
        return bool(self._next or self._held)

    @property
    def due(self) -> bool:
        """Whether it is time to look again at what others have."""
        return bool(self._held) and time.monotonic() - self._looked >= self._watcher.timing.look

    def take(self) -> tuple[Job, Claim] | None:
        """Claims the next run that can be had now; those that others work on are given up."""
        if self.due:
            self._next.extend(self._held)
            self._held.clear()
        while self._next:
            job = self._next.popleft()
            claim = self._watcher.take(job.folder)
            if claim is not None:
                return job, claim
            self._looked = time.monotonic()
            if not self._watcher.alive(job.folder):
                self._held.append(job)
                if found := claims.holder(job.folder):
                    self._waiting(job, found)
        return None

    def wait(self) -> None:
        """Lets the time pass until the next look, if there is to be one."""
        if self._held:
            time.sleep(self._watcher.timing.look)


class _Slots:
    """The slots of a program and the runs in them."""

    def __init__(
        self,
        program: Program,
        queue: _Queue,
        report: Callable[[Job, Progress], None],
        ended: Callable[[Job, Failure | None], None],
    ):
        self._program, self._queue = program, queue
        self._report, self._ended = report, ended
        self._runs: dict[int, _Run] = {}
        self._states = program.empty()
        self._in_flight: collections.deque[Metrics] = collections.deque()
        self._compiled = False
        self._hyper: Any = None
        self._occupied: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as every:
            for run in self._runs.values():
                every.callback(run.close)

    def __str__(self) -> str:
        """Which run is at which step."""
        return ", ".join(map(str, self._runs.values())) or "no run was in a slot"

    @property
    def due(self) -> bool:
        """Whether a run has to be saved, has ended, or may be had for an empty slot."""
        return any(run.due for run in self._runs.values()) or (self._room and self._queue.due)

    def fill(self, stop: StopRequest) -> bool:
        """Puts runs into empty slots until it is asked to stop; whether there is any run now."""
        while self._queue and self._room and not stop.asked:
            stop.look()
            with self._saved_on_mistakes():
                found = self._queue.take()
                if found is not None:
                    self._open(*found)
            if found is None and self._runs:
                break
            if found is None:
                self._queue.wait()  # there is nothing to train meanwhile
        if self._runs:
            self._place()
        return bool(self._runs)

    def step(self) -> None:
        """Trains every run for a step."""
        rows = np.zeros(self._program.rows_shape, np.int32)
        with self._saved_on_mistakes():
            for slot, run in self._runs.items():
                rows[slot] = run.next_rows()
        for run in self._runs.values():
            run.begin_step(compiling=not self._compiled)
        self._states, metrics = self._program.step(
            self._states, rows, self._with_limits(), self._occupied
        )
        self._compiled = True
        self._in_flight.append(metrics)
        # Reading the metrics of earlier steps only keeps the devices busy meanwhile.
        self._collect(STEPS_IN_FLIGHT)

    def settle(self, save_all: bool = False) -> None:
        """Saves the runs that are due, and empties the slots of those that are over."""
        self._collect(0)
        for slot, run in list(self._runs.items()):
            if run.due or save_all:
                run.save(functools.partial(self._program.take, self._states, slot))
            if run.over:
                del self._runs[slot]
                run.close()
                self._ended(run.job, run.failure)

    @property
    def _room(self) -> bool:
        return len(self._runs) < self._program.slots

    def _open(self, job: Job, claim: Claim) -> None:
        """Puts a run into a slot, unless it is at its end already."""
        run = _Run(job, claim, self._program.mesh, self._report)
        if run.over:
            run.close()
            self._ended(job, None)
        else:
            slot = next_slot(self._runs, self._program.slots, self._program.mesh.shape[RUN])
            self._states = self._program.put(self._states, slot, run.begin())
            self._runs[slot] = run

    @contextlib.contextmanager
    def _saved_on_mistakes(self) -> Iterator[None]:
        """Saves the runs in the slots if the block, between two steps, finds the user mistaken."""
        try:
            yield
        except UserError:
            self.settle(save_all=True)
            raise

    def _place(self) -> None:
        """Tells the devices which slots have a run, and the numbers of those runs."""
        slots = range(self._program.slots)
        any_run = next(iter(self._runs.values()))
        each = [self._runs.get(slot, any_run).hyper for slot in slots]
        stacked = jax.tree.map(lambda *numbers: np.array(numbers, np.float32), *each)
        self._hyper = self._program.place(stacked)
        self._occupied = self._program.place(np.array([slot in self._runs for slot in slots]))

    def _with_limits(self) -> Hyperparameters:
        """The numbers of the runs, with the limits of the losses of the next step."""
        if not self._program.shape.guarded:
            return self._hyper
        limits = np.full(self._program.slots, math.inf, np.float32)
        for slot, run in self._runs.items():
            limits[slot] = run.loss_limit
        return self._hyper._replace(loss_limit=self._program.place(limits))

    def _collect(self, limit: int) -> None:
        while len(self._in_flight) > limit:
            metrics = jax.device_get(self._in_flight.popleft())
            for slot, run in self._runs.items():
                run.collect(Metrics(*(values[slot] for values in metrics)))


class _Run:
    """A run in a slot, from `begin` to `close`.

    Attributes:
      failure: what ended it before its last step.
    """

    def __init__(self, job: Job, claim: Claim, mesh: Mesh, report: Callable[[Job, Progress], None]):
        self.job, self.failure = job, None
        self._check = claim.check
        with contextlib.ExitStack() as opened:
            opened.callback(claim.release)
            run = opened.enter_context(OpenRun(job.config, job.folder, mesh, claim.check))
            self._run, self._settled = run, len(run.curve)
            self._done = self._settled  # or on the devices
            self.hyper = optimizer.hyperparameters(job.config, run.budget)
            if not self.over:
                steps = range(self._done, run.budget.steps)
                feed = opened.enter_context(RowFeed(run.batches, mesh, steps))
                self._rows = iter(run.clock.waiting("data", feed))
                self._journal = opened.enter_context(
                    Journal(
                        run.mine,
                        job.config,
                        run.budget,
                        run.curve,
                        feed,
                        functools.partial(report, job),
                    )
                )
            self._opened = opened.pop_all()

    def __str__(self) -> str:
        return f"{self.job.folder.name} after step {self._done} of {self._run.budget.steps}"

    @property
    def due(self) -> bool:
        """Whether it has to be saved now, or has failed."""
        unsaved = self._done > self._settled and self._run.due(self._done)
        return self.failure is not None or unsaved

    @property
    def over(self) -> bool:
        """Whether it is at its end, or has failed."""
        return self.failure is not None or self._run.over(self._done)

    @property
    def loss_limit(self) -> float:
        """Of the step that was begun last, where leaps are skipped."""
        skips = self.job.config.health.spike == "skip"
        return self._run.curve.loss_limit(self._done) if skips else math.inf

    def begin(self) -> TrainState:
        """The state that it goes on from; only the slot keeps it."""
        state = self._run.state
        del self._run.state
        return state

    def next_rows(self) -> Int32[np.ndarray, "batch length+1"]:
        """What its next step trains on."""
        return np.asarray(next(self._rows))

    def begin_step(self, compiling: bool) -> None:
        """Counts the next step, once the rows of all runs are there."""
        self._done += 1
        lost = self._done <= self._journal.reached
        self._run.clock.enter("compile" if compiling else "repeated" if lost else "training")

    def collect(self, metrics: Metrics) -> None:
        """Writes down the next step; one that cannot be is the run's failure, and its last."""
        if self.failure is not None:
            return
        try:
            self._check()
            self._journal.write(self._run.curve.append(metrics, self._run.budget))
        except (NonFiniteLossError, HeldError) as failure:
            self.failure = failure

    def save(self, take: Callable[[], TrainState]) -> None:
        """Saves the state that `take` gets, unless the run has failed or made no step since."""
        if self.failure is not None or self._done == self._settled:
            return
        try:
            self._run.save(take())
        except HeldError as failure:
            self.failure = failure
        self._settled = self._done

    def close(self) -> None:
        """Waits until all is written, and lets the run go."""
        self._opened.close()
