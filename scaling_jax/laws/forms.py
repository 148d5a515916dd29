"""The laws: named parameters with bounds, and a JAX function of the inputs.

A new law is a few lines:

    Form(
        name="tokens_only",
        inputs=("tokens",),
        parameters=(offset("E"), factor("B"), exponent("beta")),
        function=lambda p, x: p["E"] + p["B"] * power(x["tokens"], -p["beta"]),
    )

Parameters that enter linearly are solved for at every start (variable projection), so that only the
others need starting values.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from scaling_jax.errors import UserError, nearest

Values = Mapping[str, Array]
# The input of a joint law of several groups that numbers the group, from 1.
GROUP = "group"


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a law.

    Attributes:
      name: as it appears in `Fit.parameters`.
      low, high: bounds, which the fit may touch.
      positive: fitted as a logarithm (its sign is known, its size is not).
      starts: range of the starting values; None for a parameter that enters the law linearly.
    """

    name: str
    low: float
    high: float
    positive: bool
    starts: tuple[float, float] | None = None


def factor(name: str) -> Parameter:
    """A positive factor that enters the law linearly, of any size."""
    return Parameter(name, 1e-12, math.inf, positive=True)


def offset(name: str, high: float = math.inf) -> Parameter:
    """An additive constant that enters the law linearly and may be 0 (an irreducible loss)."""
    return Parameter(name, 0.0, high, positive=False)


def exponent(name: str, starts: tuple[float, float] = (0.05, 1.0)) -> Parameter:
    """A scaling exponent between 0 and 5."""
    return Parameter(name, 1e-4, 5.0, positive=False, starts=starts)


