"""What a testbed's records say: every law fitted, every held-out run predicted beside its measure.

`fits.json` holds {"fits": [{"law", "dataset", "target", "parameters", "intervals", "warnings",
"level", "held_out": [{"run", "params", "tokens", "predicted", "low", "high", "measured",
"relative_error"}]}], "sha256"}; error laws name the loss they read in "loss".
"""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import pandas as pd

from scaling_jax import laws, records, sealed
from scaling_jax.config import LawsConfig
from scaling_jax.errors import UserError

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
    the first loss law predicts for it, never from the measured one: that on the run's own dataset
    or, where this is no validation set, on the first one.
    """
    losses = [name for name in records.targets(table) if name.startswith("loss/")]
    return [
        fitted
        for dataset in sorted(map(str, table["dataset"].unique()))
        for loss in losses
        for fitted in _fit_loss(
            table,
            dataset,
            loss,
            config,
            errors=loss == (f"loss/{dataset}" if f"loss/{dataset}" in losses else losses[0]),
        )
    ]


def fit_law(
    table: pd.DataFrame,
    law: str | laws.Form,
    target: str,
    *,
    loss: str | None = None,
    chance: float | None = None,
    level: float = 0.9,
) -> list[FittedLaw]:
    """Fits one law to one column, for each dataset of `table`.

    Raises:
      UserError: as `laws.fit`.
    """
    fits = []
    for dataset in sorted(table["dataset"].unique()):
        known, held_out = split(table[table["dataset"] == dataset])
        fit = laws.fit(law, known, target=target, loss=loss, chance=chance)
        chain = None
        if loss is not None and not held_out.empty:
            chain = laws.chained(laws.fit("over_training", known, target=loss), fit)
        fits.append(_describe(fit, chain or fit, str(dataset), held_out, level))
    return fits


def split(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows to fit to and the rows held out, by the column `role`; without it, all are fitted.

    Raises:
      UserError: no row is in role `fit`.
    """
    if "role" not in rows:
        return rows, rows[:0]
    known = rows[rows["role"] == "fit"]
    if known.empty:
        raise UserError("records table: column 'role' is nowhere 'fit'")
    return known, rows[rows["role"] == "held_out"]


def in_distribution(fitted: FittedLaw) -> bool:
    """Whether a law is of the loss or error on the distribution that its runs were trained on."""
    return fitted.get("loss", fitted["target"]) == f"loss/{fitted['dataset']}"


def write(fits: Sequence[FittedLaw], path: Path) -> None:
    """Writes `fits` as JSON, atomically; a number that is not finite, which JSON lacks, is null."""
    content = {"fits": [_finite(fitted) for fitted in fits]}
    sealed.write(path, content, indent=1)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _fit_loss(
    table: pd.DataFrame, dataset: str, loss: str, config: LawsConfig, errors: bool
) -> list[FittedLaw]:
    """The laws of a loss and, if `errors`, those of errors that are predicted from it."""
    known, held_out = split(table[table["dataset"] == dataset])
    loss_fits = [laws.fit(law, known, target=loss) for law in config.loss]
    fitted = [_describe(fit, fit, dataset, held_out, config.level) for fit in loss_fits]
    for target in config.error_columns(dataset) if errors else ():
        if target not in table:
            warnings.warn(f"no law of {target}: the records have no such column", stacklevel=2)
            continue
        for law in config.error:
            error_fit = laws.fit(law, known, target=target, loss=loss, chance=config.chance)
            chain = laws.chained(loss_fits[0], error_fit)
            fitted.append(_describe(error_fit, chain, dataset, held_out, config.level))
    return fitted


def _describe(
    fit: laws.Fit,
    predictor: laws.Fit | laws.Chained,
    dataset: str,
    held_out: pd.DataFrame,
    level: float,
) -> FittedLaw:
    described = FittedLaw(
        law=fit.form.name,
        dataset=dataset,
        target=fit.target,
        level=level,
        parameters=dict(fit.parameters),
        intervals=fit.intervals(level),
        warnings=list(fit.warnings),
        held_out=_predict(predictor, held_out.sort_values("flops_6nd"), fit.target, level),
    )
    if fit.observations.loss is not None:
        described["loss"] = fit.observations.loss
    return described


def _predict(
    predictor: laws.Fit | laws.Chained, held_out: pd.DataFrame, target: str, level: float
) -> list[HeldOut]:
    if held_out.empty:
        return []
    form = predictor.loss.form if isinstance(predictor, laws.Chained) else predictor.form
    inputs = {name: held_out[name].to_numpy(float) for name in form.inputs}
    found = predictor.predict(level=level, **inputs)
    return [
        HeldOut(
            run=str(run),
            params=float(params),
            tokens=float(tokens),
            predicted=float(value),
            low=float(low),
            high=float(high),
            measured=float(measured),
            relative_error=abs(float(value) / measured - 1) if measured else math.inf,
        )
        for run, params, tokens, measured, value, low, high in zip(
            *(held_out[name] for name in ("run", "params", "tokens", target)),
            found.value,
            found.low,
            found.high,
            strict=True,
        )
    ]
