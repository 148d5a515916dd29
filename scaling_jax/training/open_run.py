"""A run whose folder has been looked into: where it goes on, how it is saved, when it is over."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Self

from jax.sharding import Mesh

from scaling_jax import config as configs
from scaling_jax.config import RunConfig
from scaling_jax.training import branch, checkpoint, distributed, health, loop
from scaling_jax.training import budget as budgets
from scaling_jax.training import state as states
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

    Attributes:
      state: where it begins or goes on.
      curve: up to there.

    Raises:
      UserError: the data, the mesh or what is in the folder does not fit the config.
    """

    def __init__(self, config: RunConfig, folder: Path, mesh: Mesh, check: Callable[[], None]):
        self.config, self.budget = config, budgets.plan(config)
        self.batches = loop.open_batches(config, self.budget)
        self._check = check
        identity = {"identity": config.identity, "data_sha256": self.batches.sha256}
        layout = states.abstract(config.model, mesh)
        saved = folder / CHECKPOINT_FOLDER
        mine = folder if distributed.is_first() else None
        with contextlib.ExitStack() as opened:
            self.clock = opened.enter_context(Clock(mine))
            with self.clock.within("restore"):
                trunk = None
                if config.branch_from is not None and checkpoint.latest_step(saved) is None:
                    trunk = branch.restore(config, self.budget, layout, self.batches.sha256)
                self._checkpoints = opened.enter_context(
                    Checkpoints(saved, config.checkpoint.keep, always=[self.budget.decay_start])
                )
                known = trunk or self._checkpoints.restore_latest(
                    layout, lambda meta: loop.check_same(meta, identity, folder)
                )
            self.state = known.state if known else states.create(config.model, config.seed, mesh)
            self.curve = GrowingCurve(config.health, known.curve if known else None)
            branched_at = known.meta.get("branched_at", 0) if known else 0
            self._meta = identity | {
                "config": dataclasses.asdict(config),
                "branched_at": len(self.curve) if trunk else branched_at,
            }
            if not self.over(len(self.curve)):
                if mine:
                    configs.write(config, mine / CONFIG_FILE)
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
