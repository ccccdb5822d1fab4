"""How much memory this process has needed at most."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import torch


def peak_gib(device: torch.device | str = "cpu") -> float:
    """Most memory held so far, in GiB: on a GPU what the allocator handed out, else the process's resident memory.

    Neither reads the device. The resident peak is the operating system's and never falls; loader processes are apart.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return _peak_resident_bytes() / 2**30


def start_peak(device: torch.device) -> int:
    """Forget the peak so far; returns the bytes held now: by the allocator of a GPU, or by this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_reserved(device)
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
    return psutil.Process().memory_info().rss


def peak_bytes(device: torch.device) -> int:
    """The most since ``start_peak``, in the same count."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else _peak_resident_bytes()


def free_bytes(device: torch.device) -> int:
    """Memory that may still be taken: of the GPU, or of the machine and its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    for names in _CGROUP_FILES:
        try:
            limit, used, stat = (Path("/sys/fs/cgroup", name).read_text() for name in names)
            cache = next(
                (int(x.split()[1]) for x in stat.splitlines() if x.startswith(("inactive_file ", "total_inac"))), 0
            )
            free = min(free, max(0, int(limit) - int(used) + cache))  # file pages are given back when memory is wanted
        except (OSError, ValueError):
            continue  # no such group, or no limit ("max")
    return free


_CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def taken_fraction(device: torch.device) -> float:
    """How much of all memory is taken, 0..1: of a GPU by tensors at their peak (what the allocator merely keeps can be
    had), or of the machine, or its container, by everything."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / torch.cuda.get_device_properties(device).total_memory
    total = psutil.virtual_memory().total
    for limit, *_ in _CGROUP_FILES:
        try:
            total = min(total, int(Path("/sys/fs/cgroup", limit).read_text()))
        except (OSError, ValueError):
            continue  # no such group, or no limit ("max")
    return 1 - free_bytes(device) / max(1, total)


def reserved_gib(device: torch.device | str) -> float | None:
    """Most memory that the allocator took from a GPU, in GiB: what other programs see. None without a GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return None


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage: Linux hands ru_maxrss on to the program that a process starts
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
