"""The rule gives the 17 tasks of the paper; laws of made tasks are recovered; verdicts follow."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scaling_jax import laws, records
from scaling_jax.errors import UserError
from scaling_jax.evaluation import tasks as task_configs
from scaling_jax.report.margin_plot import margin_plot
from scaling_jax.testbeds import predictability, published

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "gadre"
LAW = {"E": 1.0, "a": 40.0, "b": 60.0, "eta": 0.15}
METHOD = predictability.Method(law="sigmoid")
CHANCE = {"easy": 1.0, "quiz": 0.75, "hard": 0.5}


def made() -> pd.DataFrame:
    """Eight small runs and one large one on a known law; two tasks fall with the loss, one not."""
    params, multiplier = (part.ravel() for part in np.meshgrid([2e4, 4e4, 8e4, 16e4], [10.0, 40.0]))
    params, multiplier = np.append(params, 64e4), np.append(multiplier, 20.0)
    loss = laws.FORMS["over_training"].curve(LAW, params=params, tokens=params * multiplier)
    table = pd.DataFrame({"params": params, "tokens": params * multiplier, "dataset": "text"})
    table["run"] = [f"run {number}" for number in range(9)]
    table["role"] = ["fit"] * 8 + ["held_out"]
    table["model"] = [f"{size:g}" for size in params]
    table["loss/text"] = loss
    table["error/easy"] = 1.0 / (1 + np.exp((1.8 - loss) / 0.6))
    table["error/quiz"] = 0.75 / (1 + np.exp((2.0 - loss) / 0.5))
    table["error/hard"] = 0.5
    return records.check(table)


@pytest.fixture(scope="module")
def released():
    if not DATA.is_dir():
        pytest.skip(f"the release of Gadre et al. 2024 is not there: {DATA}")
    return published.gadre2024(DATA / "exp_data"), published.gadre2024_tasks(DATA / "exp_data")


def test_the_papers_rule_gives_the_papers_17_tasks(released):
    """`average_17` of the packaged config was written down from the paper's list."""
    table, tasks = released
    runs = table[table["model"] == published.SPLIT_MODEL]
    found = predictability.above_chance(runs, tasks["chance_error"].to_dict())
    assert set(found) == set(task_configs.load("gadre2024").averages["average_17"])
    assert len(found) == 17


def test_the_packaged_config_says_what_guessing_gets_as_the_release_does(released):
    _, tasks = released
    config = task_configs.load("gadre2024").tasks
    for task, error in tasks["chance_error"].items():
        assert config[str(task)].chance == pytest.approx(1 - error)


def test_noiseless_tasks_are_predicted_and_one_at_chance_is_not_tried():
    found = predictability.by_task(made(), CHANCE, METHOD).set_index("task")
    assert list(found.index)[-1] == "hard"
    verdicts = {"easy": "predicted", "quiz": "predicted", "hard": "near chance"}
    assert found["verdict"].to_dict() == verdicts
    assert (found.loc[["easy", "quiz"], "off"].abs() < 1e-3).all()
    assert found["predicted"].isna().to_dict() == {"easy": False, "quiz": False, "hard": True}
    best = made()["error/quiz"][:8].min()
    assert found.loc["quiz", "above_chance"] == pytest.approx(0.75 - best)


def test_off_is_relative_to_what_was_measured():
    (found,) = predictability.by_task(made(), {"easy": 1.0}, METHOD).to_dict("records")
    for name, value in (("off", "predicted"), ("off_low", "low"), ("off_high", "high")):
        assert found[name] == pytest.approx(found[value] / found["measured"] - 1)
    assert found["low"] < found["measured"] < found["high"]


def test_a_run_that_breaks_the_law_is_missed():
    table = made()
    table.loc[8, "error/easy"] = 0.99
    found = predictability.by_task(table, CHANCE, METHOD).set_index("task")
    assert found.loc["easy", "verdict"] == "missed"
    assert found.loc["quiz", "verdict"] == "predicted"


def test_off_by_more_than_the_tolerance_inside_the_interval_is_uncertain():
    table = made()
    method = predictability.Method(law="sigmoid", tolerance=1e-9)
    table.loc[table["role"] == "held_out", "error/easy"] *= 1.001
    assert set(predictability.by_task(table, {"easy": 1.0}, method)["verdict"]) == {"uncertain"}


def test_the_largest_held_out_run_that_has_the_task_is_predicted():
    table = made()
    table.loc[7, "role"] = "held_out"
    whole = predictability.by_task(table, {"easy": 1.0}, METHOD).iloc[0]
    assert whole["measured"] == table["error/easy"][8]
    table.loc[8, "error/easy"] = np.nan
    smaller = predictability.by_task(table, {"easy": 1.0}, METHOD).iloc[0]
    assert smaller["measured"] == table["error/easy"][7]
    assert smaller["verdict"] == "predicted"
    table.loc[7, "error/easy"] = np.nan
    found = predictability.by_task(table, {"easy": 1.0, "quiz": 0.75}, METHOD).set_index("task")
    assert found["verdict"].to_dict() == {"easy": "not measured", "quiz": "predicted"}


def test_without_held_out_runs_tasks_are_above_chance_or_not():
    found = predictability.by_task(made()[:8], CHANCE).set_index("task")["verdict"]
    assert dict(found) == {"easy": "above chance", "quiz": "above chance", "hard": "near chance"}


def test_the_runs_of_a_size_decide_in_any_role():
    largest = made()["model"][8]
    found = predictability.by_task(made(), CHANCE, model=largest).set_index("task")
    assert found.loc["quiz", "best"] == made()["error/quiz"][8]
    with pytest.raises(UserError, match="no run of model '1b'"):
        predictability.by_task(made(), CHANCE, model="1b")


def test_a_sweep_takes_the_mean_over_the_tasks_above_each_margin():
    table = made()
    above = {task: CHANCE[task] - table[f"error/{task}"][:8].min() for task in CHANCE}
    margins = (-0.05, 0.01, (above["easy"] + above["quiz"]) / 2, 0.99)
    found = predictability.sweep(table, CHANCE, margins=margins)
    assert list(found["tasks"]) == [3, 2, 1]  # above the last margin there is none
    assert list(found["excluded"]) == [0, 1, 2]
    larger = max(("easy", "quiz"), key=lambda task: above[task])
    means = [list(CHANCE), ["easy", "quiz"], [larger]]
    expected = [table[[f"error/{task}" for task in tasks]].mean(axis=1)[8] for tasks in means]
    np.testing.assert_allclose(found["measured"], expected)


def test_the_sweep_is_drawn_where_its_numbers_are():
    swept = predictability.sweep(made(), CHANCE, margins=(0.0, 0.05))
    left, right = margin_plot(swept).axes
    np.testing.assert_allclose(np.asarray(left.lines[0].get_ydata()), 100 * swept["off"])
    np.testing.assert_allclose(np.asarray(right.lines[0].get_ydata()), swept["tasks"])


def test_tasks_that_no_run_has_are_refused():
    with pytest.raises(UserError, match="no run has an error of these tasks: copa"):
        predictability.by_task(made(), {"copa": 0.5})
