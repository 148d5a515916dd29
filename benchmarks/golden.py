"""A golden run: what open_lm itself computed from given weights and tokens, in float32 on CPU.

GOLDEN.npz holds a run of open_lm's own model, loss and schedule with torch.optim.AdamW: `init/*`,
`grad0/*` and `final/*` weights under open_lm's names, `tokens` (steps, batch, sequence length + 1),
`logits0`, `train_loss`, `ce_loss`, `grad_norm` and `lr` of every step, and
`logits_final_bf16_autocast`; GOLDEN.json beside it holds the hyper-parameters.
"""

import dataclasses
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic

from scaling_jax.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig
from scaling_jax.errors import UserError
from scaling_jax.models import openlm
from scaling_jax.models.transformer import Params

# Ours by open_lm's name; its first two are one and the same in float32.
NORMS: dict[str, Literal["layer_norm", "rms_norm"]] = {
    "gain_only_lp_layer_norm": "layer_norm",
    "gain_only_layer_norm": "layer_norm",
    "rms_norm": "rms_norm",
}
CURVES = ("train_loss", "ce_loss", "grad_norm", "lr")
DATASET = "golden"


class Settings(pydantic.BaseModel):
    """The hyper-parameters of a golden run, under the names of its JSON file."""

    model_config = pydantic.ConfigDict(extra="allow")

    hidden_dim: int
    n_layers: int
    n_heads: int
    vocab_size: int
    seq_len: int
    batch: int
    steps: int
    warmup: int
    lr: float
    min_lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    clip: float | None
    z_loss: float
    qk_norm: bool
    norm: str
    accum_freq: int = 1
    force_min_lr: float = 0.0
    seed: int = 0
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Golden:
    """What open_lm itself computed from given weights and tokens."""

    path: Path
    settings: Settings
    arrays: Mapping[str, np.ndarray]

    @classmethod
    def load(cls, path: Path) -> "Golden":
        """Reads the .npz and the .json beside it.

        Raises:
          UserError: one is missing, malformed, or of a model or run that the other is not.
        """
        arrays = _read_arrays(path)
        golden = cls(path, _read_settings(path.with_suffix(".json")), arrays)
        golden._check()
        return golden

    def model(self, **changes: Any) -> ModelConfig:
        """The model of the run, with `changes` to its config."""
        return ModelConfig(
            width=self.settings.hidden_dim,
            layers=self.settings.n_layers,
            heads=self.settings.n_heads,
            vocabulary_size=self.settings.vocab_size,
            sequence_length=self.settings.seq_len,
            norm=NORMS[self.settings.norm],
            qk_norm=self.settings.qk_norm,
            **changes,
        )

    def run(self, data_folder: str) -> RunConfig:
        """The run, on data that lie in `data_folder`."""
        settings = self.settings
        return RunConfig(
            model=self.model(),
            data=DataConfig(dataset=DATASET, validation=(DATASET,), folder=data_folder),
            batch_size=settings.batch,
            tokens=settings.steps * settings.batch * settings.seq_len,
            optimizer=OptimizerConfig(
                learning_rate=settings.lr,
                minimum_learning_rate=settings.min_lr,
                learning_rate_floor=settings.force_min_lr,
                warmup_steps=settings.warmup,
                weight_decay=settings.weight_decay,
                beta1=settings.beta1,
                beta2=settings.beta2,
                epsilon=settings.eps,
                gradient_clip_norm=float("inf") if settings.clip is None else settings.clip,
            ),
            z_loss_weight=settings.z_loss,
            seed=settings.seed,
            microbatches=settings.accum_freq,
        )

    def params(self, group: str) -> Params:
        """The weights or gradients called `group`/..., nested as ours are."""
        return openlm.to_params(self._tensors(group))

    def _tensors(self, group: str) -> dict[str, np.ndarray]:
        start = f"{group}/"
        return {
            name.removeprefix(start): array
            for name, array in self.arrays.items()
            if name.startswith(start)
        }

    def _check(self) -> None:
        """Raises a UserError unless settings and arrays describe one run that we can repeat."""
        settings, name = self.settings, self.path.with_suffix(".json")
        if settings.norm not in NORMS:
            known = ", ".join(NORMS)
            raise UserError(f"{name}: norm '{settings.norm}' is not supported, only {known}")
        try:
            model = self.run("data").model
        except pydantic.ValidationError as error:
            raise UserError(f"{name}: {error.errors()[0]['msg']}") from None
        rows = (settings.steps, settings.batch, settings.seq_len)
        logits = (settings.batch, settings.seq_len, settings.vocab_size)
        shapes = {
            "tokens": (*rows[:2], settings.seq_len + 1),
            "logits0": logits,
            "logits_final_bf16_autocast": logits,
            **dict.fromkeys(CURVES, rows[:1]),
        }
        for key, shape in shapes.items():
            if key not in self.arrays:
                raise UserError(f"{self.path}: no array '{key}'")
            if self.arrays[key].shape != shape:
                found = self.arrays[key].shape
                raise UserError(f"{self.path}: '{key}' is {found}, {name.name} means {shape}")
        tokens = self.arrays["tokens"]
        if tokens.min() < 0 or tokens.max() >= settings.vocab_size:
            raise UserError(f"{self.path}: 'tokens' are not below vocab_size={settings.vocab_size}")
        for group in ("init", "grad0", "final"):
            found = openlm.settings(self._tensors(group), f"{self.path}: {group}/*")
            for key, value in found.items():
                if getattr(model, key) != value:
                    told = getattr(model, key)
                    raise UserError(
                        f"{self.path}: {group}/* are of a model with {key}={value}, "
                        f"{name.name} means {told}"
                    )


def parameter_name(path: tuple[Any, ...]) -> str:
    """The dotted name of a parameter at `path` in the nesting."""
    return ".".join(str(part.key) for part in path)


def _read_settings(path: Path) -> Settings:
    try:
        return Settings.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path}: no such file") from None
    except pydantic.ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise UserError(f"{path}: {key}: {fault['msg']}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not JSON") from None


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as content:  # never pickled objects
            return dict(content)
    except OSError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, zipfile.BadZipFile, EOFError, AttributeError, TypeError):
        raise UserError(f"{path}: not an .npz of arrays") from None
