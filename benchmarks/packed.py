"""Runs packed into one program against the same runs one after another.

    python benchmarks/packed.py here --out DIR [--shrink 8]
    python benchmarks/packed.py tpu [--model models/11m.yaml] [--slice v5e-16]

`here` trains the fitted runs of quickstart twice on this machine, with 1/shrink of their tokens:
packed, and one after another, each on all devices. Compiling counts, evaluating does not. It prints
seconds, the processors' time, and how far the losses are apart; both ways are begun anew.

`tpu` needs no TPU but its compiler (`pip install -e '.[plan]'`). It compiles the paper's 24 runs of
the model for a slice: one run on all chips, and runs in slots of the chips of one of its hosts, as
each host packs them. Memory and collectives are the compiler's. Times are a roofline, not measured:
the larger of model FLOPs at the chip's peak and HBM traffic at its bandwidth, and after that the
gradients' sum at the speed of the links. The traffic of a step of b sequences on a chip is p + a b:
both are solved from what XLA counts for one chip with 2 and 4 sequences, all loops written out.
"""

import argparse
import dataclasses
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

HBM_BANDWIDTH = {"v4": 1228e9, "v5e": 819e9, "v5p": 2765e9, "v6e": 1640e9}  # bytes a second
PAPER_MULTIPLIERS = (5, 10, 20, 40, 80, 160, 320, 640)
DATASETS = 3
BATCH_SIZE = 64
ALL_LOGITS_AT_ONCE = 2**40


def main() -> None:
    """Prints one of the two comparisons."""
    parser = argparse.ArgumentParser(description="Packed runs against runs alone.")
    ways = parser.add_subparsers(dest="way", required=True)
    here = ways.add_parser("here")
    here.add_argument("--out", type=Path, required=True, help="folder for data and runs")
    here.add_argument("--shrink", type=float, default=8.0)
    here.add_argument("--slots", type=int)
    tpu = ways.add_parser("tpu")
    tpu.add_argument("--model", default="models/11m.yaml")
    tpu.add_argument("--slice", default="v5e-16")
    arguments = parser.parse_args()
    if arguments.way == "here":
        compare_here(arguments.out, arguments.shrink, arguments.slots)
    else:
        compare_on_tpu(arguments.model, arguments.slice)


def compare_here(out: Path, shrink: float, slots: int | None) -> None:
    """Trains both ways and prints a line for each, and the distances of the losses."""
    from scaling_jax import cpu

    cpu.configure()
    from scaling_jax import config as configs
    from scaling_jax import config_files
    from scaling_jax.config import TestbedConfig
    from scaling_jax.data.prepare import prepare_apart
    from scaling_jax.testbeds import grid, packing, runner
    from scaling_jax.training import loop

    content = config_files.read("testbeds/quickstart.yaml", [f"run.data.folder={out / 'data'}"])
    blocks = [block for block in content["grid"] if block["role"] == "fit"]
    for block in blocks:
        block["token_multipliers"] = [each / shrink for each in block["token_multipliers"]]
    testbed = configs.build(TestbedConfig, content | {"grid": blocks}, source="quickstart")
    runs = grid.expand(testbed)
    prepare_apart(grid.datasets(runs), out=out / "data")
    for way in ("packed", "alone"):
        shutil.rmtree(out / way, ignore_errors=True)
    steps = sum(run.budget.steps for run in runs)
    print(f"{len(runs)} runs, {steps:,} steps, {os.cpu_count()} cores")

    plan = packing.plan([runner.status(run, out / "packed") for run in runs], slots)
    for group in plan.groups:
        print(
            f"{group.runs[0].config.model.label}: {len(group.runs)} runs, {group.slots} slots, "
            f"{group.occupancy:.1%} busy"
        )
    with _Watch("packed", steps) as packed:
        packing.train(plan, out / "packed")
        for single in plan.alone:
            loop.train(single.run.config, single.run.folder(out / "packed"))
    with _Watch("alone", steps) as alone:
        for run in runs:
            loop.train(run.config, run.folder(out / "alone"))
    print(
        f"alone / packed: {alone.seconds / packed.seconds:.2f} of wall time, "
        f"{alone.cpu_seconds / packed.cpu_seconds:.2f} of processor time"
    )
    both = [runner.curves(runs, out / way) for way in ("packed", "alone")]
    apart = pd.DataFrame(_apart(one["loss"], other["loss"]) for one, other in _pairs(*both))
    print("relative distance of losses, the largest of all runs:")
    print(apart.max().to_string(float_format=lambda value: f"{value:.1e}"))


