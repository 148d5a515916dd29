import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from scaling_jax import mesh as meshes
from scaling_jax.config import MeshConfig
from scaling_jax.errors import UserError


@pytest.mark.parametrize(
    ("sizes", "devices", "shape"),
    [
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((-1, 2, 2), 8, (2, 2, 2)),
        ((2, -1, 1), 8, (2, 4, 1)),
        ((1, 2, -1), 8, (1, 2, 4)),
        ((-1, 4, 2), 8, (1, 4, 2)),
        ((2, 2, 2), 8, (2, 2, 2)),
        ((-1, 1, 1), 1, (1, 1, 1)),
        ((-1, 3, 1), 6, (2, 3, 1)),
    ],
)
def test_axes_take_the_devices_that_are_there(sizes, devices, shape):
    mesh = meshes.make_mesh(MeshConfig(*sizes), jax.devices()[:devices])
    assert mesh.axis_names == ("slice", "data", "fsdp", "tensor")
    assert mesh.devices.shape == (1, *shape)
    assert list(mesh.devices.flat) == jax.devices()[:devices]


def test_all_devices_are_taken_by_default():
    assert meshes.make_mesh(MeshConfig()).devices.size == len(jax.devices()) == 8


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 2, 1), "data=2, fsdp=2, tensor=1 makes 4 devices, but there are 8"),
        ((-1, 3, 1), "data=2, fsdp=3, tensor=1 makes 6 devices, but there are 8"),
        ((-1, 16, 1), "data=1, fsdp=16, tensor=1 makes 16 devices, but there are 8"),
    ],
)
def test_axes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(UserError, match=message) as caught:
        meshes.make_mesh(MeshConfig(*sizes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (-1, -1, 1), (-2, 1, 1)])
def test_impossible_axes_are_refused(sizes):
    with pytest.raises(ValueError, match=r"one of them may be -1"):
        MeshConfig(*sizes)


@pytest.mark.parametrize(("slices", "index"), [(0, None), (-1, None), (2, 8)])
def test_slices_that_make_no_mesh_are_refused(slices, index):
    with pytest.raises((ValueError, UserError), match="slices"):
        meshes.make_mesh(MeshConfig(data=1, fsdp=index or 8, slices=slices))


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh needs to know of a TPU chip; those of two slices have their numbers in turns."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    process_index: int = 0
    core_on_chip: int = 0

    @property
    def coords(self):
        return self.id // 2 % 2, self.id // 4, 0


def test_devices_of_a_slice_stay_together():
    chips = [Chip(number, slice_index=number % 2) for number in range(8)]
    mesh = meshes.make_mesh(MeshConfig(slices=2, fsdp=2), chips)  # pyright: ignore[reportArgumentType]
    assert dict(mesh.shape) == {"slice": 2, "data": 2, "fsdp": 2, "tensor": 1}
    for number in range(2):
        assert {chip.slice_index for chip in mesh.devices[number].flat} == {number}


@pytest.mark.parametrize(
    ("indices", "slices", "message"),
    [
        ((0, 0, 1, 1), 1, "slices=1, but the devices lie in 2 slices"),
        ((0, 0, 1, 2), 2, "slices=2, but the devices lie in 3 slices"),
        ((0, 0, 0, 1), 2, r"slices of unequal size \(3, 1 devices\)"),
    ],
)
def test_slices_other_than_those_of_the_devices_are_refused(indices, slices, message):
    chips = [Chip(number, index) for number, index in enumerate(indices)]
    with pytest.raises(UserError, match=message):
        meshes.make_mesh(MeshConfig(slices=slices), chips)  # pyright: ignore[reportArgumentType]


def test_simulated_slices_are_devices_in_a_row():
    mesh = meshes.make_mesh(MeshConfig(slices=2, data=1, fsdp=4))
    assert mesh.devices.shape == (2, 1, 4, 1)
    assert list(mesh.devices.flat) == jax.devices()
    assert meshes.batch_parts(mesh) == 8


def test_names_go_to_the_axes_of_the_table():
    spec = meshes.spec(("batch", "length", "heads"))
    assert spec == PartitionSpec(("slice", "data", "fsdp"), None, ("tensor",))
    with pytest.raises(KeyError, match="head"):
        meshes.spec(("head",))
    with pytest.raises(ValueError, match="would use a mesh axis twice"):
        meshes.spec(("heads", "mlp"))
    with pytest.raises(ValueError, match="would use a mesh axis twice"):
        meshes.spec(("batch", "embed"))


def test_a_batch_is_split_over_data_and_fsdp_and_copied_over_tensor():
    mesh = meshes.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = jax.device_put(np.arange(16).reshape(8, 2), meshes.sharding(mesh, ("batch", "length")))
    held = {
        shard.device.id: np.asarray(shard.data)[:, 0].tolist() for shard in rows.addressable_shards
    }
    starts = {tuple(place): device.id for place, device in np.ndenumerate(mesh.devices)}
    for (_, data, fsdp, _), device in starts.items():
        first = 2 * (2 * data + fsdp)
        assert held[device] == [2 * first, 2 * first + 2]


def test_constraints_hold_within_a_mesh_and_are_ignored_without():
    x = np.ones((8, 4), np.float32)
    assert meshes.constrain(x, "batch", "heads") is x  # pyright: ignore[reportArgumentType]
    mesh = meshes.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        spread = jax.jit(lambda x: meshes.constrain(x, "batch", "heads"))(x)
    assert spread.sharding.is_equivalent_to(meshes.sharding(mesh, ("batch", "heads")), 2)
    assert np.array_equal(spread, x)


def test_lengths_that_do_not_split_are_named():
    mesh = meshes.make_mesh(MeshConfig(data=2, fsdp=4))
    meshes.check_divisible(mesh, "rows", 16, "batch")
    meshes.check_divisible(mesh, "anything", 7, "length")
    with pytest.raises(UserError, match=r"rows=12 cannot be split .*\(data=2 x fsdp=4\)"):
        meshes.check_divisible(mesh, "rows", 12, "batch")


def test_what_is_split_by_hand_is_left_alone_within():
    mesh = meshes.make_mesh(MeshConfig(data=4, tensor=2))
    rows, heads = ("batch",), ("batch", "heads")

    def on_part(x):
        assert meshes.free_axes("batch") == ()
        assert meshes.constrain(x, *heads) is x
        return x.sum(axis=1)[None].sum(axis=0)

    x = np.arange(32.0).reshape(8, 4)
    with jax.set_mesh(mesh):
        spread = meshes.on_each_device(on_part, [heads], heads[:1])
        assert jax.jit(lambda x: (meshes.free_axes("batch"), x)[1] + 0)(x).shape == (8, 4)
        parts = jax.jit(spread)(x)
    assert parts.sharding.is_equivalent_to(meshes.sharding(mesh, rows), 1)
    assert meshes.on_each_device(on_part, [heads], heads) is on_part
