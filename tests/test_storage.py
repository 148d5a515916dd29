import errno
import os

import pytest

from scaling_jax import storage


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "a"),
        ValueError("RESOURCE_EXHAUSTED: Failed to write\nto 'x': [os_error_code='28']"),
        RuntimeError("Failed to finalize writing of split: a; No space left on device"),
    ],
    ids=["system", "orbax", "tensorflow"],
)
def test_a_full_disk_is_known_in_any_class_and_as_a_cause(error):
    assert storage.fault(error) == errno.ENOSPC
    outer = KeyError("step")
    outer.__cause__ = error
    assert storage.fault(outer) == errno.ENOSPC


def test_other_errors_are_none_of_the_storage():
    for error in (FileNotFoundError(errno.ENOENT, "no"), ValueError("28"), OSError("closed")):
        assert storage.fault(error) is None


def test_errors_that_cause_each_other_come_to_an_end():
    one, other = KeyError(1), KeyError(2)
    one.__context__, other.__context__ = other, one
    assert storage.fault(one) is None


def test_words_are_the_system_s():
    assert storage.in_words(errno.EROFS).startswith(os.strerror(errno.EROFS))
