"""Params and tokens -> loss -> error, the uncertainty of the first step carried into the second."""

import dataclasses

from jaxtyping import ArrayLike

from scaling_jax.errors import UserError
from scaling_jax.laws.downstream import shocks
from scaling_jax.laws.fit import Fit, Prediction, _shaped
from scaling_jax.laws.observations import check_inputs


@dataclasses.dataclass(frozen=True, eq=False)
class Chained:
    """A loss law and an error law that reads the loss it predicts."""

    loss: Fit
    error: Fit

    def predict(self, *, level: float = 0.9, **inputs: ArrayLike) -> Prediction:
        """The error at the loss law's `inputs` (params=, tokens=), with an interval.

        `value` is the error law at the loss law's value. The interval holds what is unknown of both
        laws: each draw of the loss, from its calibrated distribution, has its own draw of the
        error. Losses of several targets move together.

        Raises:
          UserError: a wrong level or input.
        """
        x, shape = check_inputs(self.loss.form, inputs)
        value = self.error.evaluate(self.loss.evaluate(x)[None])
        losses = self.loss.predictive(x).quantiles(shocks())
        errors = self.error.error_posterior.predictive_of_draws(losses)
        low, high = errors.interval(level)
        parts = (_shaped(part, shape) for part in (value, low, high, errors.center()))
        return Prediction(*parts, level=level, warnings=self.loss.cautions(x))


def chained(loss: Fit, error: Fit) -> Chained:
    """Chains a loss law of params and tokens with an error law fitted to the same loss column.

    Raises:
      UserError: the laws do not fit together.
    """
    if error.form.inputs != ("loss",):
        raise UserError(f"chained: '{error.form.name}' is no error law (it reads no loss)")
    if "loss" in loss.form.inputs:
        raise UserError(f"chained: '{loss.form.name}' is no law of params and tokens")
    if error.observations.loss != loss.target:
        raise UserError(
            f"chained: the error law reads '{error.observations.loss}', "
            f"the loss law predicts '{loss.target}'"
        )
    return Chained(loss, error)
