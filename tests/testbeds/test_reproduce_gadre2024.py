"""The reproduction of Gadre et al. 2024, against the paper and against the authors' own code."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scaling_jax.errors import UserError
from scaling_jax.testbeds import published
from scaling_jax.testbeds.reproduce import gadre2024
from scaling_jax.testbeds.reproduce import gadre2024_design as design
from scaling_jax.testbeds.reproduce import gadre2024_published as paper
from scaling_jax.testbeds.reproduce import gadre2024_studies as studies
from scaling_jax.testbeds.reproduce import gadre2024_tables as tables
from scaling_jax.testbeds.reproduce.paper_laws import EQUATION_4, EQUATION_5, Problem, fit_many

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "gadre"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the released testbed is not here")
TRUTH = {"E": 1.8, "a": 150.0, "b": 250.0, "eta": 0.13}
SPLITS = {"avg": "error/average_46", "avg_subset": "error/average_17"}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return published.gadre2024(DATA)


@pytest.fixture(scope="module")
def fits(table) -> tables.PaperFits:
    return tables.fit_paper(table)


@pytest.fixture(scope="module")
def truth(table, fits) -> pd.DataFrame:
    return tables.ground_truth(table, fits)


def made_up(count: int) -> pd.DataFrame:
    params = np.geomspace(1e7, 4e8, count)
    tokens = params * np.tile([20.0, 320.0, 80.0], count)[:count]
    loss = EQUATION_4.curve(TRUTH, params=params, tokens=tokens)
    error = 0.8 - 2.0 * np.exp(-0.7 * loss)
    return pd.DataFrame({"params": params, "tokens": tokens, "loss/a": loss, "error/b": error})


@pytest.mark.slow
def test_many_fits_at_once_find_the_truth_whatever_their_sizes():
    problems = [Problem(made_up(count), "loss/a") for count in (5, 7, 12)] * 30
    fits = fit_many(EQUATION_4, problems)
    assert len(fits) == 90
    for fit in fits:
        assert fit.parameters == pytest.approx(TRUTH, rel=1e-3)
    errors = fit_many(EQUATION_5, [Problem(made_up(6), "error/b", "loss/a")])
    assert errors[0].parameters == pytest.approx({"eps": 0.8, "k": 2.0, "gamma": 0.7}, rel=1e-4)


def test_the_error_law_has_no_upper_bound_as_in_the_paper():
    rows = made_up(8).assign(**{"error/b": lambda t: 1.2 - 2.0 * np.exp(-0.5 * t["loss/a"])})
    fit = fit_many(EQUATION_5, [Problem(rows, "error/b", "loss/a")])[0]
    assert fit.parameters["eps"] == pytest.approx(1.2, rel=1e-3)


def test_the_frontier_is_what_no_cheaper_model_beats():
    grid = pd.DataFrame({"flops_6nd": [1, 2, 2, 3, 4], "loss/openlm": [5.0, 4.0, 4.5, 4.2, 3.9]})
    assert list(studies.frontier(grid)["loss/openlm"]) == [5.0, 4.0, 3.9]


def test_the_optimal_multiplier_is_where_the_law_is_lowest():
    best = tables.optimal_multiplier(TRUTH)
    flops = 1e20
    around = best * np.array([0.8, 1.0, 1.25])
    params = np.sqrt(flops / (6 * around))
    loss = EQUATION_4.curve(TRUTH, params=params, tokens=params * around)
    assert loss[1] == min(loss)


@needs_data
def test_every_prediction_is_that_of_the_authors_code(truth):
    reference = pd.read_csv(DATA / "reference_predictions.csv")
    reference["loss"] = "loss/" + reference["eval_loss"]
    reference["split"] = reference["downstream"].map(SPLITS)
    reference["token_multiplier"] = reference["M"].astype(float)
    key = ["train", "loss", "split", "model", "token_multiplier"]
    both = truth.merge(reference, on=key, suffixes=("", "_theirs"))
    assert len(both) == len(truth) == 1664
    for ours, theirs in (
        ("loss_measured", "loss_true"),
        ("loss_predicted", "loss_pred"),
        ("error_measured", "err_true"),
        ("error_predicted", "err_pred"),
    ):
        np.testing.assert_allclose(both[ours], both[theirs], rtol=2e-6)
    for ours, theirs in (
        ("loss_percent", "loss_rel"),
        ("error_percent", "err_rel"),
        ("error_from_true_loss_percent", "err_rel_from_true_loss"),
    ):
        np.testing.assert_allclose(both[ours], 100 * both[theirs], atol=2e-4)
    assert both["in_loss_fit"].equals(both["in_loss_fit_theirs"])
    assert both["in_error_fit"].equals(both["in_err_fit"])


@needs_data
def test_the_thirty_numbers_of_tables_2_and_7(table, fits):
    found = tables.table2(table, fits)
    for train, rows in paper.TABLE2.items():
        for name, row in rows.items():
            assert found[train][name] == pytest.approx(row._asdict(), abs=0.01)


@needs_data
def test_table_6_to_the_printed_digits(fits):
    digits = {"E": 2, "a": 0, "b": 0, "eta": 3, "eps": 3, "k": 2, "gamma": 3}
    for train, row in tables.table6(fits).items():
        for name, value in row.items():
            assert round(value, digits[name]) == paper.TABLE6[train][name]
        assert round(tables.optimal_multiplier(row), 2) == paper.OPTIMAL_MULTIPLIER[train]


@needs_data
def test_single_numbers(table, truth):
    table1 = tables.table1(table)
    np.testing.assert_allclose(table1["flops"], table1["paper"], rtol=0.02)
    ranks = tables.rank_correlation(truth)
    assert ranks["runs"] == 9
    assert ranks["spearman"] == pytest.approx(0.883, abs=5e-4)
    assert ranks["kendall"] == pytest.approx(0.778, abs=5e-4)
    cells = tables.heat_map_cells(truth)
    assert len(cells) == 39
    np.testing.assert_allclose(cells["ours"], cells["paper"], atol=0.0501)
    grid = published.gadre2024_grid(DATA)
    assert tables.table4(grid) == paper.TABLE4
    assert len(studies.selected(grid)) == 4


@needs_data
def test_exponents_and_small_multipliers(table, fits, truth):
    low, high = paper.EXPONENT_RANGE
    assert studies.exponent_study(table, fits)["eta"].between(low, high).all()
    off = studies.off_trend(truth).set_index("token_multiplier")["mean_percent"]
    assert off[5] > 5
    assert off.drop(5).abs().max() < 2


@needs_data
def test_a_release_with_a_run_less_is_refused(tmp_path):
    folder = tmp_path / "exp_data"
    for name in ("models", "evals"):
        (folder / name).mkdir(parents=True)
        for path in (DATA / "exp_data" / name).glob("*.json"):
            (folder / name / path.name).symlink_to(path.resolve())
    for name in ("grid.json", "eval_metadata.csv"):
        (folder / name).symlink_to((DATA / "exp_data" / name).resolve())
    next((folder / "models").glob("rpj-*.json")).unlink()
    with pytest.raises(UserError, match="34 runs on rpj, the paper has 35"):
        gadre2024.reproduce(tmp_path)


@needs_data
def test_a_design_looks_at_no_loss_but_those_of_runs_it_chose(table):
    """Whatever the other runs and the large ones measure, the chosen ones are the same."""
    loss, budget = "loss/openlm", 6e18
    chosen = design.designed_runs(table, "rpj", loss, budget)
    assert chosen["flops_6nd"].sum() <= budget
    assert len(chosen) > len(EQUATION_4.names)
    unseen = ~table["run"].isin(chosen["run"])
    shaken = table.copy()
    shaken.loc[unseen, loss] *= np.random.default_rng(0).uniform(0.3, 3.0, unseen.sum())
    again = design.designed_runs(shaken, "rpj", loss, budget)
    assert list(again["run"]) == list(chosen["run"])


@needs_data
def test_random_sets_keep_the_budget(table):
    runs = design.candidates(table, "c4_original")
    assert runs["token_multiplier"].min() > 9
    random = np.random.default_rng(0)
    for budget in (1e18, 1e19):
        drawn = design.random_runs(runs, budget, random)
        assert 1 <= len(drawn) <= design.RUNS_DRAWN[1]
        assert drawn["flops_6nd"].sum() <= budget
        assert not drawn["run"].duplicated().any()


@needs_data
@pytest.mark.slow
def test_everything_is_written_and_our_predictions_keep_their_promises(tmp_path):
    gadre2024.run(DATA, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["held_out"]) == 9 * 8 * 2
    assert set(results["table2"]["rpj"]) == {"with_1b", "without_1b"}
    assert len(list((tmp_path / "plots").glob("figure_*.png"))) == 18
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == 20
    assert "What did not improve" in page
    losses = {(r["targets"], r["recipe"]): r for r in results["beyond"]["beyond_losses"]}
    errors = {
        (r["split"], r["fit_set"], r["recipe"]): r for r in results["beyond"]["beyond_errors"]
    }
    assert losses["c4_val", "paper"]["max"] == pytest.approx(4.30, abs=0.01)
    assert losses["c4_val", "ours"]["max"] <= 3.1
    assert errors["error/average_46", "with_1b", "ours"]["mean"] <= 1.8
    assert errors["error/average_46", "with_1b", "ours"]["max"] <= 3.1
    assert errors["error/average_46", "without_1b", "ours"]["mean"] <= 2.8
    coverage = {r["predictions"]: r for r in results["beyond"]["beyond_coverage"]}
    assert coverage["losses, all 8"]["count"] == 48
    assert coverage["losses, all 8"]["covered"] >= 0.9 * 48
    alone = [row for row in results["beyond"]["beyond_tasks"] if row["verdict"] != "near chance"]
    assert len({row["task"] for row in alone}) == 17
    held = [row["low"] <= row["measured"] <= row["high"] for row in alone]
    assert sum(held) >= 0.7 * len(held)
    curves = {
        (r["targets"], r["law"], r["chosen_by"], r["share_of_paper"]): r
        for r in results["design"]["losses"]
    }
    for targets, percent in ((design.MAIN_TARGETS, 1.48), (design.ALL_TARGETS, 5.46)):
        paper_set = curves[targets, design.LAW, design.PAPER, 1.0]
        assert paper_set["percent"] == pytest.approx(percent, abs=0.01)
        designed, random = (
            curves[targets, design.BAYES, who, design.HALF]
            for who in (design.DESIGNED, design.RANDOM)
        )
        assert designed["flops"] <= paper_set["flops"] / 2
        assert designed["percent"] < random["percent"]
