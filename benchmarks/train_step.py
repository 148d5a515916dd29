"""Speed of a training step on this machine's CPU: this program, and open_lm's step in PyTorch.

    python benchmarks/train_step.py [--torch_python PYTHON] [--compile] [--rounds 7]

PYTHON is an interpreter that has PyTorch (default: this one; without it only this program is
timed). Both train the same model in float32 on the same batch from the same weights. First their
losses and gradient norms over three steps must agree within 1e-4, then they are timed in turns,
each in a process of its own, so that whatever else the machine does hits both; exit code 1 if they
disagree. Printed: medians over the rounds; of the ratio also the lowest and the highest round;
processor seconds a step, which another load disturbs less; and the share of the float32 matrix
product peak, as measured between the rounds, that the model's operations are.
"""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scaling_jax.config import ModelConfig

PROBLEMS = (  # width, layers, heads, vocabulary, sequence length, batch
    (128, 4, 4, 512, 256, 16),
    (256, 6, 4, 2048, 256, 16),
    (96, 8, 4, 50432, 512, 4),
)
FIRST_STEPS, TOLERANCE = 3, 1e-4
SECONDS_A_ROUND = 2.0
HYPERPARAMETERS = {
    "learning_rate": 1e-3,
    "weight_decay": 0.033,
    "beta1": 0.9,
    "beta2": 0.95,
    "epsilon": 1e-8,
    "gradient_clip_norm": 1.0,
    "z_loss_weight": 1e-4,
}


class Worker:
    """A process that trains: it tells of its first steps, then does as many as it is asked for."""

    def __init__(self, command: list[str]):
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.start = self._answer()

    def ask(self, line: str) -> dict[str, Any]:
        """Sends a line and waits for what comes back."""
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"error: a worker has ended with code {self._process.wait()}")
        return json.loads(line)


def main() -> None:
    """Times every problem and prints the table."""
    parser = argparse.ArgumentParser(description="Times training steps.")
    parser.add_argument("--torch_python", default=sys.executable, help="has PyTorch")
    parser.add_argument("--compile", action="store_true", help="PyTorch by torch.compile")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    folder = Path(__file__).parent
    torch = [arguments.torch_python, str(folder / "torch_step.py")]
    has_torch = not subprocess.run([torch[0], "-c", "import torch"], capture_output=True).returncode
    rows = []
    for problem in PROBLEMS:
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "problem.npz"
            write_problem(path, problem)
            commands = {"ours": [sys.executable, str(folder / "our_step.py"), str(path)]}
            if has_torch:
                options = ["--compile"] if arguments.compile else []
                commands["torch"] = [*torch, str(path), *options]
            rows.append(compare(problem, commands, arguments.rounds))
    print(
        f"{os.cpu_count()} cores ({processor()}), load {os.getloadavg()[0]:.1f}, "
        f"{arguments.rounds} rounds, medians" + ("" if has_torch else "; no PyTorch here")
    )
    print(pd.DataFrame(rows).to_string(index=False))


def compare(
    problem: tuple[int, ...], commands: dict[str, list[str]], rounds: int
) -> dict[str, str]:
    """One row of the table."""
    workers = {name: Worker(command) for name, command in commands.items()}
    check_agreement({name: worker.start["first"] for name, worker in workers.items()})
    print(problem, *(worker.start["version"] for worker in workers.values()), flush=True)
    trial = {name: worker.ask("1")["seconds"] for name, worker in workers.items()}
    steps = {name: max(1, round(SECONDS_A_ROUND / each)) for name, each in trial.items()}
    times: list[dict[str, float]] = []
    for _ in range(rounds):
        found = {"peak": workers["ours"].ask("peak")["flops"]}
        for name, worker in workers.items():
            answer = worker.ask(str(steps[name]))
            found[name] = answer["seconds"] / steps[name]
            found[f"{name} cpu"] = answer["cpu"] / steps[name]
        times.append(found)
    for worker in workers.values():
        worker.close()
    return row(problem, pd.DataFrame(times), workers["ours"].start["flops_per_token"])


def row(problem: tuple[int, ...], times: pd.DataFrame, flops_per_token: float) -> dict[str, str]:
    """What is printed of one problem's rounds."""
    *_, length, batch = problem
    tokens, middle = length * batch, times.median()
    cells = {"problem": " ".join(map(str, problem))}
    for name in ("ours", "torch"):
        if name in times:
            cells[f"{name} tokens/s"] = f"{tokens / middle[name]:.0f}"
            cells[f"{name} fastest"] = f"{tokens / times[name].min():.0f}"
            cells[f"{name} cpu s"] = f"{middle[f'{name} cpu']:.2f}"
    if "torch" in times:
        ratio = times["torch"] / times["ours"]
        cells["ratio (range)"] = f"{ratio.median():.2f} ({ratio.min():.2f}-{ratio.max():.2f})"
        cells["cpu ratio"] = f"{middle['torch cpu'] / middle['ours cpu']:.2f}"
    share = (tokens * flops_per_token / times["ours"] / times["peak"]).median()
    return cells | {"peak GFLOP/s": f"{middle['peak'] / 1e9:.0f}", "of peak": f"{share:.0%}"}


def check_agreement(first: dict[str, list[list[float]]]) -> None:
    """Ends the program unless all have computed the same losses and gradient norms."""
    ours, *others = (np.array(values) for values in first.values())
    for other in others:
        deviation = np.abs(ours / other - 1).max()
        if not deviation <= TOLERANCE:
            raise SystemExit(f"error: they do not compute the same ({deviation:.1e}): {first}")


def write_problem(path: Path, problem: tuple[int, ...]) -> None:
    """Weights, rows and numbers of `problem`, as both sides read them."""
    width, layers, heads, vocabulary, length, batch = problem
    model = ModelConfig(
        width=width,
        layers=layers,
        heads=heads,
        vocabulary_size=vocabulary,
        sequence_length=length,
    )
    random = np.random.default_rng(0)
    settings = {
        "model": dataclasses.asdict(model),
        "hyperparameters": HYPERPARAMETERS,
        "first_steps": FIRST_STEPS,
    }
    arrays: dict[str, Any] = draw_weights(model, random)
    rows = random.integers(0, vocabulary, (batch, length + 1)).astype(np.int32)
    np.savez(path, settings=json.dumps(settings), rows=rows, **arrays)


def draw_weights(model: ModelConfig, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Weights by path; drawn here, as they are read by a process that has no JAX."""
    layers, width, hidden = model.layers, model.width, model.hidden_width

    def normal(*shape: int, fan_in: int) -> np.ndarray:
        return (random.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)

    def gain(*shape: int) -> np.ndarray:
        return (1 + 0.1 * random.standard_normal(shape)).astype(np.float32)

    return {
        "embedding": normal(model.vocabulary_size, width, fan_in=width),
        "blocks/attention_norm/gain": gain(layers, width),
        "blocks/attention/query_norm/gain": gain(layers, width),
        "blocks/attention/key_norm/gain": gain(layers, width),
        "blocks/attention/qkv": normal(layers, width, 3, width, fan_in=width),
        "blocks/attention/out": normal(layers, width, width, fan_in=2 * layers * width),
        "blocks/feed_forward_norm/gain": gain(layers, width),
        "blocks/feed_forward/gate_up": normal(layers, width, 2, hidden, fan_in=width),
        "blocks/feed_forward/down": normal(layers, hidden, width, fan_in=2 * layers * hidden),
        "norm/gain": gain(width),
        "output": normal(width, model.vocabulary_size, fan_in=width),
    }


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
