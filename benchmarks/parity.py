"""Compares this program with what open_lm itself computed, on one golden run.

    python benchmarks/parity.py GOLDEN.npz

GOLDEN.npz, with GOLDEN.json beside it, is such a run (`golden.py` says what it holds). Prints each
deviation beside its tolerance. Exit code 1: one is beyond it; 2: the files are not such a run.

The training is that of `scaling-jax train`: the batches go in as prepared shards, laid so that the
run's own order of rows gives them back, and the weights in place of freshly drawn ones.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from golden import CURVES, DATASET, Golden, parameter_name
from jaxtyping import Float, Int

from scaling_jax.config import RunConfig
from scaling_jax.data import shards
from scaling_jax.data.batches import Batches
from scaling_jax.errors import UserError
from scaling_jax.models import transformer
from scaling_jax.models.loss import token_loss
from scaling_jax.models.transformer import Params
from scaling_jax.training import loop, optimizer, state
from scaling_jax.training.loop import TrainedRun
from scaling_jax.training.state import TrainState

LOGITS, LOSS, GRADIENT, BFLOAT16, STEP, WEIGHTS = 2e-5, 1e-6, 1e-4, 2e-2, 1e-4, 1e-3


@dataclasses.dataclass(frozen=True)
class Deviation:
    """How far one quantity is from open_lm's, and how far it may be."""

    quantity: str
    measure: str
    deviation: float
    tolerance: float

    @property
    def within(self) -> bool:
        """Whether it is near enough; what is not a number never is."""
        return self.deviation <= self.tolerance