@dataclasses.dataclass(frozen=True)
class Form:
    """A scaling law: `function(parameters, inputs)` is written with jax.numpy, elementwise.

    Attributes:
      name: how `fit` knows it.
      inputs: the columns that it reads; "loss" stands for the loss column that `fit` is given.
      parameters: in the order in which they are reported.
      function: from {parameter: value} and {input: array} to an array of predictions.
      source: where the law comes from.
    """

    name: str
    inputs: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    function: Callable[[Values, Values], Array] = dataclasses.field(repr=False)
    source: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters."""
        return tuple(parameter.name for parameter in self.parameters)

    def evaluate(self, theta: Array, x: Array) -> Array:
        """Predictions for parameters `theta`, shape (p,), at inputs `x`, shape (inputs, n)."""
        values = dict(zip(self.names, theta, strict=True))
        return self.function(values, dict(zip(self.inputs, x, strict=True)))

    def curve(self, parameters: Mapping[str, float], **inputs: ArrayLike) -> np.ndarray:
        """The law at `inputs`, which broadcast, with `parameters`; float64.

        Raises:
          UserError: a parameter or an input is missing.
        """
        for name in (*self.names, *self.inputs):
            if name not in parameters and name not in inputs:
                raise UserError(f"law '{self.name}': no value for '{name}'")
        with jax.enable_x64(True):
            values = {name: jnp.asarray(parameters[name], float) for name in self.names}
            x = {name: jnp.asarray(inputs[name], float) for name in self.inputs}
            return np.asarray(self.function(values, x))


def power(base: Array, exponent: ArrayLike) -> Array:
    """`base` ** `exponent` for a positive base (cheaper than the general power)."""
    return jnp.exp(exponent * jnp.log(base))


def _over_training(p: Values, x: Values) -> Array:
    multiplier = x["tokens"] / x["params"]
    flops = 6.0 * x["params"] * x["tokens"]
    scale = p["a"] * power(multiplier, p["eta"]) + p["b"] * power(multiplier, -p["eta"])
    return p["E"] + scale * power(flops, -p["eta"])


def _chinchilla(p: Values, x: Values) -> Array:
    by_params = p["A"] * power(x["params"], -p["alpha"])
    return p["E"] + by_params + p["B"] * power(x["tokens"], -p["beta"])


def _kaplan(p: Values, x: Values) -> Array:
    by_params = jnp.log(p["N_c"]) - jnp.log(x["params"])
    by_tokens = jnp.log(p["D_c"]) - jnp.log(x["tokens"])
    ratio = p["alpha_N"] / p["alpha_D"]
    return jnp.exp(p["alpha_D"] * jnp.logaddexp(ratio * by_params, by_tokens))


def _data_constrained(p: Values, x: Values) -> Array:
    unique = jnp.minimum(x["unique_tokens"], x["tokens"])
    # The params that would be compute-optimal for the unique tokens; more than that are "repeated".
    ratio = jnp.log(p["alpha"] * p["A"]) - jnp.log(p["beta"] * p["B"])
    optimal = jnp.exp((ratio + p["beta"] * jnp.log(unique)) / p["alpha"])
    needed = jnp.minimum(optimal, x["params"])
    params = _with_repetition(x["params"], needed, p["R_N"])
    tokens = _with_repetition(x["tokens"], unique, p["R_D"])
    return _chinchilla(p, {"params": params, "tokens": tokens})


def _with_repetition(total: Array, unique: Array, decay: Array) -> Array:
    """What `total` is worth: every repetition of `unique` a constant factor less than the last."""
    repetitions = total / unique - 1
    return unique * (1 - decay * jnp.expm1(-repetitions / decay))


def _broken_power_law(p: Values, x: Values) -> Array:
    log_flops = jnp.log(x["flops_6nd"])
    bend = jnp.logaddexp(0.0, (log_flops - jnp.log(p["d1"])) / p["f1"])
    return p["a"] + p["b"] * jnp.exp(-p["c0"] * log_flops - p["c1"] * p["f1"] * bend)


def _exponential(p: Values, x: Values) -> Array:
    return p["eps"] - p["k"] * jnp.exp(-p["gamma"] * x["loss"])


def _sigmoid(p: Values, x: Values) -> Array:
    return p["eps"] * jax.nn.sigmoid((x["loss"] - p["l0"]) / p["q"])


OVER_TRAINING = Form(
    name="over_training",
    inputs=("params", "tokens"),
    parameters=(offset("E"), factor("a"), factor("b"), exponent("eta", (0.02, 0.5))),
    function=_over_training,
    source="Gadre et al. 2024, eq. 4: E + (a M^eta + b M^-eta) C^-eta, M = D/N, C = 6ND",
)

CHINCHILLA = Form(
    name="chinchilla",
    inputs=("params", "tokens"),
    parameters=(offset("E"), factor("A"), factor("B"), exponent("alpha"), exponent("beta")),
    function=_chinchilla,
    source="Hoffmann et al. 2022, approach 3: E + A N^-alpha + B D^-beta",
)

KAPLAN = Form(
    name="kaplan",
    inputs=("params", "tokens"),
    parameters=(
        Parameter("alpha_N", 1e-4, 5.0, positive=True, starts=(0.03, 0.5)),
        Parameter("alpha_D", 1e-4, 5.0, positive=True, starts=(0.03, 0.5)),
        Parameter("N_c", 1.0, 1e150, positive=True, starts=(1e9, 1e27)),
        Parameter("D_c", 1.0, 1e150, positive=True, starts=(1e9, 1e27)),
    ),
    function=_kaplan,
    source="Kaplan et al. 2020, eq. 1.5: ((N_c/N)^(alpha_N/alpha_D) + D_c/D)^alpha_D",
)

DATA_CONSTRAINED = Form(
    name="data_constrained",
    inputs=("params", "tokens", "unique_tokens"),
    parameters=(
        offset("E"),
        Parameter("A", 1e-12, math.inf, positive=True, starts=(1e1, 1e5)),
        Parameter("B", 1e-12, math.inf, positive=True, starts=(1e1, 1e5)),
        exponent("alpha", (0.15, 0.7)),
        exponent("beta", (0.15, 0.7)),
        Parameter("R_D", 1e-2, 1e6, positive=True, starts=(1.0, 60.0)),
        Parameter("R_N", 1e-2, 1e6, positive=True, starts=(1.0, 60.0)),
    ),
    function=_data_constrained,
    source="Muennighoff et al. 2023, eq. 5-7: Chinchilla's law of N' and D', which grow ever less "
    "as N passes what is optimal for the unique tokens and D passes these",
)

BROKEN_POWER_LAW = Form(
    name="broken_power_law",
    inputs=("flops_6nd",),
    parameters=(
        offset("a"),
        factor("b"),
        exponent("c0", (0.02, 0.5)),
        Parameter("c1", -5.0, 5.0, positive=False, starts=(-0.3, 0.5)),
        Parameter("d1", 1.0, 1e40, positive=True, starts=(1e12, 1e24)),
        Parameter("f1", 1e-2, 1e2, positive=True, starts=(0.1, 2.0)),
    ),
    function=_broken_power_law,
    source="Caballero et al. 2023, eq. 1 with one break: a + b C^-c0 (1 + (C/d1)^(1/f1))^(-c1 f1)",
)

EXPONENTIAL = Form(
    name="exponential",
    inputs=("loss",),
    parameters=(
        offset("eps", high=1.0),
        factor("k"),
        Parameter("gamma", 1e-3, 50.0, positive=True, starts=(0.1, 5.0)),
    ),
    function=_exponential,
    source="Gadre et al. 2024, eq. 5: eps - k exp(-gamma L)",
)

SIGMOID = Form(
    name="sigmoid",
    inputs=("loss",),
    parameters=(
        offset("eps", high=1.0),
        Parameter("l0", -20.0, 20.0, positive=False, starts=(0.5, 4.5)),
        Parameter("q", 1e-2, 50.0, positive=True, starts=(0.1, 3.0)),
    ),
    function=_sigmoid,
    source="the second step of Bhagia et al. 2024: eps / (1 + exp((l0 - L) / q))",
)

LOSS_FORMS = (OVER_TRAINING, CHINCHILLA, KAPLAN, DATA_CONSTRAINED, BROKEN_POWER_LAW)
ERROR_FORMS = (EXPONENTIAL, SIGMOID)
FORMS = {form.name: form for form in (*LOSS_FORMS, *ERROR_FORMS)}


def named(law: str | Form) -> Form:
    """The built-in form of that name, or `law` itself if it is a form already.

    Raises:
      UserError: no built-in form has that name.
    """
    if isinstance(law, Form):
        return law
    if law not in FORMS:
        raise UserError(f"unknown law '{law}' ({nearest(law, FORMS)})")
    return FORMS[law]
