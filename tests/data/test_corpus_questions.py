"""Questions come from what is held out, say what stands there, and are always the same."""

import json

import pytest

from scaling_jax.data import corpora, corpus_questions
from scaling_jax.data.corpora import CORPORA, Document
from scaling_jax.data.vocabularies import ByteVocabulary
from scaling_jax.evaluation import prompts, questions, tasks

CONFIG = tasks.load("quickstart")


@pytest.fixture(scope="module", params=["python_docs", "zipf_markov"])
def made(request, tmp_path_factory):
    """A corpus, the text of its held-out documents, and the folder of its questions."""
    documents = corpora.documents(request.param, "validation")
    out = tmp_path_factory.mktemp("data")
    folder = corpus_questions.write(request.param, out)
    return request.param, "\0".join(document.text for document in documents), folder


def rows(folder, kind):
    lines = (folder / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_answers_are_what_stands_in_the_held_out_text(made):
    _, text, folder = made
    found = [row["context"] + row["continuation"] for row in rows(folder, "cloze")]
    found += [row["query"] + row["choices"][row["gold"]] for row in rows(folder, "choice")]
    assert len(found) == 2 * corpus_questions.QUESTIONS
    assert {len(whole) for whole in found} == {corpus_questions.WINDOW}
    assert all(whole in text for whole in found)


def test_choices_differ_in_content_only_and_gold_has_no_favourite_place(made):
    _, _, folder = made
    golds = []
    for row in rows(folder, "choice"):
        assert len(set(row["choices"])) == corpus_questions.CHOICES
        assert {len(choice) for choice in row["choices"]} == {corpus_questions.CHOICE_LENGTH}
        golds.append(row["gold"])
    # 1000 draws of 4 places: 250 each, standard deviation 14.
    assert all(190 < golds.count(place) < 310 for place in range(corpus_questions.CHOICES))


def test_no_question_is_asked_twice(made):
    _, _, folder = made
    for kind in ("cloze", "choice"):
        lines = (folder / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(set(lines)) == len(lines)


def test_the_quickstarts_tasks_ask_them_byte_by_byte(made):
    """A row is the window itself: no delimiter, no added space, nothing stripped or cut."""
    corpus, _, folder = made
    for kind in ("cloze", "choice"):
        task = CONFIG.tasks[f"{corpus}_{kind}"]
        path = folder.parents[1] / task.data
        texts = [option for q in questions.read(task, path)[""] for option in q.options]
        asked = prompts.build(task, path, ByteVocabulary(), CONFIG.max_tokens, CONFIG.seed)
        read = [choice for prompt in asked for choice in prompt.choices]
        for (context, continuation), choice in zip(texts, read, strict=True):
            assert ByteVocabulary().decode(choice.context) == context
            assert ByteVocabulary().decode(choice.tokens) == continuation
            assert len(choice.context) + len(choice.tokens) == corpus_questions.WINDOW
            assert not choice.truncated


def test_averages_are_of_every_corpus_and_of_all():
    assert set(CONFIG.averages) == {*CORPORA, "average_6"}
    assert set(CONFIG.averages["average_6"]) == set(CONFIG.tasks)
    for corpus in CORPORA:
        assert CONFIG.averages[corpus] == (f"{corpus}_cloze", f"{corpus}_choice")


def test_writing_again_changes_nothing(monkeypatch, tmp_path):
    text = "".join(f"{number:x} is not {number * 7:x}, " for number in range(2000))
    documents = (Document("held", text, "held"), Document("short", "too short", "short"))
    monkeypatch.setattr(corpora, "documents", lambda corpus, split: iter(documents))
    first, second = (corpus_questions.write("any", tmp_path / name) for name in "ab")
    for kind in ("cloze", "choice"):
        assert rows(first, kind) == rows(second, kind)
    for row in rows(first, "cloze"):
        assert row["continuation"] == row["continuation"].strip()
        assert row["context"] == row["context"].strip()
