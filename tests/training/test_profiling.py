import pytest

from scaling_jax.errors import UserError
from scaling_jax.training.profiling import Window


def test_a_window_counts_from_its_first_step():
    window = Window.parse("10:5")
    assert (window.first, window.last) == (10, 14)
    window.check(done=9, steps=14)


@pytest.mark.parametrize("text", ["", "5", "0:3", "3:0", "-1:2", "a:b", "1:2:3", "1.5:2", " 1:2"])
def test_a_window_that_is_none_is_refused_in_one_line(text):
    with pytest.raises(UserError, match="give START:COUNT") as caught:
        Window.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("done", "steps", "message"),
    [
        (10, 20, "steps 10 to 14 are asked for, but the run has the steps 11 to 20"),
        (0, 13, "the run has the steps 1 to 13"),
        (13, 13, "no steps: it is trained"),
    ],
)
def test_a_window_outside_of_what_is_left_to_train_is_refused(done, steps, message):
    with pytest.raises(UserError, match=message):
        Window.parse("10:5").check(done, steps)
