"""Training one run from its config to its last checkpoint; what has been done is not done again.

On start:
  1. No checkpoint: begin at step 0, or with the steps taken over from `branch_from`.
  2. A checkpoint of the same run and the same data: go on from its step, bit for bit.
  3. A checkpoint of another run, or of other data: refuse, saying which.
  4. The last step is reached: return its state.
"""

import collections
import dataclasses
import json
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import jax
import numpy as np

from scaling_jax import atomic
from scaling_jax import config as configs
from scaling_jax import mesh as meshes
from scaling_jax.config import RunConfig
from scaling_jax.data.batches import Batches
from scaling_jax.data.feed import Feed
from scaling_jax.errors import Interrupted, NonFiniteLossError, UserError
from scaling_jax.models import counting
from scaling_jax.training import branch, checkpoint, interrupt, optimizer, state, step, throughput
from scaling_jax.training import budget as budgets
from scaling_jax.training.budget import Budget
from scaling_jax.training.checkpoint import Checkpoints, Curve
from scaling_jax.training.files import CHECKPOINT_FOLDER, CONFIG_FILE, METRICS_FILE
from scaling_jax.training.state import TrainState

CURVE_COLUMNS = ("step", "tokens", *step.Metrics._fields)
STEPS_IN_FLIGHT = 2
TENSORBOARD_EVERY = 10

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands after a step."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    model_flops_utilization: float
    seconds_left: float


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run that has reached its last step; the first `branched_at` were trained by another run."""

    state: TrainState
    curve: Curve
    budget: Budget
    branched_at: int


def train(
    config: RunConfig, folder: Path, report: Callable[[Progress], None] = lambda _: None
) -> TrainedRun:
    """Trains `config` in `folder`, going on from what is there; `report` hears of every step.

    Raises:
      UserError: the data, the mesh or what is in the folder does not fit the config.
      NonFiniteLossError: naming the step.
      Interrupted: after saving, on Ctrl-C or SIGTERM.
    """
    budget = budgets.plan(config)
    mesh = meshes.make_mesh(config.mesh)
    batches = _open_batches(config, budget)
    run_step = step.compiled(config.model, config.batch_size, config.microbatches, mesh)
    layout = state.abstract(config.model, mesh)
    identity = {"identity": config.identity, "data_sha256": batches.sha256}
    saved = folder / CHECKPOINT_FOLDER
    trunk = None
    if config.branch_from is not None and checkpoint.latest_step(saved) is None:
        trunk = branch.restore(config, budget, layout, batches.sha256)

    with Checkpoints(saved, config.checkpoint.keep, always=[budget.decay_start]) as checkpoints:
        known = trunk or checkpoints.restore_latest(
            layout, lambda meta: _check_same(meta, identity, folder)
        )
        if known:
            current, curve = known.state, _Curve(known.curve)
        else:
            current, curve = state.create(config.model, config.seed, mesh), _Curve()
        if trunk:
            branched_at = len(curve)
        else:
            branched_at = known.meta.get("branched_at", 0) if known else 0
            if len(curve) == budget.steps:
                return TrainedRun(current, curve.arrays(), budget, branched_at)
        configs.write(config, folder / CONFIG_FILE)
        meta = identity | {"config": dataclasses.asdict(config), "branched_at": branched_at}

        def save() -> None:
            position = {
                "next_row": len(curve) * config.batch_size,
                "unique_tokens": batches.unique_tokens(len(curve)),
            }
            checkpoints.save(current, curve.arrays(), meta | position)

        if trunk:  # from here on the run needs it no more
            save()
        # Placed once: as Python numbers they would travel to every device at every step.
        hyper = jax.device_put(optimizer.hyperparameters(config, budget), meshes.sharding(mesh, ()))
        rows = meshes.sharding(mesh, ("batch", "length"))
        with (
            Feed(batches, rows, range(len(curve), budget.steps)) as feed,
            _Journal(folder, config, budget, curve, feed, report) as journal,
            interrupt.noticing() as stop,
        ):
            in_flight: collections.deque[step.Metrics] = collections.deque()

            def collect(limit: int) -> None:
                while len(in_flight) > limit:
                    journal.write(curve.append(jax.device_get(in_flight.popleft()), budget))

            for done, batch in enumerate(feed, start=len(curve) + 1):
                current, metrics = run_step(current, batch, hyper)
                in_flight.append(metrics)
                # Reading the metrics of earlier steps only keeps the devices busy meanwhile.
                collect(STEPS_IN_FLIGHT)
                every = config.checkpoint.every_steps
                due = done in (budget.decay_start, budget.steps)
                if stop.asked or due or (every and done % every == 0):
                    collect(0)
                    save()
                    # Only here: a request that comes after the line above is for the next step.
                    if stop.signal is not None:
                        raise Interrupted(
                            f"stopped and saved after step {done} of {budget.steps}", stop.signal
                        )
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
            layout, lambda meta: _check_same(meta, {"identity": config.identity}, folder)
        )
    if restored is None:
        raise UserError(f"{folder}: every checkpoint is damaged")
    return restored


class _Curve:
    """The loss curve since step 0, one row a step."""

    def __init__(self, arrays: Curve | None = None):
        columns = (arrays[name].tolist() for name in CURVE_COLUMNS) if arrays else ()
        self._rows = list(zip(*columns, strict=True))

    def __len__(self) -> int:
        return len(self._rows)

    def append(self, metrics: step.Metrics, budget: Budget) -> dict[str, float]:
        """Adds the metrics of the next step and returns its row."""
        done = len(self) + 1
        if not (np.isfinite(metrics.loss) and np.isfinite(metrics.gradient_norm)):
            raise NonFiniteLossError(
                f"step {done}: loss {float(metrics.loss)}, gradient norm "
                f"{float(metrics.gradient_norm)}; the checkpoints before it are kept. "
                "A smaller optimizer.learning_rate or a longer warm-up may help"
            )
        row = (done, done * budget.tokens_per_step, *(float(value) for value in metrics))
        self._rows.append(row)
        return dict(zip(CURVE_COLUMNS, row, strict=True))

    def rows(self, start: int = 0) -> list[dict[str, float]]:
        """The rows after step `start`."""
        return [dict(zip(CURVE_COLUMNS, row, strict=True)) for row in self._rows[start:]]

    def arrays(self) -> Curve:
        columns = zip(*self._rows, strict=True) if self._rows else [()] * len(CURVE_COLUMNS)
        kinds = [np.int64, np.int64] + [np.float32] * len(step.Metrics._fields)
        return {
            name: np.asarray(column, kind)
            for name, column, kind in zip(CURVE_COLUMNS, columns, kinds, strict=True)
        }


class _Journal:
    """Writes each step to metrics.jsonl (flushed) and TensorBoard, and tells the caller."""

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        budget: Budget,
        curve: _Curve,
        feed: Feed,
        report: Callable[[Progress], None],
    ):
        import tensorboardX  # slow to import

        self._budget, self._feed, self._report = budget, feed, report
        self._flops_per_token = counting.flops_model_per_token(config.model)
        self._speed = throughput.Speedometer()
        self._file = _reopen(folder / METRICS_FILE, curve)
        self._tensorboard = tensorboardX.SummaryWriter(
            str(folder / "tensorboard"), purge_step=len(curve)
        )

    def __enter__(self) -> "_Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._tensorboard.close()

    def write(self, row: dict[str, float]) -> None:
        done, budget = int(row["step"]), self._budget
        tokens = int(row["tokens"])
        speed = self._speed.tokens_per_second(tokens)
        line = row | {
            "tokens_per_second": round(speed, 1),
            # Since the start of this process: many mean that the disk is too slow.
            "seconds_waited_for_data": round(self._feed.seconds_waited, 4),
            "time": round(time.time(), 3),
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if done % TENSORBOARD_EVERY == 0 or done == budget.steps:
            for name in step.Metrics._fields:
                self._tensorboard.add_scalar(name, row[name], done)
        self._report(
            Progress(
                step=done,
                steps=budget.steps,
                loss=row["loss"],
                tokens_per_second=speed,
                model_flops_utilization=speed * self._flops_per_token / throughput.peak_flops(),
                seconds_left=(budget.tokens - tokens) / speed if speed else float("inf"),
            )
        )


def _reopen(path: Path, curve: _Curve) -> TextIO:
    """Opens the metrics file for writing on after `curve`; later lines are dropped.

    Steps that another run has trained have no line yet: theirs hold neither speed nor time.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    lines = lines[: len(curve)]
    lines += [json.dumps(row) + "\n" for row in curve.rows(len(lines))]
    atomic.write_text(path, "".join(lines))
    return path.open("a", encoding="utf-8")


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


def _check_same(meta: checkpoint.Meta, identity: dict[str, str], folder: Path) -> None:
    """Raises a UserError if a checkpoint is of another run or of other data."""
    what = {"identity": "another run (its config differs)", "data_sha256": "other token shards"}
    for key, value in identity.items():
        if meta.get(key) != value:
            raise UserError(
                f"{folder}: its checkpoint belongs to {what[key]}: "
                f"{key} {meta.get(key)} there, {value} here; give another folder"
            )
