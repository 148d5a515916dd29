"""Laws are fitted to the runs in role `fit` alone, and predict the others."""

import json

import numpy as np
import pandas as pd
import pytest

from scaling_jax import laws
from scaling_jax.config import LawsConfig
from scaling_jax.errors import UserError
from scaling_jax.testbeds import analysis

TRUTH = {"E": 1.0, "a": 40.0, "b": 60.0, "eta": 0.15}


def records_of_a_law() -> pd.DataFrame:
    """Two datasets, each with eight runs to fit and one held out, on a law that is known."""
    params, multiplier = (part.ravel() for part in np.meshgrid([2e4, 4e4, 8e4, 16e4], [10.0, 40.0]))
    params, multiplier = np.append(params, 64e4), np.append(multiplier, 20.0)
    tables = []
    for dataset, factor in (("a", 1.0), ("b", 1.2)):
        table = pd.DataFrame({"params": params, "tokens": params * multiplier})
        table["flops_6nd"] = 6 * table["params"] * table["tokens"]
        loss = laws.FORMS["over_training"].curve(
            TRUTH, params=params, tokens=table["tokens"].to_numpy()
        )
        table["run"] = [f"{dataset}-{i}" for i in range(len(table))]
        table["role"] = ["fit"] * 8 + ["held_out"]
        table["dataset"], table["model"] = dataset, "m"
        for name in ("a", "b"):
            table[f"loss/{name}"] = factor * loss
            table[f"error/next_token_{name}"] = 0.9 - 1.5 * np.exp(-0.8 * factor * loss)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


@pytest.fixture(scope="module")
def fits() -> list[analysis.FittedLaw]:
    return analysis.fit_all(records_of_a_law(), LawsConfig(loss=("over_training",)))


def test_every_dataset_and_set_has_its_law(fits):
    found = {(fit["law"], fit["dataset"], fit["target"]) for fit in fits}
    losses = {("over_training", d, f"loss/{s}") for d in "ab" for s in "ab"}
    errors = {("exponential", d, f"error/next_token_{d}") for d in "ab"}
    assert found == losses | errors


def test_noiseless_laws_predict_the_held_out_run(fits):
    for fit in fits:
        (held_out,) = fit["held_out"]
        assert held_out["run"].endswith("-8")
        assert held_out["relative_error"] < 1e-3
        assert held_out["low"] < held_out["measured"] < held_out["high"]
        assert held_out["relative_error"] == pytest.approx(
            abs(held_out["predicted"] - held_out["measured"]) / held_out["measured"]
        )
    own = next(fit for fit in fits if fit["target"] == "loss/a" and fit["dataset"] == "a")
    assert own["parameters"] == pytest.approx(TRUTH, rel=1e-4)


def test_held_out_measurements_do_not_move_the_fit(fits):
    table = records_of_a_law()
    table.loc[table["role"] == "held_out", ["loss/a", "loss/b"]] *= 1.5
    again = analysis.fit_all(table, LawsConfig(loss=("over_training",), error=()))
    loss_fits = [fit for fit in fits if "loss" not in fit]
    for before, after in zip(loss_fits, again, strict=True):
        assert before["parameters"] == after["parameters"]
        assert before["held_out"][0]["predicted"] == after["held_out"][0]["predicted"]


def test_errors_are_predicted_from_predicted_losses():
    """Chained: with the loss law wrong at the held-out run, so is the error."""
    table = records_of_a_law()
    table.loc[table["role"] == "held_out", "loss/a"] *= 0.5
    fit = analysis.fit_law(table, "exponential", "error/next_token_a", loss="loss/a")[0]
    assert fit["held_out"][0]["relative_error"] < 1e-3


