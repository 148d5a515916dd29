"""The notebooks: clean in the tree, and right when they are run from top to bottom."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from scaling_jax.testbeds.reproduce import gadre2024_published as paper

FOLDER = Path(__file__).parents[2] / "notebooks"
DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "gadre"
NAMES = ("explore_testbed", "fit_your_runs", "plan_next_run", "reproduce_paper")
REPOSITORY = "scaling-jax/scaling_jax"
COLAB = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks"
SECONDS_A_CELL = 300
# As if the package that draws menus were not installed.
WITHOUT_MENUS = 'sys.modules["ipywidgets"] = None'

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the released testbed is not here")


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


class Executed:
    """A notebook that was run: what each cell put out, by the cell's id."""

    def __init__(self, notebook: dict[str, Any]):
        self.outputs = {cell["id"]: cell["outputs"] for cell in code_cells(notebook)}
        widgets = notebook["metadata"].get("widgets", {}).values()
        states = [state for kind in widgets for state in kind["state"].values()]
        # What menus draw lies in the state of their output area.
        self.menus = [
            output
            for state in states
            if state["model_name"] == "OutputModel"
            for output in state["state"]["outputs"]
        ]

    def text(self, cell: str) -> str:
        """What a cell printed."""
        return printed(self.outputs[cell])

    def table(self, cell: str) -> list[list[float]]:
        """The numbers in the rows of the table that a cell shows."""
        (html,) = (out["data"]["text/html"] for out in self.outputs[cell] if "data" in out)
        rows = (re.findall(r"<td>([\d.e+-]+)</td>", row) for row in html.split("<tr"))
        return [[float(number) for number in row] for row in rows if row]

    def figures(self, cell: str) -> int:
        return count_figures(self.outputs[cell])


def printed(outputs: list[dict[str, Any]]) -> str:
    return "".join(out["text"] for out in outputs if out.get("name") == "stdout")


def count_figures(outputs: list[dict[str, Any]]) -> int:
    return sum("image/png" in out.get("data", {}) for out in outputs)


