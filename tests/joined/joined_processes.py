"""A command in several real processes on one machine, four simulated devices among them."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

DEVICES = 4
PATIENCE = 600


def lines(run: Path | None) -> list[dict]:
    """What the run in a folder has written, a line a step; the last one may be half written."""
    assert run is not None
    path = run / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def printed(out: str) -> list[str]:
    """What the command has printed; gloo says who is connected, at times half a line at once."""
    return [line for line in out.splitlines() if "[Gloo]" not in line and "peer ranks" not in line]


class Job:
    """`scaling-jax train`, or another command, in several processes; the last one told `own`."""

    def __init__(
        self,
        config: Path,
        folder: Path | None,
        processes: int,
        *words: str,
        command: str = "train",
        own: str | None = None,
    ):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        count = f"--xla_force_host_platform_device_count={DEVICES // processes}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": count}
        line = [sys.executable, "-m", "scaling_jax.cli", *command.split(), str(config), *words]
        line += [f"--out={folder}"] if folder else []
        line += [f"--coordinator=localhost:{port}"]
        self.folder = folder
        self.processes = [
            subprocess.Popen(
                [
                    *line,
                    *([own] if own and number == processes - 1 else []),
                    *(f"--processes={processes}", f"--process_id={number}"),
                ],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(processes)
        ]

    def wait_for_step(self, step: int, *runs: Path) -> None:
        """Waits until all `runs` are there, by default the one of the job."""
        until = time.monotonic() + PATIENCE
        while min(len(lines(run)) for run in runs or (self.folder,)) < step:
            assert time.monotonic() < until
            assert all(process.poll() is None for process in self.processes), self.ends()
            time.sleep(0.02)

    def end(self, number: int) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a process that has ended by itself."""
        process = self.processes[number]
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out, err

    def ends(self) -> list[tuple[int, str, str]]:
        return [self.end(number) for number in range(len(self.processes))]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
