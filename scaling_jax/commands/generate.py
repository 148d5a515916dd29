"""`scaling-jax generate`: text from a run's newest checkpoint."""

from pathlib import Path

from scaling_jax.commands.overrides import Overrides
from scaling_jax.errors import UserError


def generate(
    run: Path,
    *overrides: Overrides,
    prompt: str,
    max_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    samples: int = 1,
    seed: int = 0,
    slide: bool = False,
    vocabulary: str | None = None,
) -> None:
    """Continue a text with a run's newest checkpoint, up to the end of text or of what fits.

    The same seed gives the same text. Changes to the config are for where it runs: mesh.fsdp=1.

    Args:
      run: the run's folder.
      prompt: the text to go on with.
      max_tokens: how many tokens to add; by default what the model's sequence length holds.
      temperature: 0 takes the most probable token each time; below 1 keeps closer to it.
      top_k: draw from so many of the most probable tokens.
      top_p: draw from the most probable tokens that together have this probability.
      samples: how many continuations.
      seed: of the random numbers.
      slide: go on beyond the sequence length, each token predicted from the last ones only.
      vocabulary: bytes, a SentencePiece .model or a tokenizer.json; by default that of the run's
        training data.
    """
    # Not cpu.configure(): a row does not split over cores.
    from scaling_jax.data.run_vocabulary import run_vocabulary
    from scaling_jax.models import decoding
    from scaling_jax.terminal import say
    from scaling_jax.training import loop
    from scaling_jax.training.files import read_config

    sampling = decoding.Sampling(temperature, top_k, top_p)
    if samples < 1 or (samples > 1 and temperature == 0):
        raise UserError(f"samples={samples}: give 1 or more, and only 1 where temperature is 0")
    config = read_config(run, overrides)
    words = run_vocabulary(config, vocabulary)
    ids = words.encode(prompt)
    restored = loop.restore(config, run)
    rows = decoding.generate(
        config.model,
        restored.state["params"],
        [ids] * samples,
        max_tokens=max_tokens,
        sampling=sampling,
        seed=seed,
        end_of_text=words.end_of_text,
        vocabulary_size=words.size,
        slide=slide,
    )
    # Decoded with its prompt: a character may begin in one and end in the other.
    for number, row in enumerate(rows, start=1):
        if samples > 1:
            say(f"--- sample {number} of {samples}: {len(row)} tokens")
        say(words.decode([*ids, *row]))
