"""Compiled programs are kept on disk, so that the second start of a command does not compile again."""

import os
from pathlib import Path

import jax


def keep_compiled_programs() -> None:
    """Let jax keep what takes it over a second to compile, in `crossvit/jax` of the user's cache folder.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false turns it off. A program is found
    again only for the same jax, devices, shapes and compiler flags. Where the folder cannot be written, jax warns and
    goes on.
    """
    if jax.config.jax_compilation_cache_dir is None:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(caches, "crossvit", "jax")))
