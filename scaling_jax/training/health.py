"""Whether a run is healthy: losses that leap, and losses or gradients that are not numbers.

A loss has leapt if it lies more than `spike_deviations` standard deviations above the mean of the
losses before it. The limit of a step is a function of losses that were fetched long before it, so
that it is known without waiting for the devices, and is the same after a restart. A step that is
skipped leaves parameters and moments as they were (`training/step.py`); its batch is not used.

Source: Groeneveld et al., OLMo (2024), skip the update of a step whose loss is an outlier of the
last 128; the limit of 6 deviations is theirs.
"""

import math
from collections.abc import Sequence

import numpy as np

from scaling_jax import records
from scaling_jax.config import HealthConfig
from scaling_jax.errors import NonFiniteLossError
from scaling_jax.training.checkpoint import Curve

# So many skipped steps in a row are no accident: nothing is learned any more.
MOST_SKIPPED_IN_A_ROW = 50


def guarded(config: HealthConfig) -> bool:
    """Whether the compiled step has to be able to skip its update."""
    return "skip" in (config.nonfinite, config.spike)


def loss_limit(losses: Sequence[float], config: HealthConfig) -> float:
    """Above which loss a step has leapt, given the `losses` of steps before it.

    Infinite while fewer than half of `spike_window` are known, and where spikes are ignored.
    """
    if config.spike == "ignore":
        return math.inf
    recent = np.asarray(losses[-config.spike_window :], np.float64)
    recent = recent[np.isfinite(recent)]
    if len(recent) < max(config.spike_window // 2, 2):
        return math.inf
    return float(np.float32(recent.mean() + config.spike_deviations * recent.std()))


def check(
    step: int, loss: float, gradient_norm: float, skipped: Sequence[float], config: HealthConfig
) -> None:
    """Raises a NonFiniteLossError if the run cannot go on after `step`.

    Args:
      step: its number.
      loss: of that step.
      gradient_norm: of that step.
      skipped: of each step up to this one, 1 if it was skipped.
      config: what is done about it.
    """
    finite = math.isfinite(loss) and math.isfinite(gradient_norm)
    found = f"step {step}: loss {loss}, gradient norm {gradient_norm}"
    advice = "A smaller optimizer.learning_rate or a longer warm-up may help"
    if not finite and config.nonfinite == "stop":
        raise NonFiniteLossError(f"{found}; the checkpoints before it are kept. {advice}")
    last = skipped[-MOST_SKIPPED_IN_A_ROW:]
    if len(last) == MOST_SKIPPED_IN_A_ROW and all(last):
        raise NonFiniteLossError(
            f"{found}; {MOST_SKIPPED_IN_A_ROW} steps in a row were skipped. {advice}"
        )


def describe(curve: Curve) -> str:
    """`ok`, or how many steps of a run were skipped and how many had a loss that leapt."""
    counts = {name: int(curve[name].sum()) for name in ("skipped", "spiked")}
    return (
        ", ".join(f"{name} {count}" for name, count in counts.items() if count) or records.HEALTHY
    )
