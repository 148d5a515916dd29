"""The report shows what it is given, needs no other file, and trusts no name."""

import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection

from scaling_jax import laws
from scaling_jax.report import page, plots
from scaling_jax.testbeds.analysis import FittedLaw, HeldOut

EVIL = "<script>alert(1)</script>"


def table(dataset: str) -> pd.DataFrame:
    params, tokens = np.array([1e4, 2e4, 1e4, 8e4]), np.array([1e5, 4e5, 4e5, 8e5])
    return pd.DataFrame(
        {
            "run": ["r0", "r1", "r2", "held"],
            "role": ["fit", "fit", "fit", "held_out"],
            "dataset": dataset,
            "model": ["s", "m", "s", EVIL],
            "params": params,
            "tokens": tokens,
            "token_multiplier": tokens / params,
            "flops_6nd": 6 * params * tokens,
            f"loss/{dataset}": [3.0, 2.5, 2.6, 2.0],
            f"error/next_token_{dataset}": [0.7, 0.6, 0.65, 0.5],
        }
    )


def fits(dataset: str) -> list[FittedLaw]:
    def held_out(predicted: float, measured: float) -> HeldOut:
        return HeldOut(
            run="held",
            params=8e4,
            tokens=8e5,
            predicted=predicted,
            low=predicted * 0.9,
            high=predicted * 1.1,
            measured=measured,
            relative_error=abs(predicted / measured - 1),
        )

    loss = {"E": 1.5, "a": 20.0, "b": 30.0, "eta": 0.15}
    error = {"eps": 0.9, "k": 1.5, "gamma": 0.8}
    return [
        FittedLaw(
            law="over_training",
            dataset=dataset,
            target=f"loss/{dataset}",
            level=0.9,
            parameters=loss,
            intervals={name: (value * 0.5, value * 2) for name, value in loss.items()},
            warnings=["a doubt"],
            held_out=[held_out(2.1, 2.0)],
        ),
        FittedLaw(
            law="exponential",
            dataset=dataset,
            target=f"error/next_token_{dataset}",
            loss=f"loss/{dataset}",
            level=0.9,
            parameters=error,
            intervals={name: (value, value) for name, value in error.items()},
            warnings=[],
            held_out=[held_out(0.55, 0.5)],
        ),
    ]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    curve = {"tokens": np.arange(1, 50) * 100, "loss": np.linspace(4, 3, 49)}
    page.write(
        out,
        title=f"Testbed {EVIL}",
        table=table("text"),
        fits=fits("text"),
        curves={"r0": curve, "held": curve},
        entropy_rates={"text": 1.25},
    )
    return out


def test_the_page_holds_its_figures_and_asks_for_nothing(written):
    content = (written / page.REPORT_FILE).read_text(encoding="utf-8")
    assert content.count("data:image/png;base64,") == 4
    assert not re.search(r'(src|href)="(?!data:)', content)
    names = {path.stem for path in (written / "plots").iterdir()}
    assert {"reducible_loss", "error_against_loss", "loss_curves"} <= names
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in (written / "plots").iterdir())


def test_names_are_escaped(written):
    content = (written / page.REPORT_FILE).read_text(encoding="utf-8")
    assert "<script" not in content
    assert "&lt;script&gt;" in content


def test_numbers_and_doubts_are_on_the_page(written):
    content = (written / page.REPORT_FILE).read_text(encoding="utf-8")
    for expected in ("5.00%", "10.00%", "a doubt", "1.25", "over_training"):
        assert expected in content


def test_tables_follow_the_fits():
    held_out = page.held_out_table(fits("text"))
    assert list(held_out["predicted"]) == [2.1, 0.55]
    parameters = page.parameter_table(fits("text"))
    assert len(parameters) == 7
    entropy = page.entropy_table(fits("text"), {"text": 1.25})
    assert list(entropy["fitted E"]) == [1.5]


def test_points_lie_where_the_records_say():
    figure = plots.reducible_loss(table("text"), fits("text"))
    points = np.concatenate([np.asarray(part.get_offsets()) for part in figure.axes[0].collections])
    expected = table("text")
    np.testing.assert_allclose(np.sort(points[:, 0]), np.sort(expected["flops_6nd"]))
    np.testing.assert_allclose(np.sort(points[:, 1]), np.sort(expected["loss/text"] - 1.5))


def test_laws_of_one_error_share_a_panel_with_the_runs_and_their_bounds():
    rows = table("text")
    for end, by in (("low", -0.02), ("high", 0.03)):
        rows[f"error/next_token_text/{end}"] = rows["error/next_token_text"] + by
    exponential = fits("text")[1]
    sigmoid = fits("text")[1]
    sigmoid["law"], sigmoid["parameters"] = "sigmoid", {"eps": 0.9, "l0": 1.8, "q": 0.5}
    (axes,) = plots.error_against_loss(rows, [exponential, sigmoid]).axes
    for line, fit in zip(axes.lines, (exponential, sigmoid), strict=True):
        x, y = np.asarray(line.get_data())
        np.testing.assert_allclose(y, laws.FORMS[fit["law"]].curve(fit["parameters"], loss=x))
    (bars,) = [part for part in axes.collections if isinstance(part, LineCollection)]
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    np.testing.assert_allclose(ends[:, 1] - ends[:, 0], 0.05)


def test_a_report_without_laws_can_be_drawn():
    assert plots.predicted_against_measured([]).axes
    assert plots.reducible_loss(table("text"), []).axes
