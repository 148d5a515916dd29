"""`scaling-jax predictable TABLE`, as a user calls it."""

import numpy as np
import pandas as pd
import pytest

from scaling_jax import cli, laws, records


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Six small runs and a larger one; `quiz` falls with the loss, `hard` is guessed."""
    params = np.array([2e4, 2e4, 4e4, 4e4, 8e4, 8e4, 32e4])
    tokens = params * np.array([10, 40, 10, 40, 10, 40, 20])
    law = {"E": 1.0, "a": 40.0, "b": 60.0, "eta": 0.15}
    loss = laws.FORMS["over_training"].curve(law, params=params, tokens=tokens)
    content = {"params": params, "tokens": tokens, "dataset": "text", "loss/text": loss}
    content |= {"error/quiz": 0.75 - 1.5 * np.exp(-0.8 * loss), "error/copa": 0.49}
    made = pd.DataFrame(content | {"role": ["fit"] * 6 + ["held_out"], "chance/quiz": 0.75})
    path = tmp_path_factory.mktemp("tables") / "records.csv"
    records.write(made, path)
    return path


@pytest.fixture
def predictable(table, monkeypatch, capsys):
    """Calls the command; its exit code and what it printed."""

    def call(*words, path=table):
        monkeypatch.setattr("sys.argv", ["scaling-jax", "predictable", *map(str, (path, *words))])
        code = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        return code, *capsys.readouterr()

    return call


def test_chance_comes_from_the_table_and_from_a_config(predictable, tmp_path):
    out, plot = tmp_path / "tasks.csv", tmp_path / "sweep.png"
    code, printed, _ = predictable("--tasks", "gadre2024", "--out", out, "--plot", plot)
    assert code == 0
    assert "above chance by 0.1: 1 of 2 tasks: quiz" in printed
    verdicts = pd.read_csv(out).set_index("task")["verdict"]
    assert verdicts.to_dict() == {"quiz": "predicted", "copa": "near chance"}
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--model", "1b"), "no run of model '1b'"),
        (("--loss", "loss/tex"), "no column 'loss/tex' (did you mean 'loss/text'?)"),
        (("--law", "over_training"), 'Choose from: "exponential", "sigmoid"'),
        (("--level", "90"), "level is between 0 and 1, not 90"),
        (("--margin", "5"), "margin is from 0 to below 1, not 5"),
        (("--margin", "nan"), "margin is from 0 to below 1, not nan"),
        (("--tolerance", "-1"), "tolerance is above 0, such as 0.1, not -1"),
        (("--plot", "m.xyz"), "m.xyz: a figure's name ends in one of .png, .pdf, .svg"),
        (("--tasks", "gadre2042"), "did you mean 'evaluations/gadre2024.yaml'?"),
    ],
)
def test_mistakes_are_one_line(predictable, words, complaint):
    code, _, errors = predictable(*words)
    assert code == 2
    assert complaint in errors
    assert errors.count("\n") == 1


def test_options_are_looked_at_before_the_table(predictable, tmp_path):
    _, _, errors = predictable("--margin", "5", path=tmp_path / "none.csv")
    assert "margin is from 0" in errors


def test_a_table_that_does_not_say_what_runs_were_trained_on(predictable, table, tmp_path):
    path = tmp_path / "bare.csv"
    pd.read_csv(table).drop(columns="dataset").to_csv(path, index=False)
    code, _, errors = predictable(path=path)
    assert code == 2
    assert "it needs columns dataset and loss/DATASET" in errors
    assert predictable("--loss", "loss/text", path=path)[0] == 0


def test_a_table_that_does_not_say_what_guessing_gets(predictable, table, tmp_path):
    path = tmp_path / "bare.csv"
    pd.read_csv(table).drop(columns="chance/quiz").to_csv(path, index=False)
    code, _, errors = predictable(path=path)
    assert code == 2
    assert "has no column error/TASK with chance/TASK" in errors
