"""What the commands print, and how they end on wrong input."""

import json
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from scaling_jax import cli, laws

TRUTH = {"E": 1.7, "a": 150.0, "b": 200.0, "eta": 0.13}


@pytest.fixture
def runs_csv(tmp_path):
    params, multiplier = (
        part.ravel() for part in np.meshgrid([1e7, 3e7, 1e8, 3e8], [5.0, 20.0, 80.0])
    )
    table = pd.DataFrame({"params": params, "tokens": params * multiplier})
    table["loss/val"] = laws.FORMS["over_training"].curve(
        TRUTH, params=params, tokens=params * multiplier
    )
    path = tmp_path / "runs.csv"
    table.to_csv(path, index=False)
    return path


def call(monkeypatch, capsys, *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    monkeypatch.setattr(sys, "argv", ["scaling-jax", *map(str, words)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_fit_prints_the_law_and_writes_it(monkeypatch, capsys, runs_csv, tmp_path):
    out, plots = tmp_path / "fit.json", tmp_path / "plots"
    words = ("fit", runs_csv, "--out", out, "--plots", plots)
    code, printed, _ = call(monkeypatch, capsys, *words)
    assert code == 0
    measured = laws.coverage(pd.read_csv(runs_csv), "over_training", "loss/val")
    held = f"90% intervals held {measured.covered:.0%} of {measured.count} larger runs"
    assert f"at {len(measured.cuts)} compute cuts inside these runs, {held}" in printed
    assert {path.name for path in plots.rglob("*.png")} >= {"prediction.png", "influence.png"}
    (fitted,) = json.loads(out.read_text())["fits"]
    assert fitted["parameters"] == pytest.approx(TRUTH, rel=1e-4)
    assert "eta" in printed
    assert "0.13" in printed


def test_fit_says_when_the_intervals_cannot_be_measured(monkeypatch, capsys, runs_csv):
    pd.read_csv(runs_csv)[:8].to_csv(runs_csv, index=False)
    code, printed, _ = call(monkeypatch, capsys, "fit", runs_csv)
    assert code == 0
    assert "the intervals could not be measured on these runs" in printed


def test_predict_prints_the_value_and_its_interval(monkeypatch, capsys, runs_csv, tmp_path):
    plot = tmp_path / "fan.svg"
    words = ("predict", runs_csv, "--params", "1e9", "--tokens", "2e10", "--plot", plot)
    code, printed, _ = call(monkeypatch, capsys, *words)
    assert plot.read_text().startswith("<?xml")
    expected = laws.FORMS["over_training"].curve(TRUTH, params=1e9, tokens=2e10)
    assert code == 0
    assert f"loss/val: {float(expected):.5g}, 90% interval" in printed


def test_predict_from_a_table_with_other_names_and_units(monkeypatch, capsys, runs_csv, tmp_path):
    table = pd.read_csv(runs_csv)
    theirs = pd.DataFrame({"N": table["params"] / 1e9, "D": table["tokens"]})
    theirs["final"] = table["loss/val"]
    theirs.to_csv(tmp_path / "theirs.csv", index=False)
    at = ("--params", "1e9", "--tokens", "2e10")
    names = ("--columns.N", "params", "--columns.D", "tokens", "--columns.final", "loss/val")
    words = ("predict", tmp_path / "theirs.csv", *at, *names, "--scale.N", "1e9")
    code, printed, _ = call(monkeypatch, capsys, *words)
    assert code == 0
    assert printed == call(monkeypatch, capsys, "predict", runs_csv, *at)[1]


def test_predict_says_which_runs_carry_it(monkeypatch, capsys, runs_csv):
    words = ("predict", runs_csv, "--params", "1e9", "--tokens", "2e10", "--influence")
    code, printed, _ = call(monkeypatch, capsys, *words)
    assert code == 0
    rows = printed[printed.index("percent_per_percent") :].splitlines()[1:]
    moves = [float(row.split()[-1]) for row in rows]
    assert len(moves) == len(pd.read_csv(runs_csv))
    assert moves == sorted(moves, key=abs, reverse=True)
    # Were every measured loss 1 % higher, so would be the prediction.
    assert sum(moves) == pytest.approx(1, abs=1e-3)


def test_predict_an_error_from_the_loss(monkeypatch, capsys, runs_csv):
    table = pd.read_csv(runs_csv)
    table["error/task"] = 0.75 / (1 + np.exp((2.2 - table["loss/val"]) / 0.9))
    table.to_csv(runs_csv, index=False)
    at = ("--params", "1e9", "--tokens", "2e10", "--target", "error/task")
    words = (*at, "--law", "sigmoid", "--loss", "loss/val", "--chance", "0.75")
    code, printed, _ = call(monkeypatch, capsys, "predict", runs_csv, *words)
    loss = laws.FORMS["over_training"].curve(TRUTH, params=1e9, tokens=2e10)
    expected = float(0.75 / (1 + np.exp((2.2 - loss) / 0.9)))
    assert code == 0
    assert f"loss/val: {float(loss):.5g}\nerror/task: {expected:.4g}" in printed


def test_coverage_prints_every_cut_and_all(monkeypatch, capsys, runs_csv):
    code, printed, _ = call(monkeypatch, capsys, "coverage", runs_csv, "--level", "0.8")
    assert code == 0
    assert "80% intervals" in printed
    lines = printed[printed.index("cut_flops") :].splitlines()
    cuts, (_, count, covered, *_) = lines[1:-1], lines[-1].split()
    assert len(cuts) >= 2
    assert int(count) == sum(int(line.split()[2]) for line in cuts)
    assert float(covered) > 0.8


def test_optimum_prints_the_price_of_smaller_models(monkeypatch, capsys, runs_csv):
    for goal in (("--flops", "1e21"), ("--loss", "2.5", "--inference_tokens", "1e12")):
        code, printed, _ = call(monkeypatch, capsys, "optimum", runs_csv, *goal)
        assert code == 0
        table = printed[printed.index("params_ratio") :].splitlines()
        at = table[0].split().index("training_ratio")
        prices = [float(line.split()[at]) for line in table[1:]]
        assert prices[0] == 1
        assert prices == sorted(prices)
        # alpha = beta = 2 eta: half the params, 0.5 (2 - 2^(2 eta))^(-1 / 2 eta) of the compute.
        half = 0.5 * (2 - 2**0.26) ** (-1 / 0.26)
        assert prices[2] == pytest.approx(half, rel=1e-3)


def test_compare_two_datasets_of_one_table_or_of_two(monkeypatch, capsys, runs_csv, tmp_path):
    first = pd.read_csv(runs_csv)
    second = first.assign(**{"loss/val": 1.7 + 1.2 * (first["loss/val"] - 1.7)})
    second.to_csv(tmp_path / "other.csv", index=False)
    both = pd.concat([first.assign(dataset="web"), second.assign(dataset="books")])
    both.to_csv(tmp_path / "both.csv", index=False)
    at = ("--params", "1e9", "--tokens", "2e10")
    calls = {
        "a: web\nb: books": (tmp_path / "both.csv", "--datasets", "web", "books"),
        f"a: {runs_csv}: data": (runs_csv, tmp_path / "other.csv"),
    }
    for label, words in calls.items():
        code, printed, _ = call(monkeypatch, capsys, "compare", *words, *at)
        assert code == 0
        assert printed.startswith(label)
        (line,) = (line for line in printed.splitlines() if "ratio" in line)
        ratio = float(line.split()[-3])
        assert ratio == pytest.approx(1.2 ** (-1 / TRUTH["eta"]), rel=1e-3)
    words = ("compare", tmp_path / "both.csv", "--datasets", "web", "book", *at)
    code, _, err = call(monkeypatch, capsys, *words)
    assert (code, err.count("\n")) == (2, 1)
    assert "did you mean 'books'?" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:2], "2 rows with 'loss/val' are too few"),
        (lambda t: pd.concat([t[:1]] * 5), "have 1 different params, tokens, which are too few"),
        (
            lambda t: t.assign(**{"loss/val": -1.0}),
            "row 1, column 'loss/val': -1.0 is not a finite",
        ),
        (lambda t: t.assign(params=np.nan), "row 1, column 'params'"),
        (lambda t: t.assign(run="same"), "row 2 repeats the key"),
        (lambda t: t.drop(columns="tokens"), "column 'tokens' is missing"),
        (lambda t: t.drop(columns="loss/val"), "no loss/<set> or error/<task> column"),
        (lambda t: t.assign(dataset=["a"] * 6 + ["b"] * 6), "give --dataset: a, b"),
    ],
)
def test_a_faulty_table_is_one_line(monkeypatch, capsys, runs_csv, change, message):
    change(pd.read_csv(runs_csv)).to_csv(runs_csv, index=False)
    words = ("predict", runs_csv, "--params", "1e9", "--tokens", "2e10")
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[t["params"] == 1e7], "all rows have params 1e+07"),
        (lambda t: t.assign(**{"loss/val": t["loss/val"].to_numpy()[::-1]}), "rises with compute"),
        (lambda t: pd.concat([t, t[:1]]), "1 rows repeat another one, number 13 the first"),
        (lambda t: t.assign(**{"loss/val": t["loss/val"].where(t.index > 0)}), "1 of 12 rows lack"),
        (lambda t: t[:3], "not identified: 3 points for 4 parameters"),
    ],
)
def test_a_doubtful_table_is_fitted_with_a_warning(monkeypatch, capsys, runs_csv, change, message):
    change(pd.read_csv(runs_csv)).to_csv(runs_csv, index=False)
    words = ("predict", runs_csv, "--params", "1e9", "--tokens", "2e10")
    code, printed, _ = call(monkeypatch, capsys, *words)
    assert code == 0
    assert f"warning: {message}" in printed or f"warning: loss/val {message}" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("fit", "no.csv"), "no.csv: no such records table"),
        (("fti",), 'Did you mean "fit"'),
        (("fit", "RUNS", "--lwa", "kaplan"), "--law"),
        (("fit", "RUNS", "--law", "chinchila"), "did you mean 'chinchilla'"),
        (("fit", "RUNS", "--target", "loss/vla"), "did you mean 'loss/val'"),
        (("fit", "RUNS", "--dataset", "c4"), "no dataset 'c4'"),
        (("fit", "RUNS", "--level", "95"), "between 0 and 1"),
        (("fit", "RUNS", "--target", "params"), "'params' is no loss/ or error/ column"),
        (("fit", "RUNS", "--columns.parms", "params"), "did you mean 'params'"),
        (("coverage", "RUNS", "--cuts", "1"), "leaves 0 runs below"),
        (("optimum", "RUNS"), "either --flops or --loss"),
        (("optimum", "RUNS", "--loss", "1"), "reaches no loss of 1"),
        (("compare", "RUNS", "--params", "1e9", "--tokens", "2e10"), "give --datasets"),
        (("next", "RUNS", "--params", "1e9", "--tokens", "2e10", "--budget_flops", "1"), "no cand"),
        (("predict", "RUNS", "--params", "1e9"), "--tokens"),
        (("predict", "RUNS", "--params", "-1", "--tokens", "1e9"), "params must be finite"),
        (("predict", "RUNS", "--params", "x", "--tokens", "1e9"), "--params"),
        (("train", "no.yaml"), "no.yaml: no such config file"),
        (("train", "runs/python_code.yaml", "model.widht=3"), "did you mean 'width'"),
        (("train", "runs/python_code.yaml", "data.folder=nowhere"), "nowhere"),
        (("testbed", "status", "testbeds/quickstart.yaml", "x=1"), "unknown key 'x'"),
        (("evaluate", "nowhere"), "nowhere"),
        (("data", "prepare"), "at least one task"),
        (("data", "prepare", "python_cod"), "did you mean 'python_code'"),
        (("data", "inspect", "nowhere"), "nowhere/index.json: not found"),
        (("quickstart", "--out", "HERE", "--fresh"), "will not remove it"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    monkeypatch, capsys, runs_csv, tmp_path, words, message
):
    monkeypatch.chdir(tmp_path)
    given = {"RUNS": runs_csv, "HERE": tmp_path}
    before = sorted(tmp_path.rglob("*"))
    code, _, err = call(monkeypatch, capsys, *(given.get(word, word) for word in words))
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


