"""Whatever a file holds, reading it gives a result or one clear line, never anything else."""

import contextlib
import dataclasses
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import HOSTILE_TEXT, SCALARS, bytes_like, content_like, json_like
from safetensors.numpy import save

from scaling_jax import config as configs
from scaling_jax import records, sealed
from scaling_jax.config import RunConfig, TestbedConfig
from scaling_jax.data import catalog, shards
from scaling_jax.data.shards import Index, ShardEntry, Shards
from scaling_jax.data.vocabularies import vocabulary
from scaling_jax.errors import UserError
from scaling_jax.evaluation import questions, validation
from scaling_jax.evaluation import tasks as task_configs
from scaling_jax.evaluation.tasks import TaskConfig
from scaling_jax.models import llama, safetensors_file, torch_file
from scaling_jax.testbeds import grid
from scaling_jax.training import checkpoint

RUN = {
    "model": {"width": 32, "layers": 1, "heads": 2, "vocabulary_size": 264, "sequence_length": 64},
    "data": {"dataset": "walk", "validation": ["walk"], "mixture": {"a": 1, "b": 2.5}},
    "batch_size": 8,
    "token_multiplier": 20,
    "optimizer": {"schedule": "cosine", "learning_rate": 0.01},
    "mesh": {"data": -1},
}
TESTBED = {
    "name": "small",
    "run": {key: value for key, value in RUN.items() if key != "token_multiplier"},
    "sizes": {"s": {"model": {"width": 16}}},
    "grid": [{"role": "fit", "datasets": ["walk"], "sizes": ["s"], "token_multipliers": [5, 10]}],
    "laws": {"loss": ["chinchilla"], "level": 0.9},
}
TASKS = {
    "name": "two",
    "tasks": {
        "a": {"data": "a.jsonl", "type": "multiple_choice", "shots": 2},
        "b": {"data": "b.jsonl", "type": "language_modeling"},
    },
    "averages": {"both": ["a", "b"]},
}
SOURCE = {
    "name": "texts",
    "format": "jsonl",
    "folder": "texts",
    "held_out_share": 0.1,
    "parts": {"a": {"rate": 2, "files": ["*.jsonl"], "validation_files": ["v.jsonl"]}},
}
ROWS = [
    {
        "run": f"r{n}",
        "dataset": "walk",
        "params": 1e6 * n,
        "tokens": 2e7 * n,
        "seed": 0,
        "step": 10,
        "loss/walk": 3.0 - 0.1 * n,
        "loss/walk/low": 2.9 - 0.1 * n,
        "loss/walk/high": 3.1 - 0.1 * n,
        "error/t": 0.5,
    }
    for n in range(1, 4)
]
QUESTIONS = {
    "multiple_choice": {"query": "Which?", "choices": ["a", "b"], "gold": 1, "category": "x"},
    "schema": {"context_options": ["He", "She"], "continuation": "sat.", "gold": 0},
    "language_modeling": {"context": "One", "continuation": " two"},
    "question_answering": {"context": "2+2?", "answer": "4", "aliases": ["four"]},
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 40,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
INDEX = dataclasses.asdict(
    Index(  # pyright: ignore[reportArgumentType]
        task="walk",
        split="train",
        source="test",
        vocabulary="bytes",
        vocabulary_size=259,
        vocabulary_sha256="",
        end_of_text=1,
        dtype="u16",
        documents=1,
        text_bytes=3,
        shards=(ShardEntry("tokens-00000-of-00001.u16", 4, "0" * 64, 1),),
        entropy_rate=None,
        versions={},
    )
)

many = settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Nothing is raised but a UserError of one line that can be printed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except UserError as error:
            line = str(error)
            assert line.strip()
            assert "Traceback" not in line


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str, bytes], Path]:
    def write(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize(
    ("kind", "good"),
    [(RunConfig, RUN), (TestbedConfig, TESTBED), (task_configs.TasksConfig, TASKS)],
    ids=["run", "testbed", "tasks"],
)
@many
@given(data=st.data())
def test_configs(file, kind, good, data):
    content = data.draw(
        content_like(good).map(lambda found: yaml.safe_dump(found).encode())
        | bytes_like(yaml.safe_dump(good).encode())
    )
    with one_line():
        found = configs.load(kind, file("config.yaml", content))
        if kind is TestbedConfig:
            grid.expand(found)


@many
@given(key=st.text(max_size=20), value=SCALARS | st.text(max_size=20))
def test_overrides(file, key, value):
    path = file("config.yaml", yaml.safe_dump(RUN).encode())
    with one_line():
        configs.load(RunConfig, path, [f"{key}={value}"])


@many
@given(data=st.data())
def test_data_configs(file, data):
    content = data.draw(content_like(SOURCE).map(lambda found: yaml.safe_dump(found).encode()))
    with one_line():
        catalog.find(str(file("source.yaml", content)))


@many
@given(content=bytes_like(pd.DataFrame(ROWS).to_csv(index=False).encode()))
def test_records_as_csv(file, content):
    with one_line():
        records.read(file("records.csv", content))


@many
@given(content=json_like(ROWS))
def test_records_as_json(file, content):
    with one_line():
        records.read(file("records.json", content))


@many
@given(data=st.data())
def test_records_as_parquet(file, tmp_path, data):
    pd.DataFrame(ROWS).to_parquet(tmp_path / "good.parquet")
    content = data.draw(bytes_like((tmp_path / "good.parquet").read_bytes()))
    with one_line():
        records.read(file("records.parquet", content))


@many
@given(content=json_like(INDEX))
def test_the_index_of_token_shards(file, content):
    file("split/tokens-00000-of-00001.u16", np.arange(4, dtype="<u2").tobytes())
    path = file(f"split/{shards.INDEX_FILE}", content)
    with one_line():
        Shards.open(path.parent)


@pytest.mark.parametrize("kind", sorted(QUESTIONS))
@many
@given(data=st.data())
def test_questions(file, kind, data):
    lines = data.draw(st.lists(json_like(QUESTIONS[kind]), min_size=1, max_size=3))
    with one_line():
        task = TaskConfig(data="t.jsonl", type=kind)  # pyright: ignore[reportArgumentType]
        for group in questions.read(task, file("t.jsonl", b"\n".join(lines))).values():
            for question in group:
                assert 0 <= question.gold < len(question.options)


@many
@given(content=json_like(sealed.seal({"step": 4, "identity": "a", "fingerprints": {"x": 1}})))
def test_the_meta_of_a_checkpoint(file, content):
    folder = file("checkpoints/4/meta/metadata", content).parents[2]
    with one_line():
        assert checkpoint.read_meta(folder)["fingerprints"] == {"x": 1}


@many
@given(content=json_like({"walk": {"loss": 3.0, "loss_low": 2.9, "loss_high": 3.1, "error": 0.5}}))
def test_kept_scores(file, content):
    path = validation.path(file("run/x", b"").parent, 4)
    file(str(path.relative_to(path.parents[2])), content)
    with one_line():
        validation.read(path.parents[1], 4)


@many
@given(content=bytes_like(save({"a": np.zeros((2, 3), np.float32)})))
def test_safetensors(file, content):
    with one_line():
        safetensors_file.read(file("model.safetensors", content))


@many
@given(data=st.data())
def test_torch_files(file, tmp_path, data):
    torch_file.write(tmp_path / "good.pt", {"state_dict": {"a": np.zeros((2, 3), np.float32)}})
    content = data.draw(bytes_like((tmp_path / "good.pt").read_bytes()))
    with one_line():
        torch_file.read(file("other.pt", content))


@many
@given(content=json_like(LLAMA))
def test_llama_configs(file, content):
    file("llama/model.safetensors", save({"a": np.zeros((2, 3), np.float32)}))
    with one_line():
        llama.read(file("llama/config.json", content).parent)


@settings(many, max_examples=30)
@given(content=json_like({"version": "1.0", "added_tokens": [], "model": {"type": "BPE"}}))
def test_tokenizers(file, content):
    with one_line():
        vocabulary(str(file("tokenizer.json", content)))


@many
@given(name=HOSTILE_TEXT | st.text(max_size=12))
def test_names_stay_in_their_folder(name):
    """Names become paths: of runs, of prepared splits."""
    grown = json.loads(json.dumps(TESTBED))
    grown["grid"][0]["datasets"] = [name]
    with one_line():
        config = configs.build(TestbedConfig, grown, "test")
        for run in grid.expand(config):
            out = Path("/out")
            assert run.folder(out).parent == out / "runs"
            assert ".." not in run.folder(out).parts


@many
@given(lines=st.lists(json_like({"text": "one two", "url": "a"}), min_size=1, max_size=3))
def test_lines_of_documents(file, lines):
    path = file("texts/lines.jsonl", b"\n".join(lines))
    for fault in ("fail", "skip"):
        with one_line():
            (source,) = catalog.find(str(path), [f"on_error={fault}"])
            for split in source.splits:
                for piece in source.pieces(split):
                    list(source.documents(split, [piece], Counter()))
