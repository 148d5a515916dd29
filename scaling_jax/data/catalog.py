"""From a name, a path or a config to sources of documents.

    python_code                         an embedded corpus
    my_texts/   stories.jsonl.zst       files of your own, also gs://bucket/my_texts
    tfds:c4/en:3.1.0                    a prepared dataset of tensorflow-datasets
    c4   redpajama   mine.yaml          a config: among those in configs/data, or your own

Settings of the config can be changed by `key=value`, with a path or tfds: too.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat
from pydantic.dataclasses import dataclass

from scaling_jax import config, config_files
from scaling_jax.config import STRICT, Name
from scaling_jax.data import paths
from scaling_jax.data.corpora import CORPORA, SPLITS
from scaling_jax.data.readers import BROKEN, EMPTY, Fields
from scaling_jax.data.sources import EmbeddedSource, FileSource, Source
from scaling_jax.data.tfds_source import TfdsSource, zipf_markov_source
from scaling_jax.errors import UserError, nearest

NAME = r"[A-Za-z0-9][A-Za-z0-9_.=-]*"
Share = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, config=STRICT)
class PartConfig:
    """One part of a mixture: its files, and its rate relative to the other parts."""

    rate: PositiveFloat
    files: tuple[str, ...]
    validation_files: tuple[str, ...] = ()


@dataclass(frozen=True, config=STRICT)
class SourceConfig:
    """Where the documents of a dataset are, and how they are read.

    `files` are glob patterns below `folder`, which may be gs://bucket/folder. Validation has files
    of its own, or is the `held_out_share` of the documents with the smallest hash of the field
    `held_out_by` ("": of the text). For format tfds, `tfds` is the name in tensorflow-datasets,
    `folder` its data_dir, and `files` and `validation_files` name splits or slices of it.
    """

    name: Name
    folder: str = "."
    # "" goes by each file's name.
    format: Literal["", "text", "jsonl", "parquet", "array_record", "tfds"] = ""
    tfds: str = ""
    files: tuple[str, ...] = ()
    validation_files: tuple[str, ...] = ()
    # The field, column or feature that holds the text.
    text: str = "text"
    held_out_by: str = ""
    held_out_share: Share = 0.0
    # Instead of files: a mixture, whose parts become datasets of their own, called <name>-<part>.
    parts: dict[Name, PartConfig] = dataclasses.field(default_factory=dict)
    # What to do with a document that cannot be read, and with one of no length.
    on_error: Literal["fail", "skip"] = "fail"
    on_empty: Literal["fail", "skip"] = "skip"

    def __post_init__(self) -> None:
        if bool(self.parts) == bool(self.files or self.validation_files):
            raise ValueError("give either files (or validation_files) or parts")
        if (self.format == "tfds") != bool(self.tfds):
            raise ValueError("format: tfds and tfds: NAME (such as c4/en:3.1.0) go together")
        if self.tfds and (self.parts or self.held_out_share or self.held_out_by):
            raise ValueError("of tfds, validation is a split or a slice, such as train[:1%]")
        if self.held_out_share and self.validation_files:
            raise ValueError("give either validation_files or held_out_share")

    @property
    def fatal(self) -> frozenset[str]:
        """The kinds of fault that end the reading."""
        broken = BROKEN if self.on_error == "fail" else frozenset()
        return broken | ({EMPTY} if self.on_empty == "fail" else frozenset())

    def sources(self) -> dict[str, Source]:
        """The source, or those of a mixture's parts, by name."""
        if self.tfds:
            return {self.name: self._tfds_source()}
        parts: Mapping[str, PartConfig | SourceConfig] = {
            f"{self.name}-{part}": below for part, below in self.parts.items()
        }
        return {
            name: FileSource(
                name=name,
                folder=self.folder,
                files=files.files,
                validation_files=files.validation_files,
                format=self.format,
                fields=Fields(self.text, self.held_out_by),
                held_out_share=self.held_out_share,
                fatal=self.fatal,
            )
            for name, files in (parts or {self.name: self}).items()
        }

    def rates(self) -> dict[str, float]:
        """The rate of each part of a mixture, by the name of its dataset."""
        return {f"{self.name}-{part}": below.rate for part, below in self.parts.items()}

    def _tfds_source(self) -> TfdsSource:
        both = zip(SPLITS, (self.files, self.validation_files), strict=True)
        slices = tuple((split, "+".join(parts)) for split, parts in both if parts)
        return TfdsSource(self.name, self.tfds, self.folder, slices, self.text, self.fatal)


