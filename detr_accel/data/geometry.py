"""What happens to an image, decided before it is decoded: flip, resize, crop, resize, and where it is put. Boxes follow
from the plan alone.

Sizes are (height, width) in pixels; N boxes of one image. Source of every rule and draw: the transforms of DETR
(Carion et al., End-to-End Object Detection with Transformers, ECCV 2020) and their published code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

Size = tuple[int, int]
Rect = tuple[float, float, float, float]  # top, left, height, width

_MOST_PX = 2**25  # of an image before its crop: 100 MB, and a shape of 1 to 90 with DETR's 600 pixels
_LEAST_SHARE = 0.1  # of a box's area that must be left of it, where an image is placed on a canvas
_LEAST_PX = 1.0  # a side that such a box must have there


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
    canvas_step: int = 1  # a window's canvas is made of multiples of it
    square: bool = False  # scales are the sides of squares that images are squeezed to
    final_scale: int | None = None  # what scales give way to at the end of the training
    final_from: int = 0  # the window of the training in which they do

    def at(self, window: int) -> Augmentation:
        """What of it holds in a window of the training."""
        ended = self.final_scale is not None and window >= self.final_from
        return replace(self, scales=(self.final_scale,)) if ended else self

    @property
    def largest(self) -> int:
        """The greatest scale at any time."""
        return max(*self.scales, self.final_scale or 0)

    def resized(self, size_px: Size, scale: int) -> Size:
        """As ``resized``, by this policy's bound and shape."""
        return resized(size_px, scale, self.max_size, self.square)


@dataclass(frozen=True)
class Jitter:
    """Colours: factors and a shift, None where nothing is done."""

    brightness: float | None = None
    contrast: float | None = None
    saturation: float | None = None
    hue: float | None = None  # turns
    contrast_first: bool = False  # before saturation and hue, or after them


@dataclass(frozen=True)
class Plan:
    """The steps, in the order of the fields; None leaves a step out."""

    orig_px: Size
    flip: bool
    first_px: Size | None  # resize before the crop
    crop_px: tuple[int, int, int, int] | None  # top, left, height, width
    size_px: Size  # resize to what reaches the model
    exact: bool = False  # DETR's own kernels, bit for bit; otherwise the fast ones
    place_px: tuple[int, int, int, int] | None = None  # where in size_px it goes; the mean colour fills the rest
    by_centre: bool = False  # a box stays if the crop holds its centre, and else if it leaves some of its area
    jitter: Jitter | None = None
    layers: tuple[Layer, ...] = ()  # further images, one after the other on top
    kinds: tuple[str, ...] = ()  # which augmentations beyond DETR's made this plan

    @property
    def inner_px(self) -> Size:
        """What the last resize goes to."""
        return self.size_px if self.place_px is None else self.place_px[2:]

    @property
    def needs_px(self) -> Size:
        """What the first resize makes of the decoded image: a decoder need not give more."""
        return self.first_px or (self.inner_px if self.crop_px is None else self.orig_px)

    def images(self, index: int) -> list[tuple[int, Plan, float]]:
        """Every image on the canvas: index in the source, own plan, weight of its pixels.

        Args:
            index: of the first.
        """
        return [(index, self, 1.0), *((one.index, one.plan, one.weight) for one in self.layers)]


@dataclass(frozen=True)
class Layer:
    """A further image on a plan's canvas."""

    index: int  # in the source
    plan: Plan  # with a place, on a canvas of the same size, and no layers of its own
    weight: float = 1.0  # of its pixels; 1 hides what is beneath


@dataclass(frozen=True)
class Demands:
    """The largest shapes that a recipe's data can bring. Sizes are (h, w) in pixels."""

    canvas_px: tuple[int, int]  # of a training window
    most_boxes: int  # in one training image
    eval_canvas_px: tuple[int, int]
    num_classes: int
    num_images: int | None  # in the training split; None: not known
    assumed: bool  # the data were not there, so these are what any data could bring


