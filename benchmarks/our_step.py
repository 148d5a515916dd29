"""The training step of `scaling-jax train`, for `train_step.py`.

Started on a problem that `train_step.py` wrote, it tells of the first steps, then takes commands
line by line: a number of steps, or `peak` for a large matrix product.
"""

import json
import sys
import time
from typing import Any

from scaling_jax import cpu

PEAK_SIZE = 2048


def main() -> None:
    """Answers `train_step.py`."""
    # Before NumPy is imported, as in the program: its threads would already have memory pools.
    cpu.configure()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from scaling_jax import mesh as meshes
    from scaling_jax.config import MeshConfig, ModelConfig
    from scaling_jax.models import counting
    from scaling_jax.training import optimizer, state, step

    with np.load(sys.argv[1]) as arrays:
        settings = json.loads(str(arrays["settings"]))
        weights = {name: arrays[name] for name in arrays.files if name not in ("settings", "rows")}
        rows = arrays["rows"]
    model = ModelConfig(**settings["model"])
    mesh = meshes.make_mesh(MeshConfig())
    layout = state.abstract(model, mesh)
    params = jax.tree.map_with_path(
        lambda place, leaf: jnp.asarray(weights["/".join(part.key for part in place)]),
        layout["params"],
    )
    current = jax.device_put(
        state.TrainState(
            params=params, moments=optimizer.initial_moments(params), step=jnp.zeros((), jnp.int32)
        ),
        jax.tree.map(lambda leaf: leaf.sharding, layout),
    )
    peak_rate = settings["hyperparameters"]["learning_rate"]
    hyper = optimizer.Hyperparameters(
        **settings["hyperparameters"],
        minimum_learning_rate=peak_rate,
        learning_rate_floor=0.0,
        warmup_steps=0.0,
        total_steps=1.0,
    )
    hyper = jax.device_put(hyper, meshes.sharding(mesh, ()))
    placed = jax.device_put(rows, meshes.sharding(mesh, ("batch", "length")))
    run_step = step.compiled(model, len(rows), 1, mesh)

    def advance() -> Any:
        nonlocal current
        current, metrics = run_step(current, placed, hyper)
        return metrics

    first = [
        [float(metrics.loss), float(metrics.gradient_norm)]
        for metrics in (advance() for _ in range(settings["first_steps"]))
    ]
    version = f"jax {jax.__version__}, {jax.device_count()} devices"
    flops = counting.flops_model_per_token(model)
    print(json.dumps({"first": first, "version": version, "flops_per_token": flops}), flush=True)

    matrix = jnp.ones((PEAK_SIZE, PEAK_SIZE), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    for line in sys.stdin:
        begin = time.perf_counter(), time.process_time()
        if line.strip() == "peak":
            product(matrix, matrix).block_until_ready()
            answer = {"flops": 2 * PEAK_SIZE**3 / (time.perf_counter() - begin[0])}
        else:
            previous = None
            for _ in range(int(line)):
                metrics = advance()
                # As in training: the next step is under way while the last one's are read.
                jax.block_until_ready(previous)
                previous = metrics
            jax.block_until_ready(current)
            end = time.perf_counter(), time.process_time()
            answer = {"seconds": end[0] - begin[0], "cpu": end[1] - begin[1]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
