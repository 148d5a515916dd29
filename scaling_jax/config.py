"""Every setting of the program: frozen typed dataclasses, read from YAML with dotted overrides.

    run = config.load(RunConfig, "configs/runs/python_code.yaml", ["model.width=64", "seed=1"])

A value that is the name of another YAML file stands for that file's content; it is looked for
beside the file that names it, then among the configs that come with the package. A mistake is one
line with the file, the key and the nearest key that exists.
"""

import dataclasses
import hashlib
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import pydantic
import yaml
from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from scaling_jax import atomic
from scaling_jax.errors import UserError, nearest

STRICT = ConfigDict(extra="forbid", str_strip_whitespace=True)
Fraction = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.=-]*$")]


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
    """Which prepared shards to read: `folder`/`dataset`/train and `folder`/<set>/validation."""

    dataset: Name
    validation: tuple[Name, ...]
    folder: str = "data"
    # "bytes", a SentencePiece *.model or a Hugging Face tokenizer.json
    vocabulary: str = "bytes"

    def __post_init__(self) -> None:
        if not self.validation:
            raise ValueError("validation names no set: at least one is needed")


@dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """AdamW with decay coupled to the learning rate; linear warm-up, then cosine to the minimum."""

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
    """How many devices lie along each mesh axis; -1 (one axis at most) takes all that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError("axes are positive numbers; one of them may be -1 for all the rest")


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    """The last step is always saved; in between, every so many steps if asked for."""

    every_steps: PositiveInt | None = None
    keep: PositiveInt = 2


@dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
    """How much of each validation set is scored, and how its 95 % bounds are found."""

    sequences: PositiveInt = 256
    batch_size: PositiveInt = 64
    bootstrap_samples: PositiveInt = 1000


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

    def __post_init__(self) -> None:
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
        memory it may use do not change the result and are left out.
        """
        content = dataclasses.asdict(self)
        for name in ("mesh", "checkpoint", "evaluation", "microbatches"):
            del content[name]
        for section, name in (("model", "name"), ("model", "remat"), ("data", "folder")):
            del content[section][name]
        del content["data"]["validation"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


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
    level: Fraction = 0.9


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


Config = TypeVar("Config", RunConfig, TestbedConfig, ModelConfig)


def load(kind: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads `kind` from a YAML file, `key.key=value` overrides applied.

    Raises:
      UserError: with file and key, for anything missing, unknown, ill-typed or impossible.
    """
    path = find(path)
    return build(kind, read(path, overrides), source=str(path))


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


def build(kind: type[Config], content: Mapping[str, Any], source: str) -> Config:
    """Makes and checks a `kind` from nested mappings; `source` is named in errors.

    Raises:
      UserError: with source and key, for anything missing, unknown, ill-typed or impossible.
    """
    try:
        return pydantic.TypeAdapter(kind).validate_python(dict(content))
    except pydantic.ValidationError as error:
        raise UserError(f"{source}: {_explain(kind, error)}") from None


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


def write(config: RunConfig | TestbedConfig, path: str | Path) -> None:
    """Writes the complete, resolved config as YAML, atomically."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    atomic.write_text(path, yaml.safe_dump(plain, sort_keys=False))


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
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values")
    return {str(key): _include(value, path, including) for key, value in content.items()}


def _include(value: Any, path: Path, including: tuple[Path, ...]) -> Any:
    if isinstance(value, str) and value.endswith(".yaml"):
        return _read_yaml(find(value, beside=path.parent), (*including, path))
    if isinstance(value, dict):
        return {str(key): _include(below, path, including) for key, below in value.items()}
    return value


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
        content[last] = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise UserError(f"override '{override}': the value is not valid YAML") from None


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
        else:
            kind = next((inner for inner in get_args(kind) if inner is not Ellipsis), None)
    return kind if dataclasses.is_dataclass(kind) else None
