"""The loss curve of a run while it grows: one row a step, since step 0."""

import logging
import math

import numpy as np

from scaling_jax.config import HealthConfig
from scaling_jax.training import health, step
from scaling_jax.training.budget import Budget
from scaling_jax.training.checkpoint import Curve

CURVE_COLUMNS = ("step", "tokens", *step.Metrics._fields, "spiked")
INTEGERS = ("step", "tokens", "skipped", "spiked")
# So many steps may be on the devices while the host reads the metrics of those before.
STEPS_IN_FLIGHT = 2

logger = logging.getLogger(__name__)


class GrowingCurve:
    """The curve up to now; a restored one goes on growing."""

    def __init__(self, config: HealthConfig, arrays: Curve | None = None):
        self._config = config
        columns = {name: arrays[name].tolist() if arrays else [] for name in CURVE_COLUMNS}
        self._columns: dict[str, list[float]] = columns

    def __len__(self) -> int:
        return len(self._columns["step"])

    def append(self, metrics: step.Metrics, budget: Budget) -> dict[str, float]:
        """Adds the metrics of the next step and returns its row.

        Raises:
          NonFiniteLossError: the run cannot go on (`health.check`).
        """
        done = len(self) + 1
        values = {name: float(value) for name, value in metrics._asdict().items()}
        skipped = [*self._columns["skipped"][-health.MOST_SKIPPED_IN_A_ROW :], values["skipped"]]
        health.check(done, values["loss"], values["gradient_norm"], skipped, self._config)
        limit = self.loss_limit(done)
        spiked = math.isfinite(values["loss"]) and values["loss"] > limit
        if spiked or values["skipped"]:
            logger.warning(
                "step %d%s: loss %.4g, gradient norm %.4g%s",
                done,
                " is skipped" if values["skipped"] else "",
                values["loss"],
                values["gradient_norm"],
                f": a leap above {limit:.4g}" if spiked else "",
            )
        values |= {"step": done, "tokens": done * budget.tokens_per_step, "spiked": spiked}
        row = {name: _number(name, values[name]) for name in CURVE_COLUMNS}
        for name, value in row.items():
            self._columns[name].append(value)
        return row

    def loss_limit(self, number: int) -> float:
        """Above which loss step `number` has leapt; known before that step is dispatched."""
        known = max(number - 1 - STEPS_IN_FLIGHT, 0)
        first = max(known - self._config.spike_window, 0)
        return health.loss_limit(self._columns["loss"][first:known], self._config)

    def rows(self, start: int = 0) -> list[dict[str, float]]:
        """The rows after step `start`."""
        columns = (self._columns[name][start:] for name in CURVE_COLUMNS)
        return [dict(zip(CURVE_COLUMNS, row, strict=True)) for row in zip(*columns, strict=True)]

    def arrays(self) -> Curve:
        """Each column: counts as int64, the others as float32."""
        return {
            name: np.asarray(column, np.int64 if name in INTEGERS else np.float32)
            for name, column in self._columns.items()
        }


def _number(column: str, value: float) -> float:
    return int(value) if column in INTEGERS else value
