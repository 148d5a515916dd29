"""One law fitted to several groups of runs at once, some of its parameters common to all."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, ArrayLike, Float

from scaling_jax import records
from scaling_jax.errors import UserError, nearest
from scaling_jax.laws import calibrated
from scaling_jax.laws.fit import Fit, Prediction, fit
from scaling_jax.laws.forms import GROUP, Form, Values, named
from scaling_jax.laws.objectives import Objective


@dataclasses.dataclass(frozen=True, eq=False)
class GroupFit:
    """A law fitted to groups of runs jointly.

    Attributes:
      form: the law of one group.
      groups: their names.
      joint: the fit of all; its parameters are those shared ("eta") and those of each group
        ("E[c4]"), and its diagnostics, intervals and warnings are of all.
    """

    form: Form
    groups: tuple[str, ...]
    joint: Fit

    def parameters(self, group: str) -> dict[str, float]:
        """The parameters of one group's law, shared ones included.

        Raises:
          UserError: no such group.
        """
        self._number(group)
        found = self.joint.parameters
        return {
            name: found.get(name, found.get(_own(name, group), 0.0)) for name in self.form.names
        }

    def curve(self, group: str, **inputs: ArrayLike) -> np.ndarray:
        """The fitted law of `group` at `inputs`, which broadcast.

        Raises:
          UserError: no such group, or a wrong input.
        """
        return self.joint.curve(**inputs, **{GROUP: self._number(group)})

    def predict(
        self, group: str, *, level: float = 0.9, method: str = "calibrated", **inputs: ArrayLike
    ) -> Prediction:
        """As `Fit.predict`, for `group`.

        The calibrated interval of a loss of params and tokens depends on the runs of the group
        alone; the others see all runs.

        Raises:
          UserError: no such group, an unknown method, or a wrong level or input.
        """
        inputs = {**inputs, GROUP: self._number(group)}
        if method != "calibrated" or self.form.inputs != ("params", "tokens"):
            return self.joint.predict(level=level, method=method, **inputs)
        known = self.joint.predict(level=level, method="delta", **inputs)
        own = self.joint.observations.x[-1] == self._number(group)
        x, y = self.joint.observations.x[:2, own], self.joint.observations.y[own]
        at = np.broadcast_arrays(*(np.asarray(inputs[name], float) for name in self.form.inputs))
        distribution = calibrated.calibrate(x, y).predictive(np.stack([a.ravel() for a in at]))
        parts = (*distribution.interval(level), distribution.center())
        shape = np.shape(known.value)
        low, high, center = (p.reshape(shape) if shape else float(p[0]) for p in parts)
        return dataclasses.replace(known, low=low, high=high, center=center)

    def influence(self, group: str, **inputs: float) -> Float[np.ndarray, "n"]:
        """As `Fit.influence`, for `group`: one number for each row of `joint.observations.table`.

        Raises:
          UserError: no such group, or a wrong input.
        """
        return self.joint.influence(**inputs, **{GROUP: self._number(group)})

    def _number(self, group: str) -> float:
        if group not in self.groups:
            raise UserError(f"no group '{group}' was fitted ({nearest(group, self.groups)})")
        return 1.0 + self.groups.index(group)


def fit_groups(
    law: str | Form,
    table: pd.DataFrame,
    *,
    target: str,
    groups: str = "dataset",
    shared: Sequence[str] = (),
    loss: str | None = None,
    chance: float | None = None,
    pinned: Mapping[str, float] | None = None,
    objective: Objective | None = None,
    weights: str | None = None,
) -> GroupFit:
    """Fits a law to every group of runs at once, with the parameters `shared` common to all.

    Args:
      law: name of a built-in form, or a form.
      table: records.
      target: the column to fit.
      groups: the column that says which group a run is of.
      shared: names of parameters that all groups have in common.
      loss, chance, objective, weights: as for `fit`.
      pinned: parameters held at a value, in all groups.

    Raises:
      UserError: an unknown parameter or column, and as `fit`.
    """
    form = named(law)
    table = records.check(table)
    records.require(table, [groups])
    held = dict(pinned or {}) | ({} if chance is None else {"eps": chance})
    for name in (*shared, *held):
        if name not in form.names:
            hint = nearest(name, form.names)
            raise UserError(f"law '{form.name}' has no parameter '{name}' ({hint})")
    labels = table[groups].map(str)
    names = tuple(sorted(labels.unique()))
    joint_form = _joint(form, names, frozenset(shared))
    by_name = {
        joint: value
        for name, value in held.items()
        for joint in ([name] if name in shared else [_own(name, group) for group in names])
    }
    numbered = table.assign(**{GROUP: 1.0 + labels.map(names.index)})
    found = fit(
        joint_form,
        numbered,
        target=target,
        loss=loss,
        pinned=by_name,
        objective=objective,
        weights=weights,
    )
    return GroupFit(form, names, found)


def _own(name: str, group: str) -> str:
    return f"{name}[{group}]"


@functools.cache
def _joint(form: Form, groups: tuple[str, ...], shared: frozenset[str]) -> Form:
    """The law of all groups: one more input, the number of the group."""
    parameters = []
    for parameter in form.parameters:
        if parameter.name in shared:
            parameters.append(parameter)
        else:
            own = (_own(parameter.name, group) for group in groups)
            parameters += [dataclasses.replace(parameter, name=name) for name in own]

    def function(p: Values, x: Values) -> Array:
        index = x[GROUP].astype(int) - 1
        each = {
            name: jnp.stack([p[_own(name, group)] for group in groups])[index]
            for name in form.names
            if name not in shared
        }
        return form.function({**p, **each}, x)

    name = f"{form.name} by group"
    return Form(name, (*form.inputs, GROUP), tuple(parameters), function, form.source)
