"""Which images when: windows of an epoch, shares of ranks, micro-batches. Plain arithmetic; nothing is decoded here.

A window is one optimizer step. Window w of a training is window w % W of epoch w // W, with W windows an epoch. Its
images are the positions [v * batch_size, (v + 1) * batch_size) of the epoch's permutation; the last one may be short.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from detr_accel.data import source as seeds
from detr_accel.data.augment import Strong, strong_plan
from detr_accel.data.geometry import Augmentation, Plan, Size, canvas, eval_plan, train_plan, window_scale
from detr_accel.data.source import Source


@dataclass(frozen=True)
class Task:
    """One micro-batch, decided down to the last pixel's place."""

    window: int
    epoch: int
    positions: tuple[int, ...]  # global, in the epoch or in the split
    indices: tuple[int, ...]  # into the source
    plans: tuple[Plan, ...]
    canvas_px: tuple[int, int]
    waited: float = 0.0  # seconds that the training process waited for the stream to give it


def windows_per_epoch(num_images: int, batch_size: int) -> int:
    """The short last window counts."""
    return -(-num_images // batch_size)


def permutation(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The order of one epoch: int64 [num_images], a function of nothing else."""
    return seeds.generator(seed, seeds.ORDER, epoch).permutation(num_images)


SQUARE = 1.15  # the longer side is at most this much longer than the other


def shapes_of(sizes_px: Iterable[Size]) -> np.ndarray:
    """int64 [num_images]: 0 tall, 1 square, 2 wide."""
    h, w = np.array([*sizes_px], np.float64).reshape(-1, 2).T
    return 1 + (w > SQUARE * h).astype(np.int64) - (h > SQUARE * w)


def by_shape(shapes: np.ndarray, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """An epoch's images in another order: a window holds tall, square or wide ones, and the windows come mixed.

    The images of each shape keep their order. Shapes meet in at most two windows of an epoch, where one runs out, and a
    short window stays the last.

    Args:
        shapes: int64 [num_images], of the images in the epoch's order.
    Returns:
        int64 [num_images], places in that order.
    """
    sorted_ = np.argsort(shapes, kind="stable")
    whole = len(shapes) // batch_size
    windows = seeds.generator(seed, seeds.WINDOWS, epoch).permutation(whole)
    head = sorted_[: whole * batch_size].reshape(whole, batch_size)[windows]
    return np.concatenate((head.reshape(-1), sorted_[whole * batch_size :]))


def share(num: int, rank: int, num_ranks: int) -> range:
    """A rank's contiguous part of ``range(num)``; parts differ by one at most, longer ones first (8 on 3: 3, 3, 2)."""
    base, more = divmod(num, num_ranks)
    start = rank * base + min(rank, more)
    return range(start, start + base + (rank < more))


@dataclass(frozen=True)
class Windows:
    """What every way of training has in common: one rank's micro-batches over windows [start_window, end_window)."""

    source: Source
    policy: Augmentation
    batch_size: int
    micro: int
    seed: int
    rank: int
    num_ranks: int
    start_window: int
    end_window: int

    def window_positions(self, window: int) -> range:
        """Global positions in the epoch, of all ranks."""
        at = window % windows_per_epoch(len(self.source), self.batch_size) * self.batch_size
        return range(at, min(at + self.batch_size, len(self.source)))

    def num_tasks(self, window: int) -> int:
        """Micro-batches of this rank in a window."""
        raise NotImplementedError

    def __len__(self) -> int:
        return sum(self.num_tasks(w) for w in range(self.start_window, self.end_window))


@dataclass(frozen=True)
class TrainTasks(Windows):
    """The micro-batches of one rank, in order.

    Any start gives the tail of the run that began at 0. Canvas and geometry are those of the whole window, so they are
    the same on every rank and for every ``micro``.
    """

    group_by_shape: bool = False  # whether a window holds images of one shape
    strong: Strong | None = None  # augmentation beyond the policy

    def num_tasks(self, window: int) -> int:
        """Micro-batches of this rank in a window: 0 where a short window leaves it none."""
        return -(-len(share(len(self.window_positions(window)), self.rank, self.num_ranks)) // self.micro)

    def __iter__(self) -> Iterator[Task]:
        per_epoch = windows_per_epoch(len(self.source), self.batch_size)
        known_epoch, order, drawn = -1, np.empty(0, np.int64), np.empty(0, np.int64)
        for window in range(self.start_window, self.end_window):
            epoch = window // per_epoch
            if epoch != known_epoch:
                known_epoch, (order, drawn) = epoch, self._order(epoch)
            yield from self._cut(window, epoch, order, drawn)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The images by position, and the place of each in the permutation, which its augmentation is drawn from: that
        the shape decides where an image goes, and not the other way round."""
        plain = permutation(self.seed, epoch, len(self.source))
        if not self.group_by_shape:
            return plain, np.arange(len(plain))
        at = by_shape(self._final_shapes(plain, epoch), self.batch_size, self.seed, epoch)
        return plain[at], at

    def _final_shapes(self, order: np.ndarray, epoch: int) -> np.ndarray:
        """Of the epoch's images as training will see them, crop and all."""
        if self.policy.crop == 0 and self.strong is None:
            return shapes_of(self.source.size_px(i) for i in order.tolist())
        first = epoch * windows_per_epoch(len(self.source), self.batch_size)
        plan = Planner(self.policy, self.strong, self.seed, first, epoch)
        return shapes_of(plan(self.source, p, i).size_px for p, i in enumerate(order.tolist()))

    def _cut(self, window: int, epoch: int, order: np.ndarray, drawn: np.ndarray) -> Iterator[Task]:
        positions = self.window_positions(window)
        indices = [int(order[p]) for p in positions]
        plan = Planner(self.policy, self.strong, self.seed, window, epoch)
        plans = [plan(self.source, int(drawn[p]), i) for p, i in zip(positions, indices, strict=True)]
        size = canvas(plans, self.policy.canvas_step)
        mine = share(len(positions), self.rank, self.num_ranks)
        for start in range(mine.start, mine.stop, self.micro):
            part = slice(start, min(start + self.micro, mine.stop))
            yield Task(window, epoch, tuple(positions[part]), tuple(indices[part]), tuple(plans[part]), size)


class Planner:
    """What is done to the images of one window.

    Args:
        policy, strong: of the whole training; strong: augmentation beyond the policy.
    """

    def __init__(self, policy: Augmentation, strong: Strong | None, seed: int, window: int, epoch: int) -> None:
        self.policy, self.seed, self.epoch = policy.at(window), seed, epoch
        self.scale = window_scale(seeds.generator(seed, seeds.WINDOW_SCALE, window), self.policy)
        self.strong = strong.at(window) if strong is not None else None

    def __call__(self, source: Source, position: int, index: int) -> Plan:
        """
        Args:
            source: asked for sizes and boxes.
            position: of the image in the epoch's permutation.
            index: of the image in the source.
        """
        if self.strong is not None:
            return strong_plan(
                self.strong, source, self.policy, seed=self.seed, epoch=self.epoch, position=position, index=index,
                scale=self.scale,
            )  # fmt: skip
        rng = seeds.generator(self.seed, seeds.GEOMETRY, self.epoch, index)
        return train_plan(rng, source.size_px(index), self.policy, self.scale)


@dataclass(frozen=True)
class EvalTasks:
    """Each image of a split once, in split order: batches are formed globally, then dealt to the ranks in turn, so that
    who shares a canvas with whom does not depend on the number of ranks."""

    source: Source
    batch: int
    short: int
    max_size: int
    rank: int
    num_ranks: int
    square: bool = False

    def __len__(self) -> int:
        return len(range(self.rank, windows_per_epoch(len(self.source), self.batch), self.num_ranks))

    def __iter__(self) -> Iterator[Task]:
        for number in range(self.rank, windows_per_epoch(len(self.source), self.batch), self.num_ranks):
            indices = tuple(range(number * self.batch, min((number + 1) * self.batch, len(self.source))))
            sizes = (self.source.size_px(i) for i in indices)
            plans = tuple(eval_plan(size, self.short, self.max_size, self.square) for size in sizes)
            yield Task(number, 0, indices, indices, plans, canvas(plans))
