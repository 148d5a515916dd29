"""A job small enough to be done hundreds of times: data, three runs, tasks, records, fits, report.

Every command runs in a child of its own, forked from a process that has imported everything but has
not started JAX. A child can be killed by SIGKILL when it is about to make, rename or remove its
n-th file, or some time after that.
"""

import dataclasses
import importlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

IMPORTS = (
    "tensorboardX",
    "scaling_jax.cli",
    "scaling_jax.commands.downstream",
    "scaling_jax.data.meter",
    "scaling_jax.data.prepare",
    "scaling_jax.progress",
    "scaling_jax.report.page",
)
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
# What a child is doing, by the file that it touches; the first that fits.
PHASES = {
    "preparing data": ("/data",),
    "saving": ("/checkpoints",),
    "training": ("metrics.jsonl", "tensorboard", "config.yaml", "goodput", "claims"),
    "evaluating": ("evaluations",),
    "records": ("records.csv",),
    "fits and report": ("fit", "report", "figures"),
}
TESTBED = {
    "name": "faults",
    "run": {
        "model": {"vocabulary_size": 264, "sequence_length": 16, "layers": 1, "heads": 1},
        "data": {"validation": ["texts"], "folder": "data"},
        "batch_size": 128,
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "checkpoint": {"every_steps": 4, "keep": 2},
        "evaluation": {
            "sequences": 32,
            "batch_size": 32,
            "bootstrap_samples": 20,
            "tasks": {"config": "quickstart", "folder": "."},
        },
    },
    "sizes": {"s": {"model": {"width": 8}}, "m": {"model": {"width": 12}}},
    "grid": [
        {"role": "fit", "datasets": ["texts"], "sizes": ["s", "m"], "token_multipliers": [1, 2]},
        {"role": "held_out", "datasets": ["texts"], "sizes": ["m"], "token_multipliers": [3]},
    ],
    "laws": {"loss": ["over_training"], "error": []},
}
TASKS = {
    "name": "small",
    "tasks": {"go_on": {"type": "language_modeling", "data": "go_on.jsonl"}},
    "averages": {"all": ["go_on"]},
}


DEVICES = 2
PREPARE = ("data", "prepare", "texts", "--out", "data", "--shards", "3")
TESTBED_RUN = ("testbed", "run", "testbed.yaml", "run.evaluation.tasks.config=tasks.yaml")
TESTBED_RUN += ("--out", "out")
FIT = ("fit", "out/records.csv", "--target", "loss/texts", "--out", "fit.json")


@dataclasses.dataclass(frozen=True)
class Kill:
    """SIGKILL at the file event of this number, or so many seconds after it."""

    event: int
    after: float = 0.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a child ended: its exit status (-9: killed), in which phase, after how many events."""

    code: int
    phase: str
    events: int
    seconds: float
    output: str


def write_inputs(folder: Path) -> None:
    """The configs and task files of the job."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "testbed.yaml").write_text(yaml.safe_dump(TESTBED))
    (folder / "tasks.yaml").write_text(yaml.safe_dump(TASKS))
    words = ["red", "green", "blue", "one", "two", "three", "four", "five"]
    for split, files, rows in (("train", 3, 60), ("validation", 1, 60)):
        (folder / "texts" / split).mkdir(parents=True)
        for number in range(files):
            texts = (
                " ".join(words[(row * step + number) % 8] for step in range(1, 12))
                for row in range(rows)
            )
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (folder / "texts" / split / f"{number}.jsonl").write_text(lines)
    questions = [{"context": "one two", "continuation": word} for word in words]
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    (folder / "go_on.jsonl").write_text(lines)


def warm_up() -> None:
    """Imports what the commands need; JAX must not start, or children could not."""
    for name in IMPORTS:
        importlib.import_module(name)
    from jax._src import xla_bridge

    assert not xla_bridge._backends


def run(
    arguments: Sequence[str], folder: Path, kill: Kill | None = None, devices: int = DEVICES
) -> Outcome:
    """`scaling-jax` with these arguments in a forked child, whose working folder is `folder`."""
    announced, announce = os.pipe()
    heard, tell = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(announced)
        os.close(heard)
        _be_the_command(arguments, folder, kill, devices, announce, tell)
    os.close(announce)
    os.close(tell)
    output, noted = _listen(child, heard, announced, kill)
    _, status = os.waitpid(child, 0)
    phase, events = noted.split("\t") if noted else ("starting", "0")
    seconds = time.monotonic() - start
    return Outcome(os.waitstatus_to_exitcode(status), phase, int(events), seconds, output)


def in_child(function: Callable[[], dict[str, str]]) -> dict[str, str]:
    """What `function` returns, from a forked child: it may start JAX."""
    end, told = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(end)
            _use_devices(DEVICES)
            with os.fdopen(told, "w") as file:
                json.dump(function(), file)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(told)
    with os.fdopen(end) as file:
        text = file.read()
    os.waitpid(child, 0)
    if not text:
        raise RuntimeError("the child that looks at the results has failed")
    return json.loads(text)


def _listen(child: int, heard: int, announced: int, kill: Kill | None) -> tuple[str, str]:
    """What the child prints, and the last it announced; kills it when it is time."""
    texts = {heard: b"", announced: b""}
    open_ends, deadline = [heard, announced], None
    while open_ends:
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        ready, _, _ = select.select(open_ends, [], [], left)
        if not ready:
            os.kill(child, signal.SIGKILL)
            deadline = None
        for end in ready:
            part = os.read(end, 1 << 16)
            if not part:
                open_ends.remove(end)
                os.close(end)
            texts[end] += part
        known = texts[announced].count(b"\n")
        if kill and kill.after and deadline is None and known >= kill.event:
            deadline = time.monotonic() + kill.after
            kill = None
    lines = texts[announced].decode().splitlines()
    return texts[heard].decode(errors="replace"), f"{lines[-1]}\t{len(lines)}" if lines else ""


def _be_the_command(
    arguments: Sequence[str],
    folder: Path,
    kill: Kill | None,
    devices: int,
    announce: int,
    tell: int,
) -> None:
    """Never returns."""
    code = 70
    try:
        os.dup2(tell, 1)
        os.dup2(tell, 2)
        os.chdir(folder)
        _use_devices(devices)
        events = 0

        def hook(name: str, args: tuple) -> None:
            nonlocal events
            if name == "open":
                if not args[2] & (os.O_WRONLY | os.O_RDWR):
                    return
            elif name not in WRITES:
                return
            path = os.fspath(args[0]) if not isinstance(args[0], int) else ""
            if not path or not str(Path(path).absolute()).startswith(str(folder)):
                return
            events += 1
            if kill and not kill.after and events == kill.event:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(announce, f"{phase_of(path)}\n".encode())

        sys.addaudithook(hook)
        sys.argv = ["scaling-jax", *arguments]
        from scaling_jax.cli import main

        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _use_devices(count: int) -> None:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"


def phase_of(path: str) -> str:
    """What a process is doing that touches the file `path`."""
    for phase, parts in PHASES.items():
        if any(part in f"/{path}" for part in parts):
            return phase
    return "other"
