"""The child process of `ahead_of_time`: one request on stdin, the compiler's answer on stdout.

A process of its own, because libtpu reads its settings from the environment when it is loaded and
ends the process where it goes wrong.
"""

import json
import sys
import time
from typing import Any

import jax
from jax.experimental import topologies

from scaling_jax import config as configs
from scaling_jax import mesh as meshes
from scaling_jax.config import MeshConfig, ModelConfig
from scaling_jax.errors import UserError
from scaling_jax.planning.collectives import collectives
from scaling_jax.training import step


def main() -> None:
    """Compiles what stdin asks for; the last line of stdout is a JSON object."""
    request = json.load(sys.stdin)
    try:
        answer = _compile(request)
    except UserError as error:
        answer = {"user_error": str(error)}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        answer = {"exhausted": str(error)}
    print(json.dumps(answer))


def _compile(request: dict[str, Any]) -> dict[str, Any]:
    model = configs.build(ModelConfig, request["model"], source="model")
    devices = _devices(request["topology"], request["slices"])
    mesh = meshes.make_mesh(configs.build(MeshConfig, request["mesh"], source="mesh"), devices)
    start = time.perf_counter()
    lowered = step.lower(model, request["batch_size"], request["microbatches"], mesh)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    memory = compiled.memory_analysis()
    assert memory is not None  # which only other compilers leave out
    sent = collectives(compiled.as_text() or "")
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "trace_seconds": traced - start,
        "compile_seconds": done - traced,
        "collectives": [[each.kind, each.dtype, each.bytes, each.repeats] for each in sent],
    }


def _devices(topology: str, slices: int) -> list[Any]:
    """The devices of slices that need not exist; a single chip is taken from a host of four."""
    kind, _, shape = topology.partition(":")
    alone = set(shape.split("x")) == {"1"}
    settings: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if kind in ("v4", "v5p"):
        # The two cores of a chip as one device, as training finds them.
        settings["chip_config_name"] = "megacore"
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{kind}:2x2" if alone else topology, **settings
    )
    return described.devices[:1] if alone else described.devices


if __name__ == "__main__":
    main()
