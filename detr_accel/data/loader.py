"""Tasks through worker processes, in order. One loader serves a whole training, so its workers live across epochs."""

from __future__ import annotations

import atexit
import functools
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from detr_accel.data.collate import make_batch, plan_batch
from detr_accel.data.cost import TimedMaking
from detr_accel.data.device import PlannedBatch
from detr_accel.data.sampler import Task, TrainTasks
from detr_accel.data.source import Source
from detr_accel.structures import Batch, Lost, UserError

_MOST_LIKELY = (
    "most often for lack of memory or shared memory: lower data.workers, data.queue_gib or batch.micro (in a "
    "container, give more with --shm-size)"
)
_GRACE_SECONDS = 30
_ORPHAN_SECONDS = 1.0


class _Tasks(Dataset):
    """A task goes in, a batch comes out; a user's mistake comes out as its sentence, not as a worker's traceback."""

    def __init__(
        self, source: Source, mean: tuple[float, ...], std: tuple[float, ...], on_device: bool, leave_out: bool
    ):
        self.mean, self.std = mean, std
        make = functools.partial(plan_batch if on_device else make_batch, leave_out=leave_out)
        self.make = TimedMaking(source, make)

    def __getitem__(self, task: Task) -> Batch | PlannedBatch | UserError:
        try:
            batch = self.make(task, self.mean, self.std)
            if get_worker_info() is not None:
                begun = time.perf_counter()
                # The move is due anyway; left to the queue's own thread, a full /dev/shm would be an endless wait.
                batch.share_memory_()
                batch.spent.pixels += time.perf_counter() - begun
            return batch
        except UserError as error:
            return error
        except MemoryError:
            return UserError(f"a loader process ran out of memory, {_MOST_LIKELY}")
        except RuntimeError as error:
            if "shared memory" not in str(error) and "No space left" not in str(error):
                raise
            return UserError(f"a loader process found no room in shared memory, {_MOST_LIKELY}")


def start_worker(_: int) -> None:
    """Terminals and schedulers send stop requests to the whole group. The training process answers: it finishes its
    window, for which it needs the workers, and ends them. A worker told to end and then forgotten ends by itself."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # with success: a death by the signal would be raised in the training process, wherever it is by then
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))
    sys.excepthook = functools.partial(_unless_orphaned, os.getppid(), sys.excepthook)


def _unless_orphaned(parent: int, hook: Callable, *error) -> None:
    """A training process killed while a batch changes hands is told of by others, not by a traceback from here."""
    until = time.monotonic() + _ORPHAN_SECONDS
    while os.getppid() == parent:  # its sockets close a little before the system counts it as gone
        if time.monotonic() > until:
            return hook(*error)
        time.sleep(0.02)


_open_streams: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Before multiprocessing's own exit handler, which ends children by SIGTERM and waits for them."""
    for stream in list(_open_streams):
        _close(stream)


def _close(stream: Iterator) -> None:
    stop = getattr(stream, "_shutdown_workers", None)  # absent without workers; what the iterator's __del__ calls
    if stop is not None:
        stop()


def batches(
    source: Source,
    tasks: Iterable[Task],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
    keep_faults: bool = False,
    on_device: bool = False,
    leave_out: bool = False,
) -> Iterator[Batch | PlannedBatch | UserError]:
    """One batch for each task, in the order of the tasks.

    Closing the iterator ends the workers. The global random generators are neither read nor moved.

    Args:
        workers: processes; 0 works in the calling one.
        prefetch: tasks that each worker keeps ready.
        pin_memory: page-locked batches, for asynchronous copies to a GPU.
        keep_faults: yield the error of a broken record in the place of its batch, and go on.
        on_device: hand over decoded images with their plans; ``to`` makes the batch of them.
        leave_out: an image that cannot be read leaves its place empty, and is named in its batch's ``lost``.
    Raises:
        UserError: a record is broken, or the operating system ended a worker.
    """
    loader = DataLoader(
        _Tasks(source, mean, std, on_device, leave_out),
        sampler=tasks,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=start_worker,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # otherwise the loader's base seed is drawn from, and moves, the global generator
    )
    stream = iter(loader)
    _open_streams.add(stream)
    try:
        for batch in stream:
            if isinstance(batch, UserError) and not keep_faults:
                raise batch
            yield batch
    except (RuntimeError, OSError, EOFError) as error:  # the latter two: it died while a batch changed hands
        raise worker_death(error) or _found_dead(stream) or error from None
    finally:
        _close(stream)  # not left to garbage collection: a traceback may hold the iterator


def worker_death(error: RuntimeError) -> UserError | None:
    """The sentence for a loader process that the operating system ended; None for any other error.

    PyTorch raises it from a signal handler, so it can surface in the middle of any statement of the training process.
    """
    text = str(error)
    if "DataLoader worker" not in text or not ("killed by signal" in text or "exited unexpectedly" in text):
        return None
    return _death(text.split(". ")[0].strip())


def _found_dead(stream: Iterator) -> UserError | None:
    workers = {worker.sentinel: worker for worker in getattr(stream, "_workers", [])}
    gone = [workers[sentinel] for sentinel in connection.wait(list(workers), timeout=1)]
    for worker in gone:
        worker.join(1)  # its connections close a little before its exit code is known
    dead = [worker.exitcode for worker in gone if worker.exitcode not in (None, 0)]
    return _death(f"exit code {dead[0]}, where -9 is SIGKILL") if dead else None


def _death(how: str) -> UserError:
    return UserError(f"a loader process was ended from outside ({how}), {_MOST_LIKELY}")


def largest_canvas(micro_batches: Iterable[Batch | PlannedBatch]) -> tuple[int, int]:
    """The (h, w) that holds every one of them, also those whose images are all lost; (0, 0) of none."""
    sizes = [(0, 0), *(b.canvas_px for b in micro_batches)]
    return max(h for h, _ in sizes), max(w for _, w in sizes)


def without_lost(micro_batches: list[Batch]) -> tuple[list[Batch], list[Lost]]:
    """The micro-batches that have images, and what was lost of all of them."""
    return [b for b in micro_batches if len(b)], [lost for b in micro_batches for lost in b.lost]


def windows(stream: Iterator[Batch], tasks: TrainTasks) -> Iterator[list[Batch]]:
    """Group the batches of ``tasks`` by window: the micro-batches of this rank, none where its share is empty."""
    try:
        for window in range(tasks.start_window, tasks.end_window):
            yield [next(stream) for _ in range(tasks.num_tasks(window))]
    finally:
        stream.close()
