"""Predictive distributions of what a new run will measure, and their central intervals."""

import dataclasses
from typing import Protocol

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit

from scaling_jax.errors import UserError

# Student's t with so many degrees of freedom is normal.
NORMAL_DEGREES = 1e6


class Predictive(Protocol):
    """A distribution at each of m targets."""

    def interval(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end of the central interval that holds `level`; shape (m,) each."""
        ...

    def center(self) -> Float[np.ndarray, "m"]:
        """The median at each target."""
        ...

    def quantiles(self, probabilities: Float[np.ndarray, "k"]) -> Float[np.ndarray, "k m"]:
        """Quantiles at each target."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class LogStudentT:
    """exp(mean + scale t), t Student's with `degrees` of freedom (0: no finite interval)."""

    mean: Float[np.ndarray, "m"]
    scale: Float[np.ndarray, "m"]
    degrees: float

    def interval(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        """The central interval; from 0 to infinity without degrees of freedom."""
        quantile = student_t_quantile(level, self.degrees)
        # Infinite however small the scale, which nothing has measured.
        reach = quantile * self.scale if self.degrees > 0 else np.inf
        with np.errstate(over="ignore"):
            return np.exp(self.mean - reach), np.exp(self.mean + reach)

    def center(self) -> Float[np.ndarray, "m"]:
        """The median."""
        return np.exp(self.mean)

    def quantiles(self, probabilities: Float[np.ndarray, "k"]) -> Float[np.ndarray, "k m"]:
        """Quantiles at each target."""
        unit = stdtrit(min(self.degrees, NORMAL_DEGREES), probabilities)
        return np.exp(self.mean + self.scale * unit[:, None])


@dataclasses.dataclass(frozen=True, eq=False)
class Draws:
    """Equally likely values."""

    values: Float[np.ndarray, "draws m"]

    def interval(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        """The central interval, by quantiles."""
        low, high = np.nanquantile(self.values, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return low, high

    def center(self) -> Float[np.ndarray, "m"]:
        """The median."""
        return np.nanmedian(self.values, axis=0)

    def quantiles(self, probabilities: Float[np.ndarray, "k"]) -> Float[np.ndarray, "k m"]:
        """Quantiles at each target."""
        return np.nanquantile(self.values, probabilities, axis=0)


def student_t_quantile(level: float, degrees: float) -> float:
    """Half the width of the central interval of Student's t; infinite without degrees.

    Raises:
      UserError: the level is not between 0 and 1.
    """
    check_level(level)
    return float(stdtrit(degrees, (1 + level) / 2)) if degrees > 0 else np.inf


def check_level(level: float) -> None:
    """Raises a UserError if `level` is not between 0 and 1."""
    if not 0 < level < 1:
        raise UserError(f"level={level}: the level of an interval is between 0 and 1")
