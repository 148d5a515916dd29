"""A run inside lm-evaluation-harness: the same numbers as by our own engine. No network."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
lm_eval = pytest.importorskip("lm_eval", reason="the extra lm_eval is not installed")

from lm_eval.api.instance import Instance  # noqa: E402 # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # noqa: E402 # pyright: ignore[reportMissingImports]

from scaling_jax.config import DataConfig, ModelConfig, RunConfig  # noqa: E402
from scaling_jax.data.vocabularies import ByteVocabulary  # noqa: E402
from scaling_jax.errors import UserError  # noqa: E402
from scaling_jax.evaluation import downstream, generation, tasks, validation  # noqa: E402
from scaling_jax.evaluation.lm_eval_adapter import RunLM  # noqa: E402
from scaling_jax.models import transformer  # noqa: E402
from scaling_jax.training import converted  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")

BYTES = ByteVocabulary()
LENGTH = 48
MODEL = ModelConfig(width=16, layers=1, heads=2, vocabulary_size=BYTES.size, sequence_length=LENGTH)
QUIZ = """\
task: quiz
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - metric: acc
"""
WORDS = """\
task: words
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: generate_until
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 9
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def params():
    return jax.device_get(transformer.initialize(MODEL, jax.random.key(0)))


@pytest.fixture(scope="module")
def run(params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    data = DataConfig(dataset="words", validation=("words",), folder=str(folder / "nowhere"))
    config = RunConfig(model=MODEL, data=data, batch_size=1, tokens=LENGTH)
    converted.write(config, params, folder, 10, {})
    return folder


@pytest.fixture(scope="module")
def model(run):
    return RunLM(run=str(run), vocabulary="bytes")


@pytest.fixture
def folder(tmp_path):
    """Questions whose choices are equally long, so that sums and means rank them alike."""
    random = np.random.default_rng(3)
    rows = [
        {
            "query": f"question {n}" + "?" * int(random.integers(1, 20)),
            "choices": ["".join(map(chr, random.integers(97, 122, 3))) for _ in range(4)],
            "gold": int(random.integers(0, 4)),
        }
        for n in range(30)
    ]
    path = tmp_path / "quiz.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("quiz", QUIZ), ("words", WORDS)):
        (tmp_path / f"{name}.yaml").write_text(text.format(data=path, cache=tmp_path / "cache"))
    return tmp_path


def simple(folder, names, **given):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(tasks=names, task_manager=manager, bootstrap_iters=0, **given)


def test_by_name_a_task_gives_what_our_engine_gives(run, model, folder):
    found = simple(
        folder,
        ["quiz"],
        model="scaling_jax",
        model_args={"run": str(run), "vocabulary": "bytes"},
    )
    task = tasks.TaskConfig(data="quiz.jsonl", type="multiple_choice")
    config = tasks.TasksConfig(tasks={"quiz": task}, max_tokens=LENGTH)
    report = downstream.evaluate(config, config.tasks, folder, BYTES, model._scorer)
    ours = report.tasks["quiz"]
    assert found["results"]["quiz"]["acc,none"] == ours.accuracy
    assert 0 < ours.accuracy < 1
    samples = sorted(found["samples"]["quiz"], key=lambda sample: sample["doc_id"])
    for sample, outcome in zip(samples, ours.outcomes, strict=True):
        theirs = [answer[0][0] for answer in sample["resps"]]
        np.testing.assert_allclose(theirs, outcome.log_probabilities, atol=1e-4)


def test_rolling_is_the_validation_loss(model, params, make_shards, tmp_path):
    random = np.random.default_rng(0)
    texts = ["".join(map(chr, random.integers(32, 127, LENGTH))) for _ in range(5)]
    # Rows of an end of text and one text each.
    rows = [[1], *([*BYTES.encode(text), 1] for text in texts)]
    make_shards(rows, size=BYTES.size, name="words/validation")
    data = DataConfig(dataset="words", validation=("words",), folder=str(tmp_path))
    config = RunConfig(model=MODEL, data=data, batch_size=1, tokens=LENGTH)
    scores = validation.evaluate(config, params)["words"]
    found = model.loglikelihood_rolling([rolling(text) for text in texts])
    assert scores["tokens"] == len(texts) * LENGTH
    assert -sum(found) / scores["tokens"] == pytest.approx(scores["loss"], abs=1e-5)


def rolling(text):
    return Instance("loglikelihood_rolling", {}, (text,), 0)


def test_a_long_text_is_scored_in_rows_that_reach_back(model, params):
    text = "abcdefghij" * 7
    ids = BYTES.encode(text)
    found = model.loglikelihood_rolling([rolling(text)])
    first = np.array([1, *ids[:LENGTH]])
    second = np.array(ids[-LENGTH - 1 :])
    logs = jax.nn.log_softmax(transformer.bind(MODEL, params)(jnp.stack([first, second])[:, :-1]))
    each = np.take_along_axis(np.asarray(logs), np.stack([first, second])[:, 1:, None], axis=2)[
        ..., 0
    ]
    expected = each[0].sum() + each[1, -(len(ids) - LENGTH) :].sum()
    assert found == [pytest.approx(float(expected), abs=1e-3)]
    assert model.loglikelihood_rolling([rolling(""), rolling("")]) == [0.0, 0.0]


def loglikelihood(model, *pairs):
    return model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])


