"""`scaling-jax generate` on a run's folder, as a user calls it."""

import json

import jax
import pytest
import yaml

from scaling_jax import cli
from scaling_jax.config import DataConfig, ModelConfig, RunConfig
from scaling_jax.data.vocabularies import ByteVocabulary
from scaling_jax.models import decoding, transformer
from scaling_jax.training import converted

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODEL = ModelConfig(width=16, layers=1, heads=2, vocabulary_size=264, sequence_length=16)


@pytest.fixture
def params():
    return jax.device_get(transformer.initialize(MODEL, jax.random.key(0)))


@pytest.fixture
def run(make_shards, params, tmp_path):
    """A run's folder, and beside it the data that it was trained on."""
    shards = make_shards([[3, 4, 1], [5, 6, 1]])
    folder = tmp_path / "data" / "words" / "train"
    folder.parent.mkdir(parents=True)
    shards.folder.rename(folder)
    index = json.loads((folder / "index.json").read_text())
    index["vocabulary_sha256"] = ByteVocabulary().sha256
    (folder / "index.json").write_text(json.dumps(index))
    data = DataConfig(dataset="words", validation=("words",), folder=str(tmp_path / "data"))
    config = RunConfig(model=MODEL, data=data, batch_size=1, tokens=160)
    converted.write(config, params, tmp_path / "run", 10, {})
    return tmp_path / "run"


@pytest.fixture
def generate(run, monkeypatch, capsys):
    """Calls the command; what it printed, or the line of its error."""

    def call(*words, folder=run):
        monkeypatch.setattr("sys.argv", ["scaling-jax", "generate", str(folder), *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        if stopped.value.code:
            assert stopped.value.code == 2
            return printed.err.splitlines()[-1]
        return printed.out

    return call


def test_greedy_text_goes_on_after_the_prompt(generate, params):
    words = ByteVocabulary()
    ids = words.encode("né")
    (row,) = decoding.generate(MODEL, params, [ids], end_of_text=1, vocabulary_size=259)
    expected = words.decode([*ids, *row])
    assert expected.startswith("né")
    assert generate("--prompt", "né", "--temperature", "0") == expected + "\n"


def test_samples_are_told_apart_and_repeat_with_their_seed(generate):
    words = ["--prompt", "ab", "--samples", "3", "--max_tokens", "5", "--top_p", "0.9"]
    first = generate(*words, "--seed", "1")
    assert [line for line in first.splitlines() if line.startswith("---")] == [
        f"--- sample {number} of 3: 5 tokens" for number in (1, 2, 3)
    ]
    assert generate(*words, "--seed", "1") == first
    assert generate(*words, "--seed", "2") != first


def test_what_is_wrong_is_said_in_one_line(generate, run, tmp_path):
    wrong = {
        ("--prompt=",): "the prompt is empty",
        ("--prompt=a", "--temperature=-1"): "temperature=-1.0: give 0",
        ("--prompt=a", "--samples=2", "--temperature=0"): "samples=2: give 1 or more, and only 1",
        ("--prompt=a", "--max_tokens=17"): "sequence_length=16, where the model was never trained",
        ("--prompt=a", "--vocabulary=no.json"): "vocabulary 'no.json': there is no such file",
        ("--prompt=a", "model.width=32"): "belongs to another run",
        ("--prompt=a", "data.folder=gone"): "gone/words/train/index.json: not found",
        (): "--prompt",
    }
    for words, message in wrong.items():
        assert message in generate(*words)
    assert "not the folder of a run" in generate("--prompt=a", folder=tmp_path)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text((run / "config.yaml").read_text())
    assert "holds no checkpoint" in generate("--prompt=a", folder=bare)


def test_a_vocabulary_that_has_changed_or_is_gone_is_refused(generate, run, tmp_path):
    index = tmp_path / "data" / "words" / "train" / "index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"vocabulary": str(tmp_path / "gone.model")}))
    assert "gone.model': there is no such file" in generate("--prompt=a")
    index.write_text(json.dumps(content | {"vocabulary_sha256": "0" * 64}))
    assert "bytes: not the vocabulary that" in generate("--prompt=a")
    assert generate("--prompt=a", "--vocabulary=bytes").startswith("a")


def test_a_model_too_small_for_the_vocabulary_is_named(generate, run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["vocabulary_size"] = 100
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert "the vocabulary has 259 ids, the model 100" in generate("--prompt=a")
