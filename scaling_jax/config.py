"""Every setting of the program: frozen typed dataclasses, read from YAML with dotted overrides.

    run = config.load(RunConfig, "configs/runs/python_code.yaml", ["model.width=64", "seed=1"])

How files are read and put together is config_files.py. A mistake is one line with the file, the key
and the nearest key that exists.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import pydantic
import yaml
from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from scaling_jax import atomic, config_files
from scaling_jax.errors import UserError, nearest

STRICT = ConfigDict(extra="forbid", str_strip_whitespace=True)
Fraction = Annotated[float, Field(gt=0, lt=1)]
NAME = "[A-Za-z0-9][A-Za-z0-9_.=-]*"
Name = Annotated[str, Field(pattern=f"^{NAME}$")]
SetName = Annotated[str, Field(pattern=f"^{NAME}(/{NAME})?$")]

# Settings of a run that do not change its result, and those that change its decay only.
NO_RESULT = {"mesh", "checkpoint", "evaluation", "microbatches", "branch_from"}
NO_RESULT |= {"model.name", "model.remat", "data.folder", "data.validation"}
NO_FIRST_STEPS = {"tokens", "token_multiplier", "optimizer.schedule", "optimizer.decay_fraction"}
NO_FIRST_STEPS |= {"optimizer.decay_shape", "optimizer.minimum_learning_rate"}


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """A decoder-only transformer as in open_lm. `name` labels the size in tables."""

    width: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    vocabulary_size: PositiveInt
    sequence_length: PositiveInt
    name: str = ""
    # What normalises everywhere: gain-only LayerNorm as in open_lm, or RMSNorm as in Llama.
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    qk_norm: bool = True
    rope_base: PositiveFloat = 10_000.0
    # The paper's runs rounded the rotary frequencies to bfloat16.
    rope_frequency_dtype: Literal["float32", "bfloat16"] = "float32"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    # What the backward pass keeps of a block: everything, matrix products only, or its input only.
    remat: Literal["none", "dots", "block"] = "none"

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")
        if self.head_width % 2:
            raise ValueError(f"width / heads = {self.head_width} is odd: rotary pairs need it even")

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def hidden_width(self) -> int:
        """Width inside the SwiGLU layer: 8/3 of the width, rounded up to a multiple of 256."""
        return 256 * ((8 * self.width // 3 + 255) // 256)

    @property
    def label(self) -> str:
        """The size's name in tables."""
        return self.name or f"d{self.width}_l{self.layers}_h{self.heads}"


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Which prepared shards to read: `folder`/`dataset`/train and `folder`/<set>/validation.

    A validation set written as `name/split` is that split of `name`. Of a `mixture`, `dataset` is
    only the name in tables.
    """

    dataset: Name
    validation: tuple[SetName, ...]
    # Parts of the training data, `folder`/<part>/train, and their rates: sequences of each.
    mixture: dict[Name, PositiveFloat] = dataclasses.field(default_factory=dict)
    folder: str = "data"
    # "bytes", a SentencePiece *.model or a Hugging Face tokenizer.json
    vocabulary: str = "bytes"

    def __post_init__(self) -> None:
        if not self.validation:
            raise ValueError("validation names no set: at least one is needed")

    @property
    def parts(self) -> dict[str, float]:
        """What is trained on and at which rates, by name; listed in any order they are the same."""
        return dict(sorted(self.mixture.items())) or {self.dataset: 1.0}


@dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """AdamW with weight decay coupled to the learning rate, which rises linearly in the warm-up."""

    # After the warm-up: a cosine down to the minimum; constant; or constant, then a decay to the
    # minimum in the last part of the run.
    schedule: Literal["cosine", "constant", "warmup_stable_decay"] = "cosine"
    # Of warmup_stable_decay: the part of the run's steps that are decay, and its shape.
    decay_fraction: Fraction = 0.2
    decay_shape: Literal["linear", "one_minus_sqrt"] = "linear"
    learning_rate: PositiveFloat = 3e-3
    minimum_learning_rate: NonNegativeFloat = 3e-5
    # After the warm-up the rate is cut off below here (open_lm's force_min_lr).
    learning_rate_floor: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 100
    weight_decay: NonNegativeFloat = 0.033
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: PositiveFloat = 1e-8
    gradient_clip_norm: PositiveFloat = 1.0


@dataclass(frozen=True, config=STRICT)
class MeshConfig:
    """How many devices lie along each mesh axis; -1 (one axis at most) takes all that are left.

    `slices` counts TPU slices that work on one run together, over the data-centre network.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: PositiveInt = 1

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError("axes are positive numbers; one of them may be -1 for all the rest")


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    """The last step is always saved; in between, every so many steps if asked for.

    Of schedule warmup_stable_decay, the step before the decay is saved too, and kept beside the
    latest `keep`: longer runs can branch from it.
    """

    every_steps: PositiveInt | None = None
    keep: PositiveInt = 2


