"""One step of several runs in one program, each in a slot of its own along the mesh axis `run`.

Slots share the program and nothing else: no number of one run reaches another, so devices of
different slots never talk. Within a slot a run is spread over its devices as alone. All that tells
runs of one shape apart (parameters, rows, learning rate, budget, step) is data: a slot whose run is
over takes the next one without compiling, and a slot without a run skips the step.
"""

import collections
import functools
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from scaling_jax import mesh as meshes
from scaling_jax.config import MeshConfig, ModelConfig, RunConfig
from scaling_jax.training import health, step
from scaling_jax.training import state as states
from scaling_jax.training.optimizer import Hyperparameters
from scaling_jax.training.state import TrainState
from scaling_jax.training.step import Metrics

RUN = "run"

PackedRows = Int[np.ndarray, "slots batch length+1"]


class Shape(NamedTuple):
    """What the program depends on; runs that differ in anything else can share it."""

    model: ModelConfig
    batch_size: int
    microbatches: int
    mesh: MeshConfig
    guarded: bool

    @classmethod
    def of(cls, config: RunConfig) -> "Shape":
        """The shape of a run."""
        guarded = health.guarded(config.health)
        return cls(config.model, config.batch_size, config.microbatches, config.mesh, guarded)


def make_mesh(whole: Mesh, slots: int) -> Mesh:
    """The devices of `whole`, a mesh for one run, in groups that train one run each at a time.

    There are as many groups as divide both `slots` and the devices along the axes `slice` and
    `data` of `whole`; where that is fewer than `slots`, a group takes its slots one after another.
    """
    groups = group_count(whole, slots)
    copies = whole.shape["slice"] * whole.shape["data"]
    split = (groups, 1, copies // groups, whole.shape["fsdp"], whole.shape["tensor"])
    axes = (RUN, *meshes.AXES)
    return Mesh(whole.devices.reshape(split), axes, axis_types=(AxisType.Auto,) * len(axes))


def group_count(whole: Mesh, slots: int) -> int:
    """How many groups of devices `slots` slots are dealt out to."""
    return math.gcd(slots, whole.shape["slice"] * whole.shape["data"])


def next_slot(taken: Collection[int], slots: int, groups: int) -> int:
    """The first slot that is not taken, of the group of devices that has least to do."""
    loads = group_loads(taken, slots, groups)
    empty = (slot for slot in range(slots) if slot not in taken)
    return min(empty, key=lambda slot: (loads[slot * groups // slots], slot))


def group_loads(taken: Iterable[int], slots: int, groups: int) -> collections.Counter[int]:
    """How many of the slots of each group of devices are taken."""
    return collections.Counter(slot * groups // slots for slot in taken)


@functools.cache
def program(shape: Shape, mesh: Mesh, slots: int) -> "Program":
    """The program of these slots, the same object at each call: it is compiled once.

    Raises:
      UserError: the batch or a parameter cannot be split evenly over the devices of a slot.
    """
    return Program(shape, mesh, slots)


class Program:
    """The step of all slots, and the way of a run into a slot and out of it; each compiled once.

    In the states of all slots, the hyper-parameters and the metrics every array has a leading axis
    of slots. The state of one run is laid out as that of a run alone on the same mesh.
    """

    def __init__(self, shape: Shape, mesh: Mesh, slots: int):
        step.check_batch(mesh, shape.batch_size, shape.microbatches)
        self.shape, self.mesh, self.slots = shape, mesh, slots
        self.layout = states.abstract(shape.model, mesh)
        by_run = jax.tree.map(functools.partial(_by_run, slots), self.layout)
        self._layout, self._shardings = by_run, _shardings(by_run)
        self._rows = NamedSharding(mesh, PartitionSpec(RUN, *meshes.spec(("batch", "length"))))
        self._numbers = NamedSharding(mesh, PartitionSpec(RUN))
        self._step = self._jitted()
        self._empty = jax.jit(functools.partial(_zeros, by_run), out_shardings=self._shardings)
        self._put = jax.jit(_put, donate_argnums=0, out_shardings=self._shardings)
        self._take = jax.jit(_take, out_shardings=_shardings(self.layout))

    @property
    def rows_shape(self) -> tuple[int, int, int]:
        """Of the rows of all slots."""
        return self.slots, self.shape.batch_size, self.shape.model.sequence_length + 1

    def empty(self) -> TrainState:
        """The states of slots without runs."""
        return self._empty()

    def put(self, packed: TrainState, slot: int, one: TrainState) -> TrainState:
        """The states of all slots, that of one run in `slot`; reuses the memory of `packed`."""
        return self._put(packed, np.int32(slot), one)

    def take(self, packed: TrainState, slot: int) -> TrainState:
        """The state of the run in `slot`."""
        return self._take(packed, np.int32(slot))

    def place(self, numbers: Any) -> Any:
        """Arrays of one number a slot, on the devices of the slots."""
        return jax.device_put(numbers, self._numbers)

    def step(
        self, packed: TrainState, rows: PackedRows, hyper: Hyperparameters, occupied: Array
    ) -> tuple[TrainState, Metrics]:
        """One step of every occupied slot; reuses the memory of `packed`.

        The states of the other slots stay as they are, and their metrics are zeros.

        Args:
          packed: the states of all slots.
          rows: on the host; those of empty slots can be any.
          hyper: placed, as `occupied`.
          occupied: whether there is a run in each slot.
        """
        with jax.set_mesh(self.mesh):
            return self._step(packed, jax.device_put(rows, self._rows), hyper, occupied)

    def lower(self) -> jax.stages.Lowered:
        """The program of `step`, from shapes alone: the mesh's devices need not be attached."""
        rows = jax.ShapeDtypeStruct(self.rows_shape, jnp.int32)
        number = jax.ShapeDtypeStruct((self.slots,), jnp.float32)
        hyper = Hyperparameters(*(number for _ in Hyperparameters._fields))  # pyright: ignore[reportArgumentType]
        occupied = jax.ShapeDtypeStruct((self.slots,), jnp.bool_)
        with jax.set_mesh(self.mesh):
            return self._step.lower(self._layout, rows, hyper, occupied)

    def _jitted(self) -> jax.stages.Wrapped:
        one = step.guarded_step if self.shape.guarded else step.train_step
        one = functools.partial(one, self.shape.model, self.shape.microbatches)
        by_slot = jax.shard_map(
            functools.partial(_step_each, one),
            mesh=self.mesh,
            in_specs=PartitionSpec(RUN),
            out_specs=PartitionSpec(RUN),
            # What is split within a slot is left to the step, as for a run alone.
            axis_names={RUN},
            check_vma=False,
        )
        return jax.jit(
            by_slot,
            in_shardings=(self._shardings, self._rows, self._numbers, self._numbers),
            out_shardings=(self._shardings, self._numbers),
            donate_argnums=0,
        )


def _step_each(
    train_step: Callable[[TrainState, Array, Hyperparameters], tuple[TrainState, Metrics]],
    state: TrainState,
    rows: Int[Array, "slots batch length+1"],
    hyper: Hyperparameters,
    occupied: Bool[Array, "slots"],
) -> tuple[TrainState, Metrics]:
    """The step of every slot of one group of devices, one slot after another."""

    def step_one(
        slot: tuple[TrainState, Array, Hyperparameters, Array],
    ) -> tuple[TrainState, Metrics]:
        state, rows, hyper, occupied = slot

        def train(state: TrainState) -> tuple[TrainState, Metrics]:
            return train_step(state, rows, hyper)

        def skip(state: TrainState) -> tuple[TrainState, Metrics]:
            return state, Metrics(*(jnp.zeros((), jnp.float32) for _ in Metrics._fields))

        return jax.lax.cond(occupied, train, skip, state)

    slots = (state, rows, hyper, occupied)
    if occupied.shape[0] > 1:
        return jax.lax.map(step_one, slots)
    # A loop of one round would be compiled as a loop all the same.
    after = step_one(jax.tree.map(lambda part: part[0], slots))
    return jax.tree.map(lambda part: part[None], after)


def _zeros(layout: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), layout)


def _put(packed: TrainState, slot: Int[Array, ""], one: TrainState) -> TrainState:
    return jax.tree.map(lambda every, new: jnp.where(_is(slot, every), new, every), packed, one)


def _take(packed: TrainState, slot: Int[Array, ""]) -> TrainState:
    # Not by indexing, for which the compiler would gather the states of all slots everywhere.
    return jax.tree.map(
        lambda every: jnp.where(_is(slot, every), every, 0).sum(axis=0, dtype=every.dtype), packed
    )


def _is(slot: Int[Array, ""], every: Array) -> Bool[Array, "slots ..."]:
    """Which entries of an array of all slots are those of `slot`."""
    places = jnp.arange(every.shape[0]).reshape(-1, *(1,) * (every.ndim - 1))
    return places == slot


def _by_run(slots: int, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """An array of one run as it is where all slots have one."""
    alone = leaf.sharding
    assert isinstance(alone, NamedSharding)
    sharding = NamedSharding(alone.mesh, PartitionSpec(RUN, *alone.spec))
    return jax.ShapeDtypeStruct((slots, *leaf.shape), leaf.dtype, sharding=sharding)


def _shardings(layout: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: leaf.sharding, layout)
