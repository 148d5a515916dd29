"""The plan of a run before its first step: how many steps, exactly how many tokens."""

import dataclasses
import warnings

from scaling_jax.config import OptimizerConfig, RunConfig
from scaling_jax.errors import UserError
from scaling_jax.models import counting


@dataclasses.dataclass(frozen=True)
class Budget:
    """`tokens` = `steps` x `tokens_per_step` is what is really trained on: the laws' D.

    `tokens_asked` is what the config asks for, less than one step more. No step before
    `decay_start` depends on how long the run is: a longer run begins with the same.
    """

    params: int
    tokens_asked: int
    steps: int
    tokens_per_step: int
    decay_start: int

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
      UserError: the budget is less than one step, or holds no warm-up and decay.
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
    decay_start = _decay_start(config.optimizer, steps)
    if config.optimizer.warmup_steps >= steps:
        warnings.warn(
            f"warm-up of {config.optimizer.warmup_steps} steps is not shorter than the run of "
            f"{steps}: its learning rate only rises",
            stacklevel=2,
        )
    return Budget(params, wished, steps, tokens_per_step, decay_start)


def _decay_start(optimizer: OptimizerConfig, steps: int) -> int:
    """How many of the first steps do not depend on the length of the run; of a cosine, none."""
    if optimizer.schedule == "cosine":
        return 0
    if optimizer.schedule == "constant":
        return steps
    decay_steps = max(1, round(optimizer.decay_fraction * steps))
    if optimizer.warmup_steps + decay_steps > steps:
        raise UserError(
            f"a warm-up of {optimizer.warmup_steps} steps and a decay of {decay_steps} do not fit "
            f"into a run of {steps}: give more tokens, a smaller optimizer.warmup_steps or a "
            "smaller optimizer.decay_fraction"
        )
    return steps - decay_steps
