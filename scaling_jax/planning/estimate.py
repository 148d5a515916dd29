"""How long a training step takes on a mesh of TPU chips: an estimate, to rank meshes by.

Compute time is the operations that are done, those that remat does again among them, at a stated
part (MFU) of the chips' peak. Collectives are added as if nothing went on beside them. With W_layer
and W numbers in the matrices of one layer and of all, c bytes of the compute type, b positions of a
microbatch on one chip, and r, s, f, t devices along data, slice, fsdp and tensor, one chip sends

  fsdp     of each microbatch the weights in the compute type, gathered for the forward and for the
           backward pass, and float32 gradients scattered: (2 c + 4) W/t (f - 1)/f
  data     once a step the sum of float32 gradients: 2 x 4 W/(f t) (r - 1)/r
  slice    the same, with (s - 1)/s, over the data-centre network
  tensor   of each layer the sums after both of its halves, forward, backward and, where it is
           computed again, once more: 2 x (4 or 6) c b d (t - 1)/t

over rings (Thakur, Rabenseifner and Gropp 2005) along one axis of the torus each. Besides, each
collective is taken to cost 10 us, whatever its size: an assumption, which keeps small models from
being cut into pieces.
"""

import dataclasses

from scaling_jax.config import MeshConfig, ModelConfig
from scaling_jax.models import counting
from scaling_jax.planning import memory
from scaling_jax.planning.slices import Chip

LEAST_SECONDS = 10e-6
MATRICES = 4  # of a layer: qkv, out, gate and up, down


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step: at work, and sending."""

    compute: float
    collectives: float

    @property
    def total(self) -> float:
        """One after the other."""
        return self.compute + self.collectives


def step_time(
    model: ModelConfig, batch_size: int, microbatches: int, mesh: MeshConfig, chip: Chip, mfu: float
) -> StepTime:
    """The estimate for a mesh all of whose axes are given, at `mfu` of the chips' peak."""
    f, t, data = mesh.fsdp, mesh.tensor, mesh.data
    chips = mesh.slices * data * f * t
    tokens = batch_size * model.sequence_length
    operations = tokens * (counting.flops_model_per_token(model) + _again_per_token(model))
    compute = memory.BYTES[model.compute_dtype]
    weights = memory.matrix_weights(model)
    positions = tokens / (mesh.slices * data * f)
    sums = 4 if model.remat == "none" else 6
    along_tensor = 2 * sums * compute * model.layers * positions * model.width * _others(t)
    along_fsdp = microbatches * (2 * compute + memory.FLOAT32) * weights / t * _others(f)
    gradients = 2 * memory.FLOAT32 * weights / (f * t)
    # Norms of queries and keys, whose heads are split, have sums of their own.
    along = sums * (2 if model.qk_norm else 1)
    often, once = along * (t > 1) + 3 * MATRICES * (f > 1), MATRICES * (data * mesh.slices > 1)
    return StepTime(
        compute=operations / (chips * chip.peak_flops * mfu),
        collectives=(along_tensor + along_fsdp + gradients * _others(data)) / chip.axis_bandwidth
        + gradients * _others(mesh.slices) / chip.network_bandwidth
        + LEAST_SECONDS * model.layers * (microbatches * often + once),
    )


def _again_per_token(model: ModelConfig) -> float:
    """Operations of the forward pass that remat does a second time."""
    attention = model.layers * 2 * model.width * (model.sequence_length + 1) / 2
    if model.remat == "none":
        return 0.0
    products = model.layers * memory.layer_weights(model) if model.remat == "block" else 0
    return 2.0 * (products + attention)


def _others(devices: int) -> float:
    """What part of an array lies on the other devices of a ring."""
    return (devices - 1) / devices
