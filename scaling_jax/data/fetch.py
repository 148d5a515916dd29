"""Public data sets by name: downloaded, checked by content, unpacked; whole or not at all.

`OUT/<name>/` appears when every file in it is what `DATASETS` says. A call that was stopped leaves
nothing behind and may be repeated; a repeated call after success only checks.
"""

import dataclasses
import hashlib
import http.client
import re
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from scaling_jax import atomic, config_files
from scaling_jax.errors import UserError, nearest

TIMEOUT_SECONDS = 60
# No data set here comes near this; an archive that unpacks to more is not one of them.
LARGEST_BYTES = 1 << 30
SCHEMES = ("https://", "http://", "file://")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What to download and how to know that it is right.

    Attributes:
      about: what it is and its licence.
      url: of a .tar.gz, or of a single file.
      sha256: of the single file; for an archive, of the lines "<git blob id>  <path>" of the kept
        files, sorted by path. An archive's own bytes may change, its content may not, and these
        lines can be had from the repository as well: git ls-tree -r
        --format="%(objectname)  %(path)" COMMIT:FOLDER.
      folder: of the archive, the part that becomes the data set; "" for a single file.
      keep: a regular expression for the paths in `folder` that are kept.
      tasks: instead of `keep`, a packaged config of downstream tasks that names each file and its
        git blob id. What is wrong is told by file and task then.
    """

    about: str
    url: str
    sha256: str
    folder: str = ""
    keep: str = ""
    tasks: str = ""


DATASETS: Mapping[str, Dataset] = {
    "gadre2024": Dataset(
        about="104 over-trained runs and a grid search (Gadre et al. 2024); MIT",
        url="https://github.com/mlfoundations/scaling/archive/"
        "a003c4913793ac2ae7ef87b28ecb562955d026d5.tar.gz",
        sha256="79fe60cb63d222a00d7787bb6898464cac208c508423c084d46eef9dc9bae3d1",
        folder="exp_data",
        keep=r"(models|evals)/[^/]+\.json|eval_metadata\.csv|grid\.json",
    ),
    "chinchilla": Dataset(
        about="points read off Hoffmann et al. 2022 by Besiroglu et al. 2024; no licence stated",
        url="https://raw.githubusercontent.com/epoch-research/analyzing-chinchilla/"
        "92258837425e1b5f2851d624287f0120583a3d0e/data/svg_extracted_data.csv",
        sha256="193478df4e90f040016431996c45682659306840ecdadf83cfb9cd5ca0aa1b30",
    ),
    "chinchilla_kyo": Dataset(
        about="the same figure, read off independently by kyo-takano; Apache-2.0",
        url="https://raw.githubusercontent.com/kyo-takano/chinchilla/"
        "75e5858f6e7c5b60d1fab69f66258132347b060c/examples/llm/df.csv",
        sha256="2ed2c412c6b408cb26896b92c0721fe9afa6515726b0db78c33db37cbf2816f9",
    ),
    "olmo_ladder": Dataset(
        about="OLMo's model ladder with its 7B and 13B targets (Bhagia et al. 2024); Apache-2.0",
        url="https://github.com/allenai/OLMo-ladder/archive/"
        "67a3f440f787d020da35e3ca8eeae475fae754f5.tar.gz",
        sha256="b6b231c635385a4241eaf3a8408079b3ae65a7c60c4974a43198332ded21601b",
        folder="src/scripts/paper/data/ladder-runs",
        keep=r"(190M|370M|760M|1B|3B)-[\d.]+xC(-rerun)?\.csv"
        r"|peteish7_eval_anneal\.csv|peteish13_eval_final\.csv",
    ),
    "tokenizer": Dataset(
        about="the tokenizer of GPT-NeoX-20B, as vocabulary for `data prepare`; Apache-2.0",
        url="https://raw.githubusercontent.com/BlinkDL/ChatRWKV/"
        "965e40b85288a91c94c02bfa56adc3ce0fa20a82/20B_tokenizer.json",
        sha256="56ac4821e129d2c520fdaba60abd920fa852ada51b45c0dd52bbb6bd8c985ade",
    ),
    "icl": Dataset(
        about="the files of the 46 tasks of gadre2024, as LLM Foundry has them; Apache-2.0, "
        "the sets in them under their own licences",
        url="https://github.com/mosaicml/llm-foundry/archive/"
        "8c8dd48f72168c5d51e2f7b151595892a8fba43d.tar.gz",
        sha256="cbdaf533f2a567e268e50c879c1e5ba7dca61b136adbc0c0e040470891fc8c0f",
        folder="scripts/eval/local_data",
        tasks="evaluations/gadre2024.yaml",
    ),
}


def fetch(name: str, out: Path, url: str | None = None) -> Path:
    """Downloads a data set to `out`/`name`, unless it is there already; returns that folder.

    Args:
      name: one of `DATASETS`.
      out: the folder that the data set's own folder is made in.
      url: another place to get it from, https://, http:// or file://; the content must be the same.

    Raises:
      UserError: no such data set, it cannot be reached or read, it is not what it should be,
        something else stands in its place, or `out` cannot be written to. Nothing has been written
        then.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set '{name}' ({nearest(name, DATASETS)})")
    dataset, folder = DATASETS[name], out / name
    source = url or dataset.url
    if not source.startswith(SCHEMES):
        raise UserError(f"{source}: a URL starts with one of {', '.join(SCHEMES)}")
    if folder.exists():
        if folder.is_dir() and digest(dataset, folder) == dataset.sha256:
            return folder
        raise UserError(
            f"{folder}: is there, but is not {name} as released{_wrong(dataset, folder)}; move it "
            "or choose another out"
        )
    try:
        with atomic.new_folder(folder) as temporary:
            _download(dataset, source, temporary)
            if digest(dataset, temporary) != dataset.sha256:
                raise UserError(
                    f"{source}: its content is not {name} as released (wrong checksum)"
                    f"{_wrong(dataset, temporary)}"
                )
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    return folder


