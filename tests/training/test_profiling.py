import pytest

from scaling_jax.errors import UserError
from scaling_jax.training.profiling import Window


def test_a_window_counts_from_its_first_step():
    window = Window.parse("10:5")
    assert (window.first, window.last) == (10, 14)
    window.check(steps=14)


@pytest.mark.parametrize("text", ["", "5", "0:3", "3:0", "-1:2", "a:b", "1:2:3", "1.5:2", " 1:2"])
def test_a_window_that_is_none_is_refused_in_one_line(text):
    with pytest.raises(UserError, match="give START:COUNT") as caught:
        Window.parse(text)
    assert "\n" not in str(caught.value)


def test_a_window_beyond_the_last_step_is_refused():
    with pytest.raises(UserError, match="steps 10 to 14 are asked for, but the run has 13"):
        Window.parse("10:5").check(steps=13)


@pytest.mark.parametrize(
    ("done", "message"),
    [
        (9, None),
        (11, "steps 10 to 11 were trained by an earlier call: the others are traced"),
        (14, "steps 10 to 14 were trained by an earlier call: none of them is traced"),
        (20, "steps 10 to 14 were trained by an earlier call: none of them is traced"),
    ],
)
def test_a_window_that_has_passed_is_warned_of(caplog, done, message):
    """The same command is given again after a preemption: that must not be a mistake."""
    Window.parse("10:5").warn_of_past(done)
    assert caplog.messages == ([f"profile: {message}"] if message else [])
