import jax
import numpy as np
import pytest

from scaling_jax import mesh as meshes
from scaling_jax.config import DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig

MESHES = {
    "one": (1, MeshConfig()),
    "data": (8, MeshConfig()),
    "fsdp": (8, MeshConfig(data=1, fsdp=8)),
    "tensor": (2, MeshConfig(data=1, tensor=2)),
    "all": (8, MeshConfig(data=2, fsdp=2, tensor=2)),
}


@pytest.fixture(scope="session")
def make_mesh():
    def make(name):
        devices, config = MESHES[name]
        return meshes.make_mesh(config, jax.devices()[:devices])

    return make


@pytest.fixture(scope="session")
def model():
    return ModelConfig(width=16, layers=2, heads=2, vocabulary_size=40, sequence_length=8)


@pytest.fixture(scope="session")
def config(model, data_folder):
    """Twelve steps of sixteen rows: nearly two epochs."""
    return RunConfig(
        model=model,
        data=DataConfig(dataset="walk", validation=("walk",), folder=str(data_folder)),
        batch_size=16,
        tokens=12 * 16 * 8,
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=3),
    )


@pytest.fixture(scope="session")
def fill():
    """A training state of the given layout with any numbers in it; nothing is compiled."""

    def make(layout, seed=0, step=0):
        random = np.random.default_rng(seed)

        def place(leaf):
            values = random.standard_normal(leaf.shape).astype(leaf.dtype)
            return jax.device_put(values, leaf.sharding)

        state = jax.tree.map(place, layout)
        counter = jax.device_put(np.int32(step), layout["step"].sharding)
        return state | {"step": counter}

    return make
