"""Slices by their Cloud names, checked against figures of the documentation."""

import pytest

from scaling_jax.errors import UserError
from scaling_jax.planning import slices
from scaling_jax.planning.slices import GIB, SLICES
from scaling_jax.training import throughput


@pytest.mark.parametrize(
    ("name", "chips", "shape", "hosts"),
    [
        ("v4-8", 4, "2x2x1", 1),
        ("v4-32", 16, "2x2x4", 4),
        ("v4-4096", 2048, "8x16x16", 512),
        ("v5p-128", 64, "4x4x4", 16),
        ("v5p-256", 128, "4x4x8", 32),
        ("v5p-12288", 6144, "16x16x24", 1536),
        ("v5litepod-1", 1, "1x1", 1),
        ("v5litepod-8", 8, "2x4", 1),
        ("v5litepod-16", 16, "4x4", 4),
        ("v6e-256", 256, "16x16", 64),
    ],
)
def test_a_cloud_name_gives_chips_topology_and_hosts(name, chips, shape, hosts):
    found = slices.find(name)
    assert (found.chips, found.shape, found.hosts) == (chips, shape, hosts)
    assert found.chips_per_host * found.hosts == chips


def test_every_slice_is_found_by_its_own_name():
    assert all(slices.find(name) is made and made.name == name for name, made in SLICES.items())
    assert slices.find("v5e-16") is slices.find("v5litepod-16")


def test_peaks_are_those_that_mfu_is_measured_with():
    kinds = {"v4": "TPU v4", "v5e": "TPU v5e", "v5p": "TPU v5p", "v6e": "TPU v6e"}
    for made in SLICES.values():
        assert made.chip.peak_flops == throughput.PEAK_FLOPS[kinds[made.chip.name]]


def test_memory_of_each_chip():
    memory = {made.chip.name: made.chip.hbm_bytes / GIB for made in SLICES.values()}
    assert memory == {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("v5p-100", "did you mean 'v5p-128'?"),
        ("v5e-12", "did you mean 'v5e-16'?"),
        ("v5p-4", "did you mean 'v5p-8'?"),
        ("v5x-16", "did you mean 'v5"),
        ("v5p", "no such TPU slice"),
        ("", "no such TPU slice"),
        ("v5p-²", "no such TPU slice"),
        ("v5p-0", "did you mean 'v5p-8'?"),
    ],
)
def test_an_unknown_slice_is_one_line_with_the_nearest(name, hint):
    with pytest.raises(UserError, match="slice") as error:
        slices.find(name)
    assert hint in str(error.value)
    assert "\n" not in str(error.value)
