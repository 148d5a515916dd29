"""Numbers for TensorBoard, and what becomes of them where the storage fails."""

import errno
import struct

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

from scaling_jax.training.tensorboard import EventLog


def events(folder):
    """What TensorBoard reads: records of length, checksum, content, checksum."""
    (file,) = folder.iterdir()
    content, found = file.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return found


def test_scalars_are_there_at_once_and_later_ones_of_an_earlier_log_do_not_count(tmp_path):
    log = EventLog(tmp_path / "tensorboard", after=20)
    log.write(30, {"loss": 2.5, "learning_rate": 1e-3})
    version, start, scalars = events(tmp_path / "tensorboard")
    log.close()
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (21, SessionLog.START)
    assert scalars.step == 30
    assert [value.tag for value in scalars.summary.value] == ["loss", "learning_rate"]
    assert scalars.summary.value[0].simple_value == 2.5


def test_a_fault_of_the_storage_ends_the_log_and_nothing_else(monkeypatch, tmp_path, caplog):
    log = EventLog(tmp_path / "tensorboard", after=0)
    log.write(1, {"loss": 3.0})

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(EventsWriter, "write_event", fail)
        log.write(2, {"loss": 2.0})
    log.write(3, {"loss": 1.0})
    log.close()
    assert [event.step for event in events(tmp_path / "tensorboard")[2:]] == [1]
    assert caplog.messages == [
        f"{tmp_path / 'tensorboard'}: Input/output error; no more is written there"
    ]


def test_a_folder_that_cannot_be_made_is_no_reason_to_stop(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file")
    log = EventLog(tmp_path / "tensorboard", after=0)
    log.write(1, {"loss": 3.0})
    log.close()
    assert len(caplog.messages) == 1
