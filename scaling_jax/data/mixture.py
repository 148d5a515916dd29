"""Which part of a mixture each sequence of a run comes from: exact shares, no chance.

The rates become whole numbers of sequences in a cycle. Of the first n sequences, whatever n is,
every part has its share within one sequence.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
from jaxtyping import Int

from scaling_jax.errors import UserError

LONGEST_CYCLE = 100_000  # sequences


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Parts in proportion to `weights`, whole numbers without a common divisor."""

    weights: tuple[int, ...]

    @classmethod
    def of_rates(cls, rates: Mapping[str, float]) -> "Mixture":
        """The mixture of these relative rates, taken as the decimal numbers they are written as.

        Raises:
          UserError: in whole numbers the cycle would be longer than LONGEST_CYCLE.
        """
        exact = [Fraction(repr(rate)) for rate in rates.values()]
        common = math.lcm(*(rate.denominator for rate in exact))
        numbers = [int(rate * common) for rate in exact]
        divisor = math.gcd(*numbers)
        weights = tuple(number // divisor for number in numbers)
        if sum(weights) > LONGEST_CYCLE:
            written = ", ".join(f"{name}: {rate}" for name, rate in rates.items())
            raise UserError(
                f"mixture {{{written}}}: these rates repeat only after {sum(weights):,} sequences; "
                f"round them so that it is at most {LONGEST_CYCLE:,} (four digits do)"
            )
        return cls(weights)

    def draw(
        self, places: Int[np.ndarray, "n"]
    ) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
        """The part of the sequence at each place, and how many of that part come before it."""
        cycles, within = np.divmod(places, len(self._schedule))
        parts = self._schedule[within]
        return parts, cycles * np.array(self.weights)[parts] + self._earlier[within]

    def counts(self, places: int) -> list[int]:
        """How many of the first `places` sequences come from each part."""
        cycles, within = divmod(places, len(self._schedule))
        begun = np.bincount(self._schedule[:within], minlength=len(self.weights))
        return [
            cycles * weight + more
            for weight, more in zip(self.weights, begun.tolist(), strict=True)
        ]

    @functools.cached_property
    def _schedule(self) -> Int[np.ndarray, "cycle"]:
        """The parts of one cycle.

        To keep every share within one sequence, the j-th sequence of a part of rate x has to stand
        at a place from floor(j/x) to ceil((j+1)/x) - 1. Always taking the part whose next sequence
        has the earliest last place meets them all (Baruah, Cohen, Plaxton and Varvel,
        "Proportionate progress", 1996, for one resource).
        """
        total = sum(self.weights)
        taken = [0] * len(self.weights)
        schedule = np.empty(total, np.int64)
        for place in range(total):
            last_places = [
                (-(-(done + 1) * total // weight), part)
                for part, (done, weight) in enumerate(zip(taken, self.weights, strict=True))
                if done * total // weight <= place
            ]
            _, chosen = min(last_places)
            schedule[place] = chosen
            taken[chosen] += 1
        return schedule

    @functools.cached_property
    def _earlier(self) -> Int[np.ndarray, "cycle"]:
        """How often the part at each place of the cycle stands earlier in it."""
        earlier = np.empty_like(self._schedule)
        for part in range(len(self.weights)):
            mine = self._schedule == part
            earlier[mine] = np.arange(mine.sum())
        return earlier


ONE_PART = Mixture((1,))
