"""`scaling-jax convert`: models of other programs to and from a run's folder."""

from pathlib import Path
from typing import TYPE_CHECKING

import cyclopts

from scaling_jax import cpu
from scaling_jax.commands.overrides import Overrides

if TYPE_CHECKING:
    from scaling_jax.config import RunConfig

DETERMINED_BY_LLAMA = (
    "width",
    "layers",
    "heads",
    "vocabulary_size",
    "norm",
    "qk_norm",
    "rope_base",
)

app = cyclopts.App(
    name="convert", help="Bring models from other programs, and take them there; without PyTorch."
)


@app.command(name="open_lm")
def from_open_lm(
    checkpoint: Path, out: Path, *overrides: Overrides, config: str | None = None
) -> None:
    """Turn a checkpoint of open_lm into a run's folder, which `evaluate` takes.

    Nothing of the file is run: a pickle that asks for more than tensors is refused. What the file
    does not say is assumed, and told. The paper's models were trained with rotary frequencies
    rounded to bfloat16: for them add model.rope_frequency_dtype=bfloat16.

    Args:
      checkpoint: a .pt file of torch.save, or .safetensors.
      out: folder to make.
      config: a YAML of a run or of a model, for what the file does not say, such as where the
        validation data lie; what both say must agree.
    """
    cpu.configure()
    from scaling_jax.models import openlm
    from scaling_jax.training import converted

    converted.check_free(out)
    found = openlm.read(checkpoint)
    settings = openlm.settings(found.tensors, str(checkpoint))
    run, assumed = converted.run_config(settings, openlm.USUAL, str(checkpoint), config, overrides)
    frequencies = openlm.inverse_frequencies(found.tensors, str(checkpoint))
    origin = {
        "format": "open_lm",
        "sha256": {checkpoint.name: converted.sha256(checkpoint)},
        "epoch": found.epoch,
        "inv_freq": None if frequencies is None else frequencies.tolist(),
    }
    converted.write(run, openlm.to_params(found.tensors), out, found.step or 0, origin)
    _report(run, assumed, out)


@app.command(name="to_open_lm")
def to_open_lm(run: Path, out: Path) -> None:
    """Turn a run's newest checkpoint into one that open_lm loads, in float32.

    Args:
      run: the run's folder.
      out: file to make: .pt as of torch.save, or .safetensors.
    """
    cpu.configure()
    import numpy as np

    from scaling_jax.models import openlm
    from scaling_jax.terminal import say
    from scaling_jax.training import converted

    openlm.check_suffix(out)
    converted.check_free(out)
    config, restored = converted.read(run)
    origin = restored.meta.get("origin", {})
    kept = origin.get("inv_freq")
    frequencies = None if kept is None else np.asarray(kept, np.float32)
    tensors = openlm.from_params(config.model, restored.state["params"], frequencies)
    step = int(restored.state["step"])
    openlm.write(out, tensors, run.resolve().name, origin.get("epoch") or 1, step)
    say(f"{len(tensors)} tensors after step {step}; {out}")


@app.command(name="llama")
def from_llama(model: Path, out: Path, *overrides: Overrides, config: str | None = None) -> None:
    """Turn a Llama model of Hugging Face into a run's folder, where it can be computed here.

    Args:
      model: its folder, with config.json and safetensors.
      out: folder to make.
      config: a YAML of a run or of a model, for what the folder does not say, such as where the
        validation data lie; what both say must agree.
    """
    cpu.configure()
    import dataclasses

    from scaling_jax.models import llama
    from scaling_jax.training import converted

    converted.check_free(out)
    imported = llama.read(model)
    settings = dataclasses.asdict(imported.model)
    run, assumed = converted.run_config(
        {name: settings[name] for name in DETERMINED_BY_LLAMA},
        {"sequence_length": imported.model.sequence_length},
        str(model),
        config,
        overrides,
    )
    files = {path.name: converted.sha256(path) for path in imported.files}
    converted.write(run, imported.params, out, 0, {"format": "llama", "sha256": files})
    _report(run, assumed, out)


@app.command(name="to_llama")
def to_llama(run: Path, out: Path) -> None:
    """Turn a run's newest checkpoint into a Llama model of Hugging Face, where it is one.

    It is one with norm=rms_norm and qk_norm=false; the tokenizer is not part of it.

    Args:
      run: the run's folder.
      out: folder to make.
    """
    cpu.configure()
    from scaling_jax.models import llama
    from scaling_jax.terminal import say
    from scaling_jax.training import converted

    converted.check_free(out)
    config, restored = converted.read(run)
    llama.write(out, config.model, restored.state["params"])
    say(f"after step {int(restored.state['step'])}; {out}")


def _report(run: "RunConfig", assumed: list[str], out: Path) -> None:
    from scaling_jax.models import counting
    from scaling_jax.terminal import say

    say(f"{run.model.label}: {counting.nominal_params(run.model):,} parameters; {out}")
    if assumed:
        say(f"assumed; change with section.key=value: {' '.join(assumed)}")
