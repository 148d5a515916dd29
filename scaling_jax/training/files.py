"""What lies where in the folder of a run."""

from collections.abc import Sequence
from pathlib import Path

from scaling_jax import config as configs
from scaling_jax.config import RunConfig
from scaling_jax.errors import UserError

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
CHECKPOINT_FOLDER = "checkpoints"
TENSORBOARD_FOLDER = "tensorboard"
GOODPUT_FILE = "goodput.json"


def read_config(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of the run in `folder`, with changes `section.key=value`.

    Raises:
      UserError: it is not the folder of a run, or its config or a change makes no sense.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder}: not the folder of a run: it holds no {CONFIG_FILE}")
    return configs.load(RunConfig, folder / CONFIG_FILE, overrides)
