"""The real step compiled for TPU slices: slow, and only where libtpu is installed."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from scaling_jax.config import MeshConfig, ModelConfig
from scaling_jax.errors import UserError
from scaling_jax.planning import ahead_of_time, memory, slices

TINY = ModelConfig(
    width=256,
    layers=2,
    heads=2,
    vocabulary_size=1024,
    sequence_length=512,
    compute_dtype="bfloat16",
    remat="block",
)
MESH = MeshConfig(2, 2, 1)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra plan)"
)


@needs_libtpu
@pytest.mark.slow
def test_a_tiny_step_compiles_for_four_chips_and_takes_no_more_than_the_formula():
    done = ahead_of_time.compile_step(TINY, 16, 1, MESH, slices.find("v5e-4"))
    formula = memory.estimate(TINY, 16, 1, MESH)
    assert done.fits
    assert 0 <= done.argument_bytes - formula.arguments < 0.05 * formula.arguments
    # Of so small a step much is kept in the chip's vector memory.
    assert formula.arguments < done.total_bytes < 1.2 * formula.peak
    kinds = {(each.kind, each.dtype) for each in done.sent}
    assert ("all-gather", "bf16") in kinds
    assert not {dtype for kind, dtype in kinds if kind in ("all-reduce", "reduce-scatter")} - {
        "f32"
    }


@needs_libtpu
@pytest.mark.slow
def test_a_step_that_does_not_fit_is_an_answer_and_not_a_crash():
    wide = dataclasses.replace(TINY, width=16384, heads=128, layers=4)
    done = ahead_of_time.compile_step(wide, 16, 1, MeshConfig(4, 1, 1), slices.find("v5e-4"))
    assert not done.fits
    assert done.total_bytes > 16 * 2**30


@needs_libtpu
def test_a_batch_that_cannot_be_split_is_one_line():
    with pytest.raises(UserError, match="batch_size=6 is not divisible"):
        ahead_of_time.compile_step(TINY, 6, 1, MESH, slices.find("v5e-4"))


def test_without_libtpu_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install .*\[plan\]"):
        ahead_of_time.compile_step(TINY, 16, 1, MESH, slices.find("v5e-4"))


def test_a_compiler_that_dies_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(ahead_of_time, "check_installed", lambda: None)
    dying = tmp_path / "python"
    for body, words in (
        ("kill -ABRT $$", "ended by signal 6"),
        ("echo 'x.SomeError: boom' >&2; exit 3", "boom"),
    ):
        dying.write_text(f"#!/bin/sh\n{body}\n")
        dying.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(dying))
        with pytest.raises(UserError, match=words) as error:
            ahead_of_time.compile_step(TINY, 16, 1, MESH, slices.find("v5e-4"))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory. Used 17.25G of 15.75G hbm. Exceeded", 17.25),
        ("Used 900.00M of 15.75G hbm.", 900 / 1024),
        ("HLO temporaries (230.08G) exceeds available HBM (15.75G).", 230.08),
        ("something else", 0),
    ],
)
def test_what_would_be_used_is_read_from_the_refusal(message, size):
    assert ahead_of_time.used_bytes(message) == pytest.approx(size * 2**30, rel=1e-6)


@needs_libtpu
@pytest.mark.slow
def test_slices_have_the_chips_and_hosts_that_the_compiler_knows():
    program = (
        "import json; from scaling_jax.planning import slices; "
        "from scaling_jax.planning.compile_child import _devices as devices; "
        "found = {name: devices(f'{each.chip.name}:{each.shape}', 1) "
        "for name, each in slices.SLICES.items() if each.chips <= 512}; "
        "print(json.dumps({name: [len(each), len({one.process_index for one in each})] "
        "for name, each in found.items()}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | ahead_of_time.ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) > 25
    # To the compiler eight chips are two hosts; Google Cloud has machines with all eight.
    hosts = {name: 1 if name in ("v5e-8", "v6e-8") else count for name, (_, count) in found.items()}
    assert {name: chips for name, (chips, _) in found.items()} == {
        name: slices.find(name).chips for name in found
    }
    assert hosts == {name: slices.find(name).hosts for name in found}
