"""Figures show what the law says, where it says it, and can be read."""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from scaling_jax import laws, records
from scaling_jax.errors import UserError
from scaling_jax.report import figures, panels

TRUTH = {"E": 1.7, "a": 150.0, "b": 200.0, "eta": 0.13}
MULTIPLIERS = (5.0, 20.0, 80.0)
LOSS, ERROR = "loss/val", "error/task"


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Sizes x multipliers on a law with a little noise; the largest size is to be held out."""
    params, multiplier = (
        part.ravel() for part in np.meshgrid([1e7, 3e7, 1e8, 3e8, 1e9], MULTIPLIERS, indexing="ij")
    )
    noise = np.random.default_rng(0).normal(size=params.size)
    loss = laws.FORMS["over_training"].curve(TRUTH, params=params, tokens=params * multiplier)
    found = pd.DataFrame({"params": params, "tokens": params * multiplier})
    found[LOSS] = loss * np.exp(0.004 * noise)
    found[ERROR] = 0.8 - 1.9 * np.exp(-0.8 * loss) + 0.001 * noise[::-1]
    sizes, lengths = found["params"] / 1e6, multiplier
    found["run"] = [f"size-{n:.0f}M-long-{m:.0f}" for n, m in zip(sizes, lengths, strict=True)]
    return records.check(found)


@pytest.fixture(scope="module")
def held_out(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["params"] > 5e8]


@pytest.fixture(scope="module")
def fit(table: pd.DataFrame) -> laws.Fit:
    return laws.fit("over_training", table[table["params"] < 5e8], target=LOSS)


@pytest.fixture(scope="module")
def error_fit(table: pd.DataFrame) -> laws.Fit:
    return laws.fit("exponential", table[table["params"] < 5e8], target=ERROR, loss=LOSS)


@pytest.fixture(scope="module")
def coverage() -> laws.Coverage:
    """Predictions at growing distances, half of the far ones missed."""
    decades = np.linspace(0.1, 2.5, 25)
    low = np.where((decades > 1) & (np.arange(25) % 2 == 0), 2.1, 1.8)
    rows = pd.DataFrame({"decades": decades, "measured": 2.0, "value": 2.2, "low": low})
    rows["high"] = 2.5
    return laws.Coverage(
        count=25,
        covered=0.7,
        median_relative_width=0.3,
        median_relative_error=0.1,
        mean_interval_score=0.5,
        level=0.9,
        cuts=[],
        predictions=rows,
    )


def fans(figure: Figure) -> list[np.ndarray]:
    """The outlines of a figure's bands, x and y of each corner."""
    bands = [part for part in figure.axes[0].collections if isinstance(part, PolyCollection)]
    return [np.asarray(band.get_paths()[0].vertices) for band in bands]


def points(figure: Figure, panel: int = 0) -> np.ndarray:
    """Every scattered point of a panel, sorted by x and y."""
    parts = [
        np.asarray(part.get_offsets())
        for part in figure.axes[panel].collections
        if isinstance(part, PathCollection)
    ]
    found = np.concatenate(parts)
    return found[np.lexsort(found.T[::-1])]


def test_a_fan_is_the_interval_beyond_the_runs_of_its_multiplier(fit, held_out):
    figure = figures.prediction_fan(
        fit, token_multipliers=[20], levels=(0.5, 0.9), held_out=held_out
    )
    (axes,) = figure.axes
    for level, outline in zip((0.9, 0.5), fans(figure), strict=True):
        assert outline[:, 0].min() == pytest.approx(6 * 20 * 3e8**2)
        end = outline[:, 0].max()
        params = np.sqrt(end / 120)
        there = fit.predict(params=params, tokens=20 * params, level=level)
        ends = outline[np.isclose(outline[:, 0], end), 1]
        assert (ends.min(), ends.max()) == pytest.approx((there.low, there.high))
    (line,) = (line for line in axes.lines if line.get_label() == "law")
    middle, height = np.asarray(line.get_xydata())[40]
    params = np.sqrt(middle / 120)
    assert height == pytest.approx(fit.curve(params=params, tokens=20 * params))


