"""Loaders of released testbeds: on a made-up release, and on the real ones where they are."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from scaling_jax import cli, records
from scaling_jax.errors import UserError
from scaling_jax.testbeds import published

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
GADRE, CHINCHILLA = SHARED / "gadre", SHARED / "chinchilla_besiroglu"
KYO, LADDER = SHARED / "chinchilla_kyo", SHARED / "olmo_ladder"
needs_gadre = pytest.mark.skipif(not GADRE.is_dir(), reason="the released testbed is not here")
needs_chinchilla = pytest.mark.skipif(not CHINCHILLA.is_dir(), reason="the points are not here")
needs_kyo = pytest.mark.skipif(not KYO.is_dir(), reason="the points are not here")
needs_ladder = pytest.mark.skipif(not LADDER.is_dir(), reason="the ladder's logs are not here")

TASKS = {"easy": 25, "hard": 25, "cloze": 0}
# Accuracies of the 0.011B and the 0.154B run: "easy" is learnt, "hard" is not, "cloze" just so.
ACCURACIES = {
    "d=96_l=8_h=4": {"easy": 0.24, "hard": 0.25, "cloze": 0.0},
    "d=576_l=24_h=8": {"easy": 0.60, "hard": 0.34, "cloze": 0.11},
}
PARAMS = {"d=96_l=8_h=4": 10_000_000, "d=576_l=24_h=8": 150_000_000}
PATHS = (
    "val/openlm/shard_0.tar",
    "val/c4_val/shard-0.tar",
    "val/paloma_c4_en/0.tar",
    "val/paloma_dolma_100_programing_languages/0.tar",
    "val/paloma_falcon-refinedweb/0.tar",
    "val/paloma_ptb/0.tar",
    "val/paloma_redpajama/0.tar",
    "val/de-en/val_de-en_100.tar",
)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def result(path: str, loss: float) -> dict[str, Any]:
    bounds = {"loss_sequences_lower_95": loss - 0.1, "loss_sequences_upper_95": loss + 0.1}
    return {"loss": loss, "val_data": [path], **bounds}


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = tmp_path / "exp_data"
    for model, accuracies in ACCURACIES.items():
        name, params = f"c4-{model}-1.0", PARAMS[model]
        write(
            folder / "models" / f"{name}.json",
            {
                "name": name,
                "dataset_name": "c4",
                "hyperparameters": {
                    "model": f"configs/{model}.json",
                    "params": params,
                    "tokens": 20 * params,
                },
                "results": [result(path, 3.0 + i) for i, path in enumerate(PATHS)],
            },
        )
        scores = {"eval_metrics": {"icl": accuracies}}
        write(folder / "evals" / f"evaluation_{name}_heavy.json", scores)
    header = "Eval Task,Task Category,Task Type,#shots,#datapoints,Random baseline"
    rows = [f"{task},words,choice,10,100,{chance}" for task, chance in TASKS.items()]
    (folder / "eval_metadata.csv").write_text("\n".join([header, *rows, "unscored,x,y,0,1,0"]))
    key = "d=96_l=8_h=4-8-0.003-0.033-8-200000000-100-3e-05"
    write(folder / "grid.json", {key: 5.15})
    return folder


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    write(path, content)


def first(folder: Path, kind: str) -> Path:
    return sorted((folder / kind).glob("*.json"))[0]


@pytest.mark.parametrize("at", ["exp_data", "."])
def test_a_release_becomes_a_records_table(release, at):
    table = published.gadre2024(release.parent / at)
    assert list(table["model"]) == list(ACCURACIES)
    assert table["token_multiplier"].eq(20).all()
    assert list(table["flops_6nd"]) == [6 * 20 * n**2 for n in PARAMS.values()]
    for i, name in enumerate(published.VALIDATION_SETS.values()):
        assert table[f"loss/{name}"].eq(3.0 + i).all()
        assert table[f"loss/{name}/low"].eq(2.9 + i).all()
    assert list(table["error/easy"]) == pytest.approx([0.76, 0.40])
    assert table["error/average_46"][1] == pytest.approx(np.mean([0.40, 0.66, 0.89]))
    # Tasks that 0.154B masters by more than 10 points: easy and cloze.
    assert table["error/average_17"][1] == pytest.approx(np.mean([0.40, 0.89]))
    assert records.check(table).equals(table)


def test_tasks_carry_the_error_of_guessing(release):
    tasks = published.gadre2024_tasks(release)
    assert tasks["chance_error"].to_dict() == {"easy": 0.75, "hard": 0.75, "cloze": 1.0}
    table = published.gadre2024(release)
    assert published.tasks_above_chance(table, tasks, 0.3) == ["easy"]
    assert set(published.tasks_above_chance(table, tasks, -0.5)) == set(TASKS)


def test_a_grid_search_key_says_what_was_trained(release):
    grid = published.gadre2024_grid(release)
    row = grid.iloc[0]
    assert (row["width"], row["layers"], row["heads"], row["warmup_steps"]) == (96, 8, 4, 100)
    assert row["batch_sequences"] == 64
    assert row["params"] == pytest.approx(1e7)
    assert row["loss/openlm"] == 5.15


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda d: shutil.rmtree(d / "models"), "holds models/"),
        (lambda d: shutil.rmtree(d / "evals"), "evals: no *.json"),
        (lambda d: first(d, "evals").unlink(), "_heavy.json: no such file"),
        (lambda d: (d / "eval_metadata.csv").unlink(), "eval_metadata.csv: no such file"),
        (lambda d: (d / "eval_metadata.csv").write_text("a,b\n1,2\n"), "no column 'task'"),
        (lambda d: first(d, "models").write_text("{"), "not JSON"),
        (lambda d: edit(first(d, "models"), lambda c: c.pop("results")), "no 'results'"),
        (
            lambda d: edit(first(d, "models"), lambda c: c["hyperparameters"].pop("tokens")),
            "no 'tokens'",
        ),
        (lambda d: edit(first(d, "models"), lambda c: c["results"].pop()), "no loss on val_de-en"),
        (
            lambda d: edit(first(d, "models"), lambda c: c["results"][0].update(loss="bad")),
            "'loss/openlm'",
        ),
        (
            lambda d: edit(first(d, "models"), lambda c: c["results"][0].update(val_data=["x"])),
            "none of the eight sets",
        ),
        (lambda d: edit(first(d, "evals"), lambda c: c.update(eval_metrics=3)), "no 'icl'"),
        (lambda d: write(d / "grid.json", {"d=1": 2.0}), "does not name a grid-search model"),
        (lambda d: (d / "grid.json").unlink(), "grid.json: no such file"),
    ],
)
def test_a_damaged_release_is_one_clear_line(release, damage, complaint):
    damage(release)

    def load() -> None:
        published.gadre2024(release)
        published.gadre2024_grid(release)

    with pytest.raises(UserError) as raised:
        load()
    assert complaint in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        published.gadre2024(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no such file"):
        published.chinchilla(tmp_path)


def test_chinchilla_drops_the_five_highest_losses(tmp_path):
    losses = np.linspace(2.0, 3.0, 12)
    points = pd.DataFrame({"Model Size": 1e9, "Training FLOP": 6e19, "loss": losses[::-1]})
    points.to_csv(tmp_path / published.CHINCHILLA_FILE, index=False)
    table = published.chinchilla(tmp_path)
    assert list(table["loss/train"]) == pytest.approx(losses[:7][::-1])
    assert table["tokens"].eq(1e10).all()
    points.rename(columns={"loss": "los"}).to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(UserError, match="no column 'loss'"):
        published.chinchilla(tmp_path / "other.csv")


@needs_gadre
def test_the_real_release():
    table, tasks = published.gadre2024(GADRE), published.gadre2024_tasks(GADRE)
    assert len(table) == 104
    assert table["dataset"].value_counts().to_dict() == {
        "rpj": 35,
        "rw_original": 35,
        "c4_original": 34,
    }
    assert len(tasks) == 46
    split = published.tasks_above_chance(table, tasks)
    assert len(split) == 17
    assert tasks["chance_error"].mean() == pytest.approx(0.75)
    assert tasks["chance_error"][split].mean() == pytest.approx(0.8088, abs=5e-5)
    assert set(table["token_multiplier"]) == {5, 10, 20, 40, 80, 160, 320, 640}
    assert len(published.gadre2024_grid(GADRE)) == 435


@needs_chinchilla
def test_the_real_points():
    assert len(published.chinchilla(CHINCHILLA)) == 240


def test_the_other_chinchilla_points(tmp_path):
    path = tmp_path / published.CHINCHILLA_KYO_FILE
    path.write_text("C,N,D,loss\n6e19,1e9,1e10,2.5\n")
    for given in (path, tmp_path):
        (row,) = published.chinchilla_kyo(given).to_dict("records")
        assert (row["params"], row["tokens"], row["loss/train"]) == (1e9, 1e10, 2.5)
    path.write_text("C,N,D,los\n6e19,1e9,1e10,2.5\n")
    with pytest.raises(UserError, match="no column 'loss'"):
        published.chinchilla_kyo(tmp_path)


@needs_kyo
def test_the_real_other_chinchilla_points():
    table = published.chinchilla_kyo(KYO)
    with (KYO / "df.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(table) == len(rows) == 234
    for column, name in (("params", "N"), ("tokens", "D"), ("loss/train", "loss")):
        assert table[column].sum() == pytest.approx(sum(float(row[name]) for row in rows))
    np.testing.assert_allclose(table["flops_6nd"], [float(row["C"]) for row in rows], rtol=1e-6)


@pytest.fixture
def ladder(tmp_path: Path) -> Path:
    folder = tmp_path / "ladder-runs"
    folder.mkdir()
    header = (
        "_step,throughput/total_tokens,batch_size_in_tokens,eval/pile-validation/CrossEntropyLoss,"
        "eval/downstream/boolq_acc,eval/downstream_bpb/boolq_bpb,eval/downstream_soft/boolq_soft"
    )
    for names in published.LADDER_FILES.values():
        for name in names:
            text = f"{header}\n1,1e9,1e8,4.0,0.3,2.0,0\n20,2e9,1e8,3.0,0.6,1.5,0\n"
            (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("at", ["ladder-runs", "."])
def test_a_ladder_becomes_a_records_table(ladder, at):
    table = published.olmo_ladder(ladder.parent / at)
    assert table["role"].value_counts().to_dict() == {"fit": 16, "spare": 14, "held_out": 2}
    assert table["tokens"].eq(2e9).all()
    assert table["loss/pile"].eq(3.0).all()
    assert table["error/boolq_acc"].to_numpy() == pytest.approx(0.4)
    assert table["bpb/boolq"].eq(1.5).all()
    assert not [name for name in table if "soft" in str(name)]


def test_tokens_follow_from_steps_where_they_are_not_logged(ladder):
    path = ladder / "190M-1xC.csv"
    pd.read_csv(path).drop(columns="throughput/total_tokens").to_csv(path, index=False)
    table = published.olmo_ladder(ladder).set_index("run")
    assert table.loc["190M-1xC", "tokens"] == 20 * 1e8


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "no such file"),
        ("", "not CSV"),
        ("_step,batch_size_in_tokens\n", "no rows"),
        ("_step\n1\n", "no column 'batch_size_in_tokens'"),
        ("batch_size_in_tokens\n1\n", "no column '_step'"),
    ],
)
def test_a_damaged_ladder_is_one_clear_line(ladder, content, complaint):
    path = ladder / "3B-5xC.csv"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=complaint) as raised:
        published.olmo_ladder(ladder)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@needs_ladder
def test_the_real_ladder():
    table = published.olmo_ladder(LADDER).set_index("run")
    assert len(table) == 32
    # The lengths are multiples of 20 tokens a parameter; a run ends a little later.
    for run, row in table.iterrows():
        if str(row["role"]) != "held_out":
            length = float(str(run).split("-")[1].removesuffix("xC"))
            assert row["token_multiplier"] == pytest.approx(20 * length, rel=4e-3)
    sizes = json.loads((LADDER / "configs" / "final.json").read_text())
    for entry in sizes.values():
        assert table.loc[Path(entry["paths"][0]).stem, "params"] == entry["n"]
    roles = {
        Path(path).stem: "fit" if entry["mode"] == "train" else "held_out"
        for entry in sizes.values()
        for path in entry["paths"]
    }
    assert table["role"][table["role"] != "spare"].to_dict() == roles
    # 3B: 16 layers of 16 d^2 parameters, gains, and an output embedding of 100352 rows.
    width = 3328
    counted = 16 * (16 * width**2 + 4 * width) + width + 100352 * width
    assert table.loc["3B-1xC", "params"] == counted


@needs_ladder
def test_the_real_ladder_measures_what_its_authors_published_of_13b():
    table = published.olmo_ladder(LADDER)
    measured = table[table["run"] == "peteish13_eval_final"].iloc[0]
    actual = pd.read_csv(LADDER / "step2_taskce_main.csv").set_index("Task")["Actual"]
    for task, accuracy in actual.drop("mmlu_avg_test_5shot").items():
        name = f"error/{str(task).removesuffix('_5shot')}_rc_5shot_len_norm"
        assert 1 - measured[name] == pytest.approx(accuracy, abs=1e-12)
    # MMLU's mean is over its 14042 questions.
    questions = {"stem": 3018, "humanities": 4705, "social_sciences": 3077, "other": 3242}
    mmlu = sum(
        count * (1 - measured[f"error/mmlu_{part}_test_rc_5shot_len_norm"])
        for part, count in questions.items()
    )
    assert mmlu / 14042 == pytest.approx(actual["mmlu_avg_test_5shot"], abs=1e-4)
    loss = pd.read_csv(LADDER / "step1_c4_main.csv")["Actual"].iloc[0]
    # Theirs is the mean over the last checkpoints.
    assert float(measured["loss/c4_en"]) == pytest.approx(loss, rel=5e-4)


@needs_gadre
def test_the_real_release_adds_up():
    table = published.gadre2024(GADRE)
    runs = [json.loads(path.read_text()) for path in (GADRE / "exp_data/models").glob("*.json")]
    settings = [run["hyperparameters"] for run in runs]
    for column in ("params", "tokens"):
        assert sorted(table[column]) == sorted(part[column] for part in settings)
    losses = [part["loss"] for run in runs for part in run["results"]]
    ours = sum(table[f"loss/{name}"].sum() for name in published.VALIDATION_SETS.values())
    assert ours == pytest.approx(sum(losses))


@pytest.mark.parametrize("paper", ["gadre2024", "chinchilla"])
def test_reproducing_without_data_is_one_line_and_nothing_is_written(
    monkeypatch, capsys, tmp_path, paper
):
    out = tmp_path / "out"
    words = ["reproduce", paper, "--data", str(tmp_path / "nowhere"), "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["scaling-jax", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    # cyclopts itself warns that it is being run by pytest.
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"error: {tmp_path / 'nowhere'}: no such folder" or "no such file" in last
    assert not out.exists()
