"""Figures 5, 7, 10, 11 and 12 of Gadre et al. 2024: relative errors by size and multiplier."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scaling_jax.report.panels import error_map, error_scale
from scaling_jax.report.style import panels
from scaling_jax.testbeds.reproduce.gadre2024_tables import MAIN_LOSS, SPLITS
from scaling_jax.testbeds.reproduce.paper_laws import SIZES, TRAIN_SETS

MULTIPLIERS = (10, 20, 40, 80, 160, 320, 640)
SCALE = error_scale(largest=10.0)
EVALUATIONS = {
    MAIN_LOSS: "C4 eval",
    "loss/paloma_c4_en": "Paloma C4",
    "loss/paloma_redpajama": "Paloma RedPajama",
    "loss/paloma_falcon-refinedweb": "Paloma RefinedWeb",
    "loss/paloma_dolma_100_programing_languages": "100 programming languages",
    "loss/paloma_ptb": "Penn Tree Bank",
    "loss/val_de-en_100": "German C4",
    SPLITS[0]: "46 tasks",
    SPLITS[1]: "17 tasks",
}


def figure_5(truth: pd.DataFrame) -> Figure:
    """C4 eval loss, a panel for each train set."""
    return _maps(truth, [(train, MAIN_LOSS) for train in TRAIN_SETS])


def figure_7(truth: pd.DataFrame) -> Figure:
    """Loss on the distribution trained on."""
    own = ("loss/paloma_c4_en", "loss/paloma_redpajama", "loss/paloma_falcon-refinedweb")
    return _maps(truth, list(zip(TRAIN_SETS, own, strict=True)))


def figure_10(truth: pd.DataFrame) -> Figure:
    """Loss on other distributions: trained on C4; code, Penn Tree Bank, German."""
    other = (
        "loss/paloma_dolma_100_programing_languages",
        "loss/paloma_ptb",
        "loss/val_de-en_100",
    )
    return _maps(truth, [("c4_original", loss) for loss in other])


def figure_11(truth: pd.DataFrame) -> Figure:
    """Error, mean of 46 tasks, chained through C4 eval."""
    return _maps(truth, [(train, SPLITS[0]) for train in TRAIN_SETS])


def figure_12(truth: pd.DataFrame) -> Figure:
    """Error, mean of 17 tasks, chained through C4 eval."""
    return _maps(truth, [(train, SPLITS[1]) for train in TRAIN_SETS])


def _maps(truth: pd.DataFrame, cases: Sequence[tuple[str, str]]) -> Figure:
    """A heat map for each (train set, loss or error column)."""
    figure, axes = panels(1, len(cases), (4.4, 3.7))
    for panel, (train, target) in zip(axes, cases, strict=True):
        is_loss = target.startswith("loss/")
        rows = truth[
            (truth["train"] == train)
            & (truth["loss"] == (target if is_loss else MAIN_LOSS))
            & (truth["split"] == (SPLITS[0] if is_loss else target))
        ]
        kind = "loss" if is_loss else "error"
        _draw(panel, rows, f"{kind}_percent", f"in_{kind}_fit")
        panel.set_title(f"trained on {TRAIN_SETS[train]}: {EVALUATIONS[target]}", fontsize=10)
    axes[0].set_ylabel("parameters N")
    figure.colorbar(SCALE, ax=axes, label="relative error (%); boxed: fitted", extend="max")
    return figure


def _draw(panel: Axes, rows: pd.DataFrame, value: str, fitted: str) -> None:
    models = list(SIZES)
    shape = (len(models), len(MULTIPLIERS))
    cells, boxed = np.full(shape, np.nan), np.zeros(shape, bool)
    for _, row in rows[rows["token_multiplier"].isin(MULTIPLIERS)].iterrows():
        place = models.index(row["model"]), MULTIPLIERS.index(int(row["token_multiplier"]))
        cells[place], boxed[place] = row[value], row[fitted]
    error_map(panel, cells, boxed, list(SIZES.values()), [str(m) for m in MULTIPLIERS], SCALE)
    panel.set_xlabel("token multiplier M")
