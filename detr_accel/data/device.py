"""Pixels on the training device: workers read and decode, and hand over uint8; a plan is applied where the model is.

Legend: B images of a micro-batch, H W its canvas, h w one image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_accel.data.compose import compose, mean_levels
from detr_accel.data.geometry import Plan
from detr_accel.structures import Batch, LoaderTime, Lost, Targets

T = TypeVar("T")


@dataclass
class PlannedBatch:
    """A micro-batch before its pixels are worked on. ``to`` gives the Batch that the workers would have made: the same
    boxes, sizes and mask; a pixel differs by one of 255 steps for each resize at the most, as the filters round
    differently.
    """

    pixels: Tensor  # uint8, all images one after the other, each [h, w, 3] as decoded; as many as each plan takes
    sizes_px: tuple[tuple[int, int], ...]  # (h, w) of each as decoded
    plans: tuple[Plan, ...]
    canvas_px: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    targets: list[Targets]
    positions: tuple[int, ...]
    window: int = 0
    epoch: int = 0
    lost: tuple[Lost, ...] = ()
    spent: LoaderTime | None = None
    places: tuple[int, ...] = ()  # see Batch
    _arrived: torch.cuda.Event | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.targets)

    def part(self, start: int, stop: int) -> PlannedBatch:
        """Images start .. stop - 1 on the same canvas."""
        cut = slice(start, stop)
        first, last = (sum(1 + len(p.layers) for p in self.plans[:row]) for row in (start, stop))
        counts = [3 * h * w for h, w in self.sizes_px]
        return replace(
            self, pixels=self.pixels[sum(counts[:first]) : sum(counts[:last])], sizes_px=self.sizes_px[first:last],
            plans=self.plans[cut], targets=self.targets[cut], positions=self.positions[cut], lost=(),
            places=self.places[cut], spent=None,
        )  # fmt: skip

    def pin_memory(self) -> PlannedBatch:
        if not len(self):  # all are lost: nothing to pin, nothing to send
            return self
        return replace(self, pixels=self.pixels.pin_memory())

    def share_memory_(self) -> None:
        self.pixels.share_memory_()

    def send(self, device: torch.device, stream: torch.cuda.Stream) -> PlannedBatch:
        """Start the copy to a GPU on a stream of its own; ``to`` waits for it, on the device."""
        if not len(self):
            return self
        with torch.cuda.stream(stream):
            pixels = self.pixels.to(device, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(stream)
        return replace(self, pixels=pixels, _arrived=arrived)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The finished micro-batch on a device."""
        device = torch.device(device)
        if self._arrived is not None:
            here = torch.cuda.current_stream(device)
            here.wait_event(self._arrived)
            self.pixels.record_stream(here)  # or the allocator would give it away while it is read
        pixels = self.pixels.to(device, non_blocking=non_blocking)
        images = torch.zeros(len(self), 3, *self.canvas_px, device=device)
        mask = torch.ones(len(self), *self.canvas_px, dtype=torch.bool, device=device)
        scale, shift, fill = _affine(self.mean, self.std, device)
        decoded = self._decoded(pixels)
        for row, plan in enumerate(self.plans):
            pieces = [apply(next(decoded).float(), one) for _, one, _ in plan.images(0)]
            h, w = plan.size_px
            torch.addcmul(shift, compose(pieces, plan, fill), scale, out=images[row, :, :h, :w])
            mask[row, :h, :w] = False
        targets = [t.to(device, non_blocking) for t in self.targets]
        return Batch(images, mask, targets, self.positions, self.window, self.epoch, self.lost, places=self.places)

    def _decoded(self, pixels: Tensor) -> Iterator[Tensor]:
        """Each image, uint8 [3, h, w]."""
        start = 0
        for h, w in self.sizes_px:
            yield pixels[start : start + 3 * h * w].view(h, w, 3).permute(2, 0, 1)
            start += 3 * h * w


def apply(image: Tensor, plan: Plan) -> Tensor:
    """A plan's steps on one image, rounded to whole levels after each resize as the workers' uint8 are.

    Args:
        image: float32 [3, h, w], levels 0..255.
    Returns:
        float32 [3, h, w] of ``plan.inner_px``.
    """
    if plan.first_px is not None:
        image = _resize(image, plan.first_px)
    if plan.crop_px is not None:
        top, left, height, width = plan.crop_px
        if plan.flip:  # the flip comes last
            left = image.shape[-1] - left - width
        image = image[:, top : top + height, left : left + width]
    image = _resize(image, plan.inner_px)
    return image.flip(-1) if plan.flip else image


def _resize(image: Tensor, size_px: tuple[int, int]) -> Tensor:
    if tuple(image.shape[-2:]) == size_px:
        return image
    return F.interpolate(image[None], size=size_px, mode="bilinear", antialias=True)[0].round_().clamp_(0, 255)


def _affine(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, ...]:
    """(x / 255 - mean) / std as one multiplication and one addition, and the mean's levels, each [3, 1, 1]."""
    m, s = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (mean, std))
    numbers = [1 / (255 * s), -m / s, mean_levels(mean).double()]
    if device.type == "cuda":  # not a wait: pinned, and a handful of bytes
        numbers = [t.pin_memory() for t in numbers]
    return tuple(t.to(device, torch.float32, non_blocking=True) for t in numbers)


def ahead(windows: Iterable[list], device: torch.device) -> Iterator[list]:
    """Each window once its copy to a GPU is under way, while the one before it is trained: one window waits there, as
    uint8. Elsewhere the windows as they come."""
    if device.type != "cuda":
        yield from windows
        return
    stream = torch.cuda.Stream(device)
    yield from _one_ahead(
        [b.send(device, stream) if isinstance(b, PlannedBatch) else b for b in window] for window in windows
    )


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each taken before the one ahead of it is given out; an error comes after what came before it."""
    waiting: list[T] = []
    while True:
        try:
            waiting.append(next(items))
        except StopIteration:
            yield from waiting
            return
        except Exception:
            yield from waiting
            raise
        if len(waiting) > 1:
            yield waiting.pop(0)
