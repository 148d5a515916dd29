"""Branches of one trunk against separate runs, and what laws fitted to either predict.

    python benchmarks/branches.py --out DIR [--datasets zipf_markov ...]

Trains the same small grid three times on the distributions of quickstart: warm-up, stable and decay
with each column of token multipliers as branches of one trunk; the same runs separately; and
separate runs with a cosine. Prints the losses cell by cell, the laws' predictions of a held-out
larger run beside its measured loss, and what the fitted runs took each way. Exit code 1: a branch
is not, bit for bit, the separate run. A second call trains nothing that is done. About ten minutes
on two cores; `--datasets zipf_markov` a third of that.
"""

import argparse
import dataclasses
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd

from scaling_jax import config as configs
from scaling_jax import config_files, cpu
from scaling_jax.config import OptimizerConfig, RunConfig, TestbedConfig
from scaling_jax.data.prepare import prepare_apart
from scaling_jax.errors import UserError
from scaling_jax.testbeds import analysis, grid, runner
from scaling_jax.testbeds.grid import PlannedRun
from scaling_jax.training import loop

QUICKSTART = "testbeds/quickstart.yaml"
DATASETS = ("python_code", "python_docs", "zipf_markov")
FIT = {"22k": [10, 20, 40], "33k": [7.5, 15], "46k": [4, 8, 16]}
HELD_OUT = {"72k": [15]}
LAWS = ("over_training", "chinchilla")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train the grid, and what the runs took that laws are fitted to.

    `seconds` of wall clock, evaluation too; None where a part was done by an earlier call.
    """

    name: str
    table: pd.DataFrame
    states: dict[str, Any]
    steps: int
    flops: float
    seconds: float | None


def main() -> None:
    """Trains the grid in the three ways and prints the tables."""
    parser = argparse.ArgumentParser(description="Branches of one trunk against separate runs.")
    parser.add_argument("--out", type=Path, required=True, help="folder for data and runs")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=DATASETS)
    arguments = parser.parse_args()
    cpu.configure()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    try:
        arms = train_all(arguments.datasets, arguments.out)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    compared = cells(arms)
    show("losses on the own distribution, and differing numbers of the final states", compared)
    show(f"held-out runs of {', '.join(HELD_OUT)}", list(predictions(arms)))
    show("cost of the fitted runs", [cost(arm, arms["separate"]) for arm in arms.values()])
    if any(row["differing_numbers"] for row in compared):
        sys.exit("branches are not the separate runs")


def train_all(datasets: Sequence[str], out: Path) -> dict[str, Arm]:
    """The three arms by name; data are prepared and steps compiled before the first."""
    data = out / "data"
    prepare_apart(datasets, out=data)
    stable = plan(datasets, data, "warmup_stable_decay")
    alone = [dataclasses.replace(run, trunk=None) for run in stable]
    ways = {"branches": stable, "separate": alone, "cosine": plan(datasets, data, "cosine")}
    with tempfile.TemporaryDirectory() as folder:
        compile_all(stable, Path(folder))
    return {name: train(name, runs, out / name) for name, runs in ways.items()}


def plan(datasets: Sequence[str], data: Path, schedule: str) -> list[PlannedRun]:
    """The grid with the settings of quickstart, under one schedule."""
    content = config_files.read(
        QUICKSTART, [f"run.data.folder={data}", f"run.optimizer.schedule={schedule}"]
    )
    content["run"]["data"]["validation"] = list(datasets)
    content["grid"] = [
        {"role": role, "datasets": list(datasets), "sizes": [size], "token_multipliers": chosen}
        for role, sizes in (("fit", FIT), ("held_out", HELD_OUT))
        for size, chosen in sizes.items()
    ]
    return grid.expand(configs.build(TestbedConfig, content, source=QUICKSTART))


def compile_all(runs: Sequence[PlannedRun], out: Path) -> None:
    """A run of one step for each size, so that no arm pays for compiling."""
    for run in {run.config.model: run for run in runs}.values():
        once = dataclasses.replace(
            run.config,
            token_multiplier=None,
            tokens=run.budget.tokens_per_step,
            optimizer=OptimizerConfig(schedule="constant", warmup_steps=0),
        )
        runner.train_and_evaluate(once, out / once.identity)


def train(name: str, runs: Sequence[PlannedRun], out: Path) -> Arm:
    """Brings one arm to its end."""
    seconds: float | None = 0.0
    start = time.perf_counter()
    for done in runner.run_all(runs, out):
        print(f"{name}: {done.run.name}: loss {done.loss:.4f}", flush=True)
        end = time.perf_counter()
        if done.run.role == "fit":
            seconds = seconds + end - start if done.now and seconds is not None else None
        start = end
    fitted = [runner.status(run, out) for run in runs if run.role == "fit"]
    return Arm(
        name=name,
        table=runner.write_table(runs, out).set_index("run"),
        states={run.name: final_state(run.config, run.folder(out)) for run in runs},
        steps=sum(status.step - status.branched_at for status in fitted),
        flops=runner.cost(fitted).spent,
        seconds=seconds,
    )


def final_state(config: RunConfig, folder: Path) -> list[np.ndarray]:
    """Parameters, moments and step at the end of a run."""
    return jax.tree.leaves(jax.device_get(loop.restore(config, folder).state))


def cells(arms: dict[str, Arm]) -> list[dict[str, Any]]:
    """The losses of each run in the three arms."""
    branches, separate = arms["branches"], arms["separate"]
    rows = []
    for run, row in branches.table.iterrows():
        target = f"loss/{row['dataset']}"
        pairs = zip(branches.states[str(run)], separate.states[str(run)], strict=True)
        loss = {name: float(arm.table[target][str(run)]) for name, arm in arms.items()}
        rows.append(
            {
                "run": run,
                **loss,
                "branches - separate": loss["branches"] - loss["separate"],
                "branches / cosine - 1": loss["branches"] / loss["cosine"] - 1,
                "differing_numbers": sum(int(np.sum(one != other)) for one, other in pairs),
            }
        )
    return rows


def predictions(arms: dict[str, Arm]) -> Iterator[dict[str, Any]]:
    """Each law of each arm, its prediction of the held-out run and what that run reached."""
    datasets = sorted(arms["branches"].table["dataset"].unique())
    for dataset, law, arm in itertools.product(datasets, LAWS, arms.values()):
        rows = arm.table[arm.table["dataset"] == dataset].reset_index()
        (fitted,) = analysis.fit_law(rows, law, f"loss/{dataset}")
        for found in fitted["held_out"]:
            yield {
                "run": found["run"],
                "law": law,
                "fitted to": arm.name,
                "predicted": found["predicted"],
                "low": found["low"],
                "high": found["high"],
                "measured": found["measured"],
                "relative error": found["relative_error"],
            }


def cost(arm: Arm, separate: Arm) -> dict[str, Any]:
    """What one arm took, beside the separate runs."""
    return {
        "runs": arm.name,
        "steps": arm.steps,
        "FLOPs (6 N D)": arm.flops,
        "FLOPs saved": 1 - arm.flops / separate.flops,
        "seconds": arm.seconds,
    }


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Prints a table."""
    print(f"\n{title}")
    with pd.option_context("display.width", 200):
        table = pd.DataFrame(rows).to_string(index=False, float_format=lambda value: f"{value:.5g}")
    print(table)


if __name__ == "__main__":
    main()
