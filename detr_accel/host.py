"""What the machine, or the container that this process runs in, still has to give."""

from __future__ import annotations

from pathlib import Path

import psutil

_GROUPS = Path("/sys/fs/cgroup")
_FILES = (  # limit, use, statistics: version 2, version 1
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def free_bytes() -> int:
    """Main memory that may still be taken."""
    free = psutil.virtual_memory().available
    for names in _FILES:
        try:
            limit, used, stat = ((_GROUPS / name).read_text() for name in names)
            cache = next(
                (int(x.split()[1]) for x in stat.splitlines() if x.startswith(("inactive_file ", "total_inac"))), 0
            )
            free = min(free, max(0, int(limit) - int(used) + cache))  # file pages are given back when memory is wanted
        except (OSError, ValueError):
            continue  # no such group, or no limit ("max")
    return free


def total_bytes() -> int:
    """Main memory that there is, or the container's limit."""
    total = psutil.virtual_memory().total
    for limit, *_ in _FILES:
        try:
            total = min(total, int((_GROUPS / limit).read_text()))
        except (OSError, ValueError):
            continue
    return total
