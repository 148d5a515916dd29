"""Times of law fitting: this package, scipy the way the papers use it, scipy and numpy our way.

    python benchmarks/laws.py --chinchilla DIR --gadre DIR

DIR are the released data (see `scaling-jax reproduce --help`). Prints one table; a part whose data
are not given is left out. What takes minutes is timed on a sample and extrapolated, and says so.
scipy and numpy run one thread each, but for numpy's linear algebra; JAX uses what cores there are.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.optimize

from scaling_jax import laws
from scaling_jax.laws import solver
from scaling_jax.testbeds import published
from scaling_jax.testbeds.reproduce import chinchilla, gadre2024_tables, paper_laws

DELTA = 1e-3
GRID = (  # starts of Besiroglu et al., in the order log A, log B, log E, alpha, beta: 4500
    np.arange(0, 30, 5),
    np.arange(0, 30, 5),
    np.arange(-1, 1.5, 0.5),
    np.arange(0, 2.5, 0.5),
    np.arange(0, 2.5, 0.5),
)
SAMPLED_STARTS, SAMPLED_BOOTSTRAPS, BOOTSTRAPS = 40, 20, 4000
STARTS_PER_CURVE_FIT = 128
COLD_STARTS = 3


def main() -> None:
    """Runs every part whose data are given and prints the table."""
    parser = argparse.ArgumentParser(description="Times of law fitting.")
    parser.add_argument("--chinchilla", type=Path, help="folder of svg_extracted_data.csv")
    parser.add_argument("--gadre", type=Path, help="exp_data of mlfoundations/scaling")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, seconds of wall clock")
    rows: list[dict[str, Any]] = []
    if arguments.chinchilla:
        rows += chinchilla_rows(published.chinchilla(arguments.chinchilla))
    if arguments.gadre:
        rows += gadre_rows(published.gadre2024(arguments.gadre))
    rows += cold_start_rows()
    table = pd.DataFrame(rows)
    with pd.option_context("display.width", 200, "display.max_colwidth", 80):
        print(table.to_string(index=False, float_format=lambda value: f"{value:.3g}"))


def chinchilla_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The 240-point Huber fit from scratch, and 4000 bootstraps from its optimum."""
    x, y = table[["params", "tokens"]].to_numpy(float).T, table["loss/train"].to_numpy(float)
    form = laws.FORMS["chinchilla"]
    box = solver.Box.of(form)

    def fit() -> np.ndarray:
        found = laws.fit(form, table, target="loss/train", objective=laws.huber(DELTA))
        return found.coordinates

    cold_fit, start = timed(fit)
    cold_resamples, _ = timed(lambda: chinchilla.bootstrap(x, y, box, start, BOOTSTRAPS))
    serial = serial_chinchilla(x, y, solver_to_scipy(start))
    twin = numpy_chinchilla(x, y)
    # After the others, so that neither side has the machine to itself in the first minute only.
    warm_fit, _ = timed(fit)
    warm_resamples, _ = timed(lambda: chinchilla.bootstrap(x, y, box, start, BOOTSTRAPS))
    total = serial["fit"] + serial["bootstraps"]
    job = "240 points, Huber"
    return [
        row(job, "ours, first call", cold_fit, cold_resamples, total),
        row(job, "ours, warm", warm_fit, warm_resamples, total),
        row(
            job,
            f"scipy as published (from {SAMPLED_STARTS} of 4500 starts, "
            f"{SAMPLED_BOOTSTRAPS} of {BOOTSTRAPS} bootstraps)",
            serial["fit"],
            serial["bootstraps"],
            total,
        ),
        row(job, "numpy, our algorithm, batched", twin["fit"], twin["bootstraps"], total),
    ]


