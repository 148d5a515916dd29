"""The plan of a run before its first step: how many steps, exactly how many tokens."""

import dataclasses
import warnings

from scaling_jax.config import RunConfig
from scaling_jax.errors import UserError
from scaling_jax.models import counting


@dataclasses.dataclass(frozen=True)
class Budget:
    """`tokens` = `steps` x `tokens_per_step` is what is really trained on: the laws' D.

    `tokens_asked` is what the config asks for, less than one step more.
    """

    params: int
    tokens_asked: int
    steps: int
    tokens_per_step: int

    @property
    def tokens(self) -> int:
        """D: sequences x sequence length over the whole run."""
        return self.steps * self.tokens_per_step

    @property
    def token_multiplier(self) -> float:
        """M = D / N."""
        return self.tokens / self.params

    @property
    def flops_6nd(self) -> float:
        """C = 6 N D."""
        return counting.flops_6nd(self.params, self.tokens)

    @property
    def flops_asked(self) -> float:
        """C of the tokens asked for, which is how the paper counts a run."""
        return counting.flops_6nd(self.params, self.tokens_asked)


def plan(config: RunConfig) -> Budget:
    """Rounds the wished-for tokens down to whole steps, as open_lm does.

    Warns if the learning rate never leaves its warm-up.

    Raises:
      UserError: the budget is less than one step.
    """
    params = counting.nominal_params(config.model)
    tokens_per_step = config.batch_size * config.model.sequence_length
    wished = config.tokens
    if wished is None:
        assert config.token_multiplier is not None  # RunConfig has exactly one of the two
        wished = round(config.token_multiplier * params)
    steps = wished // tokens_per_step
    if steps < 1:
        raise UserError(
            f"a budget of {wished:,} tokens is less than one step of {tokens_per_step:,} "
            f"(batch_size x sequence_length): give more tokens or a smaller batch_size"
        )
    if config.optimizer.warmup_steps >= steps:
        warnings.warn(
            f"warm-up of {config.optimizer.warmup_steps} steps is not shorter than the run of "
            f"{steps}: its learning rate never starts to fall",
            stacklevel=2,
        )
    return Budget(params, wished, steps, tokens_per_step)
