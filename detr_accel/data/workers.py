"""How many loader processes there are, and how much may wait in their queues."""

from __future__ import annotations

import math
import os
import platform
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from detr_accel import host
from detr_accel.data.augment import Strong
from detr_accel.data.decode import decoded_px
from detr_accel.data.geometry import Augmentation, Size, largest_first

GIB = 2**30
_SHM = Path("/dev/shm")
_SHM_SHARE, _MEMORY_SHARE = 0.8, 0.5  # of what is free there, at most
_PROCESS_BYTES = 512 * 2**20  # what a loader process takes beside its batches, at most
_UNSEEN_PX = 12 * 10**6  # of an image that comes whole, where nobody knows its size: a photograph's
_FIRST = 2  # processes to begin with, before anything is measured


@dataclass(frozen=True)
class Loading:
    """``workers``: loader processes of a training process, 0 reads in it; ``prefetch``: micro-batches that each of them
    keeps ready."""

    workers: int
    prefetch: int


@dataclass(frozen=True)
class Machine:
    """What one process sees: the cores that it may run on, their worth under a container's limit, and free bytes."""

    host: str
    cpus: frozenset[int]
    quota: float
    memory: int
    shared_memory: int


@dataclass(frozen=True)
class Room:
    """What each training process may use: cores, bytes that may wait in queues, and loader processes for memory."""

    cores: float
    queue_bytes: int
    processes: int

    @property
    def first(self) -> int:
        """Loader processes to begin with."""
        return max(1, min(_FIRST, int(self.cores) - 1, self.processes))


def machine() -> Machine:
    """As it is now, for this process."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    memory = host.free_bytes()
    shared = shutil.disk_usage(_SHM).free if _SHM.is_dir() else memory
    return Machine(platform.node(), frozenset(cpus), _quota(), memory, shared)


def room(machines: Sequence[Machine] | None = None, queue_gib: float = 2.0) -> Room:
    """The share of one process, the same for all.

    Args:
        machines: what every process sees; None: this one alone is asked, and its neighbours counted by the launcher's
            LOCAL_WORLD_SIZE.
        queue_gib: the recipe's limit, of each process.
    """
    if machines is None:
        machines = [machine()] * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    rows = []
    for name in {m.host for m in machines}:
        here = [m for m in machines if m.host == name]
        cores = min(len(frozenset.union(*(m.cpus for m in here))), min(m.quota for m in here)) / len(here)
        memory = _MEMORY_SHARE * min(m.memory for m in here) / len(here)
        shared = _SHM_SHARE * min(m.shared_memory for m in here) / len(here)
        rows.append((cores, int(min(queue_gib * GIB, memory, shared)), max(1, int(memory / _PROCESS_BYTES))))
    return Room(*(min(column) for column in zip(*rows, strict=True)))


def _quota(root: Path = Path("/sys/fs/cgroup"), of: Path = Path("/proc/self/cgroup")) -> float:
    """Cores' worth of time that a container or job leaves to this process; infinite without a limit."""
    found = [float("inf")]
    try:
        groups = [line.split(":", 2)[2] for line in of.read_text().splitlines() if line.count(":") >= 2]
    except OSError:
        groups = []
    for group in {"/", *groups}:
        inside = Path(group.lstrip("/"))
        for part in (inside, *inside.parents):  # a limit further up holds as well
            found.append(_limit(root / part / "cpu.max"))
            found += [_limit_v1(root / kind / part) for kind in ("cpu", "cpu,cpuacct")]
    return min(found)


def _limit(file: Path) -> float:
    try:
        quota, period = file.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # none here, or "max"
        return float("inf")


def _limit_v1(folder: Path) -> float:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        return quota / int((folder / "cpu.cfs_period_us").read_text()) if quota > 0 else float("inf")
    except (OSError, ValueError):
        return float("inf")


def most(room: Room, on_gpu: bool) -> int:
    """Loader processes that the cores and the memory leave room for. A training on a GPU needs one core for itself; one
    on a CPU computes on them all, and each loader process slows it."""
    cores = int(room.cores) - 1 if on_gpu else int(room.cores) // 2
    return max(1, min(cores, room.processes))


def decoded_bytes(
    sizes_px: Iterable[Size], policy: Augmentation, strong: Strong | None, scaled: bool = True, seen: bool = True
) -> int:
    """The most that one image of a micro-batch takes as decoded, with all that a mosaic or mixup brings.

    Args:
        sizes_px: (h, w) of the images, in pixels.
        scaled: they come no larger than ``decode.decoded_px`` says, as files do; else whole.
        seen: the sizes are theirs; else they are shapes, and an image of each may have any number of pixels; one that
            comes whole is counted as a photograph.
    """
    whole = not scaled or (strong is not None and strong.crops_originals())
    most = 1
    for h, w in set(sizes_px):
        a, b = largest_first((h, w), policy)
        if whole:
            most = max(most, h * w if seen else _UNSEEN_PX)
        elif seen:
            most = max(most, math.prod(decoded_px((h, w), (a, b))))
        else:
            ratio = 2 * max(a / h, b / w)
            most = max(most, math.ceil(h * ratio + 2) * math.ceil(w * ratio + 2))
    return 3 * most * (1 if strong is None else strong.most_boxes(1))


def within(workers: int, prefetch: int | str, tasks: int, task_bytes: int, room: Room) -> tuple[Loading, str | None]:
    """Queues that hold no more than they may.

    Args:
        prefetch: micro-batches that each loader process keeps ready; ``auto``: so many that all of the next window are
            ready, and one in each process's hands, but at least 2.
        tasks: micro-batches of a window on this process.
        task_bytes: of the largest micro-batch that can come.
    Returns:
        what is used, and what to say where it is less than was asked for.
    """
    if workers == 0:
        return Loading(0, 1), None
    wanted = max(2, 1 + -(-tasks // workers)) if prefetch == "auto" else prefetch
    fitting = room.queue_bytes // max(1, task_bytes)
    if workers * wanted <= fitting:
        return Loading(workers, wanted), None
    why = f"a micro-batch takes up to {_size(task_bytes)} and {_size(room.queue_bytes)} may wait in queues"
    if fitting == 0:
        text = f"loader: {why}, so the training process reads by itself: raise data.queue_gib, or lower batch.micro"
        return Loading(0, 1), f"{text} (in a container, give more memory with --shm-size)"
    fewer = min(workers, fitting)
    fits = Loading(fewer, fitting // fewer)
    if fewer < workers:
        return fits, f"loader: {why} (data.queue_gib): data.workers {workers} -> {fewer}, each with 1 in hand"
    if prefetch == "auto":
        return fits, f"loader: {why} (data.queue_gib): each loader process keeps {fits.prefetch} ready and not {wanted}"
    return fits, f"loader: {why} (data.queue_gib): data.prefetch {wanted} -> {fits.prefetch}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes > 0.1 * GIB else f"{num_bytes / 2**20:.1f} MiB"
