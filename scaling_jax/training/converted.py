"""Models that were trained elsewhere, as folders of a run: a config and one checkpoint.

The checkpoint has the converted parameters, fresh optimiser moments and no loss curve, and its
`meta` says where it came from. `scaling-jax train` refuses to go on with it: neither the data nor
the moments of its training are known.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_jax import atomic, config_files
from scaling_jax import config as configs
from scaling_jax import mesh as meshes
from scaling_jax.config import RunConfig
from scaling_jax.errors import UserError
from scaling_jax.models.transformer import Params
from scaling_jax.training import checkpoint, loop, optimizer, state
from scaling_jax.training.checkpoint import Checkpoints
from scaling_jax.training.files import CHECKPOINT_FOLDER, CONFIG_FILE, read_config
from scaling_jax.training.state import TrainState

UNKNOWN = "unknown"


def run_config(
    model: Mapping[str, Any],
    usual: Mapping[str, Any],
    source: str,
    config: str | None,
    overrides: Sequence[str],
) -> tuple[RunConfig, list[str]]:
    """The config of a converted run, and those of its settings that nobody stated.

    Args:
      model: the settings of the model that its weights determine.
      usual: other settings of the model, unless the user states them; its sequence_length is one.
      source: where the weights come from, named in errors.
      config: a YAML of a run or of a model, for what the weights do not determine.
      overrides: `section.key=value`, over `config`.

    Raises:
      UserError: `config` or an override contradicts the weights, or a setting is missing or wrong.
    """
    given = config_files.read(config) if config else {}
    if config and "model" not in given:
        given = {"model": given}
    config_files.apply(given, overrides)
    stated = given.setdefault("model", {})
    if not isinstance(stated, Mapping):
        raise UserError(f"{config or source}: model is {stated!r}, not a section of settings")
    for key, value in model.items():
        if key in stated and stated[key] != value:
            raise UserError(f"{source}: its {key} is {value}, not the given {stated[key]}")
    content = config_files.merge(given, {"model": model})
    if "heads" not in content["model"]:
        raise UserError(
            f"{source}: has no inv_freq, and shapes do not tell the number of heads: "
            "give it as model.heads=NUMBER"
        )
    assumed = {
        "model": dict(usual),
        "data": {"dataset": UNKNOWN, "validation": [UNKNOWN]},
        "batch_size": 1,
    }
    if "token_multiplier" not in content:
        assumed["tokens"] = stated.get("sequence_length", usual["sequence_length"])
    run = configs.build(RunConfig, config_files.merge(assumed, content), config or source)
    return run, list(_missing(assumed, content))


def write(
    config: RunConfig, params: Params, folder: Path, step: int, origin: Mapping[str, Any]
) -> None:
    """Makes the run's folder; it appears whole or not at all.

    Args:
      config: of the run.
      params: its float32 parameters, as arrays of NumPy.
      folder: new, or empty.
      step: that the parameters were taken after.
      origin: kept in the checkpoint's `meta`.

    Raises:
      UserError: the folder holds something.
    """
    check_free(folder)
    layout = state.abstract(config.model, meshes.make_mesh(config.mesh))
    fresh = TrainState(
        params=params, moments=optimizer.initial_moments(params), step=jnp.asarray(step, jnp.int32)
    )
    placed = jax.device_put(fresh, jax.tree.map(lambda leaf: leaf.sharding, layout))
    meta = {
        "identity": config.identity,
        "data_sha256": f"{UNKNOWN}: converted",
        "config": dataclasses.asdict(config),
        "next_row": 0,
        "origin": dict(origin),
    }
    # Orbax cannot keep arrays of no size, so the curve is one row that knows its step only.
    curve = {"step": np.asarray([step], np.int64)}
    with atomic.new_folder(folder) as made:
        configs.write(config, made / CONFIG_FILE)
        with Checkpoints(made / CHECKPOINT_FOLDER, config.checkpoint.keep) as checkpoints:
            checkpoints.save(placed, curve, meta)


def check_free(path: Path) -> None:
    """Raises a UserError if `path` is a file, or a folder that holds something."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"{path}: is there already; give another name")


def read(folder: Path) -> tuple[RunConfig, checkpoint.Restored]:
    """The config and the newest good checkpoint of any run, converted or trained here.

    Raises:
      UserError: the folder is not that of a run, or has no good checkpoint.
    """
    config = read_config(folder)
    return config, loop.restore(config, folder)


def sha256(path: Path) -> str:
    """Content hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _missing(assumed: Mapping[str, Any], content: Mapping[str, Any]) -> Iterator[str]:
    """Each `section.key=value` of `assumed` whose key is not in `content`."""
    for key, value in assumed.items():
        if isinstance(value, Mapping):
            for line in _missing(value, content.get(key, {})):
                yield f"{key}.{line}"
        elif key not in content:
            yield f"{key}={value}"
