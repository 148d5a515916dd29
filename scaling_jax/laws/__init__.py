"""Scaling laws: forms, fits, intervals, predictions. Needs no training code, only a table.

from scaling_jax import laws, records
fit = laws.fit("over_training", records.read("runs.csv"), target="loss/c4_val")
fit.predict(params=6.9e9, tokens=138e9, level=0.9)
"""

from scaling_jax.laws.chained import Chained, chained
from scaling_jax.laws.comparison import Comparison, compare
from scaling_jax.laws.coverage import Coverage, CutScore, coverage
from scaling_jax.laws.design import Design, first_runs, next_runs
from scaling_jax.laws.fit import Diagnostics, Fit, Prediction, fit
from scaling_jax.laws.forms import FORMS, Form, Parameter, exponent, factor, offset, power
from scaling_jax.laws.groups import GroupFit, fit_groups
from scaling_jax.laws.iso_loss import iso_loss
from scaling_jax.laws.objectives import (
    Objective,
    asymmetric,
    huber,
    least_squares,
    pseudo_huber,
)
from scaling_jax.laws.optimum import (
    Optimum,
    Quantity,
    inference_optimum,
    optimal_token_multiplier,
    optimum,
)

__all__ = [
    "FORMS",
    "Chained",
    "Comparison",
    "Coverage",
    "CutScore",
    "Design",
    "Diagnostics",
    "Fit",
    "Form",
    "GroupFit",
    "Objective",
    "Optimum",
    "Parameter",
    "Prediction",
    "Quantity",
    "asymmetric",
    "chained",
    "compare",
    "coverage",
    "exponent",
    "factor",
    "first_runs",
    "fit",
    "fit_groups",
    "huber",
    "inference_optimum",
    "iso_loss",
    "least_squares",
    "next_runs",
    "offset",
    "optimal_token_multiplier",
    "optimum",
    "power",
    "pseudo_huber",
]
