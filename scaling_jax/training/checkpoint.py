"""Checkpoints of a run, through orbax: `state`, the whole loss `curve`, and `meta` as JSON.

`curve` and `meta` can be read without the state and without knowing the model. Orbax restores
damaged array bytes without a word, so `meta` carries a fingerprint of every array, checked at
restore; a step that does not match is set aside and the one before it is used.
"""

import dataclasses
import importlib.metadata
import json
import logging
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from scaling_jax.errors import UserError
from scaling_jax.training.state import TrainState

Curve = dict[str, np.ndarray]
Meta = dict[str, Any]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held."""

    state: TrainState
    curve: Curve
    meta: Meta


class Checkpoints:
    """The checkpoints of one run. Saving goes on in the background; leaving the block waits for it.

    Args:
      folder: where they lie, one sub-folder a step.
      keep: how many of the latest steps are kept.
      always: steps that are kept beside those.
      read_only: change nothing in the folder, which another run may be writing.
    """

    def __init__(
        self, folder: Path, keep: int = 1, always: Sequence[int] = (), read_only: bool = False
    ):
        policies = [ocp.checkpoint_managers.LatestN(keep)]
        policies += [ocp.checkpoint_managers.CustomSteps(always)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        self._folder, self._read_only = folder, read_only
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._manager.close()

    def save(self, state: TrainState, curve: Curve, meta: Meta) -> None:
        """Saves `state` under its own step number, unless that step is there already."""
        step = int(state["step"])
        if step in self._manager.all_steps():
            return
        meta = meta | {
            "step": step,
            "fingerprints": _all_fingerprints(state, curve),
            "versions": {
                name: importlib.metadata.version(name)
                for name in ("scaling_jax", "jax", "flax", "optax", "orbax-checkpoint")
            },
        }
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),  # pyright: ignore[reportCallIssue]
                curve=ocp.args.StandardSave(curve),  # pyright: ignore[reportCallIssue]
                meta=ocp.args.JsonSave(meta),  # pyright: ignore[reportCallIssue]
            ),
        )

    def restore_latest(
        self,
        layout: TrainState,
        check: Callable[[Meta], None] = lambda _: None,
        last: int | None = None,
    ) -> Restored | None:
        """The newest step whose arrays are what was saved; None if there is no such step.

        Args:
          layout: shapes, types and shardings to restore into; the mesh may differ from the saved.
          check: raises a UserError for the `meta` of a checkpoint that is not wanted. It is asked
            first: the state of another run would look like a damaged one.
          last: steps after this one are passed over.

        Raises:
          UserError: from `check`; the checkpoint stays as it is.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            if last is not None and step > last:
                continue
            try:
                return self._restore(step, layout, check)
            except (UserError, MemoryError, jax.errors.JaxRuntimeError):  # no fault of the files
                raise
            except Exception as error:  # orbax raises bare Exception for damaged files
                reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
                logger.warning("checkpoint of step %d is damaged and set aside: %s", step, reason)
                self._set_aside(step)
        return None

    def _set_aside(self, step: int) -> None:
        """Renames a step, so that it can be saved anew and nothing is lost."""
        if self._read_only:
            return
        if jax.process_index() == 0:
            aside = self._folder / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (self._folder / str(step)).rename(aside)
        multihost_utils.sync_global_devices(f"step {step} is set aside")
        self._manager.reload()

    def _restore(self, step: int, layout: TrainState, check: Callable[[Meta], None]) -> Restored:
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        check(meta["meta"])
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(layout),  # pyright: ignore[reportCallIssue]
                curve=ocp.args.StandardRestore(),
            ),
        )
        found = _all_fingerprints(items["state"], items["curve"])
        expected = meta["meta"]["fingerprints"]
        for name in expected.keys() | found.keys():
            if expected.get(name) != found.get(name):
                raise ValueError(f"array {name} is not what was saved")
        return Restored(items["state"], items["curve"], meta["meta"])


def steps(folder: Path) -> list[int]:
    """The saved steps in a checkpoint folder."""
    return sorted(int(entry.name) for entry in folder.glob("*") if entry.name.isdigit())


def latest_step(folder: Path) -> int | None:
    """The newest saved step in a checkpoint folder."""
    return max(steps(folder), default=None)


def read_meta(folder: Path) -> Meta:
    """The `meta` of the newest checkpoint in `folder`.

    Raises:
      UserError: it is damaged.
    """
    path = folder / str(latest_step(folder)) / "meta" / "metadata"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path}: damaged; testbed run or train sets it aside") from None


def read_curve(folder: Path) -> Curve:
    """The loss curve of the newest checkpoint in `folder`: step, loss, z_loss, ... as arrays."""
    return ocp.StandardCheckpointer().restore(
        (folder / str(latest_step(folder)) / "curve").resolve()
    )


def _all_fingerprints(state: TrainState, curve: Curve) -> dict[str, int]:
    """A 32-bit number for each array, by its name."""
    of_curve = {f"['curve']['{name}']": zlib.crc32(part.tobytes()) for name, part in curve.items()}
    return _flat(jax.device_get(_fingerprints(state))) | of_curve


@jax.jit
def _fingerprints(state: TrainState) -> Any:
    """A 32-bit sum for each array; any flipped bit changes it, the mesh does not."""

    def fingerprint(leaf: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(leaf, jnp.uint32).ravel()
        # Odd weights: a change of one bit is never multiplied away.
        weights = jax.lax.iota(jnp.uint32, words.size) * np.uint32(2) + np.uint32(1)
        return jnp.sum(words * weights, dtype=jnp.uint32)

    return jax.tree.map(fingerprint, state)


def _flat(tree: Any) -> dict[str, int]:
    leaves: Sequence[tuple[Any, Any]] = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): int(leaf) for path, leaf in leaves}
