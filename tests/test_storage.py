import errno
import os

import pytest

from scaling_jax import storage
from scaling_jax.errors import OutageError, UserError


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


def test_a_peer_s_words_are_no_fault_of_the_storage():
    assert storage.fault(RuntimeError("Gloo read: Connection reset by peer")) is None
    assert storage.fault(RuntimeError("UNAVAILABLE: the coordination service")) is None


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded"), UserError),
        (PermissionError(errno.EACCES, "Permission denied"), UserError),
        (OSError(errno.EIO, "Input/output error"), OutageError),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), OutageError),
        (ValueError("UNKNOWN: Error reading [os_error_code='116']"), OutageError),
        (ValueError("DEADLINE_EXCEEDED: no answer"), OutageError),
        (TimeoutError(), OutageError),
    ],
    ids=repr,
)
def test_somebody_has_to_act_or_waiting_helps(error, kind):
    code = storage.fault(error)
    assert code is not None
    refused = storage.refusal("a", code)
    assert type(refused) is kind
    assert str(refused) == f"a: {storage.in_words(code)}"


def test_errors_that_cause_each_other_come_to_an_end():
    one, other = KeyError(1), KeyError(2)
    one.__context__, other.__context__ = other, one
    assert storage.fault(one) is None


def test_words_are_the_system_s():
    assert storage.in_words(errno.EROFS).startswith(os.strerror(errno.EROFS))
