"""The memory of the machine, or of the container."""

import os
from pathlib import Path

_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # version 2, 1


def host_memory() -> int:
    """Bytes that the programs on this machine, or in this container, may take together."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _LIMITS:
        try:
            limit = path.read_text().strip()
        except OSError:
            continue
        memory = min(memory, int(limit)) if limit.isdigit() else memory  # "max": no limit
    return memory