def find(task: str, overrides: Sequence[str] = (), data_dir: Path = Path()) -> list[Source]:
    """The sources that `task` stands for: one, or those of a mixture's parts.

    Args:
      task: a name, path or config, as above.
      overrides: `key=value` settings of the config.
      data_dir: where tensorflow-datasets keeps the synthetic corpus, and looks for tfds:NAME.

    Raises:
      UserError: there is no such source, or a setting is wrong.
    """
    if task not in CORPORA:
        return list(source_config(task, overrides, data_dir).sources().values())
    if overrides:
        raise UserError(f"{task}: an embedded corpus has no setting such as {overrides[0]}")
    return [zipf_markov_source(data_dir) if task == "zipf_markov" else EmbeddedSource(task)]


def check_names(tasks: Sequence[str], overrides: Sequence[str], data_dir: Path) -> None:
    """Raises a UserError if two of the tasks would become datasets of the same name."""
    seen: dict[str, str] = {}
    for task in tasks:
        for source in find(task, overrides, data_dir):
            if source.name in seen:
                raise UserError(
                    f"{task}: would be called '{source.name}', and so would {seen[source.name]}; "
                    "give it a command of its own, with name=..."
                )
            seen[source.name] = task


def source_config(
    task: str, overrides: Sequence[str] = (), data_dir: Path = Path()
) -> SourceConfig:
    """The config that `task` names, or that a path or tfds:NAME amounts to.

    Raises:
      UserError: as `find`.
    """
    if re.fullmatch(r"\w+", task) and task in packaged():
        content, origin = config_files.read(f"data/{task}.yaml"), f"data/{task}.yaml"
    elif task.endswith((".yaml", ".yml")):
        content, origin = config_files.read(task), task
    elif task.startswith("tfds:"):
        content, origin = _of_tfds(task.removeprefix("tfds:"), data_dir), task
    else:
        content, origin = _of_path(task, overrides), task
    config_files.apply(content, overrides)
    name = str(content.get("name", ""))
    if not re.fullmatch(NAME, name) or name in CORPORA:
        raise UserError(
            f"{origin}: '{name}' cannot be the name of a dataset; use letters, digits and _ . = -, "
            f"and none of {', '.join(CORPORA)}; name=... gives another"
        )
    return config.build(SourceConfig, content, origin)


def packaged() -> list[str]:
    """The names of the data configs that come with the package."""
    folder = config_files.find("data/c4.yaml").parent
    return sorted(file.stem for file in folder.glob("*.yaml"))


def _of_tfds(builder: str, data_dir: Path) -> dict[str, Any]:
    return {
        "name": re.split(r"[/:]", builder)[0],
        "format": "tfds",
        "tfds": builder,
        "folder": str(data_dir),
        "files": ["train"],
        "validation_files": ["validation"],
    }


def _of_path(path: str, overrides: Sequence[str]) -> dict[str, Any]:
    found = paths.config_of(path, {override.partition("=")[0] for override in overrides})
    if found is not None:
        return found
    if paths.is_url(path):
        raise UserError(f"{path}: there is no such file or folder")
    known = [*CORPORA, *packaged()]
    raise UserError(
        f"'{path}' is neither an embedded corpus, nor a data config ({nearest(path, known)}), "
        "nor a path"
    )