def numbers(text: str, pattern: str) -> list[float]:
    """The groups of `pattern` in `text`, as numbers."""
    match = re.search(pattern, text)
    assert match, f"no {pattern} in {text}"
    return [float(group) for group in match.groups()]


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Runs a notebook in a folder of its own, with this interpreter; an error in a cell raises."""
    nbformat = pytest.importorskip("nbformat", reason="needs the extra 'notebooks'")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra 'notebooks'")
    pytest.importorskip("ipykernel", reason="needs the extra 'notebooks'")
    # One device, as where users are.
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("SCALING_JAX_DATA", str(DATA.resolve()))

    def run(name: str, *, before: str = "") -> Executed:
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        first = f"import sys\n\nassert sys.executable == {sys.executable!r}\n{before}"
        notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
        place = {"metadata": {"path": str(tmp_path)}}
        client = nbclient.NotebookClient(
            notebook, kernel_name="python3", timeout=SECONDS_A_CELL, resources=place
        )
        client.execute()
        found = Executed(notebook)
        every = [*found.menus, *(out for outs in found.outputs.values() for out in outs)]
        assert [out for out in every if out["output_type"] == "error"] == []
        return found

    return run


def test_these_are_all():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_was_computed_is_in_the_tree(name):
    notebook = read(name)
    for cell in code_cells(notebook):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert "widgets" not in notebook["metadata"]
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", NAMES)
def test_colab_is_a_click_away_and_installs_what_is_missing(name):
    notebook = read(name)
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown"
    assert f"]({COLAB}/{name}.ipynb)" in "".join(first["source"])
    install = "".join(code_cells(notebook)[0]["source"])
    assert f"%pip install --quiet git+https://github.com/{REPOSITORY}" in install
    assert 'find_spec("scaling_jax") is None' in install


@pytest.mark.slow
def test_fit_your_runs_predicts_what_the_made_up_law_says(execute):
    found = execute("fit_your_runs")
    value, low, high = numbers(found.text("prediction"), r"loss/val: (\S+) \((\S+) to (\S+)\)")
    truth = made_up_loss(6.9e9, 138e9)
    assert value == pytest.approx(truth, rel=0.02)
    assert low < truth < high
    error, low, high = numbers(found.text("error"), r"error/tasks: (\S+) \((\S+) to (\S+)\)")
    assert error == pytest.approx(0.75 - 1.4 * 2.71828 ** (-0.7 * truth), rel=0.03)
    assert low < error < high
    share, count = numbers(found.text("coverage"), r"(\d+)% of (\d+) predictions")
    assert share >= 80
    assert count >= 20
    assert len(found.table("measured")) == 2
    drawn = ("residuals", "coverage", "fan", "influence", "error")
    assert [found.figures(cell) for cell in drawn] == [1] * 5


@pytest.mark.slow
def test_plan_next_run_narrows_the_interval_within_the_budget(execute):
    found = execute("plan_next_run")
    before, after = numbers(found.text("design"), r"half width: (\S+)% before, (\S+)% after")
    assert after < 0.8 * before
    spent, budget = numbers(found.text("design"), r"compute: (\S+) of (\S+) FLOPs")
    assert 0 < spent <= budget == 2e19
    old, new = (
        numbers(found.text("train"), rf"{name}: \S+ \((\S+) to (\S+)\)")
        for name in ("before", "after")
    )
    assert new[1] - new[0] < old[1] - old[0]
    (told,) = numbers(found.text("train"), r"made the runs: (\S+)")
    assert told == pytest.approx(made_up_loss(6.9e9, 138e9), abs=5e-4)
    assert old[0] < told < old[1]
    assert new[0] < told < new[1]
    of_optimum, *smaller = found.table("iso_loss")
    assert of_optimum[5] == 1
    assert all(row[5] > 1 for row in smaller)
    assert found.figures("now") == found.figures("design_figure") == 1


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("menus", [True, False])
def test_explore_testbed_shows_all_runs_with_and_without_menus(execute, menus):
    if menus:
        pytest.importorskip("ipywidgets", reason="needs the extra 'notebooks'")
    found = execute("explore_testbed", before="" if menus else WITHOUT_MENUS)
    assert found.text("data") == "104 runs, 8 validation losses, 46 tasks\n"
    assert sum(map(sum, found.table("grid"))) == 104
    drawn = [found.figures(cell) for cell in ("loss", "map", "error")]
    assert drawn == [0 if menus else 1] * 3
    assert count_figures(found.menus) == (3 if menus else 0)
    compared = printed(found.menus) if menus else found.text("compare")
    reference = pd.read_csv(DATA / "reference_predictions.csv")
    largest = reference[reference["model"].eq("open_lm_7b") & reference["eval_loss"].eq("c4_val")]
    for train in ("rpj", "rw_original"):
        (measured,) = numbers(compared, rf"measured: {train} (\S+)")
        theirs = largest[largest["train"] == train]["loss_true"].iloc[0]
        assert measured == pytest.approx(theirs, abs=5e-4)


@needs_data
@pytest.mark.slow
def test_reproduce_paper_finds_the_papers_numbers(execute):
    found = execute("reproduce_paper")
    printed_rows = [list(row) for by_fit in paper.TABLE2.values() for row in by_fit.values()]
    for ours, theirs in zip(found.table("table2"), printed_rows, strict=True):
        assert ours == pytest.approx(theirs, abs=0.0101)
    (largest,) = numbers(found.text("table2_difference"), r"30 numbers\n.*: (\S+) percentage")
    assert largest < 0.01
    best = found.table("table6")[-1]
    assert best[:3] == pytest.approx(list(paper.OPTIMAL_MULTIPLIER.values()), abs=0.01)
    (largest,) = numbers(found.text("cells"), r"39 cells, .*: (\S+) percentage")
    assert largest <= 0.05
    (ranks,) = numbers(found.text("cells"), r"rank correlation: ([\d.]+)")
    assert round(ranks, 2) == paper.RANK_CORRELATION
    held, count = numbers(found.text("beyond_numbers"), r"(\d+) of (\d+) intervals")
    # The loss of 6 runs, and their error on two splits of the tasks.
    assert count == 18
    assert held >= 0.9 * count
    assert all(found.figures(cell) == 1 for cell in ("figure_2", "figure_5", "beyond"))


def made_up_loss(params: float, tokens: float) -> float:
    """Eq. 4 of Gadre et al. 2024, with the parameters of the notebooks' made-up runs."""
    multiplier, flops = tokens / params, 6 * params * tokens
    return 1.8 + (200 * multiplier**0.135 + 330 * multiplier**-0.135) * flops**-0.135