@dataclass(frozen=True, config=STRICT)
class DownstreamConfig:
    """Tasks that a run of a testbed is scored on once it is trained."""

    # A name in configs/evaluations, such as gadre2024, or a path.
    config: str
    # The folder with the tasks' files; "" stands for data.folder.
    folder: str = ""
    # These tasks, or the members of these averages, instead of all.
    only: tuple[str, ...] = ()


@dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
    """How much of each validation set is scored, how its 95 % bounds are found, and which tasks."""

    sequences: PositiveInt = 256
    batch_size: PositiveInt = 64
    bootstrap_samples: PositiveInt = 1000
    tasks: DownstreamConfig | None = None


@dataclass(frozen=True, config=STRICT)
class HealthConfig:
    """What is done about steps that go wrong.

    A skipped step changes neither parameters nor moments. Runs that had such steps are marked in
    the records, and left out of fits by default.
    """

    # Losses or gradients that are not finite: stop the run, or skip the step.
    nonfinite: Literal["stop", "skip"] = "stop"
    # Losses that leap above those before: say so and mark the run, skip the step, or do nothing.
    spike: Literal["ignore", "warn", "skip"] = "warn"
    # A leap is so many standard deviations above the mean of so many losses before it.
    spike_deviations: PositiveFloat = 6.0
    spike_window: Annotated[int, Field(ge=4)] = 128


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """One training run. Its budget is given as `tokens` or as a multiple of the parameters."""

    model: ModelConfig
    data: DataConfig
    batch_size: PositiveInt
    tokens: PositiveInt | None = None
    token_multiplier: PositiveFloat | None = None
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    z_loss_weight: NonNegativeFloat = 1e-4
    seed: NonNegativeInt = 0
    # Gradients of this many equal parts of a batch are added up: less memory, same result.
    microbatches: PositiveInt = 1
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    health: HealthConfig = dataclasses.field(default_factory=HealthConfig)
    # Folder of a run whose first steps are those of this one: they are taken from its checkpoint.
    branch_from: str | None = None

    def __post_init__(self) -> None:
        if self.branch_from is not None and self.optimizer.schedule == "cosine":
            raise ValueError(
                "branch_from: with optimizer.schedule cosine every step depends on the length of "
                "the run; runs of schedule constant or warmup_stable_decay can branch"
            )
        if (self.tokens is None) == (self.token_multiplier is None):
            raise ValueError("give either tokens or token_multiplier")
        if self.batch_size % self.microbatches:
            raise ValueError(
                f"microbatches={self.microbatches} does not divide batch_size={self.batch_size}"
            )

    @property
    def identity(self) -> str:
        """Content hash of what determines the run's result, as 12 hexadecimal digits.

        Where its files lie, how it is spread over devices, how often it is saved and how much
        memory it may use do not change the result and are left out; so is what it branches from.
        """
        content = self._settings(without=NO_RESULT)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def first_steps(self) -> dict[str, Any]:
        """What determines the steps before the learning rate falls, by `section.key`.

        Runs of schedule constant or warmup_stable_decay that agree in it share those steps.
        """
        return self._settings(without=NO_RESULT | NO_FIRST_STEPS)

    def _settings(self, without: Set[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in dataclasses.asdict(self).items():
            section = value if isinstance(value, dict) else {"": value}
            found |= {f"{name}.{key}".rstrip("."): below for key, below in section.items()}
        # In any order the same mixture.
        found["data.mixture"] = tuple(sorted(self.data.mixture.items()))
        return {
            name: value
            for name, value in found.items()
            if name not in without and name.partition(".")[0] not in without
        }


@dataclass(frozen=True, config=STRICT)
class GridConfig:
    """A block of a testbed: every dataset x size x token multiplier x seed, in one role."""

    role: Literal["fit", "held_out"]
    datasets: tuple[Name, ...]
    sizes: tuple[Name, ...]
    token_multipliers: tuple[PositiveFloat, ...]
    seeds: tuple[NonNegativeInt, ...] = (0,)


@dataclass(frozen=True, config=STRICT)
class LawsConfig:
    """Which laws are fitted to the runs in role `fit`, and the level of their intervals."""

    loss: tuple[str, ...] = ("over_training", "chinchilla")
    error: tuple[str, ...] = ("exponential",)
    # What the error laws are fitted to, of the columns error/<name>: tasks or averages;
    # {dataset} stands for the name of each dataset.
    errors: tuple[str, ...] = ("next_token_{dataset}",)
    # The error of guessing, at which their asymptote is held; by default it is fitted.
    chance: Annotated[float, Field(gt=0, le=1)] | None = None
    level: Fraction = 0.9
    # Whether runs whose training went wrong, by the records' column `health`, are taken in.
    unhealthy: bool = False

    def error_columns(self, dataset: str) -> tuple[str, ...]:
        """The columns of the records table that error laws are fitted to, of runs on `dataset`."""
        return tuple(f"error/{name.replace('{dataset}', dataset)}" for name in self.errors)


@dataclass(frozen=True, config=STRICT)
class TestbedConfig:
    """A grid of runs. `run` holds what they share, `sizes` what each model size changes in it."""

    __test__ = False  # pytest would take the name for a test class

    name: Name
    run: dict[str, Any]
    sizes: dict[Name, dict[str, Any]]
    grid: tuple[GridConfig, ...]
    laws: LawsConfig = dataclasses.field(default_factory=LawsConfig)

    def __post_init__(self) -> None:
        for block in self.grid:
            for size in block.sizes:
                if size not in self.sizes:
                    raise ValueError(f"unknown size '{size}' ({nearest(size, self.sizes)})")
        datasets = sorted({name for block in self.grid for name in block.datasets})
        data = self.run.get("data")
        if isinstance(data, Mapping) and data.get("mixture") and len(datasets) > 1:
            raise ValueError(
                f"run.data.mixture is one dataset, but the grid names {', '.join(datasets)}"
            )


Config = TypeVar("Config")


def load(kind: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads `kind` from a YAML file, `key.key=value` overrides applied.

    Raises:
      UserError: with file and key, for anything missing, unknown, ill-typed or impossible.
    """
    path = config_files.find(path)
    return build(kind, config_files.read(path, overrides), source=str(path))


def build(kind: type[Config], content: Mapping[str, Any], source: str) -> Config:
    """Makes and checks a `kind` from nested mappings; `source` is named in errors.

    Raises:
      UserError: with source and key, for anything missing, unknown, ill-typed or impossible.
    """
    try:
        return pydantic.TypeAdapter(kind).validate_python(dict(content))
    except pydantic.ValidationError as error:
        raise UserError(f"{source}: {_explain(kind, error)}") from None


def write(config: RunConfig | TestbedConfig, path: str | Path) -> None:
    """Writes the complete, resolved config as YAML, atomically."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    atomic.write_text(path, yaml.safe_dump(plain, sort_keys=False))


def _explain(kind: type, error: pydantic.ValidationError) -> str:
    """The first mistake that pydantic found, in one line; unknown keys before all else."""
    order = {"unexpected_keyword_argument": 0, "missing": 1}
    first = min(error.errors(), key=lambda fault: order.get(fault["type"], 2))
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] == "unexpected_keyword_argument":
        section = _section(kind, location[:-1])
        fields = [field.name for field in dataclasses.fields(section)] if section else []
        return f"unknown key '{key}' ({nearest(location[-1], fields)})"
    if first["type"] == "missing":
        return f"key '{key}' is missing"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, not {first['input']!r}"


def _section(kind: Any, keys: Sequence[str]) -> Any:
    """The dataclass found by following `keys` down from `kind`; None where that is not one."""
    for key in keys:
        if dataclasses.is_dataclass(kind):
            kind = get_type_hints(kind).get(key)
            if type(None) in get_args(kind):  # a section that may be absent
                kind = get_args(kind)[0]
        else:
            # Of a mapping, what it maps to.
            inner = [each for each in get_args(kind) if each not in (Ellipsis, type(None))]
            kind = inner[-1] if inner else None
    return kind if dataclasses.is_dataclass(kind) else None