def main() -> None:
    """Compares one golden run and prints the table."""
    parser = argparse.ArgumentParser(description="Compares this program with open_lm.")
    parser.add_argument("golden", type=Path, help="a golden run's .npz, its .json beside it")
    path = parser.parse_args().golden
    jax.config.update("jax_platforms", "cpu")
    try:
        golden = Golden.load(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for key, value in (golden.settings.model_extra or {}).items():
        print(f"not read: {key}={value!r} in {path.with_suffix('.json')}")
    deviations = compare(golden)
    table = pd.DataFrame(
        {**dataclasses.asdict(each), "": "" if each.within else "BEYOND"} for each in deviations
    )
    print(table.to_string(index=False, float_format=lambda value: f"{value:.2e}"))
    beyond = sum(not each.within for each in deviations)
    print(f"{path.name}: {len(deviations) - beyond} of {len(deviations)} within their tolerances")
    sys.exit(1 if beyond else 0)


def compare(golden: Golden) -> list[Deviation]:
    """Every comparison of `golden`: forward and backward pass, bfloat16, the whole training."""
    with tempfile.TemporaryDirectory() as folder:
        trained = train(golden, Path(folder))
    return [*compare_first_step(golden), *compare_bfloat16(golden), *compare_run(golden, trained)]


def compare_first_step(golden: Golden) -> list[Deviation]:
    """Logits, losses and gradients of the initial weights on the first batch, in float32."""
    model, arrays, rows = golden.model(), golden.arrays, golden.arrays["tokens"][0]

    @jax.jit
    def gradients(params: Params) -> Any:
        def losses(params: Params) -> Any:
            logits = transformer.bind(model, params)(rows[:, :-1])
            scores = token_loss(logits, rows[:, 1:])
            loss = scores.cross_entropy.mean()
            z_loss = golden.settings.z_loss * jnp.square(scores.log_normalizer).mean()
            return loss + z_loss, (loss, logits)

        return jax.value_and_grad(losses, has_aux=True)(params)

    (total, (loss, logits)), found = gradients(golden.params("init"))
    return [
        Deviation("logits0", "largest difference", _largest(logits, arrays["logits0"]), LOGITS),
        Deviation("ce_loss[0]", "relative", _relative(loss, arrays["ce_loss"][0]), LOSS),
        Deviation("train_loss[0]", "relative", _relative(total, arrays["train_loss"][0]), LOSS),
        *_compare_trees("gradient", found, golden.params("grad0"), GRADIENT),
    ]


def compare_bfloat16(golden: Golden) -> list[Deviation]:
    """Logits of the final weights in bfloat16, the rotary frequencies rounded as open_lm's are.

    Near, not equal: autocast on CPU keeps the residual stream in float32, training with FSDP not.
    """
    model = golden.model(compute_dtype="bfloat16", rope_frequency_dtype="bfloat16")
    tokens = golden.arrays["tokens"][0][:, :-1]
    logits = jax.jit(lambda params: transformer.bind(model, params)(tokens))(golden.params("final"))
    expected = golden.arrays["logits_final_bf16_autocast"]
    deviation = _norm_ratio(np.asarray(logits), expected)
    return [Deviation("logits_final_bf16_autocast", "relative norm", deviation, BFLOAT16)]


def compare_run(golden: Golden, trained: TrainedRun) -> list[Deviation]:
    """The metrics of every step, of which the worst is told, and the weights after the last."""
    curve = {name: np.float64(column) for name, column in trained.curve.items()}
    found = {
        "train_loss": curve["loss"] + curve["z_loss"],
        "ce_loss": curve["loss"],
        "grad_norm": curve["gradient_norm"],
        "lr": curve["learning_rate"],
    }
    deviations = []
    for name in CURVES:
        each = _relative(found[name], golden.arrays[name])
        worst = int(np.argmax(each))
        where = f"relative, worst of {len(each)} steps: {worst}"
        deviations.append(Deviation(name, where, each[worst], STEP))
    weights = jax.device_get(trained.state["params"])
    return [*deviations, *_compare_trees("final", weights, golden.params("final"), WEIGHTS)]


def train(golden: Golden, folder: Path) -> TrainedRun:
    """Repeats the golden run in `folder` by the program's own training."""
    config = golden.run(str(folder / "data"))
    write_shards(golden, config, folder / "data" / DATASET / "train")
    params = jax.tree.map(jnp.asarray, golden.params("init"))
    start = TrainState(
        params=params,
        moments=optimizer.initial_moments(params),
        step=jnp.zeros((), jnp.int32),
    )
    with mock.patch.object(state, "create", return_value=start):
        return loop.train(config, folder / "run")


def write_shards(golden: Golden, config: RunConfig, folder: Path) -> None:
    """Prepares shards from which the run of `config` draws the golden batches, in their order."""
    rows = golden.arrays["tokens"].reshape(-1, golden.settings.seq_len + 1)
    _write_rows(rows, golden, folder)
    parts = {DATASET: shards.Shards.open(folder)}
    batches = Batches(parts, golden.settings.seq_len, config.batch_size, config.seed)
    _, order = batches.draw(np.arange(len(rows)))
    placed = np.empty_like(rows)
    placed[order] = rows
    _write_rows(placed, golden, folder)


def _write_rows(rows: Int[np.ndarray, "rows length+1"], golden: Golden, folder: Path) -> None:
    vocabulary_size = golden.settings.vocab_size
    dtype = "u16" if vocabulary_size <= 1 << 16 else "u32"
    content = rows.astype(shards.DTYPES[dtype]).tobytes()
    name = f"tokens-00000-of-00001.{dtype}"
    entry = shards.ShardEntry(name, rows.size, hashlib.sha256(content).hexdigest())
    index = shards.Index(
        task=DATASET,
        split="train",
        source=golden.path.name,
        vocabulary="bytes",
        vocabulary_size=vocabulary_size,
        vocabulary_sha256="",
        end_of_text=0,
        dtype=dtype,
        documents=0,
        text_bytes=0,
        shards=(entry,),
        entropy_rate=None,
        versions={},
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    (folder / shards.INDEX_FILE).write_text(json.dumps(dataclasses.asdict(index)))


def _compare_trees(what: str, found: Params, expected: Params, tolerance: float) -> list[Deviation]:
    """One deviation a parameter; of those with a layer axis the worst layer's."""
    deviations = []
    others = jax.tree.leaves(expected)
    for (path, array), other in zip(jax.tree.leaves_with_path(found), others, strict=True):
        stacked = "blocks" in jax.tree_util.keystr(path)
        pairs = zip(array, other, strict=True) if stacked else [(array, other)]
        each = np.array([_norm_ratio(np.asarray(one), two) for one, two in pairs])
        worst = int(np.argmax(each))
        where = f"relative norm, worst layer: {worst}" if stacked else "relative norm"
        deviations.append(
            Deviation(f"{what} {parameter_name(path)}", where, float(each[worst]), tolerance)
        )
    return deviations


def _largest(found: Float[np.ndarray, "..."], expected: Float[np.ndarray, "..."]) -> float:
    return float(np.abs(np.float64(found) - np.float64(expected)).max())


def _relative(found: Any, expected: Any) -> Any:
    return np.abs(np.float64(found) - np.float64(expected)) / np.abs(np.float64(expected))


def _norm_ratio(found: Float[np.ndarray, "..."], expected: Float[np.ndarray, "..."]) -> float:
    difference = np.float64(found) - np.float64(expected)
    return float(np.linalg.norm(difference) / np.linalg.norm(np.float64(expected)))


if __name__ == "__main__":
    main()