def resized(size_px: Size, short: int, max_size: int | None, square: bool = False) -> Size:
    """The size after a resize of the short side to ``short``, less where the long side would pass ``max_size``.

    The long side is cut to an integer, not rounded, as in DETR. No side falls below 1 pixel (DETR would fail there).

    Args:
        square: both sides become ``short``, whatever the image's shape (RT-DETR), or ``max_size`` where that is less.
    """
    if square:
        side = short if max_size is None else min(short, max_size)
        return side, side
    h, w = size_px
    if max_size is not None:
        low, high = float(min(h, w)), float(max(h, w))
        if high / low * short > max_size:
            short = int(round(max_size * low / high))
            if short <= 1:  # a line of pixels, of which DETR would ask for none, or for more than max_size
                return min(h, max_size) if h > w else 1, min(w, max_size) if w > h else 1
    if min(h, w) == short:
        return h, w
    if w < h:
        return int(short * h / w), short
    return short, int(short * w / h)


def eval_plan(size_px: Size, short: int, max_size: int, square: bool = False) -> Plan:
    """Evaluation and prediction: one resize."""
    return Plan(size_px, False, None, None, resized(size_px, short, max_size, square), exact=True)


def train_plan(rng: np.random.Generator, size_px: Size, policy: Augmentation, scale: int | None = None) -> Plan:
    """Draw one plan.

    Args:
        scale: the short side of this window; None draws one for the image.

    Where a crop's least side is longer than the image, DETR raises; here the least side is the image's own.
    """
    flip = rng.random() < policy.flip
    if rng.random() >= policy.crop:
        short = scale or _choice(rng, policy.scales)
        return Plan(size_px, flip, None, None, policy.resized(size_px, short))
    first = resized(size_px, _choice(rng, policy.crop_scales), None)
    if not _croppable(size_px, first):
        return Plan(size_px, flip, None, None, policy.resized(size_px, scale or _choice(rng, policy.scales)))
    width = _crop_side(rng, first[1], policy.crop_size)
    height = _crop_side(rng, first[0], policy.crop_size)
    top = int(rng.integers(0, first[0] - height + 1))
    left = int(rng.integers(0, first[1] - width + 1))
    final = policy.resized((height, width), scale or _choice(rng, policy.scales))
    return Plan(size_px, flip, first, (top, left, height, width), final)


def _croppable(size_px: Size, first_px: Size) -> bool:
    """Whether an image may become so large before it is cropped: not a line of pixels, made hundreds of pixels wide."""
    return first_px[0] * first_px[1] <= max(_MOST_PX, size_px[0] * size_px[1])


def window_scale(rng: np.random.Generator, policy: Augmentation) -> int | None:
    """The short side of a whole window, where the policy has one."""
    return _choice(rng, policy.scales) if policy.scale_by == "window" else None


def largest_first(size_px: Size, policy: Augmentation) -> Size:
    """The largest size that a training plan first resizes an image to."""
    bounded = policy.resized(size_px, policy.largest)
    if policy.crop == 0:
        return bounded
    first = resized(size_px, max(policy.crop_scales), None)
    if not _croppable(size_px, first):
        fitting = [resized(size_px, s, None) for s in policy.crop_scales]
        first = max((f for f in fitting if _croppable(size_px, f)), default=bounded)
    if policy.square:  # of another shape than what is cropped: each side as long as either wants it
        return max(bounded[0], first[0]), max(bounded[1], first[1])
    return max(bounded, first, key=lambda size: size[0] * size[1])


