"""What runs cost on TPU chips: tokens, operations, chip-hours, days and, at a given price, money.

    chip-seconds = model FLOPs / (peak of a chip x MFU)

Tokens and operations are those that the config asks for, as `testbed status` counts them. Steps
that a branch takes over from its trunk are the trunk's, so each is paid for once.
"""

import dataclasses
from collections.abc import Sequence

from scaling_jax.config import ModelConfig
from scaling_jax.models import counting
from scaling_jax.planning.slices import Chip
from scaling_jax.training.budget import Budget

SECONDS_PER_HOUR = 3600


@dataclasses.dataclass(frozen=True)
class Bill:
    """Of one run or of several together.

    Attributes:
      runs: how many.
      tokens: that are trained on.
      flops_6nd: C = 6 N D, as laws and the paper count operations.
      flops_model: matrix products and causal attention, once; remat's repetitions not counted.
      chip_hours: of one chip at the stated MFU.
    """

    runs: int
    tokens: float
    flops_6nd: float
    flops_model: float
    chip_hours: float

    def days(self, chips: int) -> float:
        """How long so many chips take."""
        return self.chip_hours / chips / 24

    def cost(self, price_per_chip_hour: float) -> float:
        """In the unit of the price."""
        return self.chip_hours * price_per_chip_hour


def bill(model: ModelConfig, budget: Budget, shared_steps: int, chip: Chip, mfu: float) -> Bill:
    """The bill of one run whose first `shared_steps` another one has trained."""
    own = 1 - shared_steps / budget.steps
    tokens = budget.tokens_asked * own
    operations = counting.flops_model_per_token(model) * tokens
    seconds = operations / (chip.peak_flops * mfu)
    return Bill(1, tokens, budget.flops_asked * own, operations, seconds / SECONDS_PER_HOUR)


def total(bills: Sequence[Bill]) -> Bill:
    """Of all together."""
    return Bill(*(sum(column) for column in zip(*map(dataclasses.astuple, bills), strict=True)))
