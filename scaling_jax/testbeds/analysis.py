"""What a testbed's records say: every law fitted, every held-out run predicted beside its measure.

`fits.json` holds {"fits": [{"law", "dataset", "target", "parameters", "intervals", "warnings",
"level", "held_out": [{"run", "params", "tokens", "predicted", "low", "high", "measured",
"relative_error"}]}]}; error laws name the loss they read in "loss".
"""

import json
import math
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import pandas as pd

from scaling_jax import atomic, laws
from scaling_jax.config import LawsConfig
from scaling_jax.testbeds.runner import error_column

FITS_FILE = "fits.json"


class HeldOut(TypedDict):
    """A run that no law saw: predicted with its interval, and measured."""

    run: str
    params: float
    tokens: float
    predicted: float
    low: float
    high: float
    measured: float
    relative_error: float


class FittedLaw(TypedDict):
    """One law fitted to the runs of one dataset, for one column of the records table."""

    law: str
    dataset: str
    target: str
    loss: NotRequired[str]
    level: float
    parameters: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    warnings: list[str]
    held_out: list[HeldOut]


def fit_all(table: pd.DataFrame, config: LawsConfig) -> list[FittedLaw]:
    """Fits the laws of `config` to the rows in role `fit`, for each dataset and validation set.

    Loss laws predict every held-out run's loss; error laws predict its error from the loss that
    the first loss law predicts for it, never from the measured one.
    """
    fits: list[FittedLaw] = []
    sets = [name.removeprefix("loss/") for name in table.columns if _is_loss(name)]
    for dataset, rows in table.groupby("dataset", sort=True):
        known, held_out = rows[rows["role"] == "fit"], rows[rows["role"] == "held_out"]
        for name in sets:
            target = f"loss/{name}"
            loss_fits = [laws.fit(law, known, target=target) for law in config.loss]
            fits += [_describe(fit, law, str(dataset), target, held_out, config.level)
                     for fit, law in zip(loss_fits, config.loss, strict=True)]
            for law in config.error if name == dataset else ():
                error_fit = laws.fit(law, known, target=error_column(name), loss=target)
                chain = laws.chained(loss_fits[0], error_fit)
                described = _describe(
                    error_fit, law, str(dataset), error_column(name), held_out, config.level, chain
                )
                fits.append(described | {"loss": target})
    return fits


def write(fits: list[FittedLaw], out: Path) -> None:
    """Writes `fits` to `out`/fits.json, atomically."""
    atomic.write_text(out / FITS_FILE, json.dumps({"fits": fits}, indent=1) + "\n")


def _is_loss(column: str) -> bool:
    return column.startswith("loss/") and not column.endswith(("/low", "/high"))


def _describe(
    fit: Any,
    law: str,
    dataset: str,
    target: str,
    held_out: pd.DataFrame,
    level: float,
    predictor: Any = None,
) -> FittedLaw:
    return FittedLaw(
        law=law,
        dataset=dataset,
        target=target,
        level=level,
        parameters={name: float(value) for name, value in fit.parameters.items()},
        intervals={
            name: (float(low), float(high)) for name, (low, high) in fit.intervals(level).items()
        },
        warnings=list(fit.warnings),
        held_out=[
            _predict(predictor or fit, row, target, level)
            for _, row in held_out.sort_values("flops_6nd").iterrows()
        ],
    )


def _predict(predictor: Any, row: pd.Series, target: str, level: float) -> HeldOut:
    prediction = predictor.predict(params=row["params"], tokens=row["tokens"], level=level)
    predicted, measured = float(prediction.value), float(row[target])
    return HeldOut(
        run=str(row["run"]),
        params=float(row["params"]),
        tokens=float(row["tokens"]),
        predicted=predicted,
        low=float(prediction.low),
        high=float(prediction.high),
        measured=measured,
        relative_error=abs(predicted - measured) / measured if measured else math.inf,
    )
