"""open_lm's checkpoints: their names and shapes, and our parameters under those names.

open_lm stores matrices as (out, in), query, key and value in one `in_proj`, gate and up in one
`w12`, and in each layer the rotary frequencies as a buffer `inv_freq`. Training puts `module.`
before every name and the whole into {"epoch": ..., "state_dict": ...}.

Source: github.com/mlfoundations/open_lm, `model.py`, `main.py`, `positional_embedding/rotary.py`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from scaling_jax import config as configs
from scaling_jax.config import ModelConfig
from scaling_jax.errors import UserError
from scaling_jax.models import safetensors_file, torch_file
from scaling_jax.models.transformer import Params

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
# What a checkpoint does not say: settings of open_lm's own that its released models mostly have.
USUAL = {"sequence_length": 2048, "norm": "layer_norm", "rope_frequency_dtype": "float32"}
ROPE_BASE = 10_000.0
_PREFIXES = ("module.", "_orig_mod.")
_FREQUENCIES = "attention.pos_embed.inv_freq"

Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Tensors under open_lm's names without prefixes, and what training wrote beside them."""

    tensors: Tensors
    epoch: int | None = None
    step: int | None = None


def read(path: Path) -> Checkpoint:
    """The checkpoint in a file of torch.save or of safetensors, told apart by suffix.

    Raises:
      UserError: it cannot be read, or holds no state dict.
    """
    check_suffix(path)
    if path.suffix == safetensors_file.SUFFIX:
        content: Mapping[str, Any] = {"state_dict": safetensors_file.read(path)}
    else:
        content = torch_file.read(path)
    tensors = content.get("state_dict", content)
    if not isinstance(tensors, Mapping) or not tensors:
        raise UserError(f"{path}: holds no state dict (keys: {_some(content)})")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, np.ndarray):
            raise UserError(f"{path}: holds no state dict: '{name}' is not a tensor")
    numbers = {
        key: content[key]
        for key in ("epoch", "step")
        if type(content.get(key)) is int and 0 <= content[key] < 1 << 31
    }
    return Checkpoint({_plain_name(name): tensor for name, tensor in tensors.items()}, **numbers)


def write(path: Path, tensors: Tensors, name: str, epoch: int, step: int) -> None:
    """Writes tensors as open_lm's training would, or as safetensors, told apart by suffix."""
    if path.suffix == safetensors_file.SUFFIX:
        safetensors_file.write(path, tensors)
        return
    state_dict = {f"module.{key}": tensor for key, tensor in tensors.items()}
    content = {"epoch": epoch, "name": name, "step": step, "state_dict": state_dict}
    torch_file.write(path, content)


def check_suffix(path: Path) -> None:
    """Raises a UserError if the suffix of `path` is of no known format."""
    known = (*TORCH_SUFFIXES, safetensors_file.SUFFIX)
    if path.suffix not in known:
        raise UserError(f"{path}: its format is told by its suffix, one of {', '.join(known)}")


def settings(tensors: Tensors, source: str) -> dict[str, Any]:
    """The keys of a ModelConfig that names, shapes and buffers of a checkpoint determine.

    `heads` is among them only where there are `inv_freq` buffers, and `rope_frequency_dtype` only
    where those were saved rounded to bfloat16.

    Raises:
      UserError: naming `source`; a tensor is missing, unknown, or of another shape or type than
        open_lm's.
    """
    table = tensors.get("tok_embeddings.weight")
    if table is None or table.ndim != 2:
        raise UserError(
            f"{source}: no checkpoint of open_lm, which has a 'tok_embeddings.weight' "
            f"(names here: {_some(tensors)})"
        )
    vocabulary_size, width = table.shape
    found: dict[str, Any] = {
        "width": width,
        "layers": _layer_count(tensors),
        "vocabulary_size": vocabulary_size,
        "qk_norm": "layers.0.attention.q_norm.weight" in tensors,
    }
    frequencies = inverse_frequencies(tensors, source)
    if frequencies is not None:
        found["heads"] = width // (2 * len(frequencies))
        if _are_rounded(frequencies, source):
            found["rope_frequency_dtype"] = "bfloat16"
    any_heads = {"heads": 1, **USUAL}
    _check_tensors(tensors, configs.build(ModelConfig, any_heads | found, source), source)
    return found


