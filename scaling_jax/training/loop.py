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
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding

from scaling_jax import config as configs
from scaling_jax import mesh as meshes
from scaling_jax.config import RunConfig
from scaling_jax.data.batches import Batches
from scaling_jax.data.feed import Feed
from scaling_jax.errors import Interrupted, UserError
from scaling_jax.training import (
    branch,
    checkpoint,
    distributed,
    health,
    interrupt,
    optimizer,
    state,
    step,
)
from scaling_jax.training import budget as budgets
from scaling_jax.training.budget import Budget
from scaling_jax.training.checkpoint import Checkpoints, Curve
from scaling_jax.training.curve import STEPS_IN_FLIGHT, GrowingCurve
from scaling_jax.training.files import CHECKPOINT_FOLDER, CONFIG_FILE, TENSORBOARD_FOLDER
from scaling_jax.training.goodput import Clock
from scaling_jax.training.journal import Journal, Progress
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
      started: when the command began, by `time.perf_counter`, for the account of the time.

    Raises:
      UserError: the data, the mesh, the profile or what is in the folder does not fit the config.
      NonFiniteLossError: naming the step.
      Interrupted: after saving, on Ctrl-C or SIGTERM.
    """
    mine = folder if distributed.is_first() else None
    with Clock(mine, started=started) as clock:
        return _train(config, folder, mine, report, check, profile, clock)


def _train(
    config: RunConfig,
    folder: Path,
    mine: Path | None,
    report: Callable[[Progress], None],
    check: Callable[[], None],
    profile: Window | None,
    clock: Clock,
) -> TrainedRun:
    """`train` by the `clock`; what the first process alone writes goes to `mine`."""
    budget = budgets.plan(config)
    if profile:
        profile.check(0, budget.steps)
    mesh = meshes.make_mesh(config.mesh)
    batches = open_batches(config, budget)
    guarded = health.guarded(config.health)
    run_step = step.compiled(config.model, config.batch_size, config.microbatches, mesh, guarded)
    layout = state.abstract(config.model, mesh)
    identity = {"identity": config.identity, "data_sha256": batches.sha256}
    distributed.check_same("config or data", str(identity))
    saved = folder / CHECKPOINT_FOLDER
    trunk = None
    if config.branch_from is not None and checkpoint.latest_step(saved) is None:
        with clock.within("restore"):
            trunk = branch.restore(config, budget, layout, batches.sha256)

    with Checkpoints(saved, config.checkpoint.keep, always=[budget.decay_start]) as checkpoints:
        with clock.within("restore"):
            known = trunk or checkpoints.restore_latest(
                layout, lambda meta: check_same(meta, identity, folder)
            )
        if known:
            current, curve = known.state, GrowingCurve(config.health, known.curve)
        else:
            current, curve = (
                state.create(config.model, config.seed, mesh),
                GrowingCurve(config.health),
            )
        if profile:
            profile.check(len(curve), budget.steps)
        if trunk:
            branched_at = len(curve)
        else:
            branched_at = known.meta.get("branched_at", 0) if known else 0
            if len(curve) == budget.steps:
                return TrainedRun(current, curve.arrays(), budget, branched_at)
        if mine:
            configs.write(config, mine / CONFIG_FILE)
            clock.begin()
        meta = identity | {"config": dataclasses.asdict(config), "branched_at": branched_at}

        def save() -> None:
            check()
            arrays = curve.arrays()
            position = {
                "next_row": len(curve) * config.batch_size,
                "unique_tokens": batches.unique_tokens(len(curve)),
                "health": health.describe(arrays),
            }
            with clock.within("checkpoint"):
                checkpoints.save(current, arrays, meta | position)

        if trunk:  # from here on the run needs it no more
            save()
        # Placed once: as Python numbers they would travel to every device at every step.
        replicated = meshes.sharding(mesh, ())
        hyper = optimizer.hyperparameters(config, budget)
        hyper = jax.tree.map(lambda number: _place(number, replicated), hyper)
        rows = meshes.sharding(mesh, ("batch", "length"))
        with (
            Feed(batches, rows, range(len(curve), budget.steps)) as feed,
            Journal(mine, config, budget, curve, feed, report) as journal,
            Tracer(profile, folder / TENSORBOARD_FOLDER) as tracer,
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
                lost = done <= journal.reached
                clock.enter("compile" if done == first else "repeated" if lost else "training")
                with tracer.before(done):
                    current, metrics = run_step(current, batch, hyper)
                clock.enter("repeated" if lost else "training")
                in_flight.append(metrics)
                # Reading the metrics of earlier steps only keeps the devices busy meanwhile.
                collect(0 if tracer.ends_with(done) else STEPS_IN_FLIGHT)
                tracer.after(done)
                stop.look()
                every = config.checkpoint.every_steps
                due = done in (budget.decay_start, budget.steps)
                if stop.asked or due or (every and done % every == 0):
                    collect(0)
                    save()
                    # Only here: a request that comes after the line above is for the next step.
                    if stop.asked:
                        assert stop.signal is not None
                        raise Interrupted(
                            f"stopped and saved after step {done} of {budget.steps}", stop.signal
                        )
            clock.enter("checkpoint")  # whose writing in the background is waited for
    return TrainedRun(current, curve.arrays(), budget, branched_at)


def restore(config: RunConfig, folder: Path) -> checkpoint.Restored:
    """The newest good checkpoint of the run in `folder`.

    Raises:
      UserError: there is none, or it is of another run.
    """
    layout = state.abstract(config.model, meshes.make_mesh(config.mesh))
    if checkpoint.latest_step(folder / CHECKPOINT_FOLDER) is None:
        raise UserError(f"{folder}: holds no checkpoint")
    with Checkpoints(folder / CHECKPOINT_FOLDER, config.checkpoint.keep) as checkpoints:
        restored = checkpoints.restore_latest(
            layout, lambda meta: check_same(meta, {"identity": config.identity}, folder)
        )
    if restored is None:
        raise UserError(f"{folder}: every checkpoint is damaged")
    return restored


def _place(number: float, sharding: NamedSharding) -> jax.Array:
    """A number on every device; jax.device_put would ask all processes whether it is the same."""
    return jax.make_array_from_callback((), sharding, lambda _: np.float32(number))


def open_batches(config: RunConfig, budget: Budget) -> Batches:
    """The training data of `config`; warns when the budget needs a part more than once."""
    batches = Batches.open(config)
    often = [
        f"{part if config.data.mixture else 'the data'} {times:.2f} times"
        for part, times in batches.epochs(budget.steps).items()
        if times > 1
    ]
    if often:
        repeats = budget.tokens - batches.unique_tokens(budget.steps)
        warnings.warn(
            f"{config.data.dataset}: {budget.tokens:,} tokens need {', '.join(often)}: "
            f"{repeats:,} of them are repeats",
            stacklevel=3,
        )
    return batches


def check_same(meta: checkpoint.Meta, identity: dict[str, str], folder: Path) -> None:
    """Raises a UserError if a checkpoint is of another run or of other data."""
    what = {"identity": "another run (its config differs)", "data_sha256": "other token shards"}
    for key, value in identity.items():
        if meta.get(key) != value:
            raise UserError(
                f"{folder}: its checkpoint belongs to {what[key]}: "
                f"{key} {meta.get(key)} there, {value} here; give another folder"
            )
