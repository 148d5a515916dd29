"""Data sets arrive whole and right, or not at all."""

import functools
import hashlib
import http.server
import io
import json
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from scaling_jax import cli
from scaling_jax.data import fetch
from scaling_jax.data.fetch import DATASETS, Dataset
from scaling_jax.errors import UserError
from scaling_jax.testbeds import published

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
RELEASED = {
    "gadre2024": SHARED / "gadre" / "exp_data",
    "chinchilla": SHARED / "chinchilla_besiroglu" / "svg_extracted_data.csv",
    "chinchilla_kyo": SHARED / "chinchilla_kyo" / "df.csv",
    "olmo_ladder": SHARED / "olmo_ladder" / "ladder-runs",
    "tokenizer": SHARED / "tokenizer" / "20B_tokenizer.json",
}
FILES = {
    "runs/a.csv": b"1\n",
    "runs/b.csv": bytes(n * n * 37 // 11 % 251 for n in range(9000)),
    "meta.json": b"{}",
}
# sha256 of "<git hash-object>  <path>" lines, made with git and sha256sum.
LISTING = "bcc187234127c6a34a650dcf36c61a346589227841c59f24e819f381038585f9"
TOY = Dataset(
    about="a toy",
    url="https://nowhere.invalid/toy.tar.gz",
    sha256=LISTING,
    folder="exp_data",
    keep=r"runs/[^/]+\.csv|meta\.json",
)
ONE = Dataset("one file", "https://nowhere.invalid/one.txt", hashlib.sha256(b"one\n").hexdigest())


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "DATASETS", {"toy": TOY, "one": ONE, **DATASETS})


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content)
    return info, content


def archive(path: Path, *extra: tuple[tarfile.TarInfo, bytes], top: str = "repo-abc/") -> str:
    """A .tar.gz like those of a code host, with `extra` members; returns its URL."""
    released = [member(f"{top}exp_data/{name}", content) for name, content in FILES.items()]
    others = [member(f"{top}README.md", b"x"), member(f"{top}exp_data/draft.txt", b"x")]
    with tarfile.open(path, "w:gz") as file:
        for info, content in (*others, *released, *extra):
            file.addfile(info, io.BytesIO(content))
    return path.as_uri()


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("top", ["repo-abc/", "", "./"])
def test_the_kept_files_of_an_archive_arrive_and_nothing_else(tmp_path, top):
    url = archive(tmp_path / "toy.tar.gz", top=top)
    folder = fetch.fetch("toy", tmp_path / "new" / "data", url)
    assert folder == tmp_path / "new" / "data" / "toy"
    assert tree(folder) == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["toy"]


def test_the_checksum_is_what_git_says(tmp_path):
    folder = fetch.fetch("toy", tmp_path / "data", archive(tmp_path / "toy.tar.gz"))
    command = ["git", "hash-object", "--no-filters", *sorted(FILES)]
    names = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    lines = [f"{n}  {path}\n" for n, path in zip(names.split(), sorted(FILES), strict=True)]
    assert fetch.digest(TOY, folder) == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_a_single_file_keeps_the_name_of_its_source(tmp_path):
    (tmp_path / "mirror").write_bytes(b"one\n")
    folder = fetch.fetch("one", tmp_path, (tmp_path / "mirror").as_uri())
    assert tree(folder) == {"one.txt": b"one\n"}


def test_what_is_there_and_right_is_not_downloaded_again(tmp_path):
    folder = fetch.fetch("toy", tmp_path, archive(tmp_path / "toy.tar.gz"))
    (folder / "notes.txt").write_text("mine")
    assert fetch.fetch("toy", tmp_path, "https://nowhere.invalid/gone.tar.gz") == folder
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "meta.json").write_text("{ }"),
        lambda folder: (folder / "runs" / "a.csv").unlink(),
        lambda folder: (folder / "runs" / "c.csv").write_text("3\n"),
    ],
)
def test_what_is_there_and_wrong_is_named_and_left_alone(tmp_path, damage):
    url = archive(tmp_path / "toy.tar.gz")
    folder = fetch.fetch("toy", tmp_path, url)
    damage(folder)
    before = tree(tmp_path)
    with pytest.raises(UserError, match="toy: is there, but is not toy as released"):
        fetch.fetch("toy", tmp_path, url)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        (member("repo-abc/exp_data/meta.json", b"{ }"), "wrong checksum"),
        (member("repo-abc/exp_data/runs/c.csv", b"3\n"), "wrong checksum"),
        (member("repo-abc/exp_data/../../escape", b"x"), "points out of the archive"),
        (member("../escape", b"x"), "points out of the archive"),
        (member("/tmp/escape", b"x"), "points out of the archive"),
        (
            member("repo-abc/exp_data/runs/l.csv", kind=tarfile.SYMTYPE, link="/etc/passwd"),
            "l.csv' is not a file",
        ),
        (
            member("repo-abc/exp_data/runs/l.csv", kind=tarfile.LNKTYPE, link="repo-abc/README.md"),
            "l.csv' is not a file",
        ),
    ],
)
def test_a_wrong_or_hostile_archive_leaves_nothing(tmp_path, extra, complaint):
    url = archive(tmp_path / "toy.tar.gz", extra)
    refused(tmp_path, "toy", url, complaint)


