"""A testbed's runs are scored on tasks, resumably, and the scores become columns of the records."""

import dataclasses
import json
import shutil

import pytest

from scaling_jax import config as configs
from scaling_jax.config import LawsConfig, TestbedConfig
from scaling_jax.errors import UserError
from scaling_jax.evaluation import run_tasks
from scaling_jax.testbeds import grid, runner

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore:words. .* tokens need the data"),
]
TASKS = """\
name: own
tasks:
  cloze: {data: cloze.jsonl, type: language_modeling}
  choice: {data: choice.jsonl, type: multiple_choice}
  lost: {data: lost.jsonl, type: multiple_choice, chance: 0.5}
averages:
  both: [cloze, choice]
  three: [cloze, choice, lost]
"""
QUESTIONS = {
    "cloze": [{"context": "the cat sat", "continuation": end} for end in ("on", "up", "at")],
    "choice": [{"query": "the dog", "choices": ["sat", "xyz", "log"], "gold": n} for n in (0, 1)],
}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(write_words, tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("data"), QUESTIONS, TASKS)


def plan(data, **tasks):
    content = {
        "name": "small",
        "run": {
            "model": {"width": 8, "layers": 1, "heads": 2},
            "data": {"validation": ["words"], "folder": str(data)},
            "batch_size": 8,
            "optimizer": {"warmup_steps": 2},
            "evaluation": {"sequences": 8, "batch_size": 8, "bootstrap_samples": 10},
        },
        "sizes": {"s": {}},
        "grid": [
            {"role": "fit", "datasets": ["words"], "sizes": ["s"], "token_multipliers": [0.1]}
        ],
    }
    content["run"]["model"] |= {"vocabulary_size": 264, "sequence_length": 16}
    if tasks:
        content["run"]["evaluation"]["tasks"] = tasks
    return grid.expand(configs.build(TestbedConfig, content, source="small.yaml"))


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        out = tmp_path_factory.mktemp("testbed")
        runs = plan(folder, config=str(folder / "own.yaml"))
        with pytest.warns(UserWarning, match=r"lost.jsonl is not there: without lost"):
            list(runner.run_all(runs, out))
        return runs, out


def test_errors_and_their_bounds_are_columns_and_whole_averages_only(finished):
    runs, out = finished
    row = runner.write_table(runs, out).iloc[0]
    step = f"step-{runs[0].budget.steps:08d}"
    kept = runs[0].folder(out) / "evaluations" / "own" / step
    right = {}
    for task in ("cloze", "choice"):
        (file,) = kept.glob(f"{task}-*.json")
        outcomes = json.loads(file.read_text())["result"]["outcomes"]
        right[task] = [outcome["correct"] for outcome in outcomes]
        assert row[f"error/{task}"] == pytest.approx(1 - sum(right[task]) / len(right[task]))
        assert row[f"error/{task}/low"] <= row[f"error/{task}"] <= row[f"error/{task}/high"]
        assert row[f"error/{task}/low"] < row[f"error/{task}/high"]
    assert [len(each) for each in right.values()] == [3, 2]
    assert row["error/both"] == pytest.approx((row["error/cloze"] + row["error/choice"]) / 2)
    assert row["chance/cloze"] == 1
    assert row["chance/choice"] == pytest.approx(2 / 3)
    assert not {"error/three", "error/lost", "chance/both"} & set(row.index)


def test_a_finished_run_is_done_until_a_task_is_added(finished, folder, monkeypatch):
    runs, out = finished
    assert [done.now for done in runner.run_all(runs, out)] == [False]
    fewer = plan(folder, config=str(folder / "own.yaml"), only=["cloze"])
    assert runner.status(fewer[0], out).word == "done"
    (folder / "more.yaml").write_text(TASKS.replace("lost.jsonl", "choice.jsonl"))
    more = plan(folder, config=str(folder / "more.yaml"))
    assert runner.status(more[0], out).word == "trained"
    scored = []
    original = run_tasks.downstream.run

    def run(task, path, *rest):
        scored.append(path.name)
        return original(task, path, *rest)

    monkeypatch.setattr(run_tasks.downstream, "run", run)
    assert [done.now for done in runner.run_all(more, out)] == [True]
    assert scored == ["choice.jsonl"]
    assert "error/three" in runner.write_table(more, out)


