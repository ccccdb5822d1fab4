"""What a loader process spends on an image, measured in this one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice

from detr_accel.data.cache import CachedSource
from detr_accel.data.collate import make_batch, plan_batch
from detr_accel.data.sampler import Task, TrainTasks


@dataclass
class ImageCost:
    """Seconds per image, and how many times more pixels are decoded than used."""

    read: float
    decode: float
    pixels: float
    excess: float

    @property
    def total(self) -> float:
        return self.read + self.decode + self.pixels


class _Timed:
    """A source whose time is taken."""

    def __init__(self, source) -> None:
        self.source, self.seconds, self.decoded = source, 0.0, 0

    def sample(self, index: int, at_least_px=None):
        begun = time.perf_counter()
        sample = self.source.sample(index, at_least_px)
        self.seconds += time.perf_counter() - begun
        h, w = self.source.size_px(index)
        self.decoded += h * w
        return sample

    def __getattr__(self, name: str):
        return getattr(self.source, name)


def image_cost(tasks: TrainTasks, mean: tuple[float, ...], std: tuple[float, ...], on_device: bool) -> ImageCost:
    """Reads, decodes and works on a few micro-batches as a worker would.

    Args:
        tasks: of a few windows.
        on_device: pixels are worked on elsewhere; then what is left here is handing over.
    """
    source = _Timed(tasks.source)
    make = plan_batch if on_device else make_batch
    read = whole = 0.0
    used = images = 0
    some: list[Task] = list(islice(tasks, 1, 12)) or list(tasks)
    for task in some:
        taken = [one for i, p in zip(task.indices, task.plans, strict=True) for one in p.images(i)]
        begun = time.perf_counter()
        for index, _, _ in taken:
            _read(tasks.source, index)
        read += time.perf_counter() - begun
        begun = time.perf_counter()
        make(source, task, mean, std)
        whole += time.perf_counter() - begun
        used += sum(p.needs_px[0] * p.needs_px[1] for _, p, _ in taken)
        images += len(task.indices)
    decoded = max(0.0, source.seconds - read)  # a sample reads its file as well
    return ImageCost(read / images, decoded / images, (whole - source.seconds) / images, source.decoded / used)


def _read(source, index: int) -> None:
    """Only the bytes; nothing where images are made, cached or streamed."""
    encoded = getattr(source, "encoded", None)
    if encoded is not None and not isinstance(source, CachedSource):
        encoded(index)