def test_log_probabilities_are_those_of_the_logits(model, params):
    with pytest.warns(UserWarning, match="1 of 3 contexts"):
        found = loglikelihood(model, ("", "xy"), ("q" * 90, " z"), ("abc", ""))
    (alone, _), (cut, _), (nothing, greedy) = found
    logs = jax.nn.log_softmax(transformer.bind(MODEL, params)(jnp.array([[1, *BYTES.encode("x")]])))
    x, y = BYTES.encode("xy")
    assert alone == pytest.approx(float(logs[0, 0, x] + logs[0, 1, y]), abs=1e-4)
    same = loglikelihood(model, ("q" * (LENGTH - 1), " z"))[0][0]
    assert cut == pytest.approx(same, abs=1e-5)
    assert (nothing, greedy) == (0.0, True)


def test_answers_are_generated_up_to_a_stop(model, folder, monkeypatch):
    contexts = [f"text number {n}" + "." * n for n in range(14)]
    ids = [np.array(BYTES.encode(context), np.int32) for context in contexts]
    plain = BYTES.decode_batch(generation.generate(ids, model._scorer, 9, BYTES.end_of_text))

    def answers(**given):
        given = {"until": [], "max_gen_toks": 9} | given
        return model.generate_until(
            [Instance("generate_until", {}, (context, given), 0) for context in contexts]
        )

    assert answers() == plain
    stop = next(text[4] for text in plain if text[4] not in text[:4])
    assert answers(until=stop) == [text.split(stop)[0] for text in plain]
    drawn = answers(do_sample=True, temperature=1.0)
    assert drawn != plain
    assert drawn == answers(do_sample=True, temperature=1.0)
    found = simple(folder, ["words"], model=model)
    assert found["results"]["words"]["exact_match,none"] == 0
    # In several rounds, as long answers are.
    monkeypatch.setattr("scaling_jax.evaluation.lm_eval_adapter.ROUND", 3)
    assert answers() == plain
    assert answers(until=stop) == [text.split(stop)[0] for text in plain]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 4}, "num_beams is not supported"),
        ({"max_gen_toks": LENGTH}, "give max_gen_toks below that"),
    ],
)
def test_what_cannot_be_generated_is_told(model, given, message):
    with pytest.raises(UserError, match=message):
        model.generate_until([Instance("generate_until", {}, ("a", given), 0)])


def test_a_folder_that_is_no_run_is_told(tmp_path):
    with pytest.raises(UserError, match="not the folder of a run"):
        RunLM(run=str(tmp_path))