def compare_on_tpu(model_file: str, slice_name: str) -> None:
    """Compiles and prints the table."""
    from scaling_jax.planning.ahead_of_time import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    from scaling_jax import config as configs
    from scaling_jax.config import ModelConfig
    from scaling_jax.models import counting
    from scaling_jax.planning import slices
    from scaling_jax.testbeds import packing

    one = slices.find(slice_name)
    chip, bandwidth = one.chip, HBM_BANDWIDTH[one.chip.name]
    model = configs.load(ModelConfig, model_file)
    flops = counting.flops_model_per_token(model) * model.sequence_length
    whole = f"{chip.name}:{one.shape}"
    # The compiler takes no part of a topology: a host's chips are a slice of their own to it.
    of_host = slices.find(f"{chip.name}-{one.chips_per_host * chip.cores_counted}")
    host = f"{chip.name}:{of_host.shape}"
    fixed, each = traffic(model, host)
    print(f"HBM traffic of a step: {fixed / 1e9:.2f} GB + {each / 1e9:.2f} GB a sequence on a chip")
    lengths = sorted([*PAPER_MULTIPLIERS] * DATASETS, reverse=True)
    rows = []
    for slots in (None, 1, one.chips_per_host, math.ceil(len(lengths) / one.hosts)):
        if slots is None:
            compiled, groups = _compile_alone(model, whole), 1
        else:
            compiled, on_host = _compile(model, host, slots)
            groups = on_host * one.hosts
        chips = one.chips // groups
        memory = compiled.memory_analysis()
        assert memory is not None
        total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        sequences = BATCH_SIZE / chips
        compute = flops * sequences / chip.peak_flops
        hbm = (fixed + each * sequences) / bandwidth
        sums = 2 * 4 * counting.actual_params(model) * (chips - 1) / chips / chip.axis_bandwidth
        # Of one run-step on the whole slice: so many groups make one each at the same time.
        seconds = (max(compute, hbm) + sums) / groups
        busy = packing.occupancy(lengths, one.hosts * slots if slots else 1, groups)
        rows.append(
            {
                "slots a host": slots or "alone",
                "chips a run": chips,
                "state+batch GiB": memory.argument_size_in_bytes / 2**30,
                "temporary GiB": memory.temp_size_in_bytes / 2**30,
                "of HBM": total / chip.hbm_bytes,
                "collectives": len(_sent(compiled.as_text() or "")),
                "ms a run-step": 1000 * seconds,
                "HBM busy": hbm / groups / seconds,
                "MFU": flops * BATCH_SIZE / (one.chips * chip.peak_flops * seconds),
                "slots busy": busy,
                "MFU of 24 runs": flops * BATCH_SIZE * busy / one.chips / chip.peak_flops / seconds,
            }
        )
    print(f"{model.label} on {one.name}, {BATCH_SIZE} sequences a run")
    with pd.option_context("display.width", 250, "display.max_columns", 20):
        print(pd.DataFrame(rows).to_string(index=False, float_format=lambda value: f"{value:.4g}"))


def traffic(model: Any, topology: str) -> tuple[float, float]:
    """Bytes that a step moves whatever its batch, and for each sequence; on one chip."""
    from scaling_jax.config import MeshConfig
    from scaling_jax.mesh import make_mesh
    from scaling_jax.models import head, kernels
    from scaling_jax.training import step

    kept = kernels.TPU, head.MOST_LOGITS
    kernels.TPU = dataclasses.replace(kernels.TPU, most_unrolled=model.layers)
    head.MOST_LOGITS = ALL_LOGITS_AT_ONCE
    mesh = make_mesh(MeshConfig(), _devices(topology)[:1])
    moved = []
    for sequences in (2, 4):
        analysis = step.lower(model, sequences, 1, mesh).compile().cost_analysis()
        assert analysis is not None  # which only other compilers leave out
        moved.append(analysis["bytes accessed"])
    kernels.TPU, head.MOST_LOGITS = kept
    each = (moved[1] - moved[0]) / 2
    return moved[0] - 2 * each, each


def _compile_alone(model: Any, topology: str) -> Any:
    """The program of one run."""
    from scaling_jax.config import MeshConfig
    from scaling_jax.mesh import make_mesh
    from scaling_jax.training import step

    mesh = make_mesh(MeshConfig(), _devices(topology))
    return step.lower(model, BATCH_SIZE, 1, mesh).compile()


def _compile(model: Any, topology: str, slots: int) -> tuple[Any, int]:
    """The program of so many slots, and how many groups of chips it has."""
    from scaling_jax.config import DataConfig, MeshConfig, RunConfig
    from scaling_jax.mesh import make_mesh
    from scaling_jax.training import packed_step

    data = DataConfig(dataset="any", validation=("any",))
    shape = packed_step.Shape.of(RunConfig(model, data, BATCH_SIZE, tokens=1))
    mesh = packed_step.make_mesh(make_mesh(MeshConfig(), _devices(topology)), slots)
    program = packed_step.Program(shape, mesh, slots)
    return program.lower().compile(), mesh.shape[packed_step.RUN]


def _devices(topology: str) -> list[Any]:
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def _sent(text: str) -> list[Any]:
    from scaling_jax.planning.collectives import collectives

    return collectives(text)


@dataclasses.dataclass
class _Watch:
    """Measures the block, and says how long it took."""

    name: str
    steps: int
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __enter__(self) -> "_Watch":
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start[0]
        self.cpu_seconds = time.process_time() - self._start[1]
        print(
            f"{self.name}: {self.seconds:.1f} s, {self.cpu_seconds:.1f} s of processors, "
            f"{self.steps / self.seconds:,.0f} steps/s; load {os.getloadavg()[0]:.1f}",
            flush=True,
        )


def _pairs(packed: dict[str, Any], alone: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    for name, curve in alone.items():
        yield packed[name], curve


def _apart(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    distance = np.abs(one / other - 1)
    upto = {f"of the first {count} steps": distance[:count].max() for count in (10, 30, 100)}
    return {**upto, "of all steps": distance.max(), "of the last": distance[-1]}


if __name__ == "__main__":
    main()