def digest(dataset: Dataset, folder: Path) -> str:
    """The checksum of a data set's files in `folder`, to compare with `dataset.sha256`."""
    if not dataset.folder:
        path = folder / _file_name(dataset)
        return hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest()
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    keep = re.compile(_keep(dataset))
    kept = sorted(path for path in paths if keep.fullmatch(path))
    lines = (f"{git_blob((folder / path).read_bytes())}  {path}\n" for path in kept)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def git_blob(content: bytes) -> str:
    """The name that git gives a file's content."""
    header = b"blob %d\0" % len(content)
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


def _keep(dataset: Dataset) -> str:
    """A regular expression for the kept paths."""
    if not dataset.tasks:
        return dataset.keep
    return "|".join(re.escape(file.path) for file in _files_of_tasks(dataset.tasks))


class _TaskFile(NamedTuple):
    path: str
    git_blob: str
    task: str


def _files_of_tasks(config: str) -> list[_TaskFile]:
    tasks = config_files.read(config)["tasks"]
    return [_TaskFile(task["data"], task["git_blob"], name) for name, task in tasks.items()]


def _wrong(dataset: Dataset, folder: Path) -> str:
    """Which tasks' files are missing or changed, where the files are known one by one."""
    wrong: dict[str, list[str]] = {}
    for file in _files_of_tasks(dataset.tasks) if dataset.tasks else ():
        path = folder / file.path
        if not path.is_file():
            wrong.setdefault(f"{file.path} is missing", []).append(file.task)
        elif git_blob(path.read_bytes()) != file.git_blob:
            wrong.setdefault(f"{file.path} differs", []).append(file.task)
    return "".join(f"; {what} ({', '.join(tasks)})" for what, tasks in wrong.items())


def _file_name(dataset: Dataset) -> str:
    return dataset.url.rpartition("/")[2]


def _download(dataset: Dataset, url: str, folder: Path) -> None:
    """Streams `url` into `folder`: the single file, or the kept files of the archive."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as stream:  # nosec B310
            if dataset.folder:
                _unpack(dataset, url, stream, folder)
            else:
                _save(stream, folder / _file_name(dataset))
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise UserError(f"{url}: is not a whole .tar.gz ({error})") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        is_page = isinstance(error, urllib.error.HTTPError)
        reason = error if is_page else getattr(error, "reason", error)
        raise UserError(
            f"{url}: cannot be downloaded ({reason}); url takes another place, also file:///..."
        ) from error


def _unpack(dataset: Dataset, url: str, stream: IO[bytes], folder: Path) -> None:
    """Writes the kept files of a .tar.gz; names that leave `folder`, and links, are refused."""
    inside = re.compile(rf"(?:[^/]+/)?{re.escape(dataset.folder)}/({_keep(dataset)})")
    room = LARGEST_BYTES
    with tarfile.open(fileobj=stream, mode="r|gz") as archive:
        for member in archive:
            if member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
                raise UserError(f"{url}: '{member.name}' points out of the archive")
            match = inside.fullmatch(member.name)
            if match is None:
                continue
            content = archive.extractfile(member) if member.isfile() else None
            if content is None:
                raise UserError(f"{url}: '{member.name}' is not a file")
            room -= member.size
            if room < 0:
                raise UserError(f"{url}: unpacks to more than {LARGEST_BYTES:,} bytes")
            _save(content, folder / match[1])


def _save(content: IO[bytes], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        shutil.copyfileobj(content, file)
