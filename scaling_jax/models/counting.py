"""How many parameters a model has and how many floating-point operations it takes.

Two counts of each are in use and are never mixed: laws take the paper's N and C = 6 N D; model
FLOPs utilisation takes the matrix products and causal attention that are really done.
"""

from scaling_jax.config import ModelConfig


def nominal_params(model: ModelConfig) -> int:
    """N of the laws: both embeddings, norms and matrices, but no query and key gains.

    Source: Gadre et al. 2024, table 3 (their counts leave the gains of qk-norm out).
    """
    width, hidden = model.width, model.hidden_width
    block = 4 * width**2 + 3 * width * hidden + 2 * width
    return 2 * model.vocabulary_size * width + model.layers * block + width


def actual_params(model: ModelConfig) -> int:
    """Every trained number of the model."""
    gains = 2 * model.layers * model.width if model.qk_norm else 0
    return nominal_params(model) + gains


def flops_6nd(params: float, tokens: float) -> float:
    """Training compute C of the laws (Gadre et al. 2024, section 2)."""
    return 6.0 * params * tokens


def flops_model_per_token(model: ModelConfig) -> float:
    """Operations of forward and backward pass for one token, averaged over a sequence.

    A matrix product of weights costs 2 operations a weight; attention at position t reads t keys
    and t values, (sequence_length + 1) / 2 on average. The backward pass costs twice the forward.
    """
    width = model.width
    weights = model.layers * (4 * width**2 + 3 * width * model.hidden_width)
    weights += model.vocabulary_size * width
    attention = model.layers * 2 * width * (model.sequence_length + 1) / 2
    return 3.0 * 2.0 * (weights + attention)


def activations_per_token(model: ModelConfig) -> int:
    """Numbers that the forward pass makes of a token in one layer, half of the scores included."""
    scores = model.heads * model.sequence_length // 2
    return 10 * model.width + 3 * model.hidden_width + scores