def worst_canvas(sizes_px: Iterable[Size], policy: Augmentation) -> Size:
    """A size that no training plan of these images can pass: the tallest and the widest meet in one window."""
    height = width = 1
    for size in set(sizes_px):
        plans = [size]
        if policy.crop > 0:
            for first in (resized(size, s, None) for s in policy.crop_scales):
                (low_h, high_h), (low_w, high_w) = (
                    [min(bound, side) for bound in policy.crop_size] for side in first
                )  # fmt: skip
                plans += [(high_h, low_w), (low_h, high_w)]
        for h, w in (policy.resized(plan, policy.largest) for plan in plans):
            height, width = max(height, h), max(width, w)
    return height, width


def placed(orig_px: Size, flip: bool, view_px: Rect, size_px: Size, by_centre: bool = False) -> Plan:
    """The plan that shows a part of an image, and what is around it.

    Args:
        view_px: the part, in pixels of the original; it may reach out of the image, and must meet it.
        size_px: what the part becomes.

    What is inside the image goes from whole pixels to whole pixels, so the boxes are exact, and each side is within
    half a pixel of what the view says.
    """
    top, height, to_top, to_height = _span(view_px[0], view_px[2], orig_px[0], size_px[0])
    left, width, to_left, to_width = _span(view_px[1], view_px[3], orig_px[1], size_px[1])
    if flip:
        left, to_left = orig_px[1] - left - width, size_px[1] - to_left - to_width
    crop = None if (height, width) == orig_px else (top, left, height, width)
    return Plan(
        orig_px, flip, None, crop, size_px, place_px=(to_top, to_left, to_height, to_width), by_centre=by_centre
    )


def _span(start: float, length: float, side: int, out: int) -> tuple[int, int, int, int]:
    """One axis of a view: from where and how many of the image's pixels, to where and how many of the output's."""
    first = min(max(round(start), 0), side - 1)
    last = min(max(round(start + length), first + 1), side)
    to_first = min(max(round((first - start) * out / length), 0), out - 1)
    to_last = min(max(round((last - start) * out / length), to_first + 1), out)
    return first, last - first, to_first, to_last - to_first


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
        some area; where the plan has a place, a tenth of their area or their centre, and a pixel. M may be 0.
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
        whole = boxes - (left, top, left, top)
        boxes = np.clip(whole, 0, (w, h, w, h))
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        if plan.place_px is not None:
            keep &= _centre_inside(whole, h, w) if plan.by_centre else _area(boxes) >= _LEAST_SHARE * _area(whole)
        boxes, labels = boxes[keep], labels[keep]
    if plan.place_px is not None:
        top, left, *inner = plan.place_px
        boxes = boxes * _ratio((h, w), inner) + (left, top, left, top)
        h, w = plan.size_px
        keep = (boxes[:, 2:] - boxes[:, :2] >= _LEAST_PX).all(1)
        boxes, labels = boxes[keep], labels[keep]
    x0, y0, x1, y1 = (boxes / (w, h, w, h)).T  # the last resize leaves fractions as they are
    return np.stack(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0), 1).astype(np.float32), labels


def _centre_inside(boxes_xyxy_px: np.ndarray, h: float, w: float) -> np.ndarray:
    x, y = ((boxes_xyxy_px[:, :2] + boxes_xyxy_px[:, 2:]) / 2).T
    return (x > 0) & (x < w) & (y > 0) & (y < h)


def _area(boxes_xyxy_px: np.ndarray) -> np.ndarray:
    return (boxes_xyxy_px[:, 2:] - boxes_xyxy_px[:, :2]).prod(1)


def _ratio(before: Size, after: Sequence[int]) -> tuple[float, float, float, float]:
    ry, rx = after[0] / before[0], after[1] / before[1]
    return rx, ry, rx, ry


def canvas(plans: Sequence[Plan], step: int = 1) -> Size:
    """The smallest size of multiples of ``step`` that holds every planned image."""
    return stepped((max(p.size_px[0] for p in plans), max(p.size_px[1] for p in plans)), step)


def stepped(size_px: Size, step: int) -> Size:
    """Both sides rounded up to multiples of ``step``."""
    return -(-size_px[0] // step) * step, -(-size_px[1] // step) * step
