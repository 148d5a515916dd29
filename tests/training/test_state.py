import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from scaling_jax import mesh as meshes
from scaling_jax.config import MeshConfig
from scaling_jax.errors import UserError
from scaling_jax.models import counting
from scaling_jax.training import state

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def small(model):
    return dataclasses.replace(model, layers=1)


@pytest.fixture(scope="module")
def alone(small, make_mesh):
    return jax.device_get(state.create(small, 5, make_mesh("one")))


@pytest.mark.parametrize(
    "name",
    ["all", *(pytest.param(one, marks=pytest.mark.slow) for one in ("data", "fsdp", "tensor"))],
)
def test_a_fresh_state_is_the_same_on_every_mesh(small, alone, make_mesh, name):
    mesh = make_mesh(name)
    made = state.create(small, 5, mesh)
    layout = state.abstract(small, mesh)
    assert jax.tree.structure(made) == jax.tree.structure(layout)
    for leaf, like, expected in zip(*map(jax.tree.leaves, (made, layout, alone)), strict=True):
        assert np.array_equal(leaf, expected)
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (like.shape, like.dtype, like.sharding)


def test_a_fresh_state_is_at_step_zero_with_no_moments(small, alone):
    assert alone["step"] == 0
    params = sum(leaf.size for leaf in jax.tree.leaves(alone["params"]))
    moments = jax.tree.leaves(alone["moments"])
    assert params == counting.actual_params(small)
    assert sum(leaf.size for leaf in moments) == 2 * params + 1
    assert not any(np.any(leaf) for leaf in moments)


def test_matrices_are_split_as_the_table_says_and_moments_like_them(model, make_mesh):
    layout = state.abstract(model, make_mesh("all"))
    params = layout["params"]
    expected = {
        "embedding": PartitionSpec(("tensor",), ("fsdp",)),
        "output": PartitionSpec(("fsdp",), ("tensor",)),
        "qkv": PartitionSpec(None, ("fsdp",), None, ("tensor",)),
        "out": PartitionSpec(None, ("tensor",), ("fsdp",)),
        "gate_up": PartitionSpec(None, ("fsdp",), None, ("tensor",)),
        "down": PartitionSpec(None, ("tensor",), ("fsdp",)),
    }
    found = {path[-1].key: leaf.sharding.spec for path, leaf in jax.tree.leaves_with_path(params)}
    gains = {spec for name, spec in found.items() if name == "gain"}
    assert all(all(axis is None for axis in spec) for spec in gains)
    assert {name: spec for name, spec in found.items() if name != "gain"} == expected
    where = [leaf.sharding for leaf in jax.tree.leaves(params)]
    moments = layout["moments"]
    assert isinstance(moments, tuple)
    for part in (moments.mu, moments.nu):  # pyright: ignore[reportAttributeAccessIssue]
        assert [leaf.sharding for leaf in jax.tree.leaves(part)] == where


def test_each_of_eight_fsdp_devices_holds_an_eighth_of_every_matrix(model, make_mesh):
    layout = state.abstract(model, make_mesh("fsdp"))
    for leaf in jax.tree.leaves(layout["params"]):
        held = np.prod(leaf.sharding.shard_shape(leaf.shape))
        assert held == leaf.size // (1 if leaf.shape[-2:] in ((2, 16), (16,)) else 8)


@pytest.mark.parametrize(
    ("changes", "mesh", "message"),
    [
        ({"width": 12}, MeshConfig(data=1, fsdp=8), r"width=12 .* \(fsdp=8\)"),
        ({"heads": 2}, MeshConfig(data=1, tensor=8), r"heads=2 .* \(tensor=8\)"),
        ({"vocabulary_size": 41}, MeshConfig(data=4, tensor=2), "vocabulary_size=41 "),
    ],
)
def test_what_does_not_split_evenly_is_named(model, changes, mesh, message):
    with pytest.raises(UserError, match=message) as caught:
        state.abstract(dataclasses.replace(model, **changes), meshes.make_mesh(mesh))
    assert "\n" not in str(caught.value)
