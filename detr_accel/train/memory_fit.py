"""Fitting a window into memory: before the first one by trial, later by cutting it into smaller parts.

``batch.size`` never changes: whatever is done here, the window gives the same gradient (law 1).
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
from collections.abc import Iterator, Sequence

import torch
from accelerate.utils import gather_object
from torch import nn

from detr_accel import data, models
from detr_accel.monitor import memory
from detr_accel.monitor.memory import is_out_of_memory
from detr_accel.recipe_model import Model, norms_see_a_forward
from detr_accel.structures import Batch, Targets, UserError
from detr_accel.train.parts import Parts
from detr_accel.train.window import forward

_FEW = 4  # images; fewer make poor statistics of norms that train
_LIBC = ctypes.CDLL(None) if os.name == "posix" else None  # glibc keeps freed memory until it is told not to

# --- while a run goes on


def recut(micro_batches: Sequence[Batch], micro: int) -> list[Batch]:
    """The same images on the same canvas, in parts of at most ``micro`` places, as the loader would have cut them: a
    place stays empty whose image is lost. Small enough ones stay as they are."""
    return [b.part(start, stop) for b in micro_batches for start, stop in _cuts(b, micro)]


def _cuts(batch: Batch, micro: int) -> Iterator[tuple[int, int]]:
    groups = [place // micro for place in batch.places or range(len(batch))]
    starts = [i for i, group in enumerate(groups) if i == 0 or group != groups[i - 1]]
    return itertools.pairwise([*starts, len(groups)])


def next_micro(micro: int) -> int | None:
    """The next smaller size to try: the greatest proper divisor, so that cutting up micro-batches that are already here
    gives what the loader would have given. None below one image."""
    return next((m for m in range(micro // 2, 0, -1) if micro % m == 0), None)


def next_step(model: nn.Module, checkpointed: Sequence[str]) -> tuple[str, ...] | None:
    """The next step of activation checkpointing; None at the end of the ladder."""
    return next((step for step in models.checkpointing_ladder(model) if set(step) > set(checkpointed)), None)


def make_room(model: nn.Module, state) -> str:
    """After memory ran out: smaller parts, or activation checkpointing; returns what was done, in words.

    Raises:
        UserError: there is nothing left to do.
    """
    smaller = next_micro(state.micro)
    if smaller is not None:
        before, state.micro = state.micro, smaller
        return (
            f"out of memory with {before} images in a forward pass; the same window is trained again with {smaller}, "
            f"and so are all later ones: {_alike(model)}, more slowly. Set batch.micro={smaller} (or auto) to begin so"
        )
    step = next_step(model, state.checkpointed)
    if step is None:
        raise UserError(
            "out of memory with one image in a forward pass and activation checkpointing on everything: lower "
            "data.augment.scales and max_size, or free memory, then go on with --resume"
        )
    models.checkpoint_parts(model, step)
    state.checkpointed = list(step)
    parts = ", ".join(step)
    return (
        "out of memory with one image in a forward pass; the same window is trained again with activation "
        f"checkpointing on {parts}: the same result, more slowly. Set model.activation_checkpointing=[{parts}] to "
        "begin so"
    )


def _alike(model: nn.Module) -> str:
    """What smaller parts of a window come to."""
    if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        return "not quite the same result, as norms that train see fewer images at a time"
    return "the same result"


def release(device: torch.device) -> None:
    """Give back what a failed attempt still holds: to the device, or from the allocator to the operating system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


# --- before the first window


def fit(parts: Parts, micro: int | str, checkpointed: Sequence[str] | str) -> tuple[int, list[str], str]:
    """The largest micro-batch, and the least activation checkpointing, with which the worst window fits.

    Every process tries for itself, without talking; all take the least of what they found. Where both are ``auto`` and
    norms train, checkpointing comes before fewer images than ``least_wanted``.

    Args:
        micro: a number, or ``auto``.
        checkpointed: parts, or ``auto``.
    Returns:
        micro, the parts that are computed again (already switched on), and a sentence about it.
    Raises:
        UserError: not even one image fits.
    """
    canvas, most_boxes = data.worst_window(parts.recipe, parts.splits.train)
    share = len(data.share(parts.recipe.batch.size, 0, parts.accelerator.num_processes))
    trial = _Trial(parts, canvas, most_boxes, parts.recipe.batch.memory_fraction)
    ladder = models.checkpointing_ladder(parts.bare) if checkpointed == "auto" else (tuple(checkpointed),)
    is_auto = micro == "auto"
    least = 1 if is_auto else min(micro, share)
    wanted = least_wanted(parts.recipe.model, share) if micro == checkpointed == "auto" else least
    step = _first_fitting(trial, ladder, wanted)
    if step == len(ladder) and wanted > least:
        step = len(ladder) - 1 + _first_fitting(trial, ladder[-1:], least)
    where = f"the worst window ({canvas[1]}x{canvas[0]} pixels, {most_boxes} boxes an image)"
    if step == len(ladder):
        raise UserError(
            f"memory: {where} with batch.micro {least} needs {_gib(trial.bytes(least))} and {_gib(trial.budget)} may "
            "be used: lower batch.micro or data.augment.scales and max_size"
            + ("" if checkpointed == "auto" else ", or set model.activation_checkpointing: auto")
        )
    models.checkpoint_parts(parts.bare, ladder[step])
    if is_auto:
        micro = min(gather_object([trial.largest(share)]))
    extra = f" and activation checkpointing on {', '.join(ladder[step])}" if ladder[step] else ""
    need = f"needs {_gib(trial.bytes(micro))} of {_gib(trial.budget)}"
    few = too_few(parts.recipe.model, micro, share) if is_auto else ""
    memory.start_peak(trial.device)  # what was tried and did not fit is no peak of the training
    return micro, list(ladder[step]), f"memory: {where} {need} with batch.micro {micro}{extra}{few and f'; {few}'}"