def gadre_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The 24 + 48 fits of Gadre et al. 2024: eq. 4 and eq. 5."""
    cold, _ = timed(lambda: gadre2024_tables.fit_paper(table))
    problems = [
        (train, loss, split)
        for train in paper_laws.TRAIN_SETS
        for loss in gadre2024_tables.LOSSES
        for split in gadre2024_tables.SPLITS
    ]
    sample = problems[:: len(problems) // 4]
    multistart, _ = timed(lambda: [curve_fit_both(table, *problem) for problem in sample])
    multistart *= len(problems) / len(sample)
    projected, _ = timed(lambda: [project_both(table, *problem) for problem in problems])
    warm, _ = timed(lambda: gadre2024_tables.fit_paper(table))
    job = "48 fits of the paper, both laws"
    return [
        row(job, "ours, first call", cold, None, multistart),
        row(job, "ours, warm", warm, None, multistart),
        row(
            job,
            f"scipy curve_fit, {STARTS_PER_CURVE_FIT} starts (from {len(sample)} of 48)",
            multistart,
            None,
            multistart,
        ),
        row(job, "numpy and scipy, our algorithm, serial", projected, None, multistart),
    ]


def cold_start_rows() -> list[dict[str, Any]]:
    """`scaling-jax fit` on a small table, each time in a new process."""
    sizes, multipliers = np.meshgrid([1e7, 3e7, 1e8, 3e8], [5.0, 20.0, 80.0])
    params, tokens = sizes.ravel(), (sizes * multipliers).ravel()
    truth = {"E": 1.7, "a": 150.0, "b": 200.0, "eta": 0.13}
    loss = laws.FORMS["over_training"].curve(truth, params=params, tokens=tokens)
    loss = loss * np.exp(0.004 * np.random.default_rng(0).standard_normal(len(loss)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs.csv"
        pd.DataFrame({"params": params, "tokens": tokens, "loss/val": loss}).to_csv(path)
        code = "from scaling_jax.cli import main; main()"
        command = [sys.executable, "-c", code, "fit", str(path)]
        times = [
            timed(lambda: subprocess.run(command, check=True, capture_output=True))[0]
            for _ in range(COLD_STARTS)
        ]
    name = f"new process, median of {COLD_STARTS}"
    return [row("scaling-jax fit, 12 rows", name, float(np.median(times)), None, None)]


def serial_chinchilla(x: np.ndarray, y: np.ndarray, optimum: np.ndarray) -> dict[str, float]:
    """Besiroglu et al.'s way: L-BFGS-B with numerical gradients; a sample, extrapolated."""
    random = np.random.default_rng(0)
    starts = np.array(list(itertools.product(*GRID)))
    chosen = starts[random.choice(len(starts), SAMPLED_STARTS, replace=False)]

    def minimise(start: np.ndarray, rows: np.ndarray) -> None:
        arguments = (x[:, rows], y[rows])
        scipy.optimize.minimize(huber_cost, start, args=arguments, method="L-BFGS-B")

    every = np.arange(len(y))
    with np.errstate(all="ignore"):
        fit, _ = timed(lambda: [minimise(start, every) for start in chosen])
        resamples = [random.integers(len(y), size=len(y)) for _ in range(SAMPLED_BOOTSTRAPS)]
        bootstraps, _ = timed(lambda: [minimise(optimum, rows) for rows in resamples])
    return {
        "fit": fit * len(starts) / SAMPLED_STARTS,
        "bootstraps": bootstraps * BOOTSTRAPS / SAMPLED_BOOTSTRAPS,
    }