def test_a_link_outside_of_the_kept_files_does_no_harm(tmp_path):
    link = member("repo-abc/exp_data/latest", kind=tarfile.SYMTYPE, link="/etc")
    assert tree(fetch.fetch("toy", tmp_path, archive(tmp_path / "toy.tar.gz", link))) == FILES


def test_an_archive_that_never_ends_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "LARGEST_BYTES", 1000)
    refused(tmp_path, "toy", archive(tmp_path / "toy.tar.gz"), "more than 1,000 bytes")


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.8])
def test_a_truncated_archive_leaves_nothing(tmp_path, kept):
    path = tmp_path / "toy.tar.gz"
    url = archive(path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    refused(tmp_path, "toy", url, "toy.tar.gz: ")


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"\x1f\x8b\x08" + b"\0" * 60])
def test_what_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "toy.tar.gz").write_bytes(content)
    refused(tmp_path, "toy", (tmp_path / "toy.tar.gz").as_uri(), "is not a whole .tar.gz")


def test_a_wrong_single_file_is_refused(tmp_path):
    (tmp_path / "one.txt").write_bytes(b"two\n")
    refused(tmp_path, "one", (tmp_path / "one.txt").as_uri(), "wrong checksum")


@pytest.mark.parametrize(
    ("name", "url", "complaint"),
    [
        ("toi", None, "unknown data set 'toi' (did you mean 'toy'?)"),
        ("toy", None, "nowhere.invalid/toy.tar.gz: cannot be downloaded"),
        ("toy", "http://127.0.0.1:9/toy.tar.gz", "refused"),
        ("toy", "file:///nowhere/toy.tar.gz", "No such file"),
        ("toy", "toy.tar.gz", "a URL starts with one of https://"),
        ("toy", "ftp://host/toy.tar.gz", "a URL starts with one of https://"),
        ("toy", "https://", "cannot be downloaded"),
    ],
)
def test_what_cannot_be_had_is_one_line(tmp_path, name, url, complaint):
    refused(tmp_path, name, url, complaint)


def refused(tmp_path: Path, name: str, url: str | None, complaint: str) -> None:
    """`fetch` says `complaint` in one line and leaves the disk as it was."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as raised:
        fetch.fetch(name, tmp_path / "new" / "data", url)
    assert complaint in str(raised.value)
    assert "\n" not in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    url = archive(tmp_path / "toy.tar.gz")
    with pytest.raises(UserError, match=r"toy\.tar\.gz/toy: cannot be written"):
        fetch.fetch("toy", tmp_path / "toy.tar.gz", url)


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address that a web server has it at."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_over_http_and_a_page_that_is_not_there(served, tmp_path):
    folder, address = served
    archive(folder / "toy.tar.gz")
    assert tree(fetch.fetch("toy", tmp_path / "out", f"{address}/toy.tar.gz")) == FILES
    refused(tmp_path, "toy", f"{address}/other.tar.gz", "HTTP Error 404")


def test_the_command_says_where_the_data_are(monkeypatch, capsys, tmp_path):
    url = archive(tmp_path / "toy.tar.gz")
    assert run(monkeypatch, "toy", "--out", tmp_path / "data", "--url", url) == 0
    assert f"{tmp_path / 'data' / 'toy'}: a toy; checksum right" in capsys.readouterr().out


@pytest.mark.parametrize("words", [("toi",), ("toy",), ("toy", "--url", "x"), ()])
def test_a_mistake_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


TASKS = """\
tasks:
  quiz: {data: runs/a.csv, git_blob: d00491fd7e5bb6fa28c517a0bb32b8b506539d4d}
  cloze: {data: runs/a.csv, git_blob: d00491fd7e5bb6fa28c517a0bb32b8b506539d4d}
  words: {data: meta.json, git_blob: 9e26dfeeb6e641a33dae4961196235bdb965b21b}