def least_wanted(model: Model, share: int) -> int:
    """Images in a forward that ``auto`` gives up only when activation checkpointing is on everything."""
    return min(size for size in _cut_sizes(share) if size >= min(_FEW, share)) if norms_see_a_forward(model) else 1


def too_few(model: Model, micro: int, share: int) -> str:
    """A warning where too few images are in a forward for norms that train; else nothing."""
    if micro >= min(_FEW, share) or not norms_see_a_forward(model):
        return ""
    return f"beware: norms that train see only {micro} image{'s' * (micro > 1)} at a time"


def _cut_sizes(share: int) -> list[int]:
    """Sizes that cut a share into parts as equal as can be, from below."""
    return sorted({-(-share // parts) for parts in range(1, share + 1)})


def _first_fitting(trial: _Trial, ladder: Sequence[Sequence[str]], micro: int) -> int:
    """The first step of the ladder with which so many images fit on every process; its length where there is none."""
    step = next((i for i, step in enumerate(ladder) if _fits_with(trial, step, micro)), len(ladder))
    return max(gather_object([step]))


def _gib(num_bytes: float) -> str:
    return "more" if num_bytes == float("inf") else f"{num_bytes / 2**30:.2f} GiB"


def _fits_with(trial: _Trial, step: Sequence[str], micro: int) -> bool:
    """Switch a step of the ladder on (there is no way back down) and try."""
    models.checkpoint_parts(trial.parts.bare, step)
    trial.measured = {}
    return trial.fits(micro)


class _Trial:
    """Runs the worst window's forward and backward and looks at the memory.

    On a GPU each size is really tried. On a CPU an allocation that goes too far ends the process, so one and two images
    are run and larger sizes are reckoned from them.
    """

    def __init__(self, parts: Parts, canvas_px: tuple[int, int], most_boxes: int, fraction: float) -> None:
        self.parts, self.canvas_px, self.most_boxes = parts, canvas_px, most_boxes
        self.device = parts.accelerator.device
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.device.type == "cpu" else 1
        self.budget = fraction * memory.free_bytes(self.device) / neighbours
        self.measured: dict[int, float] = {}  # images -> bytes needed; inf where they do not fit

    def fits(self, micro: int) -> bool:
        return self.bytes(micro) <= self.budget

    def largest(self, share: int) -> int:
        """The best of the sizes that cut a share into parts as equal as can be; found from below."""
        return max(itertools.takewhile(self.fits, _cut_sizes(share)), default=1)

    def bytes(self, micro: int) -> float:
        """What ``micro`` images need, above what is held already."""
        if self.device.type == "cpu" and micro > 1:
            one = self.bytes(1)
            if one * micro > self.budget and micro == 2:
                return one * micro  # not worth the risk of being ended
            if micro > 2:
                return one + (micro - 1) * max(self.bytes(2) - one, 0.1 * one)
        if micro not in self.measured:
            self.measured[micro] = self._run(micro)
        return self.measured[micro]

    def _run(self, micro: int) -> float:
        release(self.device)
        before = memory.start_peak(self.device)
        try:
            for _ in range(2):  # the second time gradients are already there, as in a window of several parts
                _forward_backward(self.parts, worst_batch(self.canvas_px, self.most_boxes, micro))
            return max(1, memory.peak_bytes(self.device) - before)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return float("inf")
        finally:
            self.parts.runner.discard()
            release(self.device)


def worst_batch(canvas_px: tuple[int, int], most_boxes: int, count: int) -> Batch:
    """Noise of the size and with the boxes of the most demanding window (``data.worst_window``).

    Args:
        canvas_px: (h, w).
        most_boxes: in each image.
        count: images.
    """
    height, width = canvas_px
    gen = torch.Generator().manual_seed(0)
    targets = []
    for i in range(count):
        labels = torch.zeros(most_boxes, dtype=torch.int64)
        boxes = torch.rand(most_boxes, 4, generator=gen) * 0.4 + 0.3
        targets.append(Targets(i, labels, boxes, canvas_px, canvas_px))
    images = torch.randn(count, 3, height, width, generator=gen)
    return Batch(images, torch.zeros(count, height, width, dtype=torch.bool), targets, tuple(range(count)))


def _forward_backward(parts: Parts, batch: Batch) -> None:
    parts.bare.train()
    parts.criterion.train()
    parts.runner.forward_state.remember()
    device = parts.accelerator.device
    counts = parts.criterion.normalisers(parts.criterion.count(batch.targets).to(device))
    noise, most = parts.criterion.noise, max(len(t.labels) for t in batch.targets)
    denoising = parts.criterion.disturb(batch, noise.most_demanding(most) if noise else most, seed=0)
    batch = batch.to(device)
    with parts.accelerator.autocast():
        outputs, denoising = forward(parts.bare, batch, denoising)
    parts.criterion(outputs, batch.targets, counts, denoising).total.backward()
    parts.runner.forward_state.restore()
