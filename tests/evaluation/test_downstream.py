import dataclasses
import json

import numpy as np
import pytest

from scaling_jax.data.fetch import git_blob
from scaling_jax.data.vocabularies import ByteVocabulary
from scaling_jax.evaluation import downstream, tasks
from scaling_jax.evaluation.results import Unscorable
from scaling_jax.evaluation.scoring import TargetScores
from scaling_jax.evaluation.tasks import TaskConfig, TasksConfig

BYTES = ByteVocabulary()
CONFIG = TasksConfig(
    name="made",
    tasks={
        "choice": TaskConfig(data="choice.jsonl", type="multiple_choice", shots=2),
        "schema": TaskConfig(data="schema.jsonl", type="schema"),
        "words": TaskConfig(data="words.jsonl", type="language_modeling", group="words"),
        "answers": TaskConfig(data="answers.jsonl", type="question_answering", group="words"),
        "absent": TaskConfig(data="absent.jsonl", type="schema"),
    },
    averages={"average": ("choice", "absent")},
)


def alphabet(tokens, positions, targets):
    """After each byte, and after a space what was before it, comes the next one or a space."""
    before = np.take_along_axis(tokens, np.maximum(positions - 1, 0), axis=1)
    last = np.take_along_axis(tokens, positions, axis=1)
    space = BYTES.encode(" ")[0]
    likeliest = np.where(last == space, before + 1, space)
    return TargetScores(np.where(targets == likeliest, -0.1, -5.0), likeliest)


def broken(*_):
    raise InterruptedError


