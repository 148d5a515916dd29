import os
import subprocess
import sys
from pathlib import Path

import pytest

from scaling_jax import cpu

FAULTS = """
import resource, sys
from scaling_jax import cpu
if "configure" in sys.argv:
    cpu._arrange_heap()
for turn in range(8):
    b"x" * (64 << 20)
    if turn == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


MAPPINGS = """
from scaling_jax import cpu
cpu.configure()
print(open("/proc/self/smaps").read())
"""


def python(*arguments, **environment):
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    }
    result = subprocess.run(
        [sys.executable, *arguments],
        env=inherited | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()


@pytest.mark.parametrize(
    ("cores", "devices"), [(1, 1), (2, 2), (3, 2), (4, 4), (7, 4), (8, 8), (12, 8), (96, 8)]
)
def test_devices_are_a_power_of_two_up_to_the_cores_and_eight(cores, devices):
    assert cpu._devices_for(cores) == devices


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({}, cpu._devices_for(os.cpu_count() or 1)),
        ({"JAX_NUM_CPU_DEVICES": "3"}, 3),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, 5),
    ],
    ids=str,
)
def test_each_core_becomes_a_device_unless_the_user_chose(environment, devices):
    code = "from scaling_jax import cpu; cpu.configure(); import jax; print(jax.device_count())"
    assert python("-c", code, **environment) == str(devices)


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages on this system"
)
def test_the_heap_may_have_huge_pages():
    flags, size = [], 0
    for line in python("-c", MAPPINGS).splitlines():
        if line.startswith("Size:"):
            size = int(line.split()[1]) << 10
        if line.startswith("VmFlags:"):
            flags.append((size, line.split()))
    assert [size for size, set_ in flags if "hg" in set_] == [cpu.HEAP - cpu.HUGE_PAGE]


@pytest.mark.parametrize(
    ("installed", "device", "chosen", "platforms"),
    [
        ({"libtpu"}, "null", {}, "cpu"),
        ({"libtpu"}, "accel0", {}, None),
        ({"libtpu"}, "vfio/0", {}, None),
        ({"libtpu", "jax_plugins"}, "null", {}, None),
        ({"libtpu"}, "null", {"JAX_PLATFORMS": "tpu,cpu"}, "tpu,cpu"),
        (set(), "null", {}, None),
    ],
)
def test_a_tpu_is_passed_over_only_where_there_is_none(
    monkeypatch, tmp_path, installed, device, chosen, platforms
):
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: name if name in installed else None
    )
    (tmp_path / device).parent.mkdir(exist_ok=True)
    (tmp_path / device).touch()
    environment = dict(chosen)
    cpu.pass_over_absent_tpu(environment, tmp_path)
    assert environment.get("JAX_PLATFORMS") == platforms


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc that is told")
def test_freed_memory_is_kept():
    """Counted in page faults of the kernel, a few thousand for 64 MiB that are new."""
    mapped_anew, kept = (int(python("-c", FAULTS, *how)) for how in ([], ["configure"]))
    assert kept < mapped_anew / 10
