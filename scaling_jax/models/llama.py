"""Models of Hugging Face's `LlamaForCausalLM`, as far as they are the same computation as ours.

That is so with `norm: rms_norm` and `qk_norm: false` here, and there with as many key heads as
query heads, no biases, an output matrix of its own, plain rotary positions, our epsilon and our
feed-forward width. Whatever differs is refused with the setting that differs. So no model of
open_lm's recipe can be exported: it subtracts means and normalises queries and keys.

Source: github.com/huggingface/transformers, `models/llama`; Touvron et al. 2023.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling_jax import atomic
from scaling_jax import config as configs
from scaling_jax.config import ModelConfig
from scaling_jax.errors import UserError
from scaling_jax.models import activations, safetensors_file
from scaling_jax.models.transformer import Params

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Settings that must be so, or absent: LlamaConfig's default is the same.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "rope_scaling": None,
    "quantization_config": None,
}

Tensors = Mapping[str, np.ndarray]


class Imported(NamedTuple):
    """A model in our terms, and the files that it was read from."""

    model: ModelConfig
    params: Params
    files: list[Path]


def read(folder: Path) -> Imported:
    """The model in a folder with config.json and safetensors, one file or several with an index.

    Raises:
      UserError: a file is missing or damaged, or the model is none that can be computed here.
    """
    path = folder / CONFIG_FILE
    model = _to_model(_read_json(path), str(path))
    files = _weight_files(folder)
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        tensors |= safetensors_file.read(file)
    return Imported(model, _to_params(model, tensors, str(folder)), [path, *files])


def write(folder: Path, model: ModelConfig, params: Params) -> None:
    """Makes a folder that transformers loads as LlamaForCausalLM, in float32; no tokenizer.

    Args:
      folder: new, or empty.
      model: of the parameters.
      params: arrays that NumPy can read.

    Raises:
      UserError: it would compute something else there.
    """
    check_exportable(model)
    with atomic.new_folder(folder) as made:
        atomic.write_text(made / CONFIG_FILE, json.dumps(_from_model(model), indent=2) + "\n")
        safetensors_file.write(made / WEIGHTS_FILE, _from_params(model, params))


def check_exportable(model: ModelConfig) -> None:
    """Raises a UserError, with the reason, for a model that LlamaForCausalLM cannot compute."""
    reasons = {
        "norm": ("rms_norm", "it subtracts the mean, which Llama's RMSNorm does not"),
        "qk_norm": (False, "Llama does not normalise queries and keys"),
        "rope_frequency_dtype": ("float32", "Llama does not round its rotary frequencies"),
    }
    for name, (needed, reason) in reasons.items():
        value = getattr(model, name)
        if value != needed:
            raise UserError(f"model.{name}={value}: {reason}; this model cannot be exported")


def _to_model(given: Mapping[str, Any], source: str) -> ModelConfig:
    """Our config for a LlamaConfig, every setting of which is checked to mean the same here."""
    if given.get("model_type") != "llama":
        raise UserError(f"{source}: model_type is {given.get('model_type')!r}, not 'llama'")
    for name, needed in _FIXED.items():
        _check(source, name, given.get(name, needed), needed)
    try:
        width, heads = int(given["hidden_size"]), int(given["num_attention_heads"])
        rope = given.get("rope_parameters") or {}
        content = {
            "width": width,
            "layers": given["num_hidden_layers"],
            "heads": heads,
            "vocabulary_size": given["vocab_size"],
            "sequence_length": given.get("max_position_embeddings", 2048),
            "rope_base": rope.get("rope_theta", given.get("rope_theta", 10_000.0)),
            "norm": "rms_norm",
            "qk_norm": False,
        }
        hidden = given["intermediate_size"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{source}: missing or malformed: {error}") from None
    model = configs.build(ModelConfig, content, source)
    _check(source, "rope_type", rope.get("rope_type", "default"), "default")
    _check(source, "partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0)
    _check(source, "num_key_value_heads", given.get("num_key_value_heads") or heads, heads)
    _check(source, "head_dim", given.get("head_dim") or model.head_width, model.head_width)
    _check(source, "intermediate_size", hidden, model.hidden_width)
    _check(source, "rms_norm_eps", given.get("rms_norm_eps", 1e-6), activations.NORM_EPSILON)
    return model


def _from_model(model: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocabulary_size,
        "hidden_size": model.width,
        "intermediate_size": model.hidden_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.heads,
        "max_position_embeddings": model.sequence_length,
        "rope_theta": model.rope_base,
        "rms_norm_eps": activations.NORM_EPSILON,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "float32",
    }


def _to_params(model: ModelConfig, tensors: Tensors, source: str) -> Params:
    _check_tensors(model, tensors, source)

    def stack(*names: str) -> np.ndarray:
        """Matrices as (layer, in, out), with those of several names on an axis before the last."""
        layers = []
        for layer in range(model.layers):
            parts = [tensors[f"model.layers.{layer}.{name}.weight"].T for name in names]
            layers.append(np.stack(parts, axis=-2) if len(names) > 1 else parts[0])
        return np.stack(layers).astype(np.float32, copy=False)

    return {
        "embedding": tensors["model.embed_tokens.weight"].astype(np.float32),
        "blocks": {
            "attention_norm": {"gain": stack("input_layernorm")},
            "attention": {
                "qkv": stack("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "out": stack("self_attn.o_proj"),
            },
            "feed_forward_norm": {"gain": stack("post_attention_layernorm")},
            "feed_forward": {
                "gate_up": stack("mlp.gate_proj", "mlp.up_proj"),
                "down": stack("mlp.down_proj"),
            },
        },
        "norm": {"gain": tensors["model.norm.weight"].astype(np.float32)},
        "output": tensors["lm_head.weight"].T.astype(np.float32),
    }


def _from_params(model: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    params = jax.tree.map(np.asarray, params)
    blocks = params["blocks"]
    attention, feed_forward = blocks["attention"], blocks["feed_forward"]
    tensors = {"model.embed_tokens.weight": params["embedding"]}
    for layer in range(model.layers):
        query, key, value = np.moveaxis(attention["qkv"][layer], 1, 0)
        gate, up = np.moveaxis(feed_forward["gate_up"][layer], 1, 0)
        parts = {
            "input_layernorm": blocks["attention_norm"]["gain"][layer],
            "self_attn.q_proj": query,
            "self_attn.k_proj": key,
            "self_attn.v_proj": value,
            "self_attn.o_proj": attention["out"][layer],
            "post_attention_layernorm": blocks["feed_forward_norm"]["gain"][layer],
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": feed_forward["down"][layer],
        }
        tensors |= {f"model.layers.{layer}.{name}.weight": part.T for name, part in parts.items()}
    tensors["model.norm.weight"] = params["norm"]["gain"]
    tensors["lm_head.weight"] = params["output"].T
    return tensors


def _check_tensors(model: ModelConfig, tensors: Tensors, source: str) -> None:
    """Raises a UserError unless there is every tensor of `model` and no other."""
    width, hidden = model.width, model.hidden_width
    square = ("q_proj", "k_proj", "v_proj", "o_proj")
    block: dict[str, tuple[int, ...]] = {f"self_attn.{name}": (width, width) for name in square}
    block |= {"mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width)}
    block |= {"mlp.down_proj": (width, hidden)}
    block |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    expected = {
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(model.layers)
        for name, shape in block.items()
    }
    table = (model.vocabulary_size, width)
    expected |= {"model.embed_tokens.weight": table, "lm_head.weight": table}
    expected["model.norm.weight"] = (width,)
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{source}: '{name}' is missing")
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype not in (np.float32, np.float16, jnp.bfloat16):
            raise UserError(
                f"{source}: '{name}' is {tensor.dtype} of shape {tensor.shape}, not float32, "
                f"float16 or bfloat16 of shape {shape}"
            )
    for name in tensors:
        if name not in expected and not name.endswith("rotary_emb.inv_freq"):
            raise UserError(f"{source}: '{name}' has no place in this model")


def _check(source: str, name: str, value: Any, needed: Any) -> None:
    if value != needed:
        raise UserError(
            f"{source}: {name} is {value!r}; only {needed!r} can be computed here, so this model "
            "cannot be imported"
        )


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise UserError(f"{folder}: holds neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    places = _read_json(folder / INDEX_FILE).get("weight_map")
    names = set(places.values()) if isinstance(places, dict) else set()
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise UserError(f"{folder / INDEX_FILE}: its weight_map does not name files of the folder")
    return [folder / name for name in sorted(names)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no settings")
    return content
