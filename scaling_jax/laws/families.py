"""Six point fits whose disagreement measures how far the form of a loss law can be trusted.

Chinchilla's, Kaplan's and the tied law are one law with different parameters held:

    L = (E + A N^-(ratio beta) + B D^-beta)^power

In units in which N, D and L are about 1 its starting values are known, and all six fits, to all the
data or to parts of them, share one compilation.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from scaling_jax.laws import solver
from scaling_jax.laws.forms import Form, Parameter, Values, exponent
from scaling_jax.laws.objectives import QUADRATIC, Objective

STARTS = 10
HUBER = 1e-3
# Weight of a run in the fits: its compute to this power. The runs nearest to what will be asked
# count most, for what a law gets wrong of small models says little about large ones.
COMPUTE_WEIGHT = 0.6


def _united(p: Values, x: Values) -> Array:
    by_params = p["A"] * jnp.exp(-p["ratio"] * p["beta"] * x["log_params"])
    by_tokens = p["B"] * jnp.exp(-p["beta"] * x["log_tokens"])
    return jnp.exp(p["power"] * jnp.log(p["E"] + by_params + by_tokens))


UNITED = Form(
    name="united",
    inputs=("log_params", "log_tokens"),
    parameters=(
        Parameter("E", 0.0, 10.0, positive=False, starts=(0.0, 0.9)),
        Parameter("A", 1e-9, 1e3, positive=True, starts=(0.02, 1.0)),
        Parameter("B", 1e-9, 1e3, positive=True, starts=(0.02, 1.0)),
        Parameter("ratio", 1e-2, 1e2, positive=True, starts=(0.4, 2.5)),
        exponent("beta"),
        Parameter("power", 1e-4, 5.0, positive=True, starts=(0.03, 0.5)),
    ),
    function=_united,
)


class Family(NamedTuple):
    """One of the fits: what is held, and where the cost turns linear."""

    pinned: dict[str, float]
    delta: float = QUADRATIC


FAMILIES = (
    Family({"power": 1.0}),
    Family({"power": 1.0}, HUBER),
    Family({"power": 1.0, "E": 0.0}),
    Family({"power": 1.0, "ratio": 1.0}),
    Family({"power": 1.0, "ratio": 1.0}, HUBER),
    Family({"beta": 1.0, "E": 0.0}),
)
# Of the first family.
FREE_PARAMETERS = 5


class Curves(NamedTuple):
    """The families fitted to some runs.

    Attributes:
      parameters: of UNITED.
      middle: log params and log tokens that N and D are measured from.
      level: log loss that L is measured from.
    """

    parameters: Float[np.ndarray, "families p"]
    middle: Float[np.ndarray, "2"]
    level: float

    def log_loss(self, targets: Float[np.ndarray, "2 m"]) -> Float[np.ndarray, "families m"]:
        """Log loss of each family at `targets` (params, tokens)."""
        at = np.log(targets) - self.middle[:, None]
        return np.log(solver.evaluate(UNITED, self.parameters, at)) + self.level


def compute_weights(x: Float[np.ndarray, "2 n"]) -> Float[np.ndarray, "n"]:
    """Weights of runs of params and tokens `x`, 1 on average."""
    weights = (x[0] * x[1] / (x[0] * x[1]).max()) ** COMPUTE_WEIGHT
    return weights / weights.mean()


def fit(
    x: Float[np.ndarray, "2 n"], y: Float[np.ndarray, "n"], subsets: Bool[np.ndarray, "subsets n"]
) -> tuple[Curves, list[Curves]]:
    """The families fitted to all runs, from many starts, and to each subset, from there.

    `x` holds params and tokens, `y` losses.
    """
    log_x, log_y = np.log(x), np.log(y)
    middle, level = log_x.mean(axis=1), float(log_y.mean())
    at, scaled, count = log_x - middle[:, None], np.exp(log_y - level), len(FAMILIES)
    boxes = [solver.Box.of(UNITED, family.pinned) for family in FAMILIES]
    box = solver.Box(np.stack([b.low for b in boxes]), np.stack([b.high for b in boxes]))
    delta = np.array([family.delta for family in FAMILIES])
    losses, weights = np.tile(scaled, (count, 1)), compute_weights(x)
    every = np.tile(weights, (count, 1))
    whole = solver.multistart(UNITED, Objective(delta=delta), at, losses, every, box, STARTS)
    curves = Curves(whole.parameters, middle, level)
    if not len(subsets):
        return curves, []
    times = (len(subsets), 1)
    parts = solver.refit(
        UNITED,
        Objective(delta=np.tile(delta, len(subsets))),
        at,
        np.tile(losses, times),
        np.repeat(subsets * weights, count, axis=0),
        solver.Box(np.tile(box.low, times), np.tile(box.high, times)),
        np.tile(whole.coordinates, times),
    )
    by_subset = np.split(parts.parameters, len(subsets))
    return curves, [Curves(parameters, middle, level) for parameters in by_subset]
