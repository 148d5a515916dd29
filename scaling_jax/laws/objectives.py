"""What a fit minimises: a sum over the observations of weight x cost(residual).

Sums, never means: a mean shrinks with the number of points and stops optimisers early.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from scaling_jax.errors import UserError

Residual = Literal["log", "linear"]
# A Huber threshold beyond every residual, which leaves plain least squares.
QUADRATIC = 1e30


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("delta", "below"),
    meta_fields=("residual", "smooth"),
)
@dataclasses.dataclass(frozen=True)
class Objective:
    """A residual and its cost. Thresholds are data for `jit`, so all Huber fits compile once.

    Attributes:
      residual: "log" (log prediction - log observation) or "linear" (their difference).
      smooth: pseudo-Huber in place of Huber.
      delta: the residual at which the cost turns from quadratic to linear.
      below: what a prediction below its observation costs, relative to one as far above.
    """

    residual: Residual = "log"
    smooth: bool = False
    delta: ArrayLike = QUADRATIC
    below: ArrayLike = 1.0

    def residuals(self, predicted: Float[Array, "n"], observed: Float[Array, "n"]) -> Array:
        """Positive where the law predicts too much."""
        if self.residual == "linear":
            return predicted - observed
        return jnp.log(jnp.maximum(predicted, 1e-12)) - jnp.log(jnp.maximum(observed, 1e-12))

    def costs(self, residuals: Float[Array, "n"]) -> Float[Array, "n"]:
        """The cost of each residual: r^2 / 2 near zero."""
        size = jnp.abs(residuals)
        if self.smooth:
            cost = self.delta**2 * (jnp.sqrt(1 + (residuals / self.delta) ** 2) - 1)
        else:
            linear = self.delta * (size - self.delta / 2)
            cost = jnp.where(size <= self.delta, residuals**2 / 2, linear)
        return jnp.where(residuals < 0, self.below, 1.0) * cost

    def curvatures(self, residuals: Float[Array, "n"]) -> Float[Array, "n"]:
        """Slope of the cost / residual: curvature of the quadratic that touches it from above."""
        size = jnp.maximum(jnp.abs(residuals), 1e-30)
        if self.smooth:
            curvature = 1 / jnp.sqrt(1 + (size / self.delta) ** 2)
        else:
            curvature = jnp.minimum(1.0, self.delta / size)
        return jnp.where(residuals < 0, self.below, 1.0) * curvature

    def slopes(self, residuals: Float[Array, "n"]) -> Float[Array, "n"]:
        """The derivative of the cost at each residual."""
        return self.curvatures(residuals) * residuals


def least_squares(residual: Residual = "log") -> Objective:
    """Half the sum of squares."""
    return Objective(_known(residual))


def huber(delta: float = 1e-3, residual: Residual = "log") -> Objective:
    """Quadratic up to `delta`, linear beyond (Hoffmann et al. 2022 use log residuals and 1e-3)."""
    return Objective(_known(residual), delta=_positive("delta", delta))


def pseudo_huber(delta: float = 1e-3, residual: Residual = "log") -> Objective:
    """A smooth Huber: every observation keeps some influence."""
    return Objective(_known(residual), smooth=True, delta=_positive("delta", delta))


def asymmetric(
    below: float = 4.0, delta: float = QUADRATIC, residual: Residual = "log"
) -> Objective:
    """Huber (least squares unless `delta` is given) with a price of its own for predicting less.

    With `below` under 1 it forgives measurements above the law, as those of undertuned runs are.
    """
    delta, below = _positive("delta", delta), _positive("below", below)
    return Objective(_known(residual), delta=delta, below=below)


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise UserError(f"objective: {name} must be positive, not {value}")
    return float(value)


def _known(residual: Residual) -> Residual:
    if residual not in ("log", "linear"):
        raise UserError(f"objective: residual is 'log' or 'linear', not '{residual}'")
    return residual
