"""Texts of your own, by their path or URL: what a config for them would say.

A folder stands for all files of known kinds below it, and a share of the documents is held out; or
for what is in its train/, and in its validation/ (val/, valid/, dev/).
"""

import re
import warnings
from collections.abc import Collection, Sequence
from glob import escape
from pathlib import Path
from typing import Any

from scaling_jax.data import files
from scaling_jax.data.corpora import VALIDATION_SHARE
from scaling_jax.data.readers import format_of
from scaling_jax.errors import UserError

# In the order in which a folder's files are read.
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".array_record", ".arrayrecord")
PACKING = re.compile(r"\.(gz|zst)$", re.IGNORECASE)
SHARD = re.compile(r"(^|/)tokens-\d+-of-\d+\.u(16|32)$")
TRAIN = "train"
VALIDATION = ("validation", "val", "valid", "dev")
TEST = "test"
EXAMPLES = 3


def is_url(path: str) -> bool:
    """Whether this is a URL of fsspec's, such as gs://bucket/folder, and no local path."""
    return "://" in path


def config_of(path: str, given: Collection[str] = ()) -> dict[str, Any] | None:
    """What a config for the texts at `path` would say; None if there is nothing.

    Args:
      path: a file or folder, or the URL of one.
      given: the keys that will be laid over it.

    Raises:
      UserError: there is no text that can be read, or what is to be trained on is not clear.
    """
    is_folder = files.is_folder(path)
    if is_folder is None:
        return None
    content = {"name": _name(path, is_folder), "held_out_share": VALIDATION_SHARE}
    if "validation_files" in given:
        content["held_out_share"] = 0.0
    if is_folder:
        return content | {"folder": path} | _files(path, given)
    if format_of(path) is None:
        raise UserError(f"{path}: a file of text ends in one of {_known()}")
    file = path.rpartition("/")[2]
    return content | {"folder": path.removesuffix(file) or ".", "files": [escape(file)]}


def _files(folder: str, given: Collection[str]) -> dict[str, Any]:
    """The patterns of a folder's files by split, and what is said of those left out."""
    every = _texts(files.below(folder))
    known = [name for name in every if format_of(name) is not None]
    splits = {name.split("/")[0] for name in known if "/" in name}
    validation = [name for name in VALIDATION if name in splits]
    if "files" in given:
        chosen = len(validation) == 1 and TRAIN in splits and "held_out_share" not in given
        return {"files": []} | (_with_validation(known, validation[0]) if chosen else {})
    if not known:
        raise UserError(f"{folder}: no file ends in one of {_known()}")
    _say_left_out(folder, set(every) - set(known), "of other kinds")
    if TRAIN not in splits:
        if apart := [name for name in (*VALIDATION, TEST) if name in splits]:
            raise UserError(
                f"{folder}: has {apart[0]}/ but no {TRAIN}/; say what to train on, such as "
                "files='[\"*.jsonl\"]'"
            )
        return {"files": _patterns(known, "")}
    if len(validation) > 1:
        raise UserError(
            f"{folder}: {' and '.join(f'{name}/' for name in validation)} may both be for "
            "validation; say which, with files='[\"train/**/*.jsonl\"]' and validation_files=..."
        )
    used = [f"{name}/" for name in (TRAIN, *validation)]
    outside = {name for name in known if not name.startswith(tuple(used))}
    _say_left_out(folder, outside, f"outside {' and '.join(used)}")
    train = {"files": _patterns(known, f"{TRAIN}/")}
    return train | (_with_validation(known, validation[0]) if validation else {})


def _texts(names: Sequence[str]) -> list[str]:
    """The names but for those of splits prepared in the folder itself: with my_texts in OUT."""
    prepared = {name.rpartition("/")[0] for name in names if SHARD.search(name)}
    return [name for name in names if name.rpartition("/")[0] not in prepared]


def _with_validation(known: Sequence[str], split: str) -> dict[str, Any]:
    return {"held_out_share": 0.0, "validation_files": _patterns(known, f"{split}/")}


def _patterns(names: Sequence[str], below: str) -> list[str]:
    """Patterns for the kinds of file that there are, in upper case where they are."""
    found = {_suffix(name) for name in names if name.startswith(below)}
    return [f"{below}**/*{suffix}" for suffix in sorted(found, key=_order)]


def _suffix(name: str) -> str:
    """What the name of a file of a known kind ends in, as a pattern."""
    if format_of(name) == "array_record":
        return re.findall(r"\.array_?record", name, re.IGNORECASE)[-1] + "*"
    unpacked = PACKING.sub("", name)
    return name[unpacked.rindex(".") :]


def _order(suffix: str) -> tuple[int, str]:
    unpacked = PACKING.sub("", suffix).rstrip("*").lower()
    return SUFFIXES.index(unpacked), suffix


def _say_left_out(folder: str, names: Collection[str], which: str) -> None:
    seen = sorted(name for name in names if not name.rpartition("/")[2].startswith("."))
    if seen:
        examples = ", ".join([*seen[:EXAMPLES], *(["..."] if len(seen) > EXAMPLES else [])])
        plural = "file" if len(seen) == 1 else "files"
        warnings.warn(
            f"{folder}: {len(seen):,} {plural} {which} left out: {examples}", stacklevel=4
        )


def _name(path: str, is_folder: bool) -> str:
    """The last part of a path, without what says which kind of file it is."""
    if is_folder:
        return (Path(path) if is_url(path) else Path(path).resolve()).name
    return Path(PACKING.sub("", Path(path).name)).stem


def _known() -> str:
    return f"{', '.join(SUFFIXES[:-1])} (text and lines also with .gz or .zst)"
