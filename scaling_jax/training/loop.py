"""Training one run from its config to its last checkpoint; what has been done is not done again.

On start:
  1. No checkpoint: begin at step 0, or with the steps taken over from `branch_from`.
  2. A checkpoint of the same run and the same data: go on from its step, bit for bit.
  3. A checkpoint of another run, or of other data: refuse, saying which.
  4. The last step is reached: return its state.

Several processes (`distributed`) do all of this together; the first one alone writes, checkpoints
aside.
"""

import collections
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from scaling_jax import mesh as meshes
from scaling_jax.config import RunConfig
from scaling_jax.data.feed import Feed
from scaling_jax.errors import Interrupted, UserError
from scaling_jax.training import budget as budgets
from scaling_jax.training import checkpoint, health, interrupt, optimizer, state, step
from scaling_jax.training.budget import Budget
from scaling_jax.training.checkpoint import Checkpoints, Curve
from scaling_jax.training.curve import STEPS_IN_FLIGHT
from scaling_jax.training.files import CHECKPOINT_FOLDER, TENSORBOARD_FOLDER
from scaling_jax.training.journal import Journal, Progress
from scaling_jax.training.open_run import OpenRun, check_same
from scaling_jax.training.profiling import Tracer, Window
from scaling_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run that has reached its last step; the first `branched_at` were trained by another run."""

    state: TrainState
    curve: Curve
    budget: Budget
    branched_at: int


def train(
    config: RunConfig,
    folder: Path,
    report: Callable[[Progress], None] = lambda _: None,
    check: Callable[[], None] = lambda: None,
    profile: Window | None = None,
    started: float | None = None,
) -> TrainedRun:
    """Trains `config` in `folder`, going on from what is there.

    Args:
      config: of the run; in several processes the same.
      folder: of the run, which all processes see.
      report: hears of every step.
      check: called before anything is written; raises if the run is not ours any more.
      profile: steps to trace.
      started: when the command began, by `time.perf_counter`, for the account of the time; by
        default now.

    Raises:
      UserError: the data, the mesh, the profile or what is in the folder does not fit the config.
      NonFiniteLossError: naming the step.
      Interrupted: after saving, on Ctrl-C or SIGTERM.
    """
    started = time.perf_counter() if started is None else started
    if profile:
        profile.check(budgets.plan(config).steps)
    mesh = meshes.make_mesh(config.mesh)
    guarded = health.guarded(config.health)
    run_step = step.compiled(config.model, config.batch_size, config.microbatches, mesh, guarded)
    with OpenRun(config, folder, mesh, check, started) as run:
        if profile:
            profile.warn_of_past(len(run.curve))
        if not run.over(len(run.curve)):
            with Tracer(profile, folder / TENSORBOARD_FOLDER) as tracer:
                _train_on(run, run_step, mesh, check, report, tracer)
    return TrainedRun(run.state, run.curve.arrays(), run.budget, run.branched_at)


def _train_on(
    run: OpenRun,
    run_step: step.TrainStep,
    mesh: Mesh,
    check: Callable[[], None],
    report: Callable[[Progress], None],
    tracer: Tracer,
) -> None:
    """Trains `run` from where its curve ends to its last step, or until it is asked to stop."""
    config, budget, curve, clock = run.config, run.budget, run.curve, run.clock
    # Placed once: as Python numbers they would travel to every device at every step.
    replicated = meshes.sharding(mesh, ())
    hyper = optimizer.hyperparameters(config, budget)
    hyper = jax.tree.map(lambda number: _place(number, replicated), hyper)
    rows = meshes.sharding(mesh, ("batch", "length"))
    with (
        Feed(run.batches, rows, range(len(curve), budget.steps)) as feed,
        Journal(run.mine, config, budget, curve, feed, report) as journal,
        interrupt.noticing() as stop,
    ):
        in_flight: collections.deque[step.Metrics] = collections.deque()

        def collect(limit: int) -> None:
            while len(in_flight) > limit:
                check()
                journal.write(curve.append(jax.device_get(in_flight.popleft()), budget))

        first = len(curve) + 1
        for done, batch in enumerate(clock.waiting("data", feed), start=first):
            if config.health.spike == "skip":
                hyper = hyper._replace(loss_limit=_place(curve.loss_limit(done), replicated))
            part = "repeated" if done <= journal.reached else "training"
            clock.enter("compile" if done == first else part)
            with tracer.before(done):
                run.state, metrics = run_step(run.state, batch, hyper)
            clock.enter(part)
            in_flight.append(metrics)
            # Reading the metrics of earlier steps only keeps the devices busy meanwhile.
            collect(0 if tracer.ends_with(done) else STEPS_IN_FLIGHT)
            tracer.after(done)
            stop.look()
            if stop.asked or run.due(done):
                collect(0)
                run.save(run.state)
                # Only here: a request that comes after the line above is for the next step.
                if stop.asked:
                    assert stop.signal is not None
                    raise Interrupted(
                        f"stopped and saved after step {done} of {budget.steps}", stop.signal
                    )


def restore(config: RunConfig, folder: Path) -> checkpoint.Restored:
    """The newest good checkpoint of the run in `folder`, which may be training: nothing is changed.

    Raises:
      UserError: there is none, or it is of another run.
    """
    layout = state.abstract(config.model, meshes.make_mesh(config.mesh))
    if checkpoint.latest_step(folder / CHECKPOINT_FOLDER) is None:
        raise UserError(f"{folder}: holds no checkpoint")
    with Checkpoints(folder / CHECKPOINT_FOLDER, read_only=True) as checkpoints:
        restored = checkpoints.restore_latest(
            layout, lambda meta: check_same(meta, {"identity": config.identity}, folder)
        )
    if restored is None:
        raise UserError(f"{folder}: every checkpoint is damaged")
    return restored


def _place(number: float, sharding: NamedSharding) -> jax.Array:
    """A number on every device; jax.device_put would ask all processes whether it is the same."""
    return jax.make_array_from_callback((), sharding, lambda _: np.float32(number))
