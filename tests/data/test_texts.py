import json

import pytest

from scaling_jax.data import texts
from scaling_jax.data.corpora import SPLITS
from scaling_jax.errors import UserError


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "stories.jsonl"
    rows = [json.dumps({"text": f"story {n}", "more": n}) for n in range(300)]
    path.write_text("\n".join(rows) + "\n\n", encoding="utf-8")
    return path


def test_lines_of_json_are_documents_each_in_one_split(lines):
    train, validation = (list(texts.documents(lines, split)) for split in SPLITS)
    assert sorted(document.text for document in train + validation) == sorted(
        f"story {n}" for n in range(300)
    )
    assert 3 <= len(validation) <= 35
    assert train[0].identifier.startswith("stories.jsonl:")


def test_a_folder_of_text_files(tmp_path):
    folder = tmp_path / "books"
    for number in range(100):
        file = folder / f"shelf {number % 3}" / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"book\r\n{number}", encoding="utf-8")
    (folder / "empty.txt").touch()
    (folder / "notes.md").write_text("no document")
    found = [document for split in SPLITS for document in texts.documents(folder, split)]
    assert len(found) == 100
    assert texts.dataset_name(folder) == "books"


def test_a_folder_with_both_splits_is_taken_as_it_is(tmp_path):
    for split in SPLITS:
        (tmp_path / "own" / split).mkdir(parents=True)
        (tmp_path / "own" / split / "a.txt").write_text(f"for {split}")
    for split in SPLITS:
        assert [document.text for document in texts.documents(tmp_path / "own", split)] == [
            f"for {split}"
        ]


def test_the_version_follows_the_content_and_not_the_place(lines, tmp_path):
    before = texts.version(lines)
    moved = tmp_path / "elsewhere" / lines.name
    moved.parent.mkdir()
    moved.write_bytes(lines.read_bytes())
    assert texts.version(moved) == before
    moved.write_text(moved.read_text().replace("story 7", "story of 7"))
    assert texts.version(moved) != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"txt": "b"}\n', "line 2 is not a JSON object"),
        (b'{"text": "a"}\nnot json\n', "line 2 is not a JSON object"),
        (b'{"text": 3}\n', "line 1 is not a JSON object"),
        (b'["text"]\n', "line 1 is not a JSON object"),
        (b'{"text": "half a pair: \\ud800"}\n', "line 1 is not a JSON object"),
        (b'{"text": "\xff"}\n', "not UTF-8"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(texts.documents(path, "train"))


def test_an_empty_split_is_an_error_that_says_what_to_do(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("the only document")
    with pytest.raises(UserError, match="no document falls into the validation split; give more"):
        texts.version(path)


def test_names_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="did you mean 'python_docs'"):
        texts.dataset_name(tmp_path.relative_to(tmp_path) / "python_doc")
    (tmp_path / "table.csv").touch()
    with pytest.raises(UserError, match=r"ends in one of \.txt, \.jsonl"):
        texts.dataset_name(tmp_path / "table.csv")
    for folder in ("python_code", "my data"):
        (tmp_path / folder).mkdir()
        with pytest.raises(UserError, match="cannot be the name of a dataset"):
            texts.dataset_name(tmp_path / folder)
