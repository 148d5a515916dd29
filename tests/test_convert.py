"""`scaling-jax convert` from the command line: there, evaluated, and back."""

import hashlib
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from scaling_jax import cli
from scaling_jax.config import ModelConfig
from scaling_jax.models import llama, openlm, torch_file, transformer
from scaling_jax.training import converted

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODEL = ModelConfig(
    width=16, layers=2, heads=2, vocabulary_size=48, sequence_length=2048, norm="rms_norm"
)


def random_params(model, seed=0):
    layout = jax.eval_shape(lambda: transformer.initialize(model, jax.random.key(0)))
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype("f4"), layout)


@pytest.fixture
def call(monkeypatch, capsys):
    """Exit code, stdout and stderr of `scaling-jax convert ...`, or of another command."""

    def run(*words, command="convert"):
        monkeypatch.setattr(sys, "argv", ["scaling-jax", command, *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "epoch_3.pt"
    openlm.write(path, openlm.from_params(MODEL, random_params(MODEL)), "made", epoch=3, step=120)
    return path


def test_a_golden_checkpoint_there_evaluated_and_back(call, golden, data_folder, tmp_path):
    source, run = golden.path.with_suffix(".pt"), tmp_path / "runs" / "golden"
    data = (f"data.folder={data_folder}", "data.validation=[walk]")
    length = f"model.sequence_length={golden.settings.seq_len}"
    code, out, _ = call("open_lm", source, run, *data, length)
    assert code == 0
    assert str(run) in out
    assert "data.dataset=unknown batch_size=1" in out
    assert "sequence_length" not in out

    config, restored = converted.read(run)
    assert config.model == golden.model()
    params = golden.params("final")
    assert jax.tree.all(jax.tree.map(np.array_equal, restored.state["params"], params))
    origin = restored.meta["origin"]
    assert origin["sha256"] == {source.name: hashlib.sha256(source.read_bytes()).hexdigest()}

    assert call(run, command="evaluate")[0] == 0
    (scores,) = (run / "evaluations").glob("*.json")
    assert np.isfinite(json.loads(scores.read_text())["sets"]["walk"]["loss"])

    for suffix in (".pt", ".safetensors"):
        back = tmp_path / f"back{suffix}"
        assert call("to_open_lm", run, back)[0] == 0
        expected, found = (openlm.read(path).tensors for path in (source, back))
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, name
            assert found[name].tobytes() == tensor.tobytes(), name
    content, original = torch_file.read(tmp_path / "back.pt"), torch_file.read(source)
    assert list(content["state_dict"]) == list(original["state_dict"])
    assert content["epoch"] == original["epoch"]


def test_step_and_epoch_survive_and_training_does_not_go_on(
    call, checkpoint, data_folder, tmp_path
):
    run, sizes = tmp_path / "run", ("model.sequence_length=8", "batch_size=8", "tokens=64")
    data = ("data.dataset=walk", "data.validation=[walk]", f"data.folder={data_folder}")
    assert call("open_lm", checkpoint, run, *data, *sizes, "model.norm=rms_norm")[0] == 0
    assert converted.read(run)[1].meta["step"] == 120
    code, _, err = call(run / "config.yaml", "--out", run, command="train")
    assert code == 2
    assert "data_sha256 unknown: converted there" in err
    assert call("to_open_lm", run, tmp_path / "back.pt")[0] == 0
    assert torch_file.read(tmp_path / "back.pt")["step"] == 120
    assert torch_file.read(tmp_path / "back.pt")["epoch"] == 3


def test_a_config_gives_what_the_file_does_not_say(call, checkpoint, tmp_path):
    model = tmp_path / "model.yaml"
    model.write_text(yaml.safe_dump({"width": 16, "layers": 2, "name": "small"}))
    assert call("open_lm", checkpoint, tmp_path / "a", "--config", model, "batch_size=4")[0] == 0
    run = tmp_path / "run.yaml"
    settings = {"model": str(model), "token_multiplier": 20, "batch_size": 4, "seed": 5}
    run.write_text(yaml.safe_dump(settings | {"data": {"dataset": "c4", "validation": ["c4"]}}))
    code, out, _ = call("open_lm", checkpoint, tmp_path / "b", "--config", run)
    assert code == 0
    assert "assumed; change with section.key=value: model.sequence_length=2048" in out
    assert "model.norm=layer_norm model.rope_frequency_dtype=float32\n" in out
    first, second = (yaml.safe_load((tmp_path / n / "config.yaml").read_text()) for n in "ab")
    assert (first["model"]["name"], first["batch_size"], first["tokens"]) == ("small", 4, 2048)
    assert (second["seed"], second["tokens"], second["data"]["dataset"]) == (5, None, "c4")


def test_a_llama_there_and_back(call, checkpoint, tmp_path):
    llama_model = ModelConfig(
        width=16, layers=2, heads=2, vocabulary_size=48, sequence_length=32,
        norm="rms_norm", qk_norm=False, rope_base=100.0,
    )  # fmt: skip
    source, run, back = tmp_path / "llama", tmp_path / "run", tmp_path / "back"
    llama.write(source, llama_model, random_params(llama_model))
    code, out, _ = call("llama", source, run)
    assert code == 0
    assert "model.sequence_length=32" in out
    assert converted.read(run)[0].model == llama_model
    assert call("to_llama", run, back)[0] == 0
    for name in ("config.json", "model.safetensors"):
        assert (back / name).read_bytes() == (source / name).read_bytes()
    code, _, err = call("to_open_lm", run, tmp_path / "a.pt")
    assert (code, "open_lm always takes 10000" in err) == (2, True)
    assert call("open_lm", checkpoint, tmp_path / "other")[0] == 0
    code, _, err = call("to_llama", tmp_path / "other", tmp_path / "no")
    assert (code, "model.norm=layer_norm" in err) == (2, True)
    assert not (tmp_path / "no").exists()


class Attack:
    def __init__(self, marker: Path):
        self.command = f"touch {marker}"

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_malicious_checkpoint_is_refused_in_one_line(call, tmp_path):
    marker, evil = tmp_path / "marker", tmp_path / "evil.pt"
    with zipfile.ZipFile(evil, "w") as archive:
        attack = {"state_dict": {"module.tok_embeddings.weight": Attack(marker)}}
        archive.writestr("evil/data.pkl", pickle.dumps(attack, protocol=2))
    code, out, err = call("open_lm", evil, tmp_path / "out")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {evil}: refused: its pickle asks for ")
    assert "system" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [evil]


def without_frequencies(checkpoint):
    tensors = openlm.read(checkpoint).tensors
    kept = {name: part for name, part in tensors.items() if not name.endswith("inv_freq")}
    path = checkpoint.with_name("bare.pt")
    openlm.write(path, kept, "bare", epoch=1, step=0)
    return path


def test_heads_are_asked_for_where_the_file_does_not_tell_them(call, checkpoint, tmp_path):
    bare = without_frequencies(checkpoint)
    code, _, err = call("open_lm", bare, tmp_path / "out")
    assert (code, "give it as model.heads=NUMBER" in err) == (2, True)
    assert call("open_lm", bare, tmp_path / "out", "model.heads=4")[0] == 0
    assert converted.read(tmp_path / "out")[0].model.heads == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("open_lm", "no.pt", "OUT"), "no.pt: no such file"),
        (("open_lm", "CHECKPOINT", "FULL"), "FULL: is there already"),
        (("open_lm", "CHECKPOINT", "CHECKPOINT"), "is there already"),
        (("open_lm", "CHECKPOINT", "OUT", "model.heads=4"), "its heads is 2, not the given 4"),
        (("open_lm", "CHECKPOINT", "OUT", "--config", "models/11m.yaml"), "its width is 16"),
        (("open_lm", "CHECKPOINT", "OUT", "model.widht=3"), "did you mean 'width'"),
        (("open_lm", "CHECKPOINT", "OUT", "model=3"), "model is 3, not a section"),
        (("open_lm", "CHECKPOINT", "OUT", "data=3"), "data"),
        (("open_lm", "CHECKPOINT", "OUT", "mesh.tensor=3"), "mesh"),
        (("open_lm", "CHECKPOINT", "OUT", "--confg", "x"), "--config"),
        (("openlm", "CHECKPOINT", "OUT"), "open_lm"),
        (("to_open_lm", "FULL", "OUT.pt"), "not the folder of a run: it holds no config.yaml"),
        (("to_open_lm", "FULL", "OUT.ckpt"), "its format is told by its suffix"),
        (("to_open_lm", "FULL", "CHECKPOINT"), "is there already"),
        (("llama", "FULL", "OUT"), "config.json: no such file"),
        (("to_llama", "FULL", "OUT"), "not the folder of a run: it holds no config.yaml"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_nothing_is_written(call, checkpoint, tmp_path, words, message):
    full = tmp_path / "FULL"
    full.mkdir()
    (full / "note").touch()
    before = sorted(tmp_path.rglob("*"))
    places = {"CHECKPOINT": checkpoint, "FULL": full}
    words = [
        str(places.get(word, tmp_path / word if word.startswith("OUT") else word)) for word in words
    ]
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
