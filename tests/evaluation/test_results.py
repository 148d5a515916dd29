import pytest

from scaling_jax.evaluation import proportions, results
from scaling_jax.evaluation.prompts import Prompt
from scaling_jax.evaluation.proportions import Count
from scaling_jax.evaluation.results import Outcome, Pooled
from scaling_jax.evaluation.scoring import ChoiceScore
from scaling_jax.evaluation.tasks import TaskConfig, TasksConfig

CHOICE = TaskConfig(data="x", type="multiple_choice")
WORDS = TaskConfig(data="x", type="language_modeling")


def score(log_probability, tokens=1, greedy=False):
    return ChoiceScore(log_probability, (0,) * tokens, greedy)


def asked(gold=0):
    return Prompt("", 0, (), gold)


def outcomes(*correct, category="", margin=None):
    return [
        Outcome(category, n, 0, each, 0, margin, (-1.0, -2.0, -3.0, -4.0), (1, 2, 1, 1))
        for n, each in enumerate(correct)
    ]


def result(accuracy, chance=0.0):
    task = TaskConfig(data="x", type="schema", chance=chance)
    answers = outcomes(*([True] * accuracy), *([False] * (4 - accuracy)))
    return results.task_result(task, answers, "", "")


def test_choices_are_compared_by_token():
    found = results.outcome(CHOICE, asked(1), [score(-3.0), score(-4.0, tokens=4)])
    assert (found.prediction, found.correct, found.margin) == (1, True, 2.0)
    assert (found.log_probabilities, found.tokens) == ((-3.0, -4.0), (1, 4))


def test_the_first_of_equal_choices_is_taken_and_counted_as_a_tie():
    found = results.outcome(CHOICE, asked(1), [score(-2.0), score(-2.0), score(-5.0)])
    assert (found.prediction, found.correct, found.margin) == (0, False, 0.0)
    summed = results.task_result(CHOICE, [found, *outcomes(True, margin=0.5)], "", "")
    assert (summed.ties, summed.smallest_margin) == (1, 0.0)


def test_words_are_right_if_the_model_would_have_said_them():
    assert results.outcome(WORDS, asked(), [score(-9.0, 2, greedy=True)]).correct
    wrong = results.outcome(WORDS, asked(), [score(-0.1, 2)])
    assert (wrong.correct, wrong.prediction, wrong.margin) == (False, None, None)


def test_categories_count_alike_whatever_their_size():
    task = TaskConfig(data="x", type="multiple_choice", has_categories=True, chance=0.25)
    found = results.task_result(
        task,
        [*outcomes(True, category="a"), *outcomes(False, False, True, False, category="b")],
        "prompts",
        "blob",
    )
    assert found.categories == {"a": 1.0, "b": 0.25}
    assert found.accuracy == 0.625
    assert found.centred == pytest.approx((0.625 - 0.25) / 0.75)
    assert found.nats_per_token == 1.0
    assert (found.prompts_sha256, found.data_git_blob) == ("prompts", "blob")


def test_chance_is_one_choice_of_all_unless_said():
    assert results.task_result(CHOICE, outcomes(True), "", "").chance == 0.25
    said = TaskConfig(data="x", type="multiple_choice", chance=0.5)
    assert results.task_result(said, outcomes(True), "", "").chance == 0.5
    word = results.outcome(WORDS, asked(), [score(-1.0)])
    assert results.task_result(WORDS, [word], "", "").chance == 0.0


def test_whether_the_file_is_the_released_one():
    named = TaskConfig(data="x", type="schema", git_blob="a" * 40)
    assert results.task_result(named, outcomes(True), "", "a" * 40).is_released_data is True
    assert results.task_result(named, outcomes(True), "", "b" * 40).is_released_data is False
    assert results.task_result(CHOICE, outcomes(True), "", "b" * 40).is_released_data is None


def test_averages_say_what_is_missing():
    tasks = TasksConfig(
        tasks={
            name: TaskConfig(data="x", type="schema", group=group)
            for name, group in (("a", "odd"), ("b", "even"), ("c", "odd"), ("d", "none"))
        },
        averages={"all": ("a", "b", "c"), "few": ("d",)},
    )
    found = results.averages(tasks, {"a": result(4, 0.5), "b": result(1)})
    assert set(found) == {"all", "odd", "even"}
    assert found["all"].accuracy == pytest.approx((1 + 0.25) / 2)
    assert found["all"].centred == pytest.approx((1 + 0.25) / 2)
    assert (found["all"].tasks, found["all"].missing) == (2, ("c",))
    assert found["even"].missing == ()


def test_pooled_means_are_over_categories():
    tasks = TasksConfig(
        tasks={"a": CHOICE, "b": CHOICE}, pooled={"both": ("a", "b"), "one": ("a",)}
    )
    answers = [*outcomes(True, category="x"), *outcomes(True, False, category="y")]
    a = results.task_result(CHOICE, answers, "", "")
    assert {name: mean.accuracy for name, mean in results.pooled(tasks, {"a": a}).items()} == {
        "one": 0.75
    }
    both = results.pooled(tasks, {"a": a, "b": result(0)})["both"]
    counts = [[Count(1, 1)], [Count(1, 2)], [Count(0, 4)]]
    assert both == Pooled(*proportions.mean(counts))
    assert both.accuracy == pytest.approx(0.5)
    assert both.accuracy_low < 0.5 < both.accuracy_high
