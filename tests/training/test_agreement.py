import json

import pytest

from scaling_jax.errors import OutageError, PeerError, UserError
from scaling_jax.training import agreement

KINDS = (UserError, OutageError)


def fail(error):
    raise error


def test_alone_everything_is_as_without():
    assert agreement.of_all("a") == ["a"]
    assert agreement.together(lambda: 3, KINDS) == 3
    with pytest.raises(ZeroDivisionError):
        agreement.together(lambda: 1 / 0, KINDS)


@pytest.mark.parametrize(
    ("others", "mine", "expected"),
    [
        ([None, None], None, None),
        ([["OutageError", "late"], None], None, OutageError("late")),
        ([["OutageError", "late"], ["UserError", "no"]], None, UserError("no")),
        ([["OutageError", "late"], None], UserError("no"), UserError("no")),
        ([["UserError", "no"], None], OutageError("late"), UserError("no")),
        ([["KeyError", "odd"], ["UserError", "no"]], None, PeerError("odd")),
        ([None, ["UserError", "no"]], KeyError("odd"), KeyError("odd")),
    ],
    ids=str,
)
def test_if_one_fails_all_raise_the_first_kind(monkeypatch, others, mine, expected):
    monkeypatch.setattr(agreement.distributed, "LEAVE_SECONDS", 0)
    monkeypatch.setattr(
        agreement, "of_all", lambda message: [*others, json.loads(json.dumps(message))]
    )
    if expected is None:
        assert agreement.together(lambda: 3, KINDS) == 3
        return
    with pytest.raises(type(expected)) as caught:
        agreement.together(lambda: 3 if mine is None else fail(mine), KINDS)
    assert str(caught.value) == str(expected)
