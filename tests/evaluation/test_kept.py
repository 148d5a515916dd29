import json

import pytest

from scaling_jax.evaluation import kept, results
from scaling_jax.evaluation.results import Outcome, Unscorable
from scaling_jax.evaluation.tasks import TaskConfig, TasksConfig

ORIGIN = {"model": "a", "data_git_blob": "b"}
RESULT = results.task_result(
    TaskConfig(data="x", type="multiple_choice"),
    [Outcome("", 0, 1, True, 1, 0.1, (-1.5, -0.1), (1, 2)), Outcome("", 1, 0, False, answer="é")],
    "prompts",
    "blob",
)


@pytest.fixture
def path(tmp_path):
    kept.write(tmp_path / "task.json", ORIGIN, RESULT)
    return tmp_path / "task.json"


def test_a_result_comes_back(path):
    assert kept.read(path, ORIGIN) == RESULT
    assert kept.read(path, {"model": "a"}) == RESULT


def test_why_there_is_none_comes_back(tmp_path):
    kept.write(tmp_path / "task.json", ORIGIN, Unscorable("line 1: empty"))
    assert kept.read(tmp_path / "task.json", ORIGIN) == Unscorable("line 1: empty")


def test_what_is_not_known_is_not_compared(tmp_path):
    task = TaskConfig(data="x.jsonl", type="schema")
    asked = TasksConfig(tasks={"x": task})
    (tmp_path / "x.jsonl").write_text("one")
    whole = kept.made_from(task, tmp_path / "x.jsonl", asked, "words", "model")
    less = kept.made_from(task, tmp_path / "gone.jsonl", asked, None, None)
    assert whole.keys() - less.keys() == {"model", "vocabulary_sha256", "data_git_blob"}
    assert whole | less == whole
    assert kept.file(tmp_path, "x", whole) == kept.file(tmp_path, "x", less)


def test_of_another_origin_or_absent_there_is_none(path):
    assert kept.read(path, {"model": "b", "data_git_blob": "b"}) is None
    assert kept.read(path, {"model": "a", "data_git_blob": "c"}) is None
    assert kept.read(path.with_name("none.json"), ORIGIN) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-30],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace("0.1", "0.2", 1),
        lambda text: json.dumps({**json.loads(text), "result": {}}),
        lambda text: json.dumps({"made_from": ORIGIN, "result": json.loads(text)["result"]}),
    ],
)
def test_a_damaged_one_is_named_and_not_used(path, damage):
    path.write_text(damage(path.read_text()))
    with pytest.warns(UserWarning, match=r"task\.json: damaged and not used"):
        assert kept.read(path, ORIGIN) is None
