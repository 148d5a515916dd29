"""Checkpoints of a run, through orbax: `state`, the whole loss `curve`, and `meta` as JSON.

`curve` and `meta` can be read without the state and without knowing the model. Orbax restores
damaged array bytes without a word, so `meta` carries a fingerprint of every array and a checksum of
itself (`scaling_jax.sealed`), checked at restore; a step that does not match is set aside and the
one before it is used. Files that play no part in what is restored may be damaged unseen.
"""

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import logging
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from scaling_jax import sealed, storage
from scaling_jax.errors import UserError
from scaling_jax.training.state import TrainState

Curve = dict[str, np.ndarray]
Meta = dict[str, Any]

# What the names of fingerprints begin with.
STATE, CURVE = "state", "curve"

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
        with _saving(self._folder):
            self._manager.close()

    def save(self, state: TrainState, curve: Curve, meta: Meta) -> None:
        """Saves `state` under its own step number, unless that step is there already.

        Raises:
          UserError: the storage is at fault, now or in the save before this one.
        """
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
        with _saving(self._folder):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),  # pyright: ignore[reportCallIssue]
                    curve=ocp.args.StandardSave(curve),  # pyright: ignore[reportCallIssue]
                    meta=ocp.args.JsonSave(sealed.seal(meta)),  # pyright: ignore[reportCallIssue]
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
            once `meta` and `curve` are known to belong together, and before the state is read: that
            of another run would look like a damaged one.
          last: steps after this one are passed over.

        Raises:
          UserError: from `check`, or the storage cannot be read; the checkpoint stays as it is.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            if last is not None and step > last:
                continue
            try:
                return self._restore(step, layout, check)
            except (UserError, MemoryError, jax.errors.JaxRuntimeError):  # no fault of the files
                raise
            except Exception as error:  # orbax raises bare Exception for damaged files
                code = storage.fault(error)
                if code not in (None, errno.EIO):  # EIO: a disk that cannot read this file
                    raise UserError(
                        f"{self._folder / str(step)}: cannot be read: {storage.in_words(code)}"
                    ) from None
                logger.warning(
                    "checkpoint of step %d is damaged and set aside: %s", step, _reason(error)
                )
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
        folder = self._folder / str(step)
        with _naming(folder / "meta"):
            meta = _read_meta(folder)
        with _naming(folder / "curve"):
            curve = _read_curve(folder, meta)
        check(meta)
        with _naming(folder / "state"):
            items = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(layout)  # pyright: ignore[reportCallIssue]
                ),
            )
            _compare(_state_fingerprints(items["state"]), meta, STATE)
        return Restored(items["state"], curve, meta)


def steps(folder: Path) -> list[int]:
    """The saved steps in a checkpoint folder."""
    names = (entry.name for entry in folder.glob("*") if entry.is_dir())
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def latest_step(folder: Path) -> int | None:
    """The newest saved step in a checkpoint folder."""
    return max(steps(folder), default=None)


def read_meta(folder: Path) -> Meta:
    """The `meta` of the newest checkpoint in `folder`.

    Raises:
      UserError: it is damaged.
    """
    newest = folder / str(latest_step(folder))
    with _refusing(newest), _naming(newest / "meta"):
        return _read_meta(newest)


def content(meta: Meta) -> str:
    """sha256 that names what a checkpoint holds."""
    return hashlib.sha256(json.dumps(meta["fingerprints"], sort_keys=True).encode()).hexdigest()


def read_curve(folder: Path) -> Curve:
    """The loss curve of the newest checkpoint in `folder`: step, loss, z_loss, ... as arrays.

    Raises:
      UserError: it is damaged.
    """
    newest = folder / str(latest_step(folder))
    with _refusing(newest):
        with _naming(newest / "meta"):
            meta = _read_meta(newest)
        with _naming(newest / "curve"):
            return _read_curve(newest, meta)


def _read_meta(folder: Path) -> Meta:
    """Raises a ValueError unless it is what was saved for the step that `folder` is named after."""
    meta = sealed.read(folder / "meta" / "metadata")
    if str(meta.get("step")) != folder.name:
        raise ValueError(f"it is that of step {meta.get('step')}")
    return meta


def _read_curve(folder: Path, meta: Meta) -> Curve:
    """Raises an exception of any kind unless it is what `meta` was saved with."""
    with contextlib.closing(ocp.StandardCheckpointer()) as checkpointer:
        curve = checkpointer.restore((folder / "curve").resolve())
    _compare(_curve_fingerprints(curve), meta, CURVE)
    return curve


def _compare(found: dict[str, int], meta: Meta, part: str) -> None:
    expected = {
        name: value for name, value in meta["fingerprints"].items() if name.startswith(part)
    }
    for name in expected.keys() | found.keys():
        if expected.get(name) != found.get(name):
            raise ValueError(f"array {name} is not what was saved")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts what is damaged before the reason, which orbax gives in many lines."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        raise ValueError(f"{path}: {_reason(error)}") from error


@contextlib.contextmanager
def _refusing(step: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(
            f"{error}; it is damaged: `train` sets this step of an unfinished run aside; of a "
            f"finished one rename {step} to {step.name}.damaged"
        ) from None


@contextlib.contextmanager
def _saving(folder: Path) -> Iterator[None]:
    """Turns what orbax raises, in many classes, into one line: a full disk, a time that is over.

    Orbax measures its time by a clock that may jump.
    """
    try:
        yield
    except Exception as error:
        code = storage.fault(error)
        if code is None and isinstance(error, TimeoutError):
            raise TimeoutError(
                f"{folder}: a checkpoint was not saved in time (or the clock has jumped); the same "
                "command goes on from the one before"
            ) from None
        if code is None:
            raise
        raise UserError(
            f"{folder}: a checkpoint cannot be saved: {storage.in_words(code)}"
        ) from None


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _all_fingerprints(state: TrainState, curve: Curve) -> dict[str, int]:
    """A 32-bit number for each array, by its name."""
    return _state_fingerprints(state) | _curve_fingerprints(curve)


def _state_fingerprints(state: TrainState) -> dict[str, int]:
    return {STATE + name: number for name, number in _flat(jax.device_get(_fingerprints(state)))}


def _curve_fingerprints(curve: Curve) -> dict[str, int]:
    """Of the bytes, and of what turns them into numbers."""
    return {
        f"{CURVE}['{name}']": zlib.crc32(f"{part.dtype} {part.shape} ".encode() + part.tobytes())
        for name, part in curve.items()
    }


@jax.jit
def _fingerprints(state: TrainState) -> Any:
    """A 32-bit sum for each array; any flipped bit changes it, the mesh does not."""

    def fingerprint(leaf: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(leaf, jnp.uint32).ravel()
        # Odd weights: a change of one bit is never multiplied away.
        weights = jax.lax.iota(jnp.uint32, words.size) * np.uint32(2) + np.uint32(1)
        return jnp.sum(words * weights, dtype=jnp.uint32)

    return jax.tree.map(fingerprint, state)


def _flat(tree: Any) -> list[tuple[str, int]]:
    leaves: Sequence[tuple[Any, Any]] = jax.tree.leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), int(leaf)) for path, leaf in leaves]
