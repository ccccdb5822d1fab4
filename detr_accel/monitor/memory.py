"""How much memory this process has needed at most."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import torch

from detr_accel import host


def peak_gib(device: torch.device | str = "cpu") -> float:
    """Most memory held so far, in GiB: on a GPU what the allocator handed out, else the process's resident memory.

    Neither reads the device. The resident peak is the operating system's and never falls; loader processes are apart.
    """
    device = torch.device(device)
    return max(_peak(device), _before.get(device.type, 0.0))


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return _peak_resident_bytes() / 2**30


def start_peak(device: torch.device) -> int:
    """Forget the peak so far; returns the bytes held now: by the allocator of a GPU, or by this process."""
    _before.clear()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_reserved(device)
    if _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")
    return psutil.Process().memory_info().rss


def peak_bytes(device: torch.device) -> int:
    """The most since ``start_peak``, in the same count."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else _peak_resident_bytes()


class Phases:
    """The most memory held in each phase of the windows since the last row: forward, backward, optimizer, evaluation.

    On a GPU this is the allocator's own count, which costs nothing there. On Linux without one it is the process's
    resident memory, whose high-water mark is a file of the operating system: 0.04 ms a phase. Nothing reads the device.

    Args:
        on: False measures nothing (processes that do not report).
    """

    def __init__(self, device: torch.device, on: bool = True) -> None:
        self.device = device
        self.able = on and (device.type == "cuda" or _CLEAR_REFS.exists())
        self.on = self.able
        self.planned_gib: float | None = None
        self._peaks: dict[str, float] = {}
        self._phase: str | None = None

    def expect(self, planned_gib: float | None) -> list[str]:
        """Note what the plan says, to be logged beside what is measured; returns the words about it."""
        self.planned_gib = planned_gib
        if planned_gib is None:
            return []
        beside = "" if self.device.type == "cuda" else ", beside Python and its libraries"
        return [f"memory: the plan is {planned_gib:.2f} GiB at the most{beside}"]

    def watch(self, logged: bool) -> None:
        """Before a window: will there be a row of it? Without a GPU, others are not looked at."""
        self.on = self.able and (logged or self.device.type == "cuda")

    def begin(self, phase: str | None) -> None:
        """From here on memory is this phase's, and no longer that of the one before; None: nobody's."""
        if not self.on:
            return
        peak = _restart(self.device)
        if self._phase is not None:
            self._peaks[self._phase] = max(self._peaks.get(self._phase, 0.0), peak)
        self._phase = phase

    def take(self) -> dict[str, float]:
        """``forward_gib`` and its like, where they were measured, and ``planned_gib``; starts anew."""
        self.begin(None)
        row = {f"{phase}_gib": peak for phase, peak in self._peaks.items()}
        self._peaks = {}
        return row if self.planned_gib is None else row | {"planned_gib": self.planned_gib}


def _restart(device: torch.device) -> float:
    """The most since the counters began, in GiB; they begin anew, and ``peak_gib`` remembers."""
    peak = _peak(device)
    _before[device.type] = max(peak, _before.get(device.type, 0.0))
    if device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved(device) / 2**30
        _before["reserved"] = max(reserved, _before.get("reserved", 0.0))
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _CLEAR_REFS.write_text("5")
    return peak


_before: dict[str, float] = {}  # kind of device, or "reserved" -> the most before its counters began anew, in GiB
_CLEAR_REFS = Path("/proc/self/clear_refs")


def free_bytes(device: torch.device) -> int:
    """Memory that may still be taken: of the GPU, or of the machine and its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host.free_bytes()


def taken_fraction(device: torch.device) -> float:
    """How much of all memory is taken, 0..1: of a GPU by tensors at their peak (what the allocator merely keeps can be
    had), or of the machine, or its container, by everything."""
    if device.type == "cuda":
        peak = max(_peak(device), _before.get("cuda", 0.0))  # the counters begin anew in each phase of a window
        return peak * 2**30 / torch.cuda.get_device_properties(device).total_memory
    return 1 - free_bytes(device) / max(1, host.total_bytes())


def reserved_gib(device: torch.device | str) -> float | None:
    """Most memory that the allocator took from a GPU, in GiB: what other programs see. None without a GPU."""
    if torch.device(device).type == "cuda":
        return max(torch.cuda.max_memory_reserved(device) / 2**30, _before.get("reserved", 0.0))
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host; libraries say it in several ways."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and says_out_of_memory(str(error))


def says_out_of_memory(text: str) -> bool:
    """The same of an error's words, which is all that another process hears of it."""
    told = (
        "out of memory", "outofmemory", "memoryerror", "can't allocate memory", "cudnn_status_alloc_failed",
        "cublas_status_alloc_failed",
    )  # fmt: skip
    return any(words in text.lower() for words in told)
