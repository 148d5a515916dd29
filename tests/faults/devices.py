"""The job of `job` begun on 8 devices, killed, gone on with on 4, killed, and ended on 1.

    python tests/faults/devices.py --seed 3

prints by how much losses differ from the job done on 8 at one go; more than 1e-5 is a failure. On 4
devices it also goes on on another mesh.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import job
import numpy as np
from job import PREPARE, TESTBED_RUN, Kill
from kills import ENVIRONMENT

LARGEST_DIFFERENCE = 1e-5
OTHER_MESH = ("run.mesh.data=2", "run.mesh.fsdp=2", "run.mesh.tensor=1")
# Where the job goes on, how it is called there, and whether it is killed.
SITTINGS = ((8, (), True), (4, (), True), (4, OTHER_MESH, True), (1, (), False))


def losses(folder: Path) -> dict[str, list[float]]:
    """The loss curve of each run, and its scores on held-out text."""

    def read() -> dict[str, str]:
        from scaling_jax.training import checkpoint

        return {
            run.name: ",".join(map(str, checkpoint.read_curve(run / "checkpoints")["loss"]))
            for run in sorted(folder.glob("out/runs/*"))
        }

    curves = {name: list(map(float, text.split(","))) for name, text in job.in_child(read).items()}
    import pandas as pd

    table = pd.read_csv(folder / "out" / "records.csv")
    return curves | {"records": table["loss/texts"].tolist()}


def main() -> int:
    """Prints the differences; 1 if one is too large."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    work = Path(tempfile.mkdtemp(prefix="devices-"))
    os.environ |= ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(work / "compiled")}
    job.warm_up()
    whole, moved = work / "whole", work / "moved"
    job.write_inputs(whole)
    assert job.run(PREPARE, whole).code == 0
    shutil.copytree(whole, moved)
    done = job.run(TESTBED_RUN, whole, devices=8)
    assert done.code == 0, done.output
    for devices, changes, killed in SITTINGS:
        event = draw.randint(done.events // 8, done.events // 4)
        kill = Kill(event) if killed else None
        went = job.run((*TESTBED_RUN, *changes), moved, kill, devices)
        print(f"{devices} devices {' '.join(changes)}: {went.code}, while {went.phase}", flush=True)
        assert went.code == (-9 if killed else 0), went.output
    expected, found = losses(whole), losses(moved)
    assert expected.keys() == found.keys()
    largest = max(
        float(np.max(np.abs(np.array(found[name]) / np.array(values) - 1)))
        for name, values in expected.items()
    )
    print(f"largest relative difference of {len(expected)} curves and tables: {largest:.2g}")
    shutil.rmtree(work)
    return largest > LARGEST_DIFFERENCE


if __name__ == "__main__":
    sys.exit(main())
