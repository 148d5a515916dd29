"""Checkpoints of a run, through orbax: `state`, the whole loss `curve`, and `meta` as JSON.

`curve` and `meta` can be read without the state and without knowing the model. Orbax restores
damaged array bytes without a word, so `meta` carries a fingerprint of every array and a checksum of
itself (`scaling_jax.sealed`), checked at restore; a step that does not match is set aside and the
one before it is used. Files that play no part in what is restored may be damaged unseen.

Several processes read without waiting for each other and then agree on what was found.
"""

import contextlib
import dataclasses
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

from scaling_jax import sealed, storage
from scaling_jax.errors import OutageError, UserError, first_line
from scaling_jax.training import agreement, distributed
from scaling_jax.training.state import TrainState

Curve = dict[str, np.ndarray]
Meta = dict[str, Any]

# What the names of fingerprints begin with.
STATE, CURVE = "state", "curve"
# What orbax and tensorstore raise, if need be as a cause, for files that are changed, cut or gone.
SIGNS_OF_DAMAGE = (
    *(FileNotFoundError, NotADirectoryError, IsADirectoryError, EOFError),
    *(ValueError, LookupError, TypeError, AttributeError),
)

logger = logging.getLogger(__name__)


class DamagedError(Exception):
    """A file of a checkpoint is not what was saved."""


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
      pauses: seconds between the times that a storage which does not answer is read.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 1,
        always: Sequence[int] = (),
        read_only: bool = False,
        pauses: Sequence[float] = storage.PAUSES,
    ):
        self._folder, self._pauses = folder, pauses
        self._manager = None if read_only else _manager(folder, keep, always)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _saving(self._folder):
            if self._manager is not None:
                self._manager.close()

    def save(self, state: TrainState, curve: Curve, meta: Meta) -> None:
        """Saves `state` under its own step number, unless that step is there already.

        Raises:
          UserError: the storage is full or may not be written, now or in the save before this one.
          OutageError: it does not answer.
        """
        assert self._manager is not None  # nobody saves what is read only
        step = int(state["step"])
        if step in self._manager.all_steps():
            return
        meta = meta | {
            "step": step,
            "fingerprints": _state_fingerprints(state) | _curve_fingerprints(curve),
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
          UserError: from `check`, or the state has other arrays than `layout`, or the storage may
            not be read; the checkpoint stays as it is.
          OutageError: the storage does not answer; the checkpoint stays as it is.
          PeerError: another process could not read it.
        """
        passed: set[int] = set()
        while (step := self._newest(passed, last)) is not None:
            passed.add(step)
            try:
                return self._restore(step, layout, check)
            except DamagedError as error:
                self._pass_over(step, error)
        return None

    def _newest(self, passed: set[int], last: int | None) -> int | None:
        """The newest step by what is there now: one that another run writes comes and goes."""
        there = (step for step in steps(self._folder) if last is None or step <= last)
        (step,) = distributed.from_first((max(set(there) - passed, default=-1),))
        return None if step < 0 else step

    def _restore(self, step: int, layout: TrainState, check: Callable[[Meta], None]) -> Restored:
        folder = self._folder / str(step)
        restored = agreement.together(
            lambda: storage.patiently(lambda: _read(folder, layout, check), self._pauses),
            kinds=(UserError, OutageError, DamagedError),
        )
        with _judging(folder / "state"):
            _compare(_state_fingerprints(restored.state), restored.meta, STATE)
        return restored

    def _pass_over(self, step: int, error: DamagedError) -> None:
        """Renames a damaged step, so that it can be saved anew and nothing is lost."""
        if self._manager is None:  # whoever writes it may just be removing it
            logger.warning("checkpoint of step %d is damaged or gone, passed over: %s", step, error)
            return
        logger.warning("checkpoint of step %d is damaged and set aside: %s", step, error)
        if distributed.is_first():
            aside = self._folder / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            try:
                (self._folder / str(step)).rename(aside)
            except FileNotFoundError:
                raise OutageError(f"{self._folder}: is gone") from None
        agreement.of_all(None)  # nobody looks before it is renamed
        self._manager.reload()


def steps(folder: Path) -> list[int]:
    """The saved steps in a checkpoint folder."""
    try:  # glob would pass over a folder that cannot be read
        names = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
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
    with _refusing(newest):
        return _read_meta(newest)


def newest_whole_meta(folder: Path) -> Meta | None:
    """The `meta` of the newest checkpoint in `folder` that has a whole one; warns of the others."""
    for step in reversed(steps(folder)):
        try:
            return _read_meta(folder / str(step))
        except DamagedError as error:
            logger.warning("checkpoint of step %d is damaged or gone, passed over: %s", step, error)
    return None


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
        return _read_curve(newest, _read_meta(newest))


def _manager(folder: Path, keep: int, always: Sequence[int]) -> ocp.CheckpointManager:
    policies = [ocp.checkpoint_managers.LatestN(keep)]
    policies += [ocp.checkpoint_managers.CustomSteps(always)]
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
        cleanup_tmp_directories=True,
        # Processes tell each other of new folders by the number of the save, which differs between
        # those that have worked apart.
        async_options=ocp.options.AsyncOptions(
            create_directories_asynchronously=distributed.processes() == 1
        ),
    )
    return ocp.CheckpointManager(folder.resolve(), options=options)


def _read(folder: Path, layout: TrainState, check: Callable[[Meta], None]) -> Restored:
    """A step as this process reads it, its state not yet compared."""
    meta = _read_meta(folder)
    curve = _read_curve(folder, meta)
    check(meta)
    _check_arrays(folder, layout, meta)
    with _judging(folder / "state"):
        return Restored(_read_arrays(folder / "state", layout), curve, meta)


def _read_meta(folder: Path) -> Meta:
    """What was saved for the step that `folder` is named after."""
    with _judging(folder / "meta"):
        meta = sealed.read(folder / "meta" / "metadata")
        if str(meta.get("step")) != folder.name:
            raise ValueError(f"it is that of step {meta.get('step')}")
        return meta


def _read_curve(folder: Path, meta: Meta) -> Curve:
    """What `meta` was saved with."""
    with _judging(folder / "curve"):
        curve = _read_arrays(folder / "curve")
        _compare(_curve_fingerprints(curve), meta, CURVE)
        return curve


def _read_arrays(folder: Path, layout: TrainState | None = None) -> Any:
    """Raises an exception of any kind if a file is not what it should be."""
    alone = ocp.options.MultiprocessingOptions(active_processes={jax.process_index()})
    reader = ocp.Checkpointer(ocp.StandardCheckpointHandler(), multiprocessing_options=alone)
    with contextlib.closing(reader):
        return reader.restore(
            folder.resolve(),
            args=ocp.args.StandardRestore(layout),  # pyright: ignore[reportCallIssue]
        )


def _check_arrays(folder: Path, layout: TrainState, meta: Meta) -> None:
    """Raises a UserError if another program's state was saved, which would look like damage."""
    here = set(_named(layout))
    there = {name for name in meta["fingerprints"] if name.startswith(STATE)}
    if here != there:
        name, version = min(here ^ there), meta["versions"]["scaling_jax"]
        raise UserError(
            f"{folder}: saved by another program, scaling_jax {version}: {name} is only "
            f"{'there' if name in there else 'here'}"
        )


def _compare(found: dict[str, int], meta: Meta, part: str) -> None:
    expected = {
        name: value for name, value in meta["fingerprints"].items() if name.startswith(part)
    }
    for name in expected.keys() | found.keys():
        if expected.get(name) != found.get(name):
            raise ValueError(f"array {name} is not what was saved")


@contextlib.contextmanager
def _judging(path: Path) -> Iterator[None]:
    """Tells a file at `path` that is damaged from a storage that cannot be read.

    The reason, which orbax gives in many lines, comes after the path.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):  # no fault of the files
        raise
    except Exception as error:
        code = storage.fault(error)
        if code is not None:
            raise storage.refusal(f"{path}: cannot be read", code) from None
        if not any(isinstance(each, SIGNS_OF_DAMAGE) for each in storage.causes(error)):
            raise
        raise DamagedError(f"{path}: {first_line(error, 300)}") from error


@contextlib.contextmanager
def _refusing(step: Path) -> Iterator[None]:
    try:
        yield
    except DamagedError as error:
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
    except jax.errors.JaxRuntimeError:  # another process is gone
        raise
    except Exception as error:
        code = storage.fault(error)
        if code is None:
            raise
        if isinstance(error, TimeoutError):
            raise TimeoutError(
                f"{folder}: a checkpoint was not saved in time (or the clock has jumped); the same "
                "command goes on from the one before"
            ) from None
        raise storage.refusal(f"{folder}: a checkpoint cannot be saved", code) from None


def _state_fingerprints(state: TrainState) -> dict[str, int]:
    """A 32-bit number for each array, by its name."""
    numbers = jax.device_get(_fingerprints(state))
    return {name: int(number) for name, number in _named(numbers).items()}


def _named(state: Any) -> dict[str, Any]:
    leaves: Sequence[tuple[Any, Any]] = jax.tree.leaves_with_path(state)
    return {STATE + jax.tree_util.keystr(path): leaf for path, leaf in leaves}


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
