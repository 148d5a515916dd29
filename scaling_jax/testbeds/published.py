"""Released testbeds as records tables: Gadre et al. 2024, digitised Chinchilla runs, OLMo's ladder.

`scaling-jax data fetch gadre2024`, `chinchilla`, `chinchilla_kyo` and `olmo_ladder` download them.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scaling_jax import records
from scaling_jax.errors import UserError, nearest
from scaling_jax.testbeds.predictability import MARGIN, above_chance

# Validation sets of the release, by a part of the path that it names them with.
VALIDATION_SETS = {
    "openlm/": "openlm",
    "c4_val/": "c4_val",
    "paloma_c4_en/": "paloma_c4_en",
    "paloma_dolma_100_programing_languages/": "paloma_dolma_100_programing_languages",
    "paloma_falcon-refinedweb/": "paloma_falcon-refinedweb",
    "paloma_ptb/": "paloma_ptb",
    "paloma_redpajama/": "paloma_redpajama",
    "de-en/": "val_de-en_100",
}
# A task belongs to the 17-task split if a run of this size beats guessing by this much.
SPLIT_MODEL, SPLIT_MARGIN = "d=576_l=24_h=8", MARGIN
AVERAGES = ("error/average_46", "error/average_17")
GRID_MULTIPLIER = 20
# The keys of grid.json hold one device's batch: times 8 it is table 3's for the selected models.
GRID_DEVICES = 8
CHINCHILLA_FILE = "svg_extracted_data.csv"
# Besiroglu et al. 2024 drop the runs with the highest loss, early stops that fit no law.
CHINCHILLA_DROPPED = 5
CHINCHILLA_KYO_FILE = "df.csv"
# N of OLMo's ladder as its authors count it, by the first part of a file's name.
LADDER_PARAMS = {
    "190M": 190_354_176,
    "370M": 371_262_464,
    "760M": 758_220_288,
    "1B": 1_279_395_840,
    "3B": 3_169_537_280,
    "7B": 6_887_575_552,
    "13B": 13_202_396_160,
}
# Files of finished runs, by the role they have in the authors' own prediction.
LADDER_FILES = {
    "fit": tuple(
        f"{size}-{length}xC.csv"
        for size in ("190M", "370M", "760M", "1B")
        for length in (1, 2, 5, 10)
    ),
    "spare": (
        *(f"{size}-0.5xC.csv" for size in ("190M", "370M", "760M", "1B")),
        *(f"{size}-1xC-rerun.csv" for size in ("190M", "370M", "760M", "1B", "3B")),
        *(f"3B-{length}xC.csv" for length in (0.5, 1, 2, 5, 10)),
    ),
    "held_out": ("peteish7_eval_anneal.csv", "peteish13_eval_final.csv"),
}
LADDER_TARGETS = {"peteish7_eval_anneal": "7B", "peteish13_eval_final": "13B"}

_GRID_KEY = re.compile(
    r"d=(\d+)_l=(\d+)_h=(\d+)-(\d+)-([\d.e-]+?)-([\d.e-]+?)-(\d+)-(\d+)-(\d+)-([\d.e-]+)"
)


def gadre2024(folder: str | Path) -> pd.DataFrame:
    """The 104 runs of Gadre et al. 2024 from the `exp_data` of github.com/mlfoundations/scaling.

    Args:
      folder: `exp_data`, or the folder that holds it: models/*.json, evals/*.json and
        eval_metadata.csv.

    Returns:
      A records table, smallest compute first: loss/<set> in nats per token with 95 % bounds (over
      sequences) for each of 8 sets, error/<task> (1 - accuracy) for each of 46 tasks,
      error/average_46 and error/average_17 (section 3.4: tasks in which some 0.154B run is 10
      points better than guessing).

    Raises:
      UserError: a folder, file or key is missing, or a number is not one.
    """
    folder = _exp_data(folder)
    tasks = gadre2024_tasks(folder)
    rows = [_run(path, folder, tasks) for path in _json_files(folder / "models")]
    table = pd.DataFrame(rows).sort_values(["flops_6nd", "dataset"], ignore_index=True)
    errors = table[[f"error/{task}" for task in tasks.index]]
    split = [f"error/{task}" for task in tasks_above_chance(table, tasks)]
    averages = pd.DataFrame({AVERAGES[0]: errors.mean(axis=1)})
    # A release without models of that size has no 17-task split.
    if split:
        averages[AVERAGES[1]] = errors[split].mean(axis=1)
    return records.check(pd.concat([table, averages], axis=1), source=str(folder))


def gadre2024_tasks(folder: str | Path) -> pd.DataFrame:
    """The downstream tasks that every run was scored on (paper, table 5).

    Returns:
      Indexed by task: category, type, shots, samples, chance_error (the error of guessing).

    Raises:
      UserError: eval_metadata.csv or a run's scores are missing, or a column or task is.
    """
    folder = _exp_data(folder)
    path = folder / "eval_metadata.csv"
    described = _read_csv(path).rename(
        columns={
            "Eval Task": "task",
            "Task Category": "category",
            "Task Type": "type",
            "#shots": "shots",
            "#datapoints": "samples",
            "Random baseline": "chance",
        }
    )
    wanted = ["task", "category", "type", "shots", "samples", "chance"]
    records.require(described, wanted, source=str(path))
    described["chance_error"] = 1 - described["chance"] / 100
    described = described.set_index("task")[[*wanted[1:-1], "chance_error"]]
    scored = [
        set(_at(_load(scores), scores, "eval_metrics", "icl"))
        for scores in _json_files(folder / "evals")
    ]
    common = sorted(set.intersection(*scored))
    for task in common:
        if task not in described.index:
            raise UserError(f"{path}: no task '{task}' ({nearest(task, described.index)})")
    return described.loc[common]


def tasks_above_chance(
    table: pd.DataFrame, tasks: pd.DataFrame, margin: float = SPLIT_MARGIN
) -> list[str]:
    """The tasks in which some 0.154B run, on any dataset, beats guessing by more than `margin`.

    Source: Gadre et al. 2024, section 3.4 (10 points: 17 tasks) and figure 8 (other margins).
    """
    runs = table[table["model"] == SPLIT_MODEL]
    chance = {str(task): float(error) for task, error in tasks["chance_error"].items()}
    return above_chance(runs, chance, margin)


def gadre2024_grid(folder: str | Path) -> pd.DataFrame:
    """The 435 grid-search models of Gadre et al. 2024 (figure 4), all at M = 20, from grid.json.

    Returns:
      width, layers, heads, batch_sequences, warmup_steps, params, tokens, flops_6nd and
      loss/openlm in nats per token.

    Raises:
      UserError: grid.json is missing, or a key in it is not understood.
    """
    path = _exp_data(folder) / "grid.json"
    rows = []
    for key, loss in _load(path).items():
        match = _GRID_KEY.fullmatch(key)
        if not match:
            raise UserError(f"{path}: key '{key}' does not name a grid-search model")
        width, layers, heads = (int(match[group]) for group in (1, 2, 3))
        tokens = int(match[8])
        rows.append(
            {
                "run": key,
                "dataset": "openlm_mix",
                "model": f"d={width}_l={layers}_h={heads}",
                "width": width,
                "layers": layers,
                "heads": heads,
                "batch_sequences": int(match[7]) * GRID_DEVICES,
                "warmup_steps": int(match[9]),
                "params": tokens / GRID_MULTIPLIER,
                "tokens": tokens,
                "loss/openlm": loss,
            }
        )
    return records.check(pd.DataFrame(rows), source=str(path))


def chinchilla(folder: str | Path) -> pd.DataFrame:
    """The runs that Besiroglu et al. 2024 read off figure 4 of Hoffmann et al. 2022.

    Args:
      folder: holds svg_extracted_data.csv of github.com/epoch-research/analyzing-chinchilla; the
        file itself will do too.

    Returns:
      A records table of 240 runs, those of the 5 highest losses dropped as the authors did;
      loss/train in nats per token; tokens from the compute, D = C / 6N.

    Raises:
      UserError: the file or a column is missing, or a number is not one.
    """
    path = Path(folder)
    if not path.is_file():
        path = path / CHINCHILLA_FILE
    points = _read_csv(path)
    records.require(points, ["Model Size", "Training FLOP", "loss"], source=str(path))
    # Stable: two runs share the fifth-highest loss only if they are the same point.
    kept = points.sort_values("loss", kind="stable").index[: len(points) - CHINCHILLA_DROPPED]
    points = points.loc[sorted(kept)]
    params, flops = points["Model Size"], points["Training FLOP"]
    table = pd.DataFrame(
        {
            "dataset": "massive_text",
            "params": params.to_numpy(),
            "tokens": (flops / (6 * params)).to_numpy(),
            "loss/train": points["loss"].to_numpy(),
        }
    )
    return records.check(table, source=str(path))


def chinchilla_kyo(folder: str | Path) -> pd.DataFrame:
    """Another digitisation of the same figure, by other hands: the runs that kyo-takano read off.

    Args:
      folder: holds examples/llm/df.csv of github.com/kyo-takano/chinchilla; the file will do too.

    Returns:
      A records table of 234 runs, loss/train in nats per token.

    Raises:
      UserError: the file or a column is missing, or a number is not one.
    """
    path = Path(folder)
    path = path / CHINCHILLA_KYO_FILE if path.is_dir() else path
    table = records.read(path, columns={"N": "params", "D": "tokens", "loss": "loss/train"})
    return table.drop(columns="C").assign(dataset="massive_text")


def olmo_ladder(folder: str | Path) -> pd.DataFrame:
    """The model ladder of Bhagia et al. 2024, and the 7B and 13B models that it was to predict.

    Args:
      folder: ladder-runs of github.com/allenai/OLMo-ladder (in src/scripts/paper/data), or the
        folder that holds it.

    Returns:
      A records table with a row for each of 32 finished runs; their earlier checkpoints are left
      out, because the learning rate had not come down yet. loss/<set> in nats per token for each of
      11 sets; error/<task> (1 - accuracy) for each format of each task, multiple choice ("_mc_")
      for the two large models only; bpb/<task> in bits per byte of the right answer. Column `role`:
      "fit" for the 16 runs that the authors fit, "held_out" for 7B and 13B, which ended on another
      mix of data, "spare" for the others. `params` are without the input embedding, as the authors
      count them.

    Raises:
      UserError: a file or a column is missing, or a number is not one.
    """
    folder = Path(folder)
    if (folder / "ladder-runs").is_dir():
        folder = folder / "ladder-runs"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    rows = [
        _ladder_run(folder / name, role) for role, names in LADDER_FILES.items() for name in names
    ]
    table = pd.DataFrame(rows).sort_values("tokens", kind="stable")
    return records.check(table.sort_values("params", kind="stable", ignore_index=True), str(folder))


def _ladder_run(path: Path, role: str) -> dict[str, Any]:
    """One row: the last evaluation of a run of the ladder."""
    log = _read_csv(path)
    records.require(log, ["batch_size_in_tokens"], source=str(path))
    last = log.iloc[-1]
    if "throughput/total_tokens" in log:
        tokens = last["throughput/total_tokens"]
    else:
        records.require(log, ["_step"], source=str(path))
        tokens = last["_step"] * last["batch_size_in_tokens"]
    model = LADDER_TARGETS.get(path.stem, path.stem.split("-")[0])
    row: dict[str, Any] = {
        "run": path.stem,
        "dataset": "olmo_mix",
        "model": model,
        "role": role,
        "params": LADDER_PARAMS[model],
        "tokens": tokens,
    }
    for name, value in last.items():
        kind, _, rest = str(name).removeprefix("eval/").partition("/")
        if rest == "CrossEntropyLoss":
            row[f"loss/{kind.removesuffix('-validation')}"] = value
        elif kind == "downstream":
            row[f"error/{rest}"] = 1 - value
        elif kind == "downstream_bpb":
            row[f"bpb/{rest.removesuffix('_bpb')}"] = value
    return row


def _exp_data(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    for candidate in (folder, folder / "exp_data"):
        if (candidate / "models").is_dir():
            return candidate
    raise UserError(
        f"{folder}: neither it nor its exp_data holds models/; give the exp_data folder of "
        "github.com/mlfoundations/scaling"
    )


def _run(path: Path, folder: Path, tasks: pd.DataFrame) -> dict[str, Any]:
    """One row: a run's identity, losses and errors."""
    run = _load(path)
    name = str(_at(run, path, "name"))
    settings = _at(run, path, "hyperparameters")
    params = _at(settings, path, "params")
    tokens = _at(settings, path, "tokens")
    dataset = str(_at(run, path, "dataset_name"))
    row: dict[str, Any] = {
        "run": name,
        "dataset": dataset,
        "model": Path(_at(settings, path, "model")).stem,
        "params": params,
        "tokens": tokens,
        # Whole numbers, which the tokens of the release are within a millionth of.
        "token_multiplier": float(np.round(tokens / params, 3)),
        "flops_6nd": 6 * params * tokens,
    }
    for result in _at(run, path, "results"):
        where = str(_at(result, path, "val_data"))
        found = [loss for part, loss in VALIDATION_SETS.items() if part in where]
        if len(found) != 1:
            raise UserError(f"{path}: validation data {where} is none of the eight sets")
        row[f"loss/{found[0]}"] = _at(result, path, "loss")
        for bound, key in (("low", "loss_sequences_lower_95"), ("high", "loss_sequences_upper_95")):
            row[f"loss/{found[0]}/{bound}"] = _at(result, path, key)
    for loss in VALIDATION_SETS.values():
        if f"loss/{loss}" not in row:
            raise UserError(f"{path}: no loss on {loss}")
    scores = folder / "evals" / f"evaluation_{name}_heavy.json"
    accuracies = _at(_load(scores), scores, "eval_metrics", "icl")
    return row | {f"error/{task}": 1 - _at(accuracies, scores, task) for task in tasks.index}


def _json_files(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.json"))
    if not found:
        raise UserError(f"{folder}: no *.json in it")
    return found


def _read_csv(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        rows = pd.read_csv(path)
    except ValueError as error:
        raise UserError(f"{path}: not CSV ({str(error).splitlines()[0]})") from error
    if rows.empty:
        raise UserError(f"{path}: has no rows")
    return rows


def _load(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def _at(content: Any, path: Path, *keys: str) -> Any:
    """What stands under `keys` in the content of `path`."""
    for key in keys:
        if not isinstance(content, dict):
            raise UserError(f"{path}: no '{key}', the value that should hold it is no object")
        if key not in content:
            raise UserError(f"{path}: no '{key}' ({nearest(key, map(str, content))})")
        content = content[key]
    return content
