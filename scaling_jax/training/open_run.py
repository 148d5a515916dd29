"""A run whose folder has been looked into: where it goes on, how it is saved, when it is over."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Self

from jax.sharding import Mesh

from scaling_jax import config as configs
from scaling_jax.config import RunConfig
from scaling_jax.data.batches import Batches
from scaling_jax.errors import UserError
from scaling_jax.training import branch, checkpoint, distributed, health
from scaling_jax.training import budget as budgets
from scaling_jax.training import state as states
from scaling_jax.training.budget import Budget
from scaling_jax.training.checkpoint import Checkpoints
from scaling_jax.training.curve import GrowingCurve
from scaling_jax.training.files import CHECKPOINT_FOLDER, CONFIG_FILE
from scaling_jax.training.goodput import Clock
from scaling_jax.training.state import TrainState


class OpenRun:
    """A run that begins, branches or goes on, with everything open that its steps need.

    Use it in a `with` block; leaving it waits until what was saved is written.

    Args:
      config: of the run.
      folder: of the run.
      mesh: where its state will live.
      check: called before anything is written; raises if the run is not ours any more.
      started: when the command began, by `time.perf_counter`, for the account of the time.

    Attributes:
      state: where it begins or goes on; who trains it replaces it.
      curve: up to there.
      branched_at: how many of its steps were trained by another run.
      mine: its folder, for what the first process alone writes; None in the others.

    Raises:
      UserError: the data, the mesh or what is in the folder does not fit the config.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        mesh: Mesh,
        check: Callable[[], None],
        started: float | None = None,
    ):
        self.config, self.budget = config, budgets.plan(config)
        self.mine = folder if distributed.is_first() else None
        self.batches = _open_batches(config, self.budget)
        self._check = check
        identity = {"identity": config.identity, "data_sha256": self.batches.sha256}
        distributed.check_same("config or data", str(identity))
        layout = states.abstract(config.model, mesh)
        saved = folder / CHECKPOINT_FOLDER
        with contextlib.ExitStack() as opened:
            self.clock = opened.enter_context(Clock(self.mine, started=started))
            with self.clock.within("restore"):
                trunk = None
                if config.branch_from is not None and checkpoint.latest_step(saved) is None:
                    trunk = branch.restore(config, self.budget, layout, self.batches.sha256)
                self._checkpoints = opened.enter_context(
                    Checkpoints(saved, config.checkpoint.keep, always=[self.budget.decay_start])
                )
                known = trunk or self._checkpoints.restore_latest(
                    layout, lambda meta: check_same(meta, identity, folder)
                )
            self.state = known.state if known else states.create(config.model, config.seed, mesh)
            self.curve = GrowingCurve(config.health, known.curve if known else None)
            self.branched_at = known.meta.get("branched_at", 0) if known else 0
            if trunk:
                self.branched_at = len(self.curve)
            self._meta = identity | {
                "config": dataclasses.asdict(config),
                "branched_at": self.branched_at,
            }
            if trunk or not self.over(len(self.curve)):
                if self.mine:
                    configs.write(config, self.mine / CONFIG_FILE)
                    self.clock.begin()
                if trunk:  # from here on the run needs it no more
                    self.save(self.state)
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clock.enter("checkpoint")  # whose writing in the background is waited for
        self._opened.close()

    def over(self, done: int) -> bool:
        """Whether a run of `done` steps is at its end."""
        return done == self.budget.steps

    def due(self, done: int) -> bool:
        """Whether a run of `done` steps has to be saved."""
        every = self.config.checkpoint.every_steps
        return (
            done == self.budget.decay_start or self.over(done) or bool(every and done % every == 0)
        )

    def save(self, state: TrainState) -> None:
        """Saves `state`, at which the curve ends."""
        self._check()
        arrays = self.curve.arrays()
        position = {
            "next_row": len(self.curve) * self.config.batch_size,
            "unique_tokens": self.batches.unique_tokens(len(self.curve)),
            "health": health.describe(arrays),
        }
        with self.clock.within("checkpoint"):
            self._checkpoints.save(state, arrays, self._meta | position)


def check_same(meta: checkpoint.Meta, identity: dict[str, str], folder: Path) -> None:
    """Raises a UserError if a checkpoint is of another run or of other data."""
    what = {"identity": "another run (its config differs)", "data_sha256": "other token shards"}
    for key, value in identity.items():
        if meta.get(key) != value:
            raise UserError(
                f"{folder}: its checkpoint belongs to {what[key]}: "
                f"{key} {meta.get(key)} there, {value} here; give another folder"
            )


def _open_batches(config: RunConfig, budget: Budget) -> Batches:
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
