"""The windows of this process, and how many loader processes make them."""

from __future__ import annotations

from statistics import median

from accelerate.utils import gather_object

from detr_accel import data
from detr_accel.monitor.feeding import MARGIN, needed_workers
from detr_accel.structures import Batch, LoaderTime
from detr_accel.train.parts import Parts


class Feeder:
    """Iterates over the windows from one on.

    With ``data.workers: auto`` it begins with a few loader processes. What the first windows took (each batch brings
    what its making took) settles how many there should be, and the loader is opened anew at the window in hand. A
    window is a function of its number alone, so nothing else changes; a run that is resumed measures again.

    Made on every process alike, once they agreed on their room, and ``seen`` after every window on every process: all
    agree on the numbers.

    Args:
        start, micro: the first window, and images of a micro-batch.
        skipped: windows that are not measured: kernels are chosen, processes start.
        measured: windows after them that are.
    """

    def __init__(self, built: Parts, start: int, micro: int, *, skipped: int = 2, measured: int = 8) -> None:
        self.built, self.micro, self.window = built, micro, start
        self.skipped, self.measured = skipped, measured
        recipe = built.recipe
        self.by, note = self._settle(None)
        self.said = [note] if note else []
        self.settled = recipe.data.workers != "auto" or self.by.workers == 0
        if not self.settled:
            self.said.append(
                f"loader: data.workers auto begins with {_processes(self.by.workers)} and measures the first "
                f"{skipped + measured} windows"
            )
        self._spent, self._seconds = LoaderTime(), []
        self._stream = self._open()

    def __iter__(self) -> Feeder:
        return self

    def __next__(self) -> list[Batch]:
        batches = next(self._stream)
        self.window += 1
        return batches

    def close(self) -> None:
        """Ends the loader processes."""
        self._stream.close()

    def seen(self, spent: LoaderTime, seconds: float) -> str | None:
        """Note a window that is done; where that settles the number of loader processes, says so.

        Args:
            spent: what making its images took.
            seconds: without the wait for them.
        """
        if self.settled:
            return None
        self.skipped -= 1
        if self.skipped < 0:
            self._spent, self._seconds = self._spent + spent, [*self._seconds, seconds]
        if len(self._seconds) < self.measured:
            return None
        self.settled = True
        images = self._spent.images / len(self._seconds)
        return self._choose(gather_object([(self._spent.per_image(), images, median(self._seconds))]))

    def _choose(self, rows: list) -> str:
        """From what every process saw: the one that needs most decides for all."""
        on_gpu = self.built.accelerator.device.type == "cuda"
        most = data.workers.most(self.built.room, on_gpu)
        cost, images, seconds = max(rows, key=lambda row: needed_workers(*row))
        needed = needed_workers(cost, images, seconds)
        before, (self.by, note) = self.by, self._settle(min(needed, most))
        if self.by != before:
            self._stream.close()
            self._stream = self._open()
        sum_ = f"{MARGIN:g} x {images:.3g} images x {1e3 * cost.total:.1f} ms / {1e3 * seconds:.0f} ms of a window"
        bound = f", and {self.built.room.cores:.3g} cores and the memory leave room for {most}" if needed > most else ""
        text = f"loader: data.workers auto is {self.by.workers}, each with {self.by.prefetch} micro-batches ready"
        text += f": {sum_} = {needed} needed{bound}"
        return f"{text}\n{note}" if note else text

    def _settle(self, count: int | None) -> tuple[data.Loading, str | None]:
        built = self.built
        by, note = data.loading(
            built.recipe, built.splits.train, micro=self.micro, num_ranks=built.accelerator.num_processes,
            device=built.accelerator.device, count=count, room=built.room,
        )  # fmt: skip
        built.loading = by
        return by, note

    def _open(self):
        built, accelerator = self.built, self.built.accelerator
        return data.train_windows(
            built.recipe, built.splits.train, rank=accelerator.process_index, num_ranks=accelerator.num_processes,
            start_window=self.window, end_window=built.length.total, mean=built.bare.mean, std=built.bare.std,
            micro=self.micro, device=accelerator.device, by=self.by,
        )  # fmt: skip


def _processes(number: int) -> str:
    return f"{number} process{'es' * (number != 1)}"