"""


@pytest.fixture
def quizzes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A data set whose files are those that a config of tasks names."""
    (tmp_path / "tasks.yaml").write_text(TASKS)
    lines = (
        "9e26dfeeb6e641a33dae4961196235bdb965b21b  meta.json\n"
        "d00491fd7e5bb6fa28c517a0bb32b8b506539d4d  runs/a.csv\n"
    )
    dataset = Dataset(
        about="tasks",
        url="https://nowhere.invalid/tasks.tar.gz",
        sha256=hashlib.sha256(lines.encode()).hexdigest(),
        folder="exp_data",
        tasks=str(tmp_path / "tasks.yaml"),
    )
    monkeypatch.setattr(fetch, "DATASETS", {"quizzes": dataset})


@pytest.mark.usefixtures("quizzes")
def test_the_files_of_tasks_are_those_that_the_config_names(tmp_path):
    folder = fetch.fetch("quizzes", tmp_path / "data", archive(tmp_path / "toy.tar.gz"))
    assert set(tree(folder)) == {"runs/a.csv", "meta.json"}


@pytest.mark.usefixtures("quizzes")
def test_the_tasks_that_cannot_be_had_are_named(tmp_path):
    path = tmp_path / "toy.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        info, content = member("repo-abc/exp_data/runs/a.csv", b"2\n")
        file.addfile(info, io.BytesIO(content))
    refused(
        tmp_path,
        "quizzes",
        path.as_uri(),
        "; runs/a.csv differs (quiz, cloze); meta.json is missing (words)",
    )


def test_the_checksum_of_icl_is_that_of_the_released_listing():
    manifest = SHARED / "icl" / "MANIFEST.json"
    if not manifest.is_file():
        pytest.skip(f"the listing of the released files is not here: {manifest}")
    found = json.loads(manifest.read_text())
    blobs = {
        path: file["upstream_blob_sha1"]
        for path, file in found["files"].items()
        if "subset" not in path
    }
    lines = "".join(f"{blobs[path]}  {path}\n" for path in sorted(blobs))
    assert DATASETS["icl"].sha256 == hashlib.sha256(lines.encode()).hexdigest()
    assert found["llm_foundry_commit"] in DATASETS["icl"].url


def test_of_a_part_of_icl_only_the_files_that_lack_or_differ_are_named(tmp_path):
    folder = SHARED / "icl"
    if not folder.is_dir():
        pytest.skip(f"the tasks' files are not here: {folder}")
    path = tmp_path / "part.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as file:
        file.add(folder, arcname=f"llm-foundry-abc/{DATASETS['icl'].folder}")
    with pytest.raises(UserError) as raised:
        fetch.fetch("icl", tmp_path / "data", path.as_uri())
    files = json.loads((folder / "MANIFEST.json").read_text())["files"]
    wrong = {
        path
        for path, file in files.items()
        if file["status"] in ("missing", "rebuilt (not byte-verified)")
    }
    assert {path for path in files if f"; {path} " in str(raised.value)} == wrong
    assert "mmlu.jsonl differs (mmlu_zeroshot, mmlu)" in str(raised.value)
    assert not (tmp_path / "data").exists()


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["scaling-jax", "data", "fetch", *map(str, words)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("name", RELEASED)
def test_the_pinned_checksums_are_those_of_the_released_files(tmp_path, name):
    source, dataset = RELEASED[name], DATASETS[name]
    if not source.exists():
        pytest.skip(f"{name} is not here")
    path = source
    if dataset.folder:
        path = tmp_path / "release.tar.gz"
        with tarfile.open(path, "w:gz") as file:
            file.add(source, arcname=f"repository-abc/{dataset.folder}")
    folder = fetch.fetch(name, tmp_path, path.resolve().as_uri())
    loader = getattr(published, name, None)
    if loader is not None:
        assert loader(folder).equals(loader(source))
