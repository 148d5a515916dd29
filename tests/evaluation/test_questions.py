import json

import pytest

from scaling_jax.errors import UserError
from scaling_jax.evaluation import questions
from scaling_jax.evaluation.questions import Question
from scaling_jax.evaluation.tasks import TaskConfig

CHOICE = {"query": " Which? ", "choices": [" a", "b "], "gold": 1, "category": "x"}


def task(kind, **settings):
    return TaskConfig(data="task.jsonl", type=kind, **settings)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "task.jsonl"


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_type_becomes_options(path):
    write(path, CHOICE)
    assert questions.read(task("multiple_choice"), path) == {
        "": [Question((("Which?", " a"), ("Which?", "b ")), 1)]
    }
    write(path, {"context_options": ["He ", "She "], "continuation": " sat. ", "gold": 0})
    assert questions.read(task("schema"), path)[""] == [
        Question((("He ", "sat."), ("She ", "sat.")), 0)
    ]
    write(path, {"context": "One, two,\n", "continuation": " three"})
    assert questions.read(task("language_modeling"), path)[""] == [
        Question((("One, two,", "three"),), 0)
    ]


def test_an_answer_has_names_and_may_follow_a_thought(path):
    write(path, {"context": "2+2?", "answer": "4", "aliases": ["four"], "chain_of_thought": "1+3"})
    plain = questions.read(task("question_answering", question_prelimiter="Q: "), path)[""][0]
    assert plain == Question((("Q: 2+2?", "4"),), 0, aliases=("4", "four"))
    thinking = questions.read(task("question_answering", cot_delimiter=" so "), path)[""][0]
    assert thinking.options == (("2+2?", "1+3 so 4"),)
    assert thinking.thought == "1+3 so "


def test_categories_are_sorted_and_keep_the_order_of_their_lines(path):
    rows = [CHOICE | {"category": name, "query": str(n)} for n, name in enumerate("bab")]
    write(path, *rows)
    found = questions.read(task("multiple_choice", has_categories=True), path)
    assert list(found) == ["a", "b"]
    assert [question.options[0][0] for question in found["b"]] == ["0", "2"]


def test_a_line_separator_inside_a_text_ends_no_line(path):
    path.write_text(json.dumps(CHOICE | {"query": "a\u2028b\x85c"}, ensure_ascii=False) + "\n")
    assert questions.read(task("multiple_choice"), path)[""][0].options[0][0] == "a\u2028b\x85c"


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        ("multiple_choice", {"querry": "", "choices": []}, "needs 'query' .did you mean 'querry'"),
        ("multiple_choice", CHOICE | {"gold": 2}, "'gold' must be the number of a choice"),
        ("multiple_choice", CHOICE | {"gold": "1"}, "'gold' must be the number of a choice"),
        ("multiple_choice", CHOICE | {"choices": "ab"}, "'choices' must be a list"),
        ("multiple_choice", CHOICE | {"query": 3}, "'query' must be text, not 3"),
        ("schema", CHOICE, "needs 'context_options'"),
        ("language_modeling", [], "no JSON object"),
    ],
)
def test_a_wrong_line_is_named(path, kind, row, words):
    good = {"context": "a", "continuation": "b", "context_options": ["a", "b"], "gold": 0}
    write(path, good | CHOICE, row)
    with pytest.raises(UserError, match=rf"task\.jsonl, line 2: .*{words}"):
        questions.read(task(kind), path)


@pytest.mark.parametrize("changes", [{"answer": " A "}, {"aliases": ["4", "The !"]}])
def test_an_answer_that_everything_begins_with_is_warned_of(path, changes):
    good = {"context": "2+2?", "answer": "4", "aliases": ["four"]}
    write(path, good, good | changes)
    with pytest.warns(UserWarning, match=r"line 2: answer '(A|The !)' is nothing once articles"):
        questions.read(task("question_answering"), path)


def test_what_a_task_does_not_need_may_be_anything(path):
    write(path, CHOICE | {"category": None}, CHOICE | {"category": 3})
    (found,) = questions.read(task("multiple_choice"), path).values()
    assert len(found) == 2


def test_files_without_questions(path):
    with pytest.raises(UserError, match="cannot be read"):
        questions.read(task("schema"), path)
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no question"):
        questions.read(task("schema"), path)
    path.write_text("{")
    with pytest.raises(UserError, match="line 1: not valid JSON"):
        questions.read(task("schema"), path)
