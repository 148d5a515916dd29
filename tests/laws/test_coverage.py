"""Coverage: counted right, and what it is on real tables."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scaling_jax import laws, records
from scaling_jax.errors import UserError
from scaling_jax.testbeds import published

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
GADRE = {"E": 1.7, "a": 150.0, "b": 200.0, "eta": 0.13}


def runs(noise: float) -> pd.DataFrame:
    sizes, multipliers = np.meshgrid(np.geomspace(1e7, 1e9, 6), [10.0, 20.0, 80.0])
    params, tokens = sizes.ravel(), (sizes * multipliers).ravel()
    loss = laws.FORMS["over_training"].curve(GADRE, params=params, tokens=tokens)
    shake = np.exp(noise * np.random.default_rng(0).standard_normal(len(loss)))
    return pd.DataFrame({"params": params, "tokens": tokens, "loss/val": loss * shake})


def data(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"the testbed '{name}' is not on this machine")
    return DATA / name


def test_a_true_law_covers_and_its_parts_add_up():
    found = laws.coverage(runs(0.003), "over_training", "loss/val")
    assert found.covered > 0.9
    assert found.median_relative_error < 0.01
    assert found.count == sum(cut.count for cut in found.cuts) == len(found.predictions)
    assert found.covered == pytest.approx(
        sum(cut.covered * cut.count for cut in found.cuts) / found.count
    )
    for cut in found.cuts:
        assert cut.runs >= 8
        part = found.predictions[found.predictions["cut"] == cut.flops]
        assert (6 * part["params"] * part["tokens"] >= cut.flops * (1 - 1e-9)).all()


def test_predictions_are_those_of_a_fit_to_the_runs_below():
    table = records.check(runs(0.003))
    found = laws.coverage(table, "over_training", "loss/val", cuts=[1e19])
    below = table[table["flops_6nd"] < 1e19]
    fit = laws.fit("over_training", below, target="loss/val")
    row = found.predictions.iloc[-1]
    again = fit.predict(params=row["params"], tokens=row["tokens"])
    expected = [again.value, again.low, again.high]
    assert row[["value", "low", "high"]].tolist() == pytest.approx(expected, rel=1e-6)


def test_a_higher_level_is_wider():
    half, most = (
        laws.coverage(runs(0.003), "over_training", "loss/val", cuts=[1e19], level=level)
        for level in (0.5, 0.95)
    )
    assert half.median_relative_width < most.median_relative_width
    assert half.covered <= most.covered


def test_error_laws_are_chained():
    table = runs(0.002)
    table["error/task"] = 0.75 - 2.2 * np.exp(-0.75 * table["loss/val"])
    found = laws.coverage(table, "sigmoid", "error/task", loss="loss/val", chance=0.75, cuts=[1e19])
    assert found.covered > 0.9
    assert found.median_relative_error < 0.05


def test_cuts_without_runs_on_both_sides_are_refused():
    with pytest.raises(UserError, match="leaves 0 runs below"):
        laws.coverage(runs(0.003), "over_training", "loss/val", cuts=[1e10])
    with pytest.raises(UserError, match="too few"):
        laws.coverage(runs(0.003)[:8], "over_training", "loss/val")


def macro(found: list[laws.Coverage]) -> tuple[float, float]:
    """Coverage and interval score (x 100), averaged over cuts, then tables, then distances."""
    parts = []
    for number, coverage in enumerate(found):
        rows = coverage.predictions
        low, high, measured = (np.log(rows[name]) for name in ("low", "high", "measured"))
        missed = np.maximum(np.maximum(low - measured, measured - high), 0.0)
        score = 100 * (high - low + 2 / (1 - coverage.level) * missed)
        far = pd.cut(rows["decades"], [-1, 0.5, 1, 2, 9], labels=False)
        parts.append(rows.assign(table=number, far=far, score=score, covered=missed == 0))
    rows = pd.concat(parts)[["table", "far", "cut", "covered", "score"]]
    by_table = rows.groupby(["far", "table", "cut"]).mean().groupby(["far", "table"]).mean()
    covered, score = by_table.groupby("far").mean().mean()[["covered", "score"]]
    return float(covered), float(score)


@pytest.mark.slow
def test_the_digitised_chinchilla_runs_are_covered():
    kyo = pd.read_csv(data("chinchilla_kyo") / "df.csv").drop_duplicates()
    kyo = pd.DataFrame({"params": kyo["N"], "tokens": kyo["D"], "loss/train": kyo["loss"]})
    found = [
        laws.coverage(table, "chinchilla", "loss/train")
        for table in (published.chinchilla(data("chinchilla_besiroglu")), kyo)
    ]
    covered, score = macro(found)
    assert 0.87 <= covered <= 0.98
    assert score < 6.5


@pytest.mark.slow
def test_the_papers_runs_are_covered():
    table = published.gadre2024(data("gadre"))
    table = table[table["token_multiplier"] > 9.5]
    calibrated, pairs = (
        macro(
            [
                laws.coverage(rows, "over_training", f"loss/{name}", method=method)
                for _, rows in table.groupby("dataset")
                for name in ("c4_val", "openlm", "paloma_ptb")
            ]
        )
        for method in ("calibrated", "pairs")
    )
    assert 0.87 <= calibrated[0] <= 0.97
    assert calibrated[1] < 0.9 * pairs[1]


@pytest.mark.slow
def test_the_papers_48_large_targets_are_covered_from_5_runs():
    table = published.gadre2024(data("gadre"))
    small = table["params"] < 1e9
    smallest = table["params"] == table["params"].min()
    multiplier = table["token_multiplier"].round()
    fitted = (small & (multiplier == 20)) | (smallest & (multiplier == 320))
    large = ~small & ((multiplier > 20) | (table["params"] > 6e9))
    hits = []
    for dataset in table["dataset"].unique():
        own = table["dataset"] == dataset
        for target in (name for name in records.targets(table) if name.startswith("loss/")):
            fit = laws.fit("over_training", table[fitted & own], target=target)
            asked = table[large & own]
            at = {name: asked[name].to_numpy() for name in ("params", "tokens")}
            found = fit.predict(**at)
            hits += list((found.low <= asked[target]) & (asked[target] <= found.high))
    assert len(hits) == 48
    assert np.mean(hits) >= 0.9
