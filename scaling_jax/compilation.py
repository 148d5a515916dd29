"""Compiled programs are kept on disk, so that a restart does not compile them again.

They lie in JAX_COMPILATION_CACHE_DIR, or in the user's cache folder; JAX_ENABLE_COMPILATION_CACHE=0
switches it off. Machine code for CPUs is kept apart by what the CPU can do: home folders are shared
between machines. What cannot be read or written is compiled. The folder may be removed at any time.
"""

import hashlib
import os
import platform
from pathlib import Path

# Compiling anew what takes less is as quick as reading it.
SHORTEST_SECONDS = 0.5


def keep() -> None:
    """Call once, before the first compilation. Settings the user has made are left alone."""
    import jax

    if jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return
    folder = _cache_folder() / "scaling_jax" / "compiled" / _cpu()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # no home, or one that cannot be written
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST_SECONDS)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _cpu() -> str:
    """Names what this machine's CPU can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        known = sorted(
            {line for line in lines if line.startswith(("flags", "Features", "model name"))}
        )
    except OSError:
        known = [platform.processor()]
    text = "\n".join([platform.machine(), *known])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
