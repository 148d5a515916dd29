"""YAML files of settings, before anything in them is checked: names of other files, overrides.

A value that is the name of another YAML file stands for that file's content; it is looked for
beside the file that names it, then among the configs that come with the package. Under the key
`config` a name stays a name, of another kind of config: a file beside gets its path.
"""

import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from scaling_jax.errors import UserError, nearest

# The key whose value is the name of a config and not a part of this one.
NAME_KEY = "config"


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The content of a YAML file with those it names in it, overrides applied; nothing is checked.

    Raises:
      UserError: there is no such file, it is no mapping, or an override is not `key.key=value`.
    """
    content = _read_yaml(find(path))
    apply(content, overrides)
    return content


def apply(content: dict[str, Any], overrides: Sequence[str]) -> None:
    """Changes `content` as each `key.key=value` says.

    Raises:
      UserError: an override is not of that form.
    """
    for override in overrides:
        _apply_override(content, override)


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, nested mappings key by key."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def find(path: str | Path, beside: Path | None = None) -> Path:
    """The config file `path`: as it is, beside another file, or among the packaged configs.

    Raises:
      UserError: there is no such file; the nearest packaged name is given.
    """
    packaged = Path(str(importlib.resources.files("scaling_jax.configs")))
    for folder in filter(None, (beside, Path(), packaged)):
        if (folder / path).is_file():
            return folder / path
    names = [str(file.relative_to(packaged)) for file in packaged.rglob("*.yaml")]
    raise UserError(f"{path}: no such config file ({nearest(str(path), names)})")


class _Loader(yaml.SafeLoader):
    """Safe YAML that does not let a repeated key silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                line = node.value[index][0].start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: key '{key}' appears twice")
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path, including: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path in including:
        raise UserError(f"{path}: includes itself")
    try:
        content = _parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values")
    return _include(content, path, including)


def _parse(text: str) -> Any:
    """What YAML says; ValueError, of any kind, for what is no YAML or nested too deeply."""
    try:
        return yaml.load(text, _Loader)  # nosec B506
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(error) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _include(value: Any, path: Path, including: tuple[Path, ...]) -> Any:
    if isinstance(value, str) and value.endswith(".yaml"):
        return _read_yaml(find(value, beside=path.parent), (*including, path))
    if isinstance(value, dict):
        return {
            str(key): _located(below, path)
            if key == NAME_KEY and isinstance(below, str)
            else _include(below, path, including)
            for key, below in value.items()
        }
    return value


def _located(name: str, path: Path) -> str:
    """`name` as a path that holds everywhere, if it is that of a file beside `path`."""
    beside = path.parent / name
    return str(beside.resolve()) if beside.is_file() else name


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override '{override}': write it as key.key=value")
    *sections, last = key.split(".")
    for section in sections:
        below = content.setdefault(section, {})
        if not isinstance(below, dict):
            raise UserError(f"override '{override}': '{section}' is a value, not a section")
        content = below
    try:
        content[last] = _parse(text)
    except ValueError:
        raise UserError(f"override '{override}': the value is not valid YAML") from None
