"""The options of commands that several processes run together."""

import dataclasses
from contextlib import AbstractContextManager
from typing import Annotated

from cyclopts import Parameter


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """Several processes on one run: on Cloud TPU, GKE and SLURM they find each other unasked.

    Attributes:
      coordinator: HOST:PORT of process 0.
      processes: how many there are; 1 keeps to this one, whatever the environment says.
      process_id: which this one is, from 0.
      patience: seconds to wait until all are there.
    """

    coordinator: Annotated[str | None, Parameter(env_var="JAX_COORDINATOR_ADDRESS")] = None
    processes: Annotated[int | None, Parameter(env_var="JAX_NUM_PROCESSES")] = None
    process_id: Annotated[int | None, Parameter(env_var="JAX_PROCESS_ID")] = None
    patience: int = 120

    def joined(self) -> AbstractContextManager[None]:
        """All processes, together while the block is open; before JAX is asked for devices."""
        from scaling_jax.training import distributed

        return distributed.joined(self.coordinator, self.processes, self.process_id, self.patience)
