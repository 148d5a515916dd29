"""Bytes of one chip's memory that a training step takes, by formula; no device is needed.

With W numbers in matrices and G in gains of the model, n = positions of one microbatch on one chip,
d = width, h = hidden width, V = vocabulary, L = layers, c = bytes of the compute type, and f and t
devices along the mesh axes `fsdp` and `tensor`, a chip holds

  parameters    4 (W / (f t) + G), float32
  moments       twice as much, both of Adam's
  gradients     as much as parameters, and as much again for the sum over microbatches
  batch         4 bytes a token of all microbatches, one more a sequence
  casts         parameters in the compute type, which the compiler makes once for all layers:
                c W / (f t) if it is not float32
  activations   L n times what the backward pass keeps of a layer's position:
                  remat block   c d                     the layer's input
                  remat dots    c (2 d + 3 d/t + 2 h/t) and products with weights
                  remat none    c (4 d + 7 d/t + 3 h/t) + 32
                                                        and what goes into norms, attention and
                                                        gate, and two numbers of each norm
  layer         what the backward pass of one layer needs besides: where it is computed again,
                n times remat none's; its weights gathered, for this layer and the next,
                2 c W_layer / t if f > 1; attention's gradient for the query, n c d/t for each
                block of 512 keys up to a length of 2048, once beyond; and the gradients of gate,
                up and their product and two of the layer's input, n (3 c h/t + 8 d)
  head          of the loss: logits of a part of the positions in float32 and their gradient in
                the compute type; the output matrix gathered, c d V / t, and its whole gradient,
                4 d V / t; and hidden vectors and their gradient, 2 c n d.

`layer` is at work after `head`, when gradients are there: the peak is the larger of the two phases.
A TPU fills the last axis of an activation up to 128 numbers, in attention that of every head: so
are d, h and d/t counted.

Parameters, moments and batch are exact. The paper's two smallest sizes were compiled for four chips
of v5e (libtpu 0.0.42.1), split over data, with remat none and block: the peak was between 9 % less
and 3 % more than the compiler's arguments and temporaries together.
"""

import dataclasses
import math

from scaling_jax.config import MeshConfig, ModelConfig

# Bytes of logits that a device makes at a time (scaling_jax.models.head, which imports JAX).
MOST_LOGITS = 2**28
FLOAT32 = 4
LANES = 128
# Of the kernel for attention on TPU (scaling_jax.models.tpu_kernels, which imports JAX).
BLOCK, LONGEST_FUSED = 512, 2048
BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip, as in the module's formulas."""

    parameters: float
    moments: float
    gradients: float
    batch: float
    casts: float
    activations: float
    layer: float
    head: float

    @property
    def arguments(self) -> float:
        """What lies there between steps."""
        return self.parameters + self.moments + self.batch

    @property
    def least(self) -> float:
        """What no compiler can do without."""
        return self.arguments + self.gradients

    @property
    def peak(self) -> float:
        """The most that is there at a time."""
        return (
            self.arguments
            + self.casts
            + self.activations
            + max(self.gradients + self.layer, self.head)
        )


def estimate(model: ModelConfig, batch_size: int, microbatches: int, mesh: MeshConfig) -> Memory:
    """The memory of one chip of `mesh`, all of whose axes are given.

    Args:
      model: its size, compute type and remat policy.
      batch_size: sequences of a step, on all chips.
      microbatches: parts that a step is done in.
      mesh: chips along each axis, none of them -1.
    """
    f, t = mesh.fsdp, mesh.tensor
    compute = BYTES[model.compute_dtype]
    sequences = batch_size / (mesh.slices * mesh.data * f)
    positions = sequences / microbatches * model.sequence_length
    per_layer = layer_weights(model)
    parameters = FLOAT32 * (matrix_weights(model) / (f * t) + gains(model))
    kept = kept_per_position(model, t)
    again = 0.0 if model.remat == "none" else _kept_by_none(model, t, LANES)
    slopes = _attention_gradient(model, t) + _other_gradients(model, t)
    gathered = 2 * compute * per_layer / t if f > 1 else 0.0
    most = 2 ** int(math.log2(max(MOST_LOGITS // (4 * model.vocabulary_size // t), 1)))
    logits = min(positions, most) * model.vocabulary_size / t
    output = model.width * model.vocabulary_size / t
    head = (FLOAT32 + compute) * logits + (FLOAT32 + (compute if f > 1 else 0)) * output
    return Memory(
        parameters=parameters,
        moments=2 * parameters,
        gradients=parameters * (1 if microbatches == 1 else 2),
        batch=FLOAT32 * sequences * (model.sequence_length + 1),
        casts=0.0 if compute == FLOAT32 else parameters * compute / FLOAT32,
        activations=model.layers * positions * kept,
        layer=positions * (again + slopes) + gathered,
        head=head + 2 * compute * positions * model.width,
    )


def layer_weights(model: ModelConfig) -> int:
    """Numbers in the matrices of one layer."""
    return 4 * model.width**2 + 3 * model.width * model.hidden_width


def matrix_weights(model: ModelConfig) -> int:
    """Numbers in all matrices, both embeddings among them: what a mesh splits."""
    return model.layers * layer_weights(model) + 2 * model.vocabulary_size * model.width


def gains(model: ModelConfig) -> int:
    """Numbers in gains, which every chip has all of."""
    return model.width * (model.layers * (4 if model.qk_norm else 2) + 1)


def kept_per_position(model: ModelConfig, tensor: int = 1, lanes: int = LANES) -> float:
    """Bytes that the backward pass keeps of one position in one layer.

    The last axis of an array is filled up to a multiple of `lanes`.
    """
    compute = BYTES[model.compute_dtype]
    width, hidden = _filled(model.width, lanes), _filled(model.hidden_width / tensor, lanes)
    if model.remat == "block":
        return compute * width
    if model.remat == "dots":
        return compute * (2 * width + 3 * _filled(model.width / tensor, lanes) + 2 * hidden)
    return _kept_by_none(model, tensor, lanes)


def _kept_by_none(model: ModelConfig, tensor: int, lanes: int) -> float:
    width, hidden = _filled(model.width, lanes), _filled(model.hidden_width / tensor, lanes)
    own = _filled(model.width / tensor, lanes)
    queries_and_keys, norms = (2 * own, 4) if model.qk_norm else (0, 2)
    numbers = 4 * width + queries_and_keys + own + 4 * _heads(model, tensor, lanes) + 3 * hidden
    return BYTES[model.compute_dtype] * numbers + 2 * FLOAT32 * norms


def _attention_gradient(model: ModelConfig, tensor: int) -> float:
    """Bytes for one position of the gradient for the query, before its parts are added up."""
    length = model.sequence_length
    copies = math.ceil(length / BLOCK) if length <= LONGEST_FUSED else 1
    return copies * BYTES[model.compute_dtype] * _heads(model, tensor, LANES)


def _other_gradients(model: ModelConfig, tensor: int) -> float:
    """Bytes for one position of the gradients that are there at a time besides."""
    width, hidden = _filled(model.width, LANES), _filled(model.hidden_width / tensor, LANES)
    return 3 * BYTES[model.compute_dtype] * hidden + 2 * FLOAT32 * width


def _heads(model: ModelConfig, tensor: int, lanes: int) -> float:
    """Numbers of one position in all heads of a chip, each filled up by itself."""
    return model.heads / tensor * _filled(model.head_width, lanes)


def _filled(size: float, lanes: int) -> float:
    return math.ceil(size / lanes) * lanes