@pytest.fixture
def folder(tmp_path):
    rows = {
        "choice": [
            {"query": letter, "choices": ["z", chr(ord(letter) + 1)], "gold": 1}
            for letter in "aceg"
        ],
        "schema": [{"context_options": ["x", "k"], "continuation": "l", "gold": 1}],
        "words": [
            {"context": "a b c", "continuation": "d"},
            {"context": "a b c", "continuation": "e"},
        ],
        "answers": [
            {"context": "a b c", "answer": "d", "aliases": ["D E"]},
            {"context": "a b c", "answer": "x"},
        ],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return tmp_path


@pytest.fixture
def report(folder):
    present, _ = tasks.locate(CONFIG.tasks, folder)
    return downstream.evaluate(CONFIG, present, folder, BYTES, alphabet)


def test_a_model_that_knows_the_alphabet(report):
    accuracies = {name: result.accuracy for name, result in report.tasks.items()}
    assert accuracies == {"choice": 1.0, "schema": 1.0, "words": 0.5, "answers": 0.5}
    assert report.tasks["answers"].outcomes[0].answer == " d "
    assert report.tasks["choice"].smallest_margin == pytest.approx(4.9 / 2)
    assert report.averages["average"].missing == ("absent",)
    assert report.averages["words"].accuracy == 0.5


def evaluate(folder, kept, scorer=alphabet, config=CONFIG, model="a", names=()):
    present, _ = tasks.locate(tasks.select(config, names), folder)
    return downstream.evaluate(config, present, folder, BYTES, scorer, model=model, kept=kept)


def only(folder, name):
    """The one file in `folder` of what is called `name`."""
    (path,) = folder.glob(f"{name}-*.json")
    return path


def test_what_is_kept_says_what_it_was_made_from(folder, tmp_path):
    evaluate(folder, tmp_path / "kept")
    kept = json.loads(only(tmp_path / "kept", "words").read_text())
    made_from, result = kept["made_from"], kept["result"]
    assert (made_from["model"], made_from["vocabulary_sha256"]) == ("a", BYTES.sha256)
    assert (made_from["max_tokens"], made_from["seed"]) == (2048, 1234)
    blob = git_blob((folder / "words.jsonl").read_bytes())
    assert made_from["data_git_blob"] == result["data_git_blob"] == blob
    assert len(result["prompts_sha256"]) == 64
    assert [each["correct"] for each in result["outcomes"]] == [True, False]
    report = json.loads(only(tmp_path / "kept", "report").read_text())
    assert report["tasks"]["words"]["accuracy"] == 0.5
    assert report["averages"]["words"]["tasks"] == 2


def test_what_is_kept_is_not_run_again(folder, tmp_path):
    first = evaluate(folder, tmp_path / "kept")
    assert evaluate(folder, tmp_path / "kept", broken) == first
    only(tmp_path / "kept", "schema").unlink()
    with pytest.raises(InterruptedError):
        evaluate(folder, tmp_path / "kept", broken)
    assert evaluate(folder, tmp_path / "kept") == first


def test_the_report_is_of_all_that_is_kept(folder, tmp_path):
    kept = tmp_path / "kept"
    evaluate(folder, kept, names=["words"])
    evaluate(folder, kept, names=["answers"])
    apart = json.loads(only(kept, "report").read_text())
    assert list(apart["tasks"]) == ["words", "answers"]
    assert apart["averages"]["words"]["tasks"] == 2
    # Those of another model, of other settings or of a file that has changed are not.
    (folder / "words.jsonl").write_text('{"context": "a b c", "continuation": "d"}\n')
    other = dataclasses.replace(CONFIG.tasks["answers"], shots=1)
    config = dataclasses.replace(CONFIG, tasks={**CONFIG.tasks, "answers": other})
    assert list(evaluate(folder, kept, config=config, names=["choice"]).tasks) == ["choice"]
    assert list(evaluate(folder, kept, model="b", names=["schema"]).tasks) == ["schema"]
    # That of a file which is not there any more is.
    (folder / "answers.jsonl").unlink()
    assert list(evaluate(folder, kept, names=["choice"]).tasks) == ["choice", "answers"]


def test_a_damaged_result_is_made_anew(folder, tmp_path):
    first = evaluate(folder, tmp_path / "kept")
    only(tmp_path / "kept", "schema").write_text('{"made_from": ')
    with pytest.warns(UserWarning, match=r"schema-\w+\.json: damaged"):
        assert evaluate(folder, tmp_path / "kept") == first
    assert evaluate(folder, tmp_path / "kept") == first


def test_bounds_are_in_what_is_written(folder, tmp_path):
    evaluate(folder, tmp_path / "kept")
    report = json.loads(only(tmp_path / "kept", "report").read_text())
    for found in (*report["tasks"].values(), *report["averages"].values()):
        assert 0 <= found["accuracy_low"] < found["accuracy_high"] <= 1
    # Twice one of two, against two of four in one task.
    words, whole = report["averages"]["words"], report["tasks"]["words"]
    assert words["accuracy_low"] > whole["accuracy_low"]


def test_what_was_made_from_something_else_is_run_again(folder, tmp_path):
    evaluate(folder, tmp_path / "kept")
    with pytest.raises(InterruptedError):
        evaluate(folder, tmp_path / "kept", broken, model="b")
    for changed in ({"seed": 1}, {"max_tokens": 100}):
        with pytest.raises(InterruptedError):
            evaluate(
                folder, tmp_path / "kept", broken, config=dataclasses.replace(CONFIG, **changed)
            )
    with (folder / "words.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(InterruptedError):
        evaluate(folder, tmp_path / "kept", broken)


def test_what_other_settings_give_lies_beside_it(folder, tmp_path):
    kept = tmp_path / "kept"
    first = evaluate(folder, kept)
    before = {path: path.read_bytes() for path in kept.iterdir()}
    changed = dataclasses.replace(CONFIG.tasks["choice"], shots=0)
    config = dataclasses.replace(CONFIG, tasks={**CONFIG.tasks, "choice": changed})
    evaluate(folder, kept, config=config)
    assert before == {path: path.read_bytes() for path in before}
    added = {path.name.split("-")[0] for path in kept.iterdir() if path not in before}
    assert added == {"choice", "report"}
    assert evaluate(folder, kept) == first


@pytest.mark.parametrize("part", ["FORMAT", "prompt_cache.LIBRARIES"])
def test_what_another_version_of_the_program_has_kept_is_run_again(
    folder, tmp_path, monkeypatch, part
):
    evaluate(folder, tmp_path / "kept", names=["words"])
    monkeypatch.setattr(f"scaling_jax.evaluation.kept.{part}", "other")
    with pytest.raises(InterruptedError):
        evaluate(folder, tmp_path / "kept", broken, names=["words"])


def test_a_task_that_cannot_be_scored_is_left_out_and_not_tried_again(
    folder, tmp_path, monkeypatch
):
    path, kept = folder / "schema.jsonl", tmp_path / "kept"
    good = path.read_text()
    path.write_text("{}\n")
    heard = []
    present, _ = tasks.locate(CONFIG.tasks, folder)
    config = dataclasses.replace(CONFIG, averages={"two": ("words", "schema")})
    report = downstream.evaluate(
        config, present, folder, BYTES, alphabet, kept=kept, done=lambda *both: heard.append(both)
    )
    assert list(report.tasks) == ["choice", "words", "answers"]
    reason = f"{path}, line 1: a schema question needs 'context_options' (known: )"
    assert report.left_out == {"schema": reason}
    assert ("schema", Unscorable(reason)) in heard
    assert report.averages["two"].missing == ("schema",)

    with monkeypatch.context() as patch:
        patch.setattr(downstream, "run", broken)
        again = downstream.evaluate(config, present, folder, BYTES, alphabet, kept=kept)
    assert again == report
    path.write_text(good)
    assert evaluate(folder, kept, config=config, model="").left_out == {}


def test_git_names_contents_so():
    assert git_blob(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert git_blob(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_each_task_is_told_when_it_is_done(folder):
    heard = []
    present, _ = tasks.locate(CONFIG.tasks, folder)
    downstream.evaluate(
        CONFIG, present, folder, BYTES, alphabet, done=lambda name, _: heard.append(name)
    )
    assert heard == ["choice", "schema", "words", "answers"]
