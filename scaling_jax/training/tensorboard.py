"""A run's numbers for TensorBoard: for whoever looks on, and never a reason to stop or to wait."""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class EventLog:
    """Scalars by step, written by the thread that calls; tensorboardX's own thread may be gone.

    Where the storage fails the log ends, with a warning.

    Args:
      folder: where TensorBoard looks.
      after: the last step that is known; what an earlier log has after it does not count.
    """

    def __init__(self, folder: Path, after: int):
        from tensorboardX.event_file_writer import EventsWriter  # slow to import
        from tensorboardX.proto.event_pb2 import SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        self._folder, self._writer = folder, None
        with self._ending_on_faults():
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"))
            self._add(after + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes down the numbers of a step."""
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        with self._ending_on_faults():
            self._add(step, summary=Summary(value=values))

    def close(self) -> None:
        """Nothing is written after that."""
        with self._ending_on_faults():
            if self._writer is not None:
                self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        if self._writer is not None:
            self._writer.write_event(Event(step=step, wall_time=time.time(), **content))
            self._writer.flush()

    @contextlib.contextmanager
    def _ending_on_faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            logger.warning("%s: %s; no more is written there", self._folder, error.strerror)