def test_every_run_is_in_the_fan_once_and_held_out_ones_at_their_multiplier(fit, table, held_out):
    figure = figures.prediction_fan(fit, token_multipliers=[20], held_out=held_out)
    of_20 = held_out[held_out["token_multiplier"] == 20]
    shown = pd.concat([table[table["params"] < 5e8], of_20])
    expected = shown.sort_values(["flops_6nd", LOSS])[["flops_6nd", LOSS]].to_numpy()
    np.testing.assert_allclose(points(figure), expected)


def test_a_fan_without_wishes_has_the_multipliers_of_the_held_out_runs(fit, held_out):
    figure = figures.prediction_fan(fit, held_out=held_out[held_out["token_multiplier"] != 20])
    assert [axes.get_title() for axes in figure.axes] == ["M = D/N = 5", "M = D/N = 80"]
    assert len(figures.prediction_fan(fit).axes) == 1


def test_a_fan_ends_where_it_is_told_to(fit):
    figure = figures.prediction_fan(fit, token_multipliers=[20], levels=[0.9], until=1e22)
    assert fans(figure)[0][:, 0].max() == pytest.approx(1e22)


def test_a_chain_has_a_fan_of_its_error(fit, error_fit, held_out):
    chain = laws.chained(fit, error_fit)
    figure = figures.prediction_fan(chain, token_multipliers=[20], levels=[0.9], held_out=held_out)
    (axes,) = figure.axes
    assert axes.get_ylabel() == ERROR
    (start,) = fans(figure)
    there = chain.predict(params=3e8, tokens=6e9, level=0.9)
    first = start[np.isclose(start[:, 0], 6 * 20 * 3e8**2), 1]
    assert (first.min(), first.max()) == pytest.approx((there.low, there.high))


def test_reducible_losses_are_losses_less_e(fit, table, held_out):
    figure = figures.reducible_loss(fit, held_out=held_out)
    above = table.assign(above=table[LOSS] - fit.parameters["E"])
    expected = above.sort_values(["flops_6nd", "above"])[["flops_6nd", "above"]].to_numpy()
    np.testing.assert_allclose(points(figure), expected)
    assert len(figure.axes[0].lines) == len(MULTIPLIERS)


def test_an_error_law_has_its_curve_and_band(error_fit, table, held_out):
    figure = figures.error_against_loss(error_fit, held_out=held_out, level=0.8)
    (outline,) = fans(figure)
    lowest = outline[:, 0].min()
    there = error_fit.predict(loss=lowest, level=0.8)
    ends = outline[np.isclose(outline[:, 0], lowest), 1]
    assert (ends.min(), ends.max()) == pytest.approx((there.low, there.high))
    expected = table.sort_values([LOSS])[[LOSS, ERROR]].to_numpy()
    np.testing.assert_allclose(points(figure), expected)


def cells(figure: Figure) -> dict[tuple[str, str], str]:
    """The text of every cell of a heat map, by its row and column label."""
    axes = figure.axes[0]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    columns = [label.get_text() for label in axes.get_xticklabels()]
    found = {}
    for text in axes.texts:
        x, y = text.get_position()
        found[rows[int(y)], columns[int(x)]] = text.get_text()
    return found


def test_a_map_holds_each_run_and_frames_the_fitted(fit, held_out, table):
    figure = figures.relative_error_map(fit, held_out=held_out)
    shown = cells(figure)
    assert len(shown) == len(table)
    row = held_out[held_out["token_multiplier"] == 80].iloc[0]
    off = 100 * (float(fit.curve(params=1e9, tokens=8e10)) / row[LOSS] - 1)
    assert shown["1B", "80"] == f"{off:+.1f}".replace("-", "−")
    frames = [p for p in figure.axes[0].patches if isinstance(p, Rectangle) and not p.get_fill()]
    assert len(frames) == len(table) - len(held_out)


def test_a_map_of_a_table_shows_the_mean_of_runs_that_share_a_cell():
    rows = pd.DataFrame(
        {
            "params": [1e6, 1e6, 2e6],
            "token_multiplier": [20.0, 20.01, 20.0],
            "relative_error": [0.01, 0.02, -0.0001],
            "fitted": [False, True, False],
        }
    )
    assert cells(figures.relative_error_map(rows)) == {("1M", "20"): "+1.5", ("2M", "20"): "+0.0"}
    with pytest.raises(UserError, match="no column 'fitted'"):
        figures.relative_error_map(rows.drop(columns="fitted"))


