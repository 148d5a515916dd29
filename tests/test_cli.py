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
    out = tmp_path / "fit.json"
    code, printed, _ = call(monkeypatch, capsys, "fit", runs_csv, "--out", out)
    assert code == 0
    (fitted,) = json.loads(out.read_text())["fits"]
    assert fitted["parameters"] == pytest.approx(TRUTH, rel=1e-4)
    assert "eta" in printed
    assert "0.13" in printed


def test_predict_prints_the_value_and_its_interval(monkeypatch, capsys, runs_csv):
    words = ("predict", runs_csv, "--params", "1e9", "--tokens", "2e10")
    code, printed, _ = call(monkeypatch, capsys, *words)
    expected = laws.FORMS["over_training"].curve(TRUTH, params=1e9, tokens=2e10)
    assert code == 0
    assert f"loss/val: {float(expected):.4f}, 90% interval" in printed


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
        (("quickstart", "grid=[]", "--out", "HERE", "--fresh"), "will not remove it"),
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