def huber_cost(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """Sum of Huber costs of log residuals at (log A, log B, log E, alpha, beta)."""
    residuals = np.abs(log_law(theta[None], x)[0] - np.log(y))
    linear = DELTA * (residuals - DELTA / 2)
    return float(np.where(residuals <= DELTA, residuals**2 / 2, linear).sum())


def log_law(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Log of the Chinchilla law, shape (problems, n), for `theta` of shape (problems, 5)."""
    a, b, e, alpha, beta = theta.T[:, :, None]
    by_params, by_tokens = np.exp(a - alpha * np.log(x[0])), np.exp(b - beta * np.log(x[1]))
    return np.log(by_params + by_tokens + np.exp(e))


def numpy_chinchilla(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Our algorithm in numpy: 64 projected starts and batched reweighted Levenberg-Marquardt."""
    ones = np.ones((1, len(y)))

    def fit() -> np.ndarray:
        starts = np.array([project_start(x, y, *exponents) for exponents in even_spread(64)])
        found, cost = descend(starts, x, y, np.repeat(ones, 64, axis=0), solver.ITERATIONS)
        return found[np.argmin(cost)]

    seconds, best = timed(fit)
    random = np.random.RandomState(chinchilla.SEED)
    weights = np.array(
        [np.bincount(random.choice(len(y), len(y)), minlength=len(y)) for _ in range(BOOTSTRAPS)],
        float,
    )

    def resample() -> None:
        for first in range(0, BOOTSTRAPS, chinchilla.BATCH):
            w = weights[first : first + chinchilla.BATCH]
            descend(np.repeat(best[None], len(w), axis=0), x, y, w, chinchilla.ITERATIONS)

    return {"fit": seconds, "bootstraps": timed(resample)[0]}


def even_spread(count: int) -> np.ndarray:
    """Pairs of exponents between 0.05 and 1."""
    index = np.arange(1, count + 1)[:, None]
    unit = (0.5 + index * np.array([0.7548776662466927, 0.5698402909980532])) % 1.0
    return 0.05 + 0.95 * unit


def project_start(x: np.ndarray, y: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """(log A, log B, log E, alpha, beta) with the best non-negative A, B and E."""
    columns = np.stack([x[0] ** -alpha, x[1] ** -beta, np.ones(len(y))], axis=1) / y[:, None]
    unit = np.linalg.norm(columns, axis=0)
    linear = scipy.optimize.nnls(columns / unit, np.ones(len(y)))[0] / unit
    return np.array([*np.log(np.maximum(linear, 1e-12)), alpha, beta])


def descend(
    theta: np.ndarray, x: np.ndarray, y: np.ndarray, weights: np.ndarray, iterations: int
) -> tuple[np.ndarray, np.ndarray]:
    """Batched Levenberg-Marquardt on the quadratic that touches the Huber cost from above."""
    log_x, log_y = np.log(x), np.log(y)

    def model(at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        a, b, e, alpha, beta = at.T[:, :, None]
        parts = [
            np.exp(a - alpha * log_x[0]),
            np.exp(b - beta * log_x[1]),
            np.exp(e) + 0 * log_x[0],
        ]
        total = parts[0] + parts[1] + parts[2]
        shares = [part / total for part in parts]
        slopes = np.stack([*shares, -shares[0] * log_x[0], -shares[1] * log_x[1]], axis=1)
        residuals = np.log(total) - log_y
        size = np.abs(residuals)
        costs = np.where(size <= DELTA, size**2 / 2, DELTA * (size - DELTA / 2))
        curvature = weights * np.minimum(1.0, DELTA / np.maximum(size, 1e-30))
        weighted = slopes * curvature[:, None]
        gradient = np.einsum("ipn,in->ip", weighted, residuals)
        return (weights * costs).sum(1), gradient, weighted @ slopes.transpose(0, 2, 1)

    damping = np.full(len(theta), 1e-2)
    with np.errstate(all="ignore"):
        cost, gradient, hessian = model(theta)
        for _ in range(iterations):
            root = np.sqrt(np.maximum(np.einsum("ipp->ip", hessian), 1e-300))
            scaled = hessian / root[:, :, None] / root[:, None]
            scaled = scaled + damping[:, None, None] * np.eye(theta.shape[1])
            move = np.linalg.solve(scaled, (gradient / root)[..., None])[..., 0] / root
            trial = theta - np.clip(move, -5, 5)
            tried = model(trial)
            better = tried[0] < cost
            theta = np.where(better[:, None], trial, theta)
            cost = np.where(better, tried[0], cost)
            gradient = np.where(better[:, None], tried[1], gradient)
            hessian = np.where(better[:, None, None], tried[2], hessian)
            damping = np.where(better, np.maximum(damping / 8, 1e-14), damping * 4)
            if (damping > 1e12).all():
                break
    return theta, cost


def curve_fit_both(table: pd.DataFrame, train: str, loss: str, split: str) -> None:
    """Eq. 4 and eq. 5 by curve_fit from random starts, the best kept, as the authors do."""
    random = np.random.default_rng(0)
    rows, chosen = paper_laws.loss_rows(table, train), paper_laws.error_rows(table, train)
    x = rows[["params", "tokens"]].to_numpy(float).T

    def equation_4(x: np.ndarray, e: float, a: float, b: float, eta: float) -> np.ndarray:
        multiplier, flops = x[1] / x[0], 6 * x[0] * x[1]
        return e + (a * multiplier**eta + b * multiplier**-eta) * flops**-eta

    def equation_5(loss: np.ndarray, eps: float, k: float, gamma: float) -> np.ndarray:
        return eps - k * np.exp(-gamma * loss)

    for law, inputs, target, high in (
        (equation_4, x, rows[loss].to_numpy(), (3, 1000, 1000, 0.5)),
        (equation_5, chosen[loss].to_numpy(), chosen[split].to_numpy(), (1, 5, 2)),
    ):
        best = np.inf
        for _ in range(STARTS_PER_CURVE_FIT):
            try:
                with np.errstate(all="ignore"), warnings.catch_warnings():
                    warnings.simplefilter("ignore", scipy.optimize.OptimizeWarning)
                    start = random.uniform(0, high)
                    found = scipy.optimize.curve_fit(law, inputs, target, start, maxfev=2000)[0]
            except RuntimeError:  # this start did not converge
                continue
            best = min(best, float(((law(inputs, *found) - target) ** 2).sum()))


def project_both(table: pd.DataFrame, train: str, loss: str, split: str) -> None:
    """Eq. 4 and eq. 5 by variable projection: a search over the one nonlinear parameter."""
    rows, chosen = paper_laws.loss_rows(table, train), paper_laws.error_rows(table, train)
    params, tokens = (rows[name].to_numpy(float) for name in ("params", "tokens"))
    flops, multiplier = 6 * params * tokens, tokens / params
    at = chosen[loss].to_numpy()
    fit_projected(
        lambda eta: [multiplier**eta * flops**-eta, multiplier**-eta * flops**-eta],
        rows[loss].to_numpy(),
        np.geomspace(0.02, 0.5, 64),
    )
    fit_projected(
        lambda gamma: [np.exp(-gamma * at)], chosen[split].to_numpy(), np.geomspace(0.1, 5, 64)
    )


def fit_projected(
    columns: Callable[[float], list[np.ndarray]], target: np.ndarray, starts: np.ndarray
) -> float:
    """The best nonlinear parameter, the linear ones solved for at each."""

    def cost(value: float) -> float:
        matrix = np.stack([np.ones(len(target)), *columns(value)], axis=1)
        matrix = matrix / np.linalg.norm(matrix, axis=0)
        return float(((matrix @ np.linalg.lstsq(matrix, target)[0] - target) ** 2).sum())

    place = int(np.argmin([cost(value) for value in starts]))
    ends = starts[max(0, place - 1)], starts[min(len(starts) - 1, place + 1)]
    options = {"xatol": 1e-10}
    return scipy.optimize.minimize_scalar(cost, bounds=ends, method="bounded", options=options).x


def solver_to_scipy(coordinates: np.ndarray) -> np.ndarray:
    """From the solver's (E, log A, log B, alpha, beta) to (log A, log B, log E, alpha, beta)."""
    e, a, b, alpha, beta = coordinates
    return np.array([a, b, np.log(e), alpha, beta])


def row(
    job: str, how: str, fit: float, bootstraps: float | None, reference: float | None
) -> dict[str, Any]:
    """One line of the table; `times faster` is against the published way, both parts together."""
    total = fit + (bootstraps or 0.0)
    return {
        "job": job,
        "how": how,
        "fit": fit,
        "4000 bootstraps": "" if bootstraps is None else f"{bootstraps:.3g}",
        "together": total,
        "times faster": "" if reference is None else f"{reference / total:.3g}",
    }


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of wall clock, and what `work` returned."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
