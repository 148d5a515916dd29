import numpy as np
import pytest

from scaling_jax.evaluation import generation
from scaling_jax.evaluation.scoring import TargetScores


def counting(tokens, positions, targets):
    """After token t comes t + 1, whatever stands at padded places."""
    there = np.take_along_axis(tokens, positions, axis=1)
    return TargetScores(np.zeros(there.shape), there + 1)


def test_each_row_goes_on_from_its_own_end_until_the_text_ends():
    contexts = [np.array(ids, np.int32) for ids in ([5], [9, 9, 20], [7] * 40)]
    rows = generation.generate(contexts, counting, count=3, end_of_text=9)
    assert rows == [[6, 7, 8], [21, 22, 23], [8]]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" The Beatles!", True),
        ("beatles, who else", True),
        ("a_beatles", True),
        ("'Beatles'", True),
        ("No, the Beatles", False),
        ("Theatre", False),
        ("", False),
    ],
)
def test_an_answer_begins_with_a_name(answer, right):
    assert generation.is_right(answer, ["The Beatles", "Fab four"]) is right


def test_only_what_follows_the_thought_counts():
    assert generation.is_right("two and two is ### 4", ["4"], "###")
    assert not generation.is_right("4 ### 5", ["4"], "###")
