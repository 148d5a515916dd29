"""Token ids kept on disk are those that would be built, and are built once."""

import concurrent.futures
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from scaling_jax.data.vocabularies import ByteVocabulary, vocabulary
from scaling_jax.evaluation import prompt_cache, prompts, tasks
from scaling_jax.evaluation.prompts import Digest
from scaling_jax.evaluation.tasks import TaskConfig

BYTES = ByteVocabulary()
SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
TASK = TaskConfig(data="quiz.jsonl", type="multiple_choice", shots=2, has_categories=True)
ANSWERS = TaskConfig(data="answers.jsonl", type="question_answering", shots=1)


@pytest.fixture
def folder(tmp_path):
    quiz = [
        {"query": f"{n} é", "choices": ["one", " one", "two" * 9], "gold": n % 3, "category": c}
        for n, c in enumerate("aabba")
    ]
    answers = [{"context": f"q{n}", "answer": "x", "aliases": ["y", "longer"]} for n in range(3)]
    for name, rows in (("quiz", quiz), ("answers", answers)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def prepare(folder):
    def call(task=TASK, words=BYTES, max_tokens=64, seed=1234, cache=folder / "cache"):
        return prompt_cache.prepare(task, folder / task.data, words, max_tokens, seed, cache)

    return call


@pytest.fixture
def untouched(monkeypatch):
    """Nothing may be built from here on."""

    def forbid():
        monkeypatch.setattr(prompts, "build", lambda *_: pytest.fail("built again"))

    return forbid


def plain(prepared):
    """Everything of the prompts, comparable."""
    return prepared.sha256, [
        dataclasses.replace(
            prompt,
            choices=[(c.context.tolist(), c.tokens.tolist(), c.truncated) for c in prompt.choices],
        ).__dict__
        for prompt in prepared.prompts
    ]


@pytest.mark.parametrize("task", [TASK, ANSWERS])
def test_what_comes_back_is_what_was_built(prepare, untouched, task):
    # Some choices are cut on the left, others of the same question are not.
    built = prepare(task, cache=None)
    first = prepare(task)
    untouched()
    again = prepare(task)
    assert plain(again) == plain(first) == plain(built)
    digest = Digest()
    for prompt in again.prompts:
        digest.add(prompt)
        assert all(choice.context.dtype == np.int32 for choice in prompt.choices)
    assert digest.sha256 == again.sha256


def test_where_a_task_belongs_does_not_change_its_prompts(prepare, untouched):
    prepare()
    untouched()
    prepare(dataclasses.replace(TASK, group="words", chance=0.1, git_blob="a" * 40))


@pytest.mark.parametrize(
    "changed",
    [
        {"task": dataclasses.replace(TASK, shots=1)},
        {"task": dataclasses.replace(TASK, prompt_string="!")},
        {"max_tokens": 63},
        {"seed": 1},
    ],
)
def test_what_changes_the_prompts_is_another_file(prepare, folder, changed):
    prepare()
    prepare(**changed)
    assert len(list((folder / "cache").iterdir())) == 2


def test_another_content_is_another_file(prepare, folder):
    before = prepare()
    text = (folder / "quiz.jsonl").read_text()
    (folder / "quiz.jsonl").write_text(text.replace("one", "won"))
    after = prepare()
    assert after.sha256 != before.sha256
    assert after.data_git_blob != before.data_git_blob


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        lambda content: bytes([content[0] ^ 1]) + content[1:],
    ],
)
def test_a_damaged_file_is_made_anew(prepare, folder, untouched, damage):
    first = prepare()
    (path,) = (folder / "cache").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="is damaged and made anew"):
        assert plain(prepare()) == plain(first)
    untouched()
    assert plain(prepare()) == plain(first)


def test_many_may_write_at_once(prepare, folder):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = [each.result() for each in [pool.submit(prepare) for _ in range(24)]]
    assert len({json.dumps(plain(each)) for each in found}) == 1
    assert len(list((folder / "cache").iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_no_harm(prepare, folder):
    (folder / "file").write_text("")
    with pytest.warns(UserWarning, match="are not kept there"):
        assert prepare(cache=folder / "file").prompts


def test_the_default_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert prompt_cache.default_folder() == tmp_path / "scaling_jax" / "prompts"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert prompt_cache.default_folder() == Path("/home/somebody/.cache/scaling_jax/prompts")


def test_a_released_task_is_built_once(untouched, tmp_path):
    """With ten shots, in the vocabulary that it was made for."""
    words, folder = SHARED / "tokenizer" / "20B_tokenizer.json", SHARED / "icl"
    if not words.is_file() or not folder.is_dir():
        pytest.skip(f"the tasks' files or the tokenizer are not here: {SHARED}")
    ids, task = vocabulary(str(words)), tasks.load("gadre2024").tasks["arc_challenge"]
    built = prompt_cache.prepare(task, folder / task.data, ids, 2048, 1234, tmp_path)
    untouched()
    kept = prompt_cache.prepare(task, folder / task.data, ids, 2048, 1234, tmp_path)
    assert len(kept.prompts) == 1172
    assert plain(kept) == plain(built)
