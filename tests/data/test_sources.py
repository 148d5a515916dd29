import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path

import fsspec
import pytest

from scaling_jax.data import catalog
from scaling_jax.data.corpora import CORPORA, SPLITS, documents
from scaling_jax.data.readers import Fields, Piece
from scaling_jax.data.sources import EmbeddedSource, FileSource, dealt, split_of
from scaling_jax.errors import UserError


def texts(source, split, count=None):
    pieces = source.pieces(split, count)
    return [record.text for record in source.documents(split, pieces)]


def test_pieces_are_dealt_in_order_and_by_size():
    pieces = [Piece(str(number), 0, size) for number, size in enumerate([5, 1, 1, 1, 8, 0, 0])]
    for count in (1, 2, 3, 7, 12):
        runs = dealt(pieces, count)
        assert len(runs) == count
        assert [piece for run in runs for piece in run] == pieces
    assert [len(run) for run in dealt(pieces, 2)] == [4, 3]
    assert dealt([], 3) == [[], [], []]


@pytest.mark.parametrize("count", [None, 1, 4, pytest.param(1000, marks=pytest.mark.slow)])
def test_embedded_corpora_in_pieces(count):
    source = EmbeddedSource("python_docs")
    expected = [document.text for document in documents("python_docs", "validation")]
    assert texts(source, "validation", count) == expected


@pytest.fixture
def books(tmp_path):
    for number in range(40):
        path = tmp_path / f"shelf {number % 3}" / f"{number}.jsonl"
        path.parent.mkdir(exist_ok=True)
        rows = ({"text": f"book {number} page {page}", "url": f"{page}"} for page in range(50))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_files_in_pieces_hold_each_document_once(books, count):
    source = FileSource("books", str(books), ("**/*.jsonl",), held_out_share=0.1)
    found = {split: texts(source, split, count) for split in SPLITS}
    assert found == {split: texts(source, split) for split in SPLITS}
    assert len(found["train"]) + len(found["validation"]) == 2000
    assert 150 < len(found["validation"]) < 250
    assert not set(found["train"]) & set(found["validation"])
    assert len(source.pieces("train", 1000)) > 900


def test_what_is_held_out_hangs_on_the_key_alone(books):
    source = FileSource(
        "books", str(books), ("**/*.jsonl",), fields=Fields("text", "url"), held_out_share=0.3
    )
    pages = {split: {text.split()[-1] for text in texts(source, split)} for split in SPLITS}
    assert not pages["train"] & pages["validation"]
    assert pages["validation"] == {
        str(page) for page in range(50) if split_of(str(page).encode(), 0.3) == "validation"
    }


def test_the_fingerprint_follows_the_content_and_not_the_place(books, tmp_path_factory):
    moved = tmp_path_factory.mktemp("moved") / "books"
    books.rename(moved)
    source = FileSource("books", str(moved), ("**/*.jsonl",))
    before = [source.fingerprint(piece) for piece in source.pieces("train")]
    moved.rename(books)
    again = FileSource("books", str(books), ("**/*.jsonl",))
    assert [again.fingerprint(piece) for piece in again.pieces("train")] == before
    path = books / "shelf 0" / "0.jsonl"
    path.write_text(path.read_text().replace("page 7", "page 9"))
    changed = [again.fingerprint(piece) for piece in again.pieces("train")]
    assert sum(old != new for old, new in zip(before, changed, strict=True)) == 1


def test_the_fingerprint_covers_all_that_a_piece_is_read_from(tmp_path):
    """Wherever a byte changes, every piece that reads differently then has another fingerprint."""
    path = tmp_path / "lines.jsonl"
    lines = [json.dumps({"text": f"{number}" * number}) for number in range(1, 9)]
    content = "\n".join(lines).encode()

    def read(content):
        path.write_bytes(content)
        source = FileSource("lines", str(tmp_path), ("*.jsonl",), fatal=frozenset())
        for piece in source.pieces("train", 7):
            yield list(source.read("train", piece)), source.fingerprint(piece)

    before = list(read(content))
    assert sum(len(records) for records, _ in before) == len(lines)
    for place in range(len(content)):
        for byte in b"0\n":
            changed = content[:place] + bytes([byte]) + content[place + 1 :]
            for (old, known), (new, found) in zip(before, read(changed), strict=True):
                assert known != found or old == new


def test_the_fingerprint_of_a_whole_file_is_its_sha256(books):
    source = FileSource("books", str(books), ("**/*.jsonl",))
    for piece in source.pieces("train"):
        sha256 = hashlib.sha256(Path(piece.file).read_bytes()).hexdigest()
        assert source.fingerprint(piece).endswith(f" {sha256}")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_files_that_are_not_local(suffix):
    content = b"".join(b'{"text": "text %d"}\n' % number for number in range(1000))
    packed = gzip.compress(content) if suffix.endswith("gz") else content
    fsspec.filesystem("memory").pipe(f"/bucket/data/a{suffix}", packed)
    source = FileSource("remote", "memory://bucket/data", (f"*{suffix}",))
    pieces = source.pieces("train", 5)
    assert len(pieces) == (5 if suffix == ".jsonl" else 1)
    assert texts(source, "train", 5) == [f"text {number}" for number in range(1000)]
    assert len(source.fingerprint(pieces[0])) > 64


def test_faults_end_the_reading_or_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\nbroken\n{"text": ""}\n{"text": "b"}\n')
    (source,) = catalog.find(str(tmp_path), ["held_out_share=0"])
    with pytest.raises(UserError, match=r"a\.jsonl: line 2 is not a JSON object"):
        texts(source, "train")
    (source,) = catalog.find(str(tmp_path), ["held_out_share=0", "on_error=skip"])
    assert texts(source, "train") == ["a", "b"]
    (source,) = catalog.find(str(tmp_path), ["held_out_share=0", "on_error=skip", "on_empty=fail"])
    with pytest.raises(UserError, match="line 3 has an empty text"):
        texts(source, "train")


def test_a_fault_is_counted_in_one_split(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f"broken {number}\n" for number in range(200)))
    (source,) = catalog.find(str(tmp_path), ["held_out_share=0.5", "on_error=skip"])
    counts = {split: Counter[str]() for split in SPLITS}
    for split in SPLITS:
        assert not list(source.documents(split, source.pieces(split), counts[split]))
    assert counts["train"]["not JSON"] + counts["validation"]["not JSON"] == 200
    assert min(count["not JSON"] for count in counts.values()) > 60


def test_no_such_files(tmp_path):
    with pytest.raises(UserError, match=r"no file is called \*\.jsonl"):
        FileSource("none", str(tmp_path), ("*.jsonl",)).pieces("train")
    with pytest.raises(UserError, match="cannot be searched"):
        FileSource("none", "nosuch://bucket", ("*",)).pieces("train")
    (tmp_path / "a.csv").touch()
    with pytest.raises(UserError, match="give format, one of text, jsonl"):
        FileSource("none", str(tmp_path), ("*",)).pieces("train")


def test_every_corpus_is_a_source(tmp_path):
    for corpus in CORPORA:
        (source,) = catalog.find(corpus, data_dir=tmp_path)
        assert source.name == corpus
        assert source.splits == SPLITS
