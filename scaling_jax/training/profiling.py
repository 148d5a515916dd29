"""`--profile START:COUNT`: a trace of some steps, as XLA and the devices see them.

It lies in the run's TensorBoard folder: `tensorboard --logdir RUN/tensorboard` with the plugin
xprof shows it.
"""

import dataclasses
import re
from pathlib import Path
from typing import Self

import jax

from scaling_jax.errors import UserError


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

    def check(self, done: int, steps: int) -> None:
        """Raises a UserError unless the window lies between the steps `done` and `steps`."""
        if not done < self.first <= self.last <= steps:
            left = f"the steps {done + 1} to {steps}" if done < steps else "no steps: it is trained"
            raise UserError(
                f"profile: steps {self.first} to {self.last} are asked for, but the run has {left}"
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
        """Starts the trace if `step` is its first; names the step in it."""
        if self._window and step == self._window.first:
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
