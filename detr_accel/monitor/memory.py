"""How much memory this process has needed at most."""

from __future__ import annotations

import sys

import torch


def peak_gib(device: torch.device | str = "cpu") -> float:
    """Most memory held so far, in GiB: on a GPU what the allocator handed out, else the process's resident memory.

    Neither reads the device. The resident peak is the operating system's and never falls; loader processes are apart.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return _peak_resident_bytes() / 2**30


def reserved_gib(device: torch.device | str) -> float | None:
    """Most memory that the allocator took from a GPU, in GiB: what other programs see. None without a GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return None


def _peak_resident_bytes() -> int:
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere
