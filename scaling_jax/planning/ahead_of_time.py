"""The real training step, compiled for TPU slices by their own compiler where there is no TPU.

It is the program that training runs (`training.step`): the same kernels, the same shardings. The
compiler is libtpu's, which the extra `plan` installs. FLOPs are not taken from it: XLA counts the
body of a scan once, whatever the number of layers.
"""

import collections
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from typing import Any

from scaling_jax.config import MeshConfig, ModelConfig
from scaling_jax.errors import UserError
from scaling_jax.planning.slices import Slice

INSTALL = "pip install -c constraints.txt -e '.[plan]'"
ENVIRONMENT = {
    # No TPU is asked for: its compiler alone is used, and by as many processes as like.
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Sent:
    """What the collectives of one kind and type send in a step: `count` arrays, `bytes` in all."""

    kind: str
    dtype: str
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of the step on one chip.

    Attributes:
      fits: whether it fits the chip's memory; where the compiler refused, no more is known than
        `total_bytes`, perhaps of temporaries alone, and 0 if not even that.
      total_bytes: arguments and temporaries, which the program allocates.
      argument_bytes: state and batch, which the new state takes the place of.
      temporary_bytes: everything else.
      peak_bytes: the most of it in use at a time, as the compiler reports it.
      seconds: tracing and compiling.
      sent: its collectives.
    """

    fits: bool
    total_bytes: int
    argument_bytes: int = 0
    temporary_bytes: int = 0
    peak_bytes: int = 0
    seconds: float = 0.0
    sent: tuple[Sent, ...] = ()


def compile_step(
    model: ModelConfig,
    batch_size: int,
    microbatches: int,
    mesh: MeshConfig,
    one: Slice,
) -> Compiled:
    """Compiles the step of a run for `mesh.slices` slices like `one`, in a process of its own.

    Raises:
      UserError: libtpu is not installed, the batch or a parameter cannot be split evenly, or the
        compiler failed: its last words.
    """
    check_installed()
    request = {
        "model": dataclasses.asdict(model),
        "batch_size": batch_size,
        "microbatches": microbatches,
        "mesh": dataclasses.asdict(mesh),
        "topology": f"{one.chip.name}:{one.shape}",
        "slices": mesh.slices,
    }
    done = subprocess.run(
        [sys.executable, "-m", "scaling_jax.planning.compile_child"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=os.environ | ENVIRONMENT,
        check=False,
    )
    if done.returncode:
        raise UserError(f"compiling {model.label} for {one.name} failed: {_last_words(done)}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "user_error" in answer:
        raise UserError(answer["user_error"])
    if "exhausted" in answer:
        return Compiled(fits=False, total_bytes=used_bytes(answer["exhausted"]))
    return _read(answer, one)


def check_installed() -> None:
    """Raises a UserError with the command that installs libtpu, where it is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--compile needs libtpu, the compiler for TPUs: {INSTALL}")


def used_bytes(message: str) -> int:
    """How much memory a program would take, from the compiler's refusal; 0 if it does not say.

    It says 'Used 17.20G of 15.75G hbm', or of temporaries alone '(230.08G) exceeds'.
    """
    found = re.search(r"(?:Used |\()([\d.]+)([KMG])\)? (?:of|exceeds)", message)
    return round(float(found[1]) * _UNITS[found[2]]) if found else 0


def _read(answer: dict[str, Any], one: Slice) -> Compiled:
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    sizes: collections.Counter[tuple[str, str]] = collections.Counter()
    for kind, dtype, size, repeats in answer["collectives"]:
        counts[kind, dtype] += repeats
        sizes[kind, dtype] += size * repeats
    total = answer["argument_bytes"] + answer["temporary_bytes"]
    return Compiled(
        fits=total <= one.chip.hbm_bytes,
        total_bytes=total,
        argument_bytes=answer["argument_bytes"],
        temporary_bytes=answer["temporary_bytes"],
        peak_bytes=answer["peak_bytes"],
        seconds=answer["trace_seconds"] + answer["compile_seconds"],
        sent=tuple(Sent(*key, counts[key], sizes[key]) for key in sorted(counts)),
    )


def _last_words(done: "subprocess.CompletedProcess[str]") -> str:
    """The last line of an error, or the signal that ended the process."""
    if done.returncode < 0:
        return f"it was ended by signal {-done.returncode}"
    lines = [
        line for line in done.stderr.splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)
    ]
    return (lines or done.stderr.splitlines() or ["no word"])[-1]
