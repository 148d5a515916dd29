"""With which vocabulary a run reads text."""

from pathlib import Path

from scaling_jax.config import RunConfig
from scaling_jax.data import vocabularies
from scaling_jax.data.shards import INDEX_FILE, Shards
from scaling_jax.data.vocabularies import Vocabulary
from scaling_jax.errors import UserError


def run_vocabulary(config: RunConfig, name: str | None) -> Vocabulary:
    """The vocabulary called `name`, or that of the shards which the run was trained on.

    Raises:
      UserError: there is none, it has changed, or it has more ids than the model.
    """
    if name is not None:
        found = vocabularies.vocabulary(name)
    else:
        folder = Path(config.data.folder) / next(iter(config.data.parts)) / "train"
        if not (folder / INDEX_FILE).is_file():
            raise UserError(
                f"{folder / INDEX_FILE}: not found, and it would say which vocabulary the run was "
                "trained with: give --vocabulary"
            )
        index = Shards.open(folder).index
        found = vocabularies.vocabulary(index.vocabulary)
        if found.sha256 != index.vocabulary_sha256:
            raise UserError(
                f"{index.vocabulary}: not the vocabulary that {folder} was prepared with: "
                "its content has changed"
            )
    if found.size > config.model.vocabulary_size:
        raise UserError(
            f"the vocabulary has {found.size} ids, the model {config.model.vocabulary_size}: "
            "it is not the one that the run was trained with"
        )
    return found
