import pytest

from scaling_jax.data import corpora
from scaling_jax.data.corpora import CORPORA, SPLITS, Document
from scaling_jax.errors import UserError


@pytest.mark.parametrize("corpus", CORPORA)
def test_splits_share_no_document_and_leave_none_out(corpus):
    train, validation = (list(corpora.documents(corpus, split)) for split in SPLITS)
    texts = {document.text for document in train}
    assert len(train) + len(validation) == len(CORPORA[corpus]())
    assert not {document.origin for document in train} & {
        document.origin for document in validation
    }
    assert not [document for document in validation if document.text in texts]
    assert 0.01 < len(validation) / (len(train) + len(validation)) < 0.1


@pytest.mark.parametrize("corpus", CORPORA)
def test_documents_are_the_same_when_made_anew(corpus):
    first = CORPORA[corpus]()
    CORPORA[corpus].cache_clear()
    assert CORPORA[corpus]() == first


def test_split_depends_on_the_origin_alone():
    held_out = [n for n in range(200) if Document("a", "b", f"origin {n}").split == "validation"]
    assert held_out == [
        n for n in range(200) if Document("other", "text", f"origin {n}").split == "validation"
    ]
    assert 2 <= len(held_out) <= 25


def test_what_is_held_out_of_the_docs_is_not_trained_on_as_code():
    trained_files = {document.origin for document in corpora.documents("python_code", "train")}
    held_out = list(corpora.documents("python_docs", "validation"))
    assert held_out
    assert not {document.origin for document in held_out} & trained_files


def test_code_holds_no_test_and_no_installed_package():
    names = [document.identifier for document in corpora.python_code()]
    assert "json/decoder.py" in names
    assert names == sorted(names)
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "pydoc_data"}


def test_docs_are_prose_of_known_places_each_once():
    documents = corpora.python_docs()
    texts = {document.identifier: document.text for document in documents}
    assert texts["json/decoder.py:JSONDecoder.raw_decode"].startswith("Decode a JSON document")
    assert len({document.text for document in documents}) == len(documents)


def test_docstrings_are_found_at_every_depth():
    source = '"""M."""\nif x:\n  class A:\n    """C."""\n    async def f(self):\n      """F."""\n'
    assert list(corpora._docstrings(source)) == [("", "M."), ("A", "C."), ("A.f", "F.")]
    assert list(corpora._docstrings("def broken(:")) == []


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'python_code'"):
        next(corpora.documents("python_cod", "train"))
    with pytest.raises(UserError, match="did you mean 'validation'"):
        next(corpora.documents("python_code", "valid"))


def test_a_python_without_sources_is_named(monkeypatch):
    monkeypatch.setitem(CORPORA, "python_code", lambda: ())
    with pytest.raises(UserError, match=r"python_code: .* holds no document for the train split"):
        next(corpora.documents("python_code", "train"))