def test_influence_bars_name_the_runs_the_largest_first(fit):
    at = {"params": 1e9, "tokens": 2e10}
    figure = figures.influence_bars(fit, most=4, **at)
    (axes,) = figure.axes
    slopes = pd.Series(fit.influence(**at), index=fit.observations.table["run"])
    first = slopes.abs().sort_values(ascending=False).index[:4]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(first)
    bars = [bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle)]
    assert bars == pytest.approx(slopes[first].tolist())
    assert "4 of 12 runs" in figure.get_supxlabel()
    assert figure.get_suptitle() == f"{LOSS} at N = 1B, D = 20B"


def test_coverage_bars_are_the_shares_at_each_distance(coverage):
    figure = figures.coverage_by_distance(coverage, distances=(0, 1, np.inf))
    rows = coverage.predictions
    hit = (rows["low"] <= rows["measured"]) & (rows["measured"] <= rows["high"])
    near = rows["decades"] < 1
    bars = [bar.get_height() for bar in figure.axes[1].patches if isinstance(bar, Rectangle)]
    assert bars == pytest.approx([hit[near].mean(), hit[~near].mean()])
    assert len(points(figure)) == coverage.count


def test_what_a_figure_is_not_for_is_one_line(fit, error_fit, held_out):
    kaplan = laws.fit("kaplan", fit.observations.table, target=LOSS)
    wrong = [
        (lambda: figures.prediction_fan(error_fit), "needs a law of params and tokens"),
        (lambda: figures.prediction_fan(fit, token_multipliers=[-1]), "are positive, not [-1]"),
        (lambda: figures.prediction_fan(fit, levels=[90]), "between 0 and 1"),
        (lambda: figures.prediction_fan(fit, held_out=held_out.drop(columns=LOSS)), "loss/val"),
        (lambda: figures.reducible_loss(kaplan), "'kaplan' is no law of params and tokens with E"),
        (lambda: figures.reducible_loss(error_fit), "'exponential' is no law"),
        (lambda: figures.error_against_loss(fit), "'over_training' is no law of the loss"),
        (lambda: figures.influence_bars(fit, params=1e9), "input 'tokens' is missing"),
    ]
    for draw, message in wrong:
        with pytest.raises(UserError) as raised:
            draw()
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)


def test_every_figure_can_be_read(fit, error_fit, held_out, coverage):
    drawn = [
        figures.prediction_fan(fit, held_out=held_out),
        figures.prediction_fan(fit),
        figures.reducible_loss(fit, held_out=held_out),
        figures.error_against_loss(error_fit, held_out=held_out),
        figures.relative_error_map(fit, held_out=held_out),
        figures.relative_error_map(error_fit, held_out=held_out),
        figures.influence_bars(fit, params=1e9, tokens=2e10),
        figures.coverage_by_distance(coverage),
    ]
    for figure in drawn:
        assert figure.get_figwidth() <= 7.01
        _check_readable(figure)


def _check_readable(figure: Figure) -> None:
    """All text lies in the figure, none smaller than 6 points, no tick label on another."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    whole = figure.bbox
    for axes in figure.axes:
        assert axes.get_xlabel() or axes.get_ylabel() or figure.get_supxlabel()
        labels = [axes.xaxis.label, axes.yaxis.label, axes.title]
        for axis in (axes.xaxis, axes.yaxis):
            ticks = [
                label
                for label in (*axis.get_ticklabels(), *axis.get_ticklabels(minor=True))
                if label.get_text() and label.get_visible()
            ]
            low, high = sorted(axis.get_view_interval())
            place = 0 if axis is axes.xaxis else 1
            shown = [t for t in ticks if low <= t.get_position()[place] <= high]
            boxes = [label.get_window_extent() for label in shown]
            assert not [
                pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])
            ]
            labels += shown
        for label in labels:
            if label.get_text() and label.get_visible():
                box = label.get_window_extent()
                assert float(label.get_fontsize()) >= 6
                assert box.x0 >= -1
                assert box.y0 >= -1
                assert box.x1 <= whole.x1 + 1
                assert box.y1 <= whole.y1 + 1


@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=60), st.integers(1, 12))
def test_values_are_put_together_in_order_and_into_few_groups(values, most):
    values = np.sort(np.array(values))
    groups = panels.together(values, most)
    assert len(np.unique(groups)) <= most
    assert (np.diff(groups) >= 0).all()
