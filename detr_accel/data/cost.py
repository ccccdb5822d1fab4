"""What a loader process spends on its images, noted beside each batch."""

from __future__ import annotations

import time
from collections.abc import Callable

from detr_accel.data import decode
from detr_accel.data.device import PlannedBatch
from detr_accel.data.sampler import Task
from detr_accel.data.source import Source
from detr_accel.structures import Batch, LoaderTime


class _Timed:
    """A source whose time is taken."""

    def __init__(self, source: Source) -> None:
        self.source, self.seconds, self.decoded_px = source, 0.0, 0

    def sample(self, index: int, at_least_px=None):
        begun = time.perf_counter()
        try:
            return self.source.sample(index, at_least_px)
        finally:
            self.seconds += time.perf_counter() - begun
            h, w = self.source.size_px(index)
            self.decoded_px += h * w

    def __getattr__(self, name: str):
        if name == "source":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.source, name)


class TimedMaking:
    """Makes batches, and notes on each (``spent``) where the time went.

    Args:
        make: ``make_batch`` or ``plan_batch``.
    """

    def __init__(self, source: Source, make: Callable) -> None:
        self.source, self.make = _Timed(source), make

    def __call__(self, task: Task, mean: tuple[float, ...], std: tuple[float, ...]) -> Batch | PlannedBatch:
        source = self.source
        source.seconds, source.decoded_px = 0.0, 0
        begun, read = time.perf_counter(), decode.seconds_reading()
        batch = self.make(source, task, mean, std)
        whole, read = time.perf_counter() - begun, decode.seconds_reading() - read
        needs = (one.needs_px for plan in task.plans for _, one, _ in plan.images(0))
        batch.spent = LoaderTime(
            read, max(0.0, source.seconds - read), whole - source.seconds, len(task.indices), source.decoded_px,
            sum(h * w for h, w in needs), task.waited,
        )  # fmt: skip
        return batch