def test_what_has_changed_is_scored_anew(finished, folder):
    runs, out = finished
    before = runner.write_table(runs, out).iloc[0]
    file = folder / "choice.jsonl"
    kept = file.read_text()
    try:
        flipped = [json.loads(line) for line in kept.splitlines()]
        flipped = [{**row, "gold": (row["gold"] + 1) % 3} for row in flipped]
        file.write_text("".join(json.dumps(row) + "\n" for row in flipped))
        assert runner.status(runs[0], out).word == "trained"
        with pytest.warns(UserWarning, match="without lost"):
            assert [done.now for done in runner.run_all(runs, out)] == [True]
        after = runner.write_table(runs, out).iloc[0]
    finally:
        file.write_text(kept)
    assert after["error/cloze"] == before["error/cloze"]
    assert after["error/choice"] != before["error/choice"]
    assert after["error/both"] != before["error/both"]
    assert runner.status(runs[0], out).word == "trained"
    with pytest.warns(UserWarning, match="without lost"):
        list(runner.run_all(runs, out))
    assert runner.write_table(runs, out).iloc[0]["error/both"] == before["error/both"]


@pytest.mark.filterwarnings("ignore:.*without lost")
def test_an_average_is_over_what_the_config_says_now(finished, folder, monkeypatch):
    _, out = finished
    (folder / "fewer.yaml").write_text(TASKS.replace("[cloze, choice]", "[cloze, lost]"))
    fewer = plan(folder, config=str(folder / "fewer.yaml"))
    with monkeypatch.context() as patch:
        patch.setattr(run_tasks.downstream, "run", lambda *_: pytest.fail("scored"))
        list(runner.run_all(fewer, out))
    columns = set(runner.write_table(fewer, out))
    assert {"error/cloze", "error/choice"} < columns
    assert "error/both" not in columns


def test_a_task_that_cannot_be_scored_is_warned_of_once(finished, folder):
    _, out = finished
    (folder / "long.jsonl").write_text(
        json.dumps({"query": "the", "choices": ["cat" * 9, "dog"], "gold": 0}) + "\n"
    )
    (folder / "long.yaml").write_text(TASKS.replace("lost.jsonl", "long.jsonl"))
    longer = plan(folder, config=str(folder / "long.yaml"))
    with pytest.warns(UserWarning, match=r"left out: lost: .*long.jsonl: question 0: 2\d tokens"):
        list(runner.run_all(longer, out))
    assert [done.now for done in runner.run_all(longer, out)] == [False]
    columns = set(runner.write_table(longer, out))
    assert "error/both" in columns
    assert not {"error/lost", "error/three"} & columns


def test_what_lies_elsewhere_now_is_taken_for_unchanged(finished, folder, tmp_path):
    runs, out = finished
    elsewhere = tmp_path / "copy"
    shutil.copytree(out, elsewhere)
    shutil.rmtree(runs[0].folder(elsewhere) / "checkpoints")
    moved = dataclasses.replace(runs[0].config.data, folder=str(tmp_path / "nowhere"))
    run = dataclasses.replace(runs[0], config=dataclasses.replace(runs[0].config, data=moved))
    found = run_tasks.read(run.config, runs[0].folder(elsewhere), run.budget.steps)
    assert found is not None
    assert set(found.tasks) == {"cloze", "choice"}


@pytest.mark.filterwarnings("ignore:.*without lost")
def test_a_damaged_report_is_named_and_made_anew(finished):
    runs, out = finished
    before = runner.write_table(runs, out)
    for report in runs[0].folder(out).glob("evaluations/own/*/report-*.json"):
        report.write_text(report.read_text().replace("0", "1", 1))
    with pytest.warns(UserWarning, match=r"report-\w+\.json: damaged and not used"):
        list(runner.run_all(runs, out))
    assert runner.write_table(runs, out).equals(before)


def test_tasks_do_not_change_which_run_it_is(folder):
    asked, alone = plan(folder, config=str(folder / "own.yaml")), plan(folder)
    assert asked[0].config.identity == alone[0].config.identity


def test_an_unknown_setting_of_the_tasks_names_the_nearest_one(folder):
    with pytest.raises(UserError, match=r"'evaluation.tasks.fodler' \(did you mean 'folder'"):
        plan(folder, config="quickstart", fodler="x")


@pytest.mark.parametrize(
    ("tasks", "complaint"),
    [
        ({"config": "quickstrat"}, "quickstrat"),
        ({"config": "own", "folder": "nowhere"}, "no such folder"),
        ({"config": "own", "only": ["clozes"]}, "unknown task 'clozes'"),
        ({"config": "quickstart"}, "holds no file of any task"),
    ],
)
def test_what_cannot_be_scored_is_said_before_training(folder, tmp_path, tasks, complaint):
    if tasks["config"] == "own":
        tasks = tasks | {"config": str(folder / "own.yaml")}
    runs = plan(folder, **tasks)
    with pytest.raises(UserError, match=complaint):
        list(runner.run_all(runs, tmp_path))
    assert not list(tmp_path.glob("runs/*/checkpoints"))


def test_the_table_for_reading_has_the_errors_that_laws_are_fitted_to(finished):
    runs, out = finished
    table = runner.brief(runner.write_table(runs, out), LawsConfig(errors=("both",)))
    assert [name for name in map(str, table) if "/" in name] == ["loss/words", "error/both"]
