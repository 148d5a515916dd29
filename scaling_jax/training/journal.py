"""What a run tells while it trains: metrics.jsonl, TensorBoard, and whoever listens."""

import contextlib
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self, TextIO

from scaling_jax import atomic
from scaling_jax.config import RunConfig
from scaling_jax.data.feed import Feed
from scaling_jax.models import counting
from scaling_jax.training import step, throughput
from scaling_jax.training.budget import Budget
from scaling_jax.training.curve import GrowingCurve
from scaling_jax.training.files import METRICS_FILE, TENSORBOARD_FOLDER
from scaling_jax.training.tensorboard import EventLog

TENSORBOARD_EVERY = 10


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands after a step."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    model_flops_utilization: float
    seconds_left: float


class Journal:
    """Writes each step to metrics.jsonl (flushed) and TensorBoard, and tells the caller.

    Args:
      folder: of the run; None writes nothing, where another process does.
      config: of the run.
      budget: of the run.
      curve: as far as it is known; later lines of an earlier call are dropped.
      feed: whose waiting is written down.
      report: hears of every step.

    Attributes:
      reached: the last step that an earlier call has written; those after `curve` were lost.
    """

    def __init__(
        self,
        folder: Path | None,
        config: RunConfig,
        budget: Budget,
        curve: GrowingCurve,
        feed: Feed,
        report: Callable[[Progress], None],
    ):
        self._budget, self._feed, self._report = budget, feed, report
        self._flops_per_token = counting.flops_model_per_token(config.model)
        self._speed = throughput.Speedometer()
        self._open = contextlib.ExitStack()
        self._file = self._tensorboard = None
        self.reached = 0
        if folder is not None:
            file, self.reached = _reopen(folder / METRICS_FILE, curve)
            self._file = self._open.enter_context(file)
            self._tensorboard = EventLog(folder / TENSORBOARD_FOLDER, after=len(curve))
            self._open.callback(self._tensorboard.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def write(self, row: dict[str, float]) -> None:
        """Writes down the step of `row`, the next of the curve."""
        done, tokens = int(row["step"]), int(row["tokens"])
        speed = self._speed.tokens_per_second(tokens)
        if self._file is not None:
            line = row | {
                "tokens_per_second": round(speed, 1),
                # Since the start of this process: many mean that the disk is too slow.
                "seconds_waited_for_data": round(self._feed.seconds_waited, 4),
                "time": round(time.time(), 3),
            }
            self._file.write(_line(line))
            self._file.flush()
        last = done == self._budget.steps
        if self._tensorboard is not None and (done % TENSORBOARD_EVERY == 0 or last):
            self._tensorboard.write(done, {name: row[name] for name in step.Metrics._fields})
        left = self._budget.tokens - tokens
        self._report(
            Progress(
                step=done,
                steps=self._budget.steps,
                loss=row["loss"],
                tokens_per_second=speed,
                model_flops_utilization=speed * self._flops_per_token / throughput.peak_flops(),
                seconds_left=left / speed if speed else math.inf,
            )
        )


def _reopen(path: Path, curve: GrowingCurve) -> tuple[TextIO, int]:
    """Opens the metrics file for writing on after `curve`, and says how far it had come.

    Later lines are dropped, and those that do not say what the curve says are made anew. Steps
    that another run has trained have no line yet: theirs hold neither speed nor time.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    found = text.splitlines(keepends=True)
    lines = [
        line if _says(line, row) else _line(row)
        for line, row in zip(
            itertools.chain(found, itertools.repeat("")), curve.rows(), strict=False
        )
    ]
    atomic.write_text(path, "".join(lines))
    return path.open("a", encoding="utf-8"), len(found)


def _says(line: str, row: dict[str, float]) -> bool:
    """Whether a line is whole and of this row."""
    try:
        return line.endswith("\n") and json.loads(line).items() >= json.loads(_line(row)).items()
    except (ValueError, AttributeError, RecursionError):
        return False


def _line(row: dict[str, float]) -> str:
    """A row as JSON, in which a number that is not finite is null."""
    finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(finite) + "\n"