COLUMN = """
name: column
run:
  model: {layers: 1, heads: 2, vocabulary_size: 264, sequence_length: 32}
  data: {validation: [a]}
  batch_size: 4
  optimizer: {schedule: warmup_stable_decay}
sizes: {s: {model: {width: 16}}}
grid: [{role: fit, datasets: [a], sizes: [s], token_multipliers: [10, 20, 40]}]
"""


def test_status_says_what_branches_save(monkeypatch, capsys, tmp_path):
    """0.8 x 40 of the trunk and 0.2 x (10 + 20 + 40) of the decays, where separate runs take 70."""
    (tmp_path / "column.yaml").write_text(COLUMN)
    words = ("testbed", "status", tmp_path / "column.yaml", "--out", tmp_path)
    code, printed, _ = call(monkeypatch, capsys, *words)
    assert code == 0
    assert "branches save 34%" in printed  # 1 - 46 / 70
    rows = [line.split() for line in printed.splitlines() if line.split()[:1] == ["a-s-m20"]]
    assert "a-s-m10" in rows[0]
    code, printed, _ = call(monkeypatch, capsys, *words, "run.optimizer.schedule=cosine")
    assert code == 0
    assert "branches save" not in printed


def test_help_is_there_at_once():
    started = time.perf_counter()
    command = [sys.executable, "-c", "from scaling_jax.cli import main; main()", "--help"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "quickstart" in printed
    assert time.perf_counter() - started < 5  # about 0.3 s; a floor for loaded machines


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("scaling_jax.cli", ("jax", "numpy", "pandas", "tensorflow")),
        ("scaling_jax.laws", ("tensorflow", "seqio", "flax", "matplotlib")),
        ("scaling_jax.training.loop", ("tensorflow", "seqio")),
    ],
)
def test_heavy_packages_stay_out(module, absent):
    script = f"import sys, {module}; print([n for n in {absent!r} if n in sys.modules])"
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
