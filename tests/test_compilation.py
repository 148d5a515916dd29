"""In processes of their own: the settings are made before JAX starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import jax, jax.numpy as jnp, sys
from scaling_jax import compilation
compilation.SHORTEST_SECONDS = 0.0
compilation.keep()
f = jax.jit(lambda x: jnp.linalg.qr(jnp.sin(x) @ x.T)[0].sum())
print(jax.config.jax_compilation_cache_dir, float(f(jnp.arange(64.0).reshape(8, 8))).hex())
"""


def run(**environment: str | Path) -> tuple[list[str], str]:
    """What the program prints, in words, and its complaints."""
    names = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE", "XDG_CACHE_HOME")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    given = {name: str(value) for name, value in environment.items()}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=clean | given,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split(), done.stderr


def compiled(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*-cache"))


def test_programs_are_kept_and_used_again_with_the_same_result(tmp_path):
    (folder, first), complaints = run(XDG_CACHE_HOME=tmp_path)
    kept = compiled(tmp_path)
    assert Path(folder).is_relative_to(tmp_path / "scaling_jax")
    assert kept
    assert not complaints
    (_, again), complaints = run(XDG_CACHE_HOME=tmp_path)
    assert again == first
    assert compiled(tmp_path) == kept
    assert not complaints
    for path in kept:  # as a kill while it is written leaves it
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert run(XDG_CACHE_HOME=tmp_path)[0][1] == first


@pytest.mark.slow
def test_the_users_settings_are_left_alone(tmp_path):
    own, home = tmp_path / "own", tmp_path / "home"
    (folder, _), _ = run(JAX_COMPILATION_CACHE_DIR=own, XDG_CACHE_HOME=home)
    assert folder == str(own)
    run(JAX_ENABLE_COMPILATION_CACHE="0", XDG_CACHE_HOME=home)
    assert not compiled(home)


def test_a_folder_that_cannot_be_made_is_no_reason_to_fail(tmp_path):
    (tmp_path / "file").touch()
    (folder, _), complaints = run(XDG_CACHE_HOME=tmp_path / "file")
    assert folder == "None"
    assert not complaints
