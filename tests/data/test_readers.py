import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from scaling_jax.data.readers import Fields, Piece, format_of, read_jsonl, read_parquet, read_text

FIELDS = Fields("text", "")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def whole(path: Path) -> Piece:
    return Piece(str(path), 0, path.stat().st_size)


def lines(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


@given(texts=st.lists(TEXT, max_size=20), size=st.integers(1, 200), blank=st.booleans())
def test_a_file_of_lines_reads_the_same_in_pieces_of_any_size(tmp_path_factory, texts, size, blank):
    path = tmp_path_factory.getbasetemp() / "pieces.jsonl"
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_bytes(("\n\n" if blank else "\r\n").join(rows).encode())
    end = path.stat().st_size
    found = [
        record.text
        for start in range(0, end, size)
        for record in read_jsonl(Piece(str(path), start, min(start + size, end)), FIELDS)
    ]
    assert found == texts


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize(
    ("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)]
)
def test_packed_lines(tmp_path, suffix, pack, members):
    texts = [f"text {number} " + "naïve 文字 " * (number % 50) for number in range(3000)]
    path = tmp_path / f"a.jsonl{suffix}"
    parts = [texts[number * 1000 : (number + 1) * 1000] for number in range(3)]
    parts = parts if members == 3 else [texts]
    path.write_bytes(b"".join(pack(lines(*part)) for part in parts))
    found = list(read_jsonl(whole(path), FIELDS))
    assert [record.text for record in found] == texts
    assert [record.text_bytes for record in found] == [len(text.encode()) for text in texts]
    assert found[-1].read == path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    *good, last = read_jsonl(whole(path), FIELDS)
    assert last.fault == "cut short"
    assert [record.text for record in good] == texts[: len(good)]
    assert len(good) > 1000


def test_a_packed_file_whose_bytes_were_damaged(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    content = bytearray(gzip.compress(lines(*(f"text {number}" for number in range(10_000)))))
    content[-6] ^= 1  # of the checksum
    path.write_bytes(content)
    *good, last = read_jsonl(whole(path), FIELDS)
    assert last.fault == "cut short"
    assert "CRC check failed" in last.place
    assert len(good) <= 10_000


@pytest.mark.parametrize(
    ("line", "fault", "place"),
    [
        (b'{"txt": "b"}', "no text", 'line 301 is not a JSON object with a "text"'),
        (b"not json", "not JSON", "line 301 is not a JSON object"),
        (b'{"text": 3}', "no text", "line 301"),
        (b'["text"]', "no text", "line 301"),
        (b"[" * 100_000, "not JSON", "line 301"),
        (b'{"text": "half a pair: \\ud800"}', "no text", "line 301"),
        (b'{"text": "\xff"}', "not UTF-8", "line 301 is not UTF-8 (invalid start byte 0xff)"),
        (b'{"text": ""}', "empty", "line 301 has an empty text"),
    ],
)
def test_faults_are_found_where_they_are(tmp_path, line, fault, place):
    path = tmp_path / "bad.jsonl"
    good = [f"text {number}" for number in range(300)]
    path.write_bytes(lines(*good) + line + b"\n" + lines("after"))
    found = list(read_jsonl(whole(path), FIELDS))
    assert [record.text for record in found if not record.fault] == [*good, "after"]
    (bad,) = (record for record in found if record.fault)
    assert bad.fault == fault
    assert place in bad.place
    middle = path.stat().st_size - len(line) - 100
    later = read_jsonl(Piece(str(path), middle, path.stat().st_size), FIELDS)
    assert [record.place for record in later if record.fault] == [bad.place]


def test_the_key_is_the_field_or_the_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "url": "x.org"}\n{"text": "b"}\n')
    first, second = read_jsonl(whole(path), Fields("text", "url"))
    assert first.key == b"x.org"
    assert second.fault == "no text"
    assert '"text" and a "url"' in second.place
    assert [record.key for record in read_jsonl(whole(path), FIELDS)] == [b"a", b"b"]


def test_text_files_are_read_to_the_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffline\r\nnaïve\n".encode())
    (record,) = read_text(whole(path), FIELDS)
    assert record.text.encode() == path.read_bytes()
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert next(read_text(whole(tmp_path / "a.txt.gz"), FIELDS)).text == record.text
    path.write_bytes(b"\xfe")
    assert next(read_text(whole(path), FIELDS)).fault == "not UTF-8"


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    content = pa.array([b"one", b"", None, b"\xff", "naïve".encode()], pa.binary())
    urls = [f"http://{number}" for number in range(5)]
    pq.write_table(pa.table({"content": content, "url": urls}), path, row_group_size=2)
    fields = Fields("content", "url")
    found = list(read_parquet(whole(path), fields))
    assert [record.fault for record in found] == ["", "empty", "no text", "not UTF-8", ""]
    assert [record.key.decode() for record in found[::4]] == urls[::4]
    assert found[3].place.endswith("row 4 is not UTF-8 (invalid start byte 0xff)")
    assert found[-1].read == path.stat().st_size
    with pytest.raises(Exception, match=r"no column 'text' \(did you mean 'content'"):
        list(read_parquet(whole(path), FIELDS))
    path.write_bytes(path.read_bytes()[:-20])
    (record,) = read_parquet(whole(path), fields)
    assert record.fault == "cut short"


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("a.txt", "text"),
        ("a.txt.zst", "text"),
        ("c4-train.00000-of-01024.json.gz", "jsonl"),
        ("en_head_0000.json.gz.dedup.classifier.jsonl.zst", "jsonl"),
        ("0.parquet", "parquet"),
        ("c4-train.array_record-00003-of-00512", "array_record"),
        ("a.csv", None),
    ],
)
def test_names_say_what_a_file_is(file, kind):
    assert format_of(file) == kind
