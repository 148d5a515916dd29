"""Every law has its figures, and they arrive as whole files."""

import numpy as np
import pandas as pd
import pytest

from scaling_jax import laws, records
from scaling_jax.errors import UserError
from scaling_jax.report import gallery

LOSS, ERROR = "loss/val", "error/task"


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    params, multiplier = (
        part.ravel() for part in np.meshgrid([1e7, 3e7, 1e8, 3e8], [5.0, 20.0, 80.0])
    )
    found = pd.DataFrame({"params": params, "tokens": params * multiplier})
    truth = {"E": 1.7, "A": 400.0, "B": 1500.0, "alpha": 0.33, "beta": 0.36}
    found[LOSS] = laws.FORMS["chinchilla"].curve(truth, params=params, tokens=params * multiplier)
    found[ERROR] = 0.8 - 1.9 * np.exp(-0.8 * found[LOSS])
    return records.check(found)


@pytest.mark.parametrize(
    ("law", "loss", "expected"),
    [
        ("chinchilla", None, {"prediction", "reducible_loss", "relative_error", "influence"}),
        ("kaplan", None, {"prediction", "relative_error", "influence"}),
        ("exponential", LOSS, {"error_against_loss", "relative_error", "influence"}),
    ],
)
def test_a_law_has_the_figures_that_suit_it(table, law, loss, expected):
    small = table[table["params"] < 2e8]
    fit = laws.fit(law, small, target=ERROR if loss else LOSS, loss=loss)
    found = gallery.figures_of(fit, table[table["params"] > 2e8])
    assert set(found) == expected
    at = "L = " if loss else "N = 300M, D = 24B"
    assert at in found["influence"].get_suptitle()


def test_without_held_out_runs_the_influence_is_of_ten_times_the_compute(table):
    fit = laws.fit("chinchilla", table, target=LOSS)
    title = gallery.figures_of(fit)["influence"].get_suptitle()
    assert title == f"{LOSS} at N = 949M, D = 75.9B"


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")]
)
def test_a_figure_is_written_in_the_format_of_its_name(table, tmp_path, suffix, start):
    fit = laws.fit("exponential", table, target=ERROR, loss=LOSS)
    path = tmp_path / "deep" / f"figure{suffix}"
    assert gallery.save(gallery.figures_of(fit)["influence"], path) == path
    assert path.read_bytes().startswith(start)
    assert list(path.parent.iterdir()) == [path]


def test_an_unknown_format_is_named_and_nothing_written(table, tmp_path):
    fit = laws.fit("exponential", table, target=ERROR, loss=LOSS)
    with pytest.raises(UserError, match=r"figure.gif: a figure's name ends in one of \.png"):
        gallery.save(gallery.figures_of(fit)["influence"], tmp_path / "figure.gif")
    assert not list(tmp_path.iterdir())
