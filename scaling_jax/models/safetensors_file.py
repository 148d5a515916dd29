"""Files of named tensors in the safetensors format."""

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401 - lets NumPy know bfloat16 by name
import numpy as np
import safetensors
import safetensors.numpy

from scaling_jax import atomic
from scaling_jax.errors import UserError

SUFFIX = ".safetensors"


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file.

    Raises:
      UserError: there is no such file, it is damaged, or a type is not one of NumPy's or bfloat16.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    tensors = {}
    try:
        with safetensors.safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                tensors[name] = file.get_tensor(name)
    except (safetensors.SafetensorError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not readable as safetensors: {error}") from None
    return tensors


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors so that PyTorch users' tools read them, atomically."""
    plain = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    with atomic.replacing(path) as temporary:
        safetensors.numpy.save_file(plain, temporary, metadata={"format": "pt"})