def test_error_laws_are_of_the_columns_that_the_config_names():
    table = records_of_a_law().rename(columns={"error/next_token_a": "error/quiz"})
    config = LawsConfig(loss=("over_training",), errors=("quiz",), chance=0.9)
    fits = [fit for fit in analysis.fit_all(table, config) if "loss" in fit]
    found = {fit["dataset"]: fit for fit in fits}
    assert {name: (fit["loss"], fit["target"]) for name, fit in found.items()} == {
        "a": ("loss/a", "error/quiz"),
        "b": ("loss/b", "error/quiz"),
    }
    assert all(analysis.in_distribution(fit) for fit in fits)
    assert found["a"]["parameters"] == pytest.approx({"eps": 0.9, "k": 1.5, "gamma": 0.8}, rel=1e-3)
    assert found["a"]["intervals"]["eps"] == (0.9, 0.9)


def test_error_laws_of_runs_on_no_validation_set_read_the_first_loss():
    table = records_of_a_law().drop(columns=["loss/b", "error/next_token_b"])
    config = LawsConfig(loss=("over_training",), errors=("next_token_a",))
    fits = [fit for fit in analysis.fit_all(table, config) if "loss" in fit]
    assert {(fit["dataset"], fit["loss"]) for fit in fits} == {("a", "loss/a"), ("b", "loss/a")}
    assert [analysis.in_distribution(fit) for fit in fits] == [True, False]


def test_an_error_that_no_run_has_is_warned_of():
    with pytest.warns(UserWarning, match="no law of error/average_46: the records have no such"):
        fits = analysis.fit_all(
            records_of_a_law(), LawsConfig(loss=("over_training",), errors=("average_46",))
        )
    assert not [fit for fit in fits if "loss" in fit]


def test_fits_are_written_as_json(fits, tmp_path):
    analysis.write(fits, tmp_path / "fits.json")
    content = json.loads((tmp_path / "fits.json").read_text())
    assert set(content) == {"fits", "sha256"}
    for fit in content["fits"]:
        assert {"law", "dataset", "target", "parameters", "intervals", "held_out"} <= set(fit)
        assert set(fit["parameters"]) == set(fit["intervals"])
        assert set(fit["held_out"][0]) == {
            *("run", "params", "tokens", "predicted", "low", "high"),
            *("measured", "relative_error"),
        }


def test_a_table_without_roles_is_fitted_whole():
    table = records_of_a_law().drop(columns="role")
    fit = analysis.fit_law(table, "over_training", "loss/a")[0]
    assert fit["held_out"] == []


def test_a_law_of_compute_predicts_the_held_out_run_from_its_compute():
    only_compute = laws.Form(
        name="only_compute",
        inputs=("flops_6nd",),
        parameters=(laws.offset("E"), laws.factor("k"), laws.exponent("eta")),
        function=lambda p, x: p["E"] + p["k"] * laws.power(x["flops_6nd"], -p["eta"]),
    )
    table = records_of_a_law()
    own = table[(table["dataset"] == "a") & (table["tokens"] == 10 * table["params"])]
    own = own.assign(**{"loss/a": 1 + 50 * own["flops_6nd"] ** -0.15})
    (fit,) = analysis.fit_law(own.assign(role=["fit"] * 3 + ["held_out"]), only_compute, "loss/a")
    assert fit["held_out"][0]["predicted"] == pytest.approx(own["loss/a"].iloc[-1], rel=1e-4)


def test_a_table_with_nothing_to_fit_is_refused():
    with pytest.raises(UserError, match="nowhere 'fit'"):
        analysis.fit_law(records_of_a_law().assign(role="held_out"), "over_training", "loss/a")


def test_what_is_not_finite_is_written_as_null(fits, tmp_path):
    unknown = analysis.FittedLaw(**fits[0] | {"intervals": {"E": (0.0, np.inf)}})
    analysis.write([unknown], tmp_path / "fits.json")
    written = json.loads((tmp_path / "fits.json").read_text(), parse_constant=pytest.fail)
    assert written["fits"][0]["intervals"]["E"] == [0.0, None]