def to_params(tensors: Tensors) -> Params:
    """Our parameters, float32, from tensors under open_lm's names (weights or their gradients).

    Raises:
      KeyError: a tensor is missing.
    """
    width = tensors["tok_embeddings.weight"].shape[1]
    layers = range(_layer_count(tensors))

    def stack(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Float[np.ndarray, "..."]:
        parts = [change(tensors[f"layers.{layer}.{name}.weight"]) for layer in layers]
        return np.stack(parts).astype(np.float32, copy=False)

    def gains(name: str) -> dict[str, np.ndarray]:
        return {"gain": stack(name, lambda gain: gain)}

    attention: Params = {
        "qkv": stack("attention.in_proj", lambda weight: weight.T.reshape(width, 3, width)),
        "out": stack("attention.out_proj", np.transpose),
    }
    if "layers.0.attention.q_norm.weight" in tensors:
        attention["query_norm"] = gains("attention.q_norm")
        attention["key_norm"] = gains("attention.k_norm")
    return {
        "embedding": tensors["tok_embeddings.weight"].astype(np.float32),
        "blocks": {
            "attention_norm": gains("attention_norm"),
            "attention": attention,
            "feed_forward_norm": gains("ffn_norm"),
            "feed_forward": {
                "gate_up": stack("feed_forward.w12", lambda w: w.T.reshape(width, 2, -1)),
                "down": stack("feed_forward.w3", np.transpose),
            },
        },
        "norm": {"gain": tensors["norm.weight"].astype(np.float32)},
        "output": tensors["output.weight"].T.astype(np.float32),
    }


def from_params(
    config: ModelConfig,
    params: Params,
    frequencies: Float[np.ndarray, "half_head"] | None = None,
) -> dict[str, np.ndarray]:
    """Tensors under open_lm's names, in its order, float32: the reverse of `to_params`.

    Args:
      config: the model of `params`.
      params: arrays that NumPy can read.
      frequencies: the `inv_freq` buffer of the checkpoint that the model came from, if it did.

    Raises:
      UserError: open_lm cannot compute what this model computes.
    """
    if config.rope_base != ROPE_BASE:
        raise UserError(
            f"model.rope_base={config.rope_base:g}: open_lm always takes {ROPE_BASE:g} for its "
            "rotary positions, so there it would be another model"
        )
    if frequencies is None:
        frequencies = _formula(config.head_width)
    params = jax.tree.map(np.asarray, params)
    width, blocks = config.width, params["blocks"]
    attention, feed_forward = blocks["attention"], blocks["feed_forward"]
    tensors = {"tok_embeddings.weight": params["embedding"]}
    for layer in range(config.layers):

        def add(name: str, array: np.ndarray, layer: int = layer) -> None:
            tensors[f"layers.{layer}.{name}"] = array

        add("attention.in_proj.weight", attention["qkv"][layer].reshape(width, 3 * width).T)
        add("attention.out_proj.weight", attention["out"][layer].T)
        add(_FREQUENCIES, frequencies)
        if config.qk_norm:
            add("attention.q_norm.weight", attention["query_norm"]["gain"][layer])
            add("attention.k_norm.weight", attention["key_norm"]["gain"][layer])
        add("feed_forward.w12.weight", feed_forward["gate_up"][layer].reshape(width, -1).T)
        add("feed_forward.w3.weight", feed_forward["down"][layer].T)
        add("attention_norm.weight", blocks["attention_norm"]["gain"][layer])
        add("ffn_norm.weight", blocks["feed_forward_norm"]["gain"][layer])
    tensors["norm.weight"] = params["norm"]["gain"]
    tensors["output.weight"] = params["output"].T
    return tensors


def inverse_frequencies(tensors: Tensors, source: str) -> Float[np.ndarray, "half_head"] | None:
    """The `inv_freq` buffer, one and the same in every layer; None where there is none.

    Raises:
      UserError: naming `source`; the layers' buffers differ, or fit no number of heads.
    """
    buffers = [tensor for name, tensor in tensors.items() if name.endswith(_FREQUENCIES)]
    if not buffers:
        return None
    first, width = buffers[0], tensors["tok_embeddings.weight"].shape[1]
    if any(not np.array_equal(buffer, first) for buffer in buffers):
        raise UserError(f"{source}: inv_freq is not the same in every layer")
    if first.ndim != 1 or not first.size or width % (2 * first.size):
        raise UserError(f"{source}: inv_freq of shape {first.shape} fits no heads of width {width}")
    return first.astype(np.float32)


def _check_tensors(tensors: Tensors, model: ModelConfig, source: str) -> None:
    """Raises a UserError unless there is every tensor of `model` and no other."""
    expected = _shapes(model)
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{source}: '{name}' is missing")
        tensor = tensors[name]
        if tensor.shape != shape:
            raise UserError(
                f"{source}: '{name}' has shape {tensor.shape} where open_lm has {shape}"
            )
        if tensor.dtype not in (np.float32, np.float16, jnp.bfloat16):
            raise UserError(
                f"{source}: '{name}' is of type {tensor.dtype}, which float32 does not hold"
            )
    for name in tensors:
        if name not in expected and not name.endswith(_FREQUENCIES):
            raise UserError(
                f"{source}: '{name}' has no place in a model whose norms have gains only, whose "
                "feed-forward is SwiGLU without experts, and which has no bias"
            )


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    width, hidden = model.width, model.hidden_width
    block = {
        "attention.in_proj.weight": (3 * width, width),
        "attention.out_proj.weight": (width, width),
        "feed_forward.w12.weight": (2 * hidden, width),
        "feed_forward.w3.weight": (width, hidden),
        "attention_norm.weight": (width,),
        "ffn_norm.weight": (width,),
    }
    if model.qk_norm:
        block |= {"attention.q_norm.weight": (width,), "attention.k_norm.weight": (width,)}
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (model.vocabulary_size, width),
        "norm.weight": (width,),
        "output.weight": (model.vocabulary_size, width),
    }
    for layer in range(model.layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def _layer_count(tensors: Tensors) -> int:
    parts = (name.split(".") for name in tensors if name.startswith("layers."))
    return len({part[1] for part in parts})


def _are_rounded(frequencies: Float[np.ndarray, "half_head"], source: str) -> bool:
    """Whether `inv_freq` was rounded to bfloat16; it must be that of open_lm's base."""
    exact = _formula(2 * len(frequencies))
    rounded = exact.astype(jnp.bfloat16).astype(np.float32)
    if np.allclose(frequencies, exact, rtol=1e-6, atol=0):
        return False
    if np.allclose(frequencies, rounded, rtol=1e-6, atol=0):
        return True
    raise UserError(f"{source}: inv_freq holds other frequencies than those of base {ROPE_BASE:g}")


def _formula(head_width: int) -> Float[np.ndarray, "half_head"]:
    """base^(-2 i / head width), rounded where open_lm rounds, so that most come out bit for bit."""
    exponents = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    powers = (ROPE_BASE ** exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1) / powers


def _plain_name(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _some(mapping: Mapping[Any, Any]) -> str:
    names = [str(name) for name in mapping]
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
