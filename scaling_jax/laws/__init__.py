"""Scaling laws: forms, fits, intervals, predictions. Needs no training code, only a table.

from scaling_jax import laws, records
fit = laws.fit("over_training", records.read("runs.csv"), target="loss/c4_val")
fit.predict(params=6.9e9, tokens=138e9, level=0.9)
"""

from scaling_jax.laws.chained import Chained, chained
from scaling_jax.laws.fit import Diagnostics, Fit, Prediction, fit
from scaling_jax.laws.forms import FORMS, Form, Parameter, exponent, factor, offset, power
from scaling_jax.laws.objectives import (
    Objective,
    asymmetric,
    huber,
    least_squares,
    pseudo_huber,
)

__all__ = [
    "FORMS",
    "Chained",
    "Diagnostics",
    "Fit",
    "Form",
    "Objective",
    "Parameter",
    "Prediction",
    "asymmetric",
    "chained",
    "exponent",
    "factor",
    "fit",
    "huber",
    "least_squares",
    "offset",
    "power",
    "pseudo_huber",
]
