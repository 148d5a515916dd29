from pathlib import Path

import pytest

from scaling_jax.errors import UserError
from scaling_jax.evaluation import tasks

OWN = """\
tasks:
  my_quiz:
    data: quiz.jsonl
    type: multiple_choice
    shots: 5
"""


@pytest.fixture(scope="module")
def gadre2024():
    return tasks.load("evaluations/gadre2024.yaml")


def written(folder, text):
    path = folder / "tasks.yaml"
    path.write_text(text)
    return path


def test_the_papers_tasks_are_those_of_its_table(gadre2024):
    by_type = [task.type for task in gadre2024.tasks.values()]
    assert len(by_type) == 46
    assert by_type.count("multiple_choice") == 31
    assert by_type.count("language_modeling") == 13
    assert by_type.count("schema") == 2
    assert len({task.data for task in gadre2024.tasks.values()}) == 44
    assert [len(names) for names in gadre2024.averages.values()] == [46, 17]
    assert set(gadre2024.averages["average_46"]) == set(gadre2024.tasks)


def test_delimiters_keep_their_spaces(gadre2024):
    assert gadre2024.tasks["mmlu_zeroshot"].continuation_delimiter == "Answer: "
    assert gadre2024.tasks["arc_easy"].continuation_delimiter == "\nAnswer: "
    assert gadre2024.tasks["copa"].continuation_delimiter == " "


def test_five_lines_are_a_task(tmp_path):
    found = tasks.load(written(tmp_path, OWN), ["tasks.my_quiz.shots=2"])
    assert found.tasks["my_quiz"].shots == 2
    assert found.tasks["my_quiz"].example_delimiter == "\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            OWN.replace("shots", "shot"),
            ["tasks.yaml", "tasks.my_quiz.shot", "did you mean 'shots'"],
        ),
        (OWN.replace("multiple_choice", "choice"), ["tasks.my_quiz.type", "multiple_choice"]),
        (OWN.replace("    data: quiz.jsonl\n", ""), ["tasks.my_quiz.data", "missing"]),
        (OWN.replace("5", "-1"), ["tasks.my_quiz.shots", "-1"]),
        ("tasks: {}\n", ["tasks", "at least one"]),
        (OWN.replace("my_quiz", "report"), ["tasks.report", "another name"]),
        (OWN + "averages:\n  all: [my_qiuz]\n", ["averages.all", "my_qiuz", "my_quiz"]),
        (OWN + "    cot_delimiter: '#'\n", ["my_quiz", "cot_delimiter", "question_answering"]),
    ],
)
def test_a_mistake_is_named(tmp_path, text, words):
    with pytest.raises(UserError) as error:
        tasks.load(written(tmp_path, text))
    assert all(word in str(error.value) for word in words)


def test_selecting_by_task_average_and_pooled_mean(gadre2024):
    assert list(tasks.select(gadre2024, ["piqa", "copa"])) == ["copa", "piqa"]
    assert len(tasks.select(gadre2024, ["average_17", "copa"])) == 17
    assert set(tasks.select(gadre2024, ["mmlu_paper"])) == {"mmlu", "mmlu_zeroshot"}
    assert len(tasks.select(gadre2024, [])) == 46
    with pytest.raises(UserError, match=r"'pica'.*piqa"):
        tasks.select(gadre2024, ["pica"])


def test_what_is_there_runs_and_each_missing_file_is_named_once(gadre2024, tmp_path):
    wanted = tasks.select(gadre2024, ["copa", "mmlu", "mmlu_zeroshot"])
    with pytest.raises(UserError, match="holds no file of any task"):
        tasks.locate(wanted, tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        tasks.locate(wanted, tmp_path / "nowhere")
    path = tmp_path / wanted["copa"].data
    path.parent.mkdir()
    path.touch()
    present, missing = tasks.locate(wanted, tmp_path)
    assert list(present) == ["copa"]
    assert missing == {"world_knowledge/mmlu.jsonl": ["mmlu_zeroshot", "mmlu"]}


def test_the_17_tasks_are_those_of_the_released_testbed(gadre2024):
    from scaling_jax.testbeds import published

    folder = Path(__file__).parents[2] / ".." / "shared" / "data" / "gadre"
    if not folder.is_dir():
        pytest.skip(f"the released testbed is not there: {folder}")
    described = published.gadre2024_tasks(folder)
    above = published.tasks_above_chance(published.gadre2024(folder), described)
    assert set(gadre2024.averages["average_17"]) == set(above)
    for name, task in gadre2024.tasks.items():
        assert task.chance == pytest.approx(1 - described.loc[name, "chance_error"])
        assert task.shots == described.loc[name, "shots"]
