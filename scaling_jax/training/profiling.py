"""`--profile START:COUNT`: a trace of some steps, as XLA and the devices see them.

It lies in the run's TensorBoard folder: `tensorboard --logdir RUN/tensorboard` with the plugin
xprof shows it.
"""

import dataclasses
import logging
import re
from pathlib import Path
from typing import Self

import jax

from scaling_jax.errors import UserError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Window:
    """The steps from `first` to `last`, both of them too."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads START:COUNT.

        Raises:
          UserError: it is not that.
        """
        match = re.fullmatch(r"([1-9]\d{0,11}):([1-9]\d{0,11})", text)
        if match is None:
            raise UserError(
                f"profile '{text}': give START:COUNT, as 10:5 for the steps 10 to 14; both from 1"
            )
        first, count = int(match[1]), int(match[2])
        return cls(first, first + count - 1)

    def check(self, steps: int) -> None:
        """Raises a UserError if a run of `steps` steps ends before the window does."""
        if self.last > steps:
            raise UserError(
                f"profile: steps {self.first} to {self.last} are asked for, but the run has {steps}"
            )

    def warn_of_past(self, done: int) -> None:
        """Warns of steps that are not traced, because an earlier call has trained them."""
        if self.first <= done:
            missed = "none of them is traced" if self.last <= done else "the others are traced"
            logger.warning(
                "profile: steps %d to %d were trained by an earlier call: %s",
                self.first,
                min(done, self.last),
                missed,
            )


class Tracer:
    """Traces the steps of `window`, if there is one, into `folder`."""

    def __init__(self, window: Window | None, folder: Path):
        self._window, self._folder = window, folder
        self._tracing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """Starts the trace at the first step of the window that is trained; names the step."""
        window = self._window
        if window and window.first <= step <= window.last and not self._tracing:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def ends_with(self, step: int) -> bool:
        """Whether `step` is the last that is traced."""
        return self._tracing and self._window is not None and step == self._window.last

    def after(self, step: int) -> None:
        """Ends the trace if `step`, which the devices have finished, is its last."""
        if self.ends_with(step):
            self._stop()

    def _stop(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
