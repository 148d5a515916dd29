"""Starting a run from the steps that it shares with another run, its trunk.

Up to the step at which its learning rate begins to fall, a run of schedule `constant` or
`warmup_stable_decay` does not depend on how long it is. Runs that differ in their length only are
branches of one trunk: each may take over what a shorter or a longer one has trained, and ends, on
the same devices, with the very bits of the same run trained from step 0.
"""

from pathlib import Path

from scaling_jax.config import RunConfig
from scaling_jax.errors import UserError
from scaling_jax.training import budget as budgets
from scaling_jax.training import checkpoint
from scaling_jax.training.budget import Budget
from scaling_jax.training.checkpoint import Checkpoints, Meta, Restored
from scaling_jax.training.files import CHECKPOINT_FOLDER, read_config
from scaling_jax.training.state import TrainState


def restore(config: RunConfig, budget: Budget, layout: TrainState, data_sha256: str) -> Restored:
    """The last state that a run shares with its `branch_from` and that is saved there.

    Nothing in that folder is changed.

    Args:
      config: of the run that branches.
      budget: of the run that branches.
      layout: shapes, types and shardings to restore into.
      data_sha256: of the token shards that the run is trained on.

    Raises:
      UserError: the two runs share no step, or none of those that they share is saved there.
    """
    assert config.branch_from is not None  # asked for only then
    trunk = Path(config.branch_from)
    other = read_config(trunk)
    _check_first_steps(config, other, trunk)
    shared = min(budget.decay_start, budgets.plan(other).decay_start)
    saved = checkpoint.steps(trunk / CHECKPOINT_FOLDER)
    if not any(step <= shared for step in saved):
        found = f"it has {', '.join(map(str, saved))}" if saved else "it has none"
        raise UserError(
            f"branch_from {trunk}: no checkpoint of the first {shared} steps, which the runs share "
            f"({found}); checkpoint.every_steps and checkpoint.keep there make and keep more"
        )

    def check(meta: Meta) -> None:
        for key, value in (("identity", other.identity), ("data_sha256", data_sha256)):
            if meta.get(key) != value:
                raise UserError(
                    f"branch_from {trunk}: its checkpoint is of other "
                    f"{'settings' if key == 'identity' else 'token shards'}: "
                    f"{key} {meta.get(key)} there, {value} here"
                )

    with Checkpoints(trunk / CHECKPOINT_FOLDER, read_only=True) as checkpoints:
        restored = checkpoints.restore_latest(layout, check, last=shared)
    if restored is None:
        raise UserError(f"branch_from {trunk}: every checkpoint up to step {shared} is damaged")
    return restored


def _check_first_steps(config: RunConfig, other: RunConfig, trunk: Path) -> None:
    """Raises a UserError unless the two runs begin with the same steps."""
    if other.optimizer.schedule == "cosine":
        raise UserError(
            f"branch_from {trunk}: its optimizer.schedule is cosine, so that every step of it "
            "depends on its length; runs of schedule constant or warmup_stable_decay can be "
            "branched from"
        )
    there, here = other.first_steps, config.first_steps
    for name, value in here.items():
        if there[name] != value:
            raise UserError(
                f"branch_from {trunk}: not a trunk of this run: {name} is {there[name]} there, "
                f"{value} here"
            )
