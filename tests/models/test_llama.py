import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.special

from scaling_jax.config import ModelConfig
from scaling_jax.errors import UserError
from scaling_jax.models import llama, safetensors_file, transformer

CONFIG = {
    "model_type": "llama", "vocab_size": 30, "hidden_size": 24, "intermediate_size": 256,
    "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 12,
    "max_position_embeddings": 40, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}, "rope_scaling": None,
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
    "bos_token_id": 1, "torch_dtype": "bfloat16", "pretraining_tp": 1,
}  # fmt: skip


def make_tensors(config, seed=0):
    """Tensors under the names of LlamaForCausalLM, matrices as (out, in)."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "lm_head.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{part}_proj.weight": (width, width) for part in "qkvo"}
        shapes |= {f"{block}.mlp.{part}_proj.weight": (hidden, width) for part in ("gate", "up")}
        shapes[f"{block}.mlp.down_proj.weight"] = (width, hidden)
        shapes[f"{block}.input_layernorm.weight"] = (width,)
        shapes[f"{block}.post_attention_layernorm.weight"] = (width,)
    random = np.random.default_rng(seed)
    return {
        name: (0.4 * random.standard_normal(shape) + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


def reference_logits(config, tensors, ids):
    """Llama after its paper, in float64, one position and one head at a time."""
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    heads = config["num_attention_heads"]
    size = config["hidden_size"] // heads
    base = config["rope_parameters"]["rope_theta"]
    angles = base ** (-np.arange(0, size, 2) / size)

    def norm(x, name):
        return x / np.sqrt((x**2).mean() + config["rms_norm_eps"]) * tensors[f"{name}.weight"]

    def turn(x, position):
        first, second = x[: size // 2], x[size // 2 :]
        cosine, sine = np.cos(position * angles), np.sin(position * angles)
        return np.concatenate([first * cosine - second * sine, second * cosine + first * sine])

    stream = [tensors["model.embed_tokens.weight"][token] for token in ids]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        weights = {
            part: tensors[f"{block}.{part}_proj.weight"]
            for part in (
                *(f"self_attn.{each}" for each in "qkvo"),
                "mlp.gate",
                "mlp.up",
                "mlp.down",
            )
        }
        inner = [norm(x, f"{block}.input_layernorm") for x in stream]
        query, key, value = (
            [(weights[f"self_attn.{part}"] @ x).reshape(heads, size) for x in inner]
            for part in "qkv"
        )
        for position in range(len(ids)):
            mixed = []
            for head in range(heads):
                scores = [
                    turn(query[position][head], position) @ turn(key[before][head], before)
                    for before in range(position + 1)
                ]
                share = scipy.special.softmax(np.array(scores) / np.sqrt(size))
                mixed.append(share @ [value[before][head] for before in range(position + 1)])
            stream[position] = stream[position] + weights["self_attn.o"] @ np.concatenate(mixed)
        for position, x in enumerate(stream):
            inside = norm(x, f"{block}.post_attention_layernorm")
            gate = weights["mlp.gate"] @ inside
            gated = gate * scipy.special.expit(gate) * (weights["mlp.up"] @ inside)
            stream[position] = x + weights["mlp.down"] @ gated
    return np.stack([tensors["lm_head.weight"] @ norm(x, "model.norm") for x in stream])


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "llama"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    safetensors_file.write(path / "model.safetensors", make_tensors(CONFIG))
    return path


def test_logits_are_those_of_a_plain_llama(folder):
    imported = llama.read(folder)
    assert imported.model == ModelConfig(
        width=24, layers=3, heads=2, vocabulary_size=30, sequence_length=40,
        norm="rms_norm", qk_norm=False, rope_base=500.0,
    )  # fmt: skip
    ids = np.random.default_rng(1).integers(0, 30, 17)
    expected = reference_logits(CONFIG, make_tensors(CONFIG), ids)
    assert np.abs(expected).max() > 1
    found = transformer.bind(imported.model, imported.params)(jnp.asarray(ids[None]))[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_there_and_back_is_bit_for_bit(folder, tmp_path):
    imported = llama.read(folder)
    llama.write(tmp_path / "back", imported.model, imported.params)
    back = safetensors_file.read(tmp_path / "back" / "model.safetensors")
    tensors = make_tensors(CONFIG)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)
    again = llama.read(tmp_path / "back")
    assert again.model == imported.model
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]


def test_several_files_in_half_precision_are_read(folder):
    rounded = {name: part.astype(ml_dtypes.bfloat16) for name, part in make_tensors(CONFIG).items()}
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{index % 3}.safetensors" for index, name in enumerate(rounded)}
    for file in set(places.values()):
        part = {name: tensor for name, tensor in rounded.items() if places[name] == file}
        safetensors_file.write(folder / file, part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    imported = llama.read(folder)
    assert [path.name for path in imported.files] == ["config.json", *sorted(set(places.values()))]
    assert {leaf.dtype for leaf in jax.tree.leaves(imported.params)} == {np.dtype("f4")}
    assert np.array_equal(imported.params["output"].T, rounded["lm_head.weight"].astype("f4"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', not 'llama'"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1; only 2"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True; only False"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3"}}, "rope_type is 'llama3'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06; only 1e-05"),
        ({"rms_norm_eps": ...}, "rms_norm_eps is 1e-06; only 1e-05"),
        ({"intermediate_size": 128}, "intermediate_size is 128; only 256"),
        ({"head_dim": 8}, "head_dim is 8; only 12"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_attention_heads": 5}, "heads=5 does not divide width=24"),
        ({"hidden_size": ...}, "missing or malformed: 'hidden_size'"),
        ({"hidden_size": "wide"}, "missing or malformed"),
        ({"num_hidden_layers": 2}, "'model.layers.2.input_layernorm.weight' has no place"),
        ({"num_hidden_layers": 4}, "'model.layers.3.self_attn.q_proj.weight' is missing"),
        ({"vocab_size": 31}, "of shape (30, 24), not"),
    ],
    ids=str,
)
def test_other_models_are_refused_with_the_reason(folder, changes, message):
    changed = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError) as caught:
        llama.read(folder)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(folder))


def test_folders_that_are_no_model_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"config.json: no such file"):
        llama.read(tmp_path)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="not readable as safetensors"):
        llama.read(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds neither model.safetensors nor"):
        llama.read(folder)
    for places in ({"a": "../model.safetensors"}, {"a": 3}, {}, []):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        with pytest.raises(UserError, match="does not name files of the folder"):
            llama.read(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        llama.read(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "layer_norm"}, "model.norm=layer_norm: it subtracts the mean"),
        ({"qk_norm": True}, "model.qk_norm=True: Llama does not normalise"),
        ({"rope_frequency_dtype": "bfloat16"}, "model.rope_frequency_dtype=bfloat16"),
    ],
)
def test_a_model_that_is_no_llama_is_not_exported(folder, tmp_path, changes, message):
    imported = llama.read(folder)
    with pytest.raises(UserError) as caught:
        llama.write(tmp_path / "out", dataclasses.replace(imported.model, **changes), {})
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()
