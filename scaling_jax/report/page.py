"""The report of a testbed: one HTML file that holds its figures and needs nothing else.

out/report.html     the page
out/plots/*.png     its figures, for papers and slides
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from scaling_jax import atomic
from scaling_jax.report import markup, plots
from scaling_jax.testbeds.analysis import FittedLaw, in_distribution

REPORT_FILE = "report.html"


def write(
    out: Path,
    *,
    title: str,
    table: pd.DataFrame,
    fits: Sequence[FittedLaw],
    curves: Mapping[str, Mapping[str, np.ndarray]],
    entropy_rates: Mapping[str, float],
) -> Path:
    """Draws and writes the report of a testbed; returns the page's path.

    Args:
      out: the testbed's folder.
      title: of the page.
      table: the records.
      fits: every fitted law with its held-out predictions.
      curves: the loss curve of each run, by name.
      entropy_rates: nats per token that no model can go below, of the datasets where it is known.
    """
    figures = {
        "reducible_loss": plots.reducible_loss(table, fits),
        "error_against_loss": plots.error_against_loss(table, fits),
        "predicted_against_measured": plots.predicted_against_measured(fits),
        "loss_curves": plots.loss_curves(table, curves),
    }
    images = {name: markup.png(figure) for name, figure in figures.items()}
    for name, content in images.items():
        with atomic.replacing(out / "plots" / f"{name}.png") as temporary:
            temporary.write_bytes(content)
    page = markup.page(title, _sections(table, fits, entropy_rates, images))
    atomic.write_text(out / REPORT_FILE, page)
    return out / REPORT_FILE


def _sections(
    table: pd.DataFrame,
    fits: Sequence[FittedLaw],
    entropy_rates: Mapping[str, float],
    images: Mapping[str, bytes],
) -> Iterable[str]:
    known, held_out = ((table["role"] == role).sum() for role in ("fit", "held_out"))
    yield markup.paragraph(
        f"Laws were fitted to {known} runs; {held_out} larger or longer runs were held out, and "
        "predicted from the laws alone. Losses are cross-entropy in nats per token, without z-loss."
    )
    yield markup.heading("Predicted and measured")
    own = [fit for fit in fits if in_distribution(fit)]
    yield markup.table(held_out_table(own))
    yield markup.image(
        images["predicted_against_measured"], "Held-out runs: prediction and interval"
    )
    yield markup.heading("Loss against compute")
    yield markup.image(images["reducible_loss"], "Reducible loss by token multiplier")
    yield markup.heading("Error against loss")
    yield markup.image(images["error_against_loss"], "Error against validation loss")
    yield markup.heading("Fitted laws")
    yield markup.table(parameter_table(fits))
    warned = [(fit, warning) for fit in fits for warning in fit["warnings"]]
    for fit, warning in warned:
        yield markup.paragraph(
            f"{fit['law']}, {fit['dataset']}, {fit['target']}: {warning}.", "note"
        )
    if entropy_rates:
        yield markup.heading("Irreducible loss and entropy rate")
        yield markup.paragraph(
            "The entropy rate is known in closed form: no model can have a lower expected loss. "
            "A fitted E is an extrapolation to infinitely many parameters and tokens, of a model "
            "that sees nothing before the row it reads, so it may lie a little above."
        )
        yield markup.table(entropy_table(fits, entropy_rates))
    others = [fit for fit in fits if not in_distribution(fit)]
    if others:
        yield markup.heading("On other distributions than the one trained on")
        yield markup.table(held_out_table(others))
    yield markup.heading("Training")
    yield markup.image(images["loss_curves"], "Training loss")
    yield markup.heading("Records")
    yield markup.table(table)


def held_out_table(fits: Sequence[FittedLaw]) -> pd.DataFrame:
    """Each held-out run under each law: predicted, interval, measured, relative error."""
    rows = [
        {
            "run": held["run"],
            "target": fit["target"],
            "law": fit["law"],
            "predicted": held["predicted"],
            "low": held["low"],
            "high": held["high"],
            "measured": held["measured"],
            "relative error": f"{held['relative_error']:.2%}",
        }
        for fit in fits
        for held in fit["held_out"]
    ]
    return pd.DataFrame(rows)


def parameter_table(fits: Sequence[FittedLaw]) -> pd.DataFrame:
    """Each fitted parameter with its interval."""
    rows = [
        {
            "dataset": fit["dataset"],
            "target": fit["target"],
            "law": fit["law"],
            "parameter": name,
            "value": value,
            "low": fit["intervals"][name][0],
            "high": fit["intervals"][name][1],
        }
        for fit in fits
        for name, value in fit["parameters"].items()
    ]
    return pd.DataFrame(rows)


def entropy_table(fits: Sequence[FittedLaw], entropy_rates: Mapping[str, float]) -> pd.DataFrame:
    """Each law's irreducible loss E beside the entropy rate of its distribution."""
    rows = [
        {
            "dataset": fit["dataset"],
            "law": fit["law"],
            "fitted E": fit["parameters"]["E"],
            "low": fit["intervals"]["E"][0],
            "high": fit["intervals"]["E"][1],
            "entropy rate": entropy_rates[fit["dataset"]],
        }
        for fit in fits
        if fit["dataset"] in entropy_rates
        and fit["target"] == f"loss/{fit['dataset']}"
        and "E" in fit["parameters"]
    ]
    return pd.DataFrame(rows)
