"""What happens to an image, decided before it is decoded: flip, resize, crop, resize. Boxes follow from the plan alone.

Sizes are (height, width) in pixels; N boxes of one image. Source of every rule and draw: the transforms of DETR
(Carion et al., End-to-End Object Detection with Transformers, ECCV 2020) and their published code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Size = tuple[int, int]


@dataclass(frozen=True)
class Augmentation:
    """The training policy: flip, then resize to one of ``scales``, or (``crop`` of the time) resize to one of
    ``crop_scales``, crop, resize. All sizes in pixels."""

    flip: float
    scales: tuple[int, ...]
    max_size: int
    crop: float
    crop_scales: tuple[int, ...]
    crop_size: tuple[int, int]
    scale_by: str = "image"  # or "window": all images of a window go to the same scale


@dataclass(frozen=True)
class Plan:
    """The steps, in the order of the fields; None leaves a step out."""

    orig_px: Size
    flip: bool
    first_px: Size | None  # resize before the crop
    crop_px: tuple[int, int, int, int] | None  # top, left, height, width
    size_px: Size  # resize to what reaches the model
    exact: bool = False  # DETR's own kernels, bit for bit; otherwise the fast ones

    @property
    def needs_px(self) -> Size:
        """What the first resize makes of the decoded image: a decoder need not give more."""
        return self.first_px or self.size_px


def resized(size_px: Size, short: int, max_size: int | None) -> Size:
    """The size after a resize of the short side to ``short``, less where the long side would pass ``max_size``.

    The long side is cut to an integer, not rounded, as in DETR. No side falls below 1 pixel (DETR would fail there).
    """
    h, w = size_px
    if max_size is not None:
        low, high = float(min(h, w)), float(max(h, w))
        if high / low * short > max_size:
            short = max(1, int(round(max_size * low / high)))
    if min(h, w) == short:
        return h, w
    if w < h:
        return int(short * h / w), short
    return short, int(short * w / h)


def eval_plan(size_px: Size, short: int, max_size: int) -> Plan:
    """Evaluation and prediction: one resize."""
    return Plan(size_px, False, None, None, resized(size_px, short, max_size), exact=True)


def train_plan(rng: np.random.Generator, size_px: Size, policy: Augmentation, scale: int | None = None) -> Plan:
    """Draw one plan.

    Args:
        scale: the short side of this window; None draws one for the image.

    Where a crop's least side is longer than the image, DETR raises; here the least side is the image's own.
    """
    flip = rng.random() < policy.flip
    if rng.random() >= policy.crop:
        short = scale or _choice(rng, policy.scales)
        return Plan(size_px, flip, None, None, resized(size_px, short, policy.max_size))
    first = resized(size_px, _choice(rng, policy.crop_scales), None)
    width = _crop_side(rng, first[1], policy.crop_size)
    height = _crop_side(rng, first[0], policy.crop_size)
    top = int(rng.integers(0, first[0] - height + 1))
    left = int(rng.integers(0, first[1] - width + 1))
    final = resized((height, width), scale or _choice(rng, policy.scales), policy.max_size)
    return Plan(size_px, flip, first, (top, left, height, width), final)


def window_scale(rng: np.random.Generator, policy: Augmentation) -> int | None:
    """The short side of a whole window, where the policy has one."""
    return _choice(rng, policy.scales) if policy.scale_by == "window" else None


def largest_first(size_px: Size, policy: Augmentation) -> Size:
    """The largest size that a training plan first resizes an image to."""
    bounded = resized(size_px, max(policy.scales), policy.max_size)
    if policy.crop == 0:
        return bounded
    return max(bounded, resized(size_px, max(policy.crop_scales), None), key=lambda size: size[0] * size[1])


def worst_canvas(sizes_px: Iterable[Size], policy: Augmentation) -> Size:
    """A canvas that no training window of these images can pass: the tallest and the widest plan meet in one window."""
    height = width = 1
    short = max(policy.scales)
    for size in set(sizes_px):
        plans = [size]
        if policy.crop > 0:
            for first in (resized(size, s, None) for s in policy.crop_scales):
                (low_h, high_h), (low_w, high_w) = (
                    [min(bound, side) for bound in policy.crop_size] for side in first
                )  # fmt: skip
                plans += [(high_h, low_w), (low_h, high_w)]
        for h, w in (resized(plan, short, policy.max_size) for plan in plans):
            height, width = max(height, h), max(width, w)
    return height, width


def _choice(rng: np.random.Generator, values: Sequence[int]) -> int:
    return values[int(rng.integers(0, len(values)))]


def _crop_side(rng: np.random.Generator, side: int, bounds: tuple[int, int]) -> int:
    return int(rng.integers(min(bounds[0], side), min(bounds[1], side) + 1))


def apply_boxes(plan: Plan, boxes_xyxy_px: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take boxes through a plan.

    Args:
        boxes_xyxy_px: [N, 4] in pixels of the original, inside it.
        labels: [N].
    Returns:
        float32 [M, 4] cxcywh in 0..1 of ``plan.size_px``, and the labels of the M <= N boxes of which the crop left
        some area; M may be 0.
    """
    boxes = boxes_xyxy_px.astype(np.float64).reshape(-1, 4)
    h, w = plan.orig_px
    if plan.flip:
        boxes = boxes[:, [2, 1, 0, 3]] * (-1, 1, -1, 1) + (w, 0, w, 0)
    if plan.first_px is not None:
        boxes = boxes * _ratio((h, w), plan.first_px)
        h, w = plan.first_px
    if plan.crop_px is not None:
        top, left, h, w = plan.crop_px
        boxes = np.clip(boxes - (left, top, left, top), 0, (w, h, w, h))
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes, labels = boxes[keep], labels[keep]
    x0, y0, x1, y1 = (boxes / (w, h, w, h)).T  # the last resize leaves fractions as they are
    return np.stack(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0), 1).astype(np.float32), labels


def _ratio(before: Size, after: Size) -> tuple[float, float, float, float]:
    ry, rx = after[0] / before[0], after[1] / before[1]
    return rx, ry, rx, ry


def canvas(plans: Sequence[Plan]) -> Size:
    """The smallest size that holds every planned image."""
    return max(p.size_px[0] for p in plans), max(p.size_px[1] for p in plans)
