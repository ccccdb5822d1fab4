"""Stronger augmentation, planned: all numbers are drawn from (seed, purpose, epoch, position) before any decoding.

An image's plan begins as DETR's, with the very draws that it would have without all this. What is on in this window
then changes where the image goes: a mosaic, or a large-scale jitter, or a zoom-out and a crop around boxes; and, with
any of them or none, its colours and what is blended in. An image whose geometry is changed does not get DETR's crop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np

from detr_accel.data import source as seeds
from detr_accel.data.geometry import Augmentation, Jitter, Layer, Plan, Size, placed, train_plan
from detr_accel.data.source import Source

Range = tuple[float, float]
_TRIES = 40  # crops around boxes
MOST_ASPECT = 2.0  # of such a crop


@dataclass(frozen=True)
class Scheduled:
    probability: float
    start: float  # fractions of the training
    stop: float


@dataclass(frozen=True)
class Photometric(Scheduled):
    brightness: Range
    contrast: Range
    saturation: Range
    hue: Range


@dataclass(frozen=True)
class ZoomOut(Scheduled):
    side: Range


@dataclass(frozen=True)
class IouCrop(Scheduled):
    min_iou: tuple[float, ...]
    least_side: float


@dataclass(frozen=True)
class LargeScaleJitter(Scheduled):
    scale: Range
    size: int | None


@dataclass(frozen=True)
class Mosaic(Scheduled):
    scale: Range
    shift: float


@dataclass(frozen=True)
class Mixup(Scheduled):
    weight: Range


@dataclass(frozen=True)
class Strong:
    """What goes beyond DETR's policy, and over how many windows; None or probability 0 is off."""

    total_windows: int
    photometric: Photometric | None = None
    zoom_out: ZoomOut | None = None
    iou_crop: IouCrop | None = None
    large_scale_jitter: LargeScaleJitter | None = None
    mosaic: Mosaic | None = None
    mixup: Mixup | None = None

    def at(self, window: int) -> Strong:
        """What of it is on in a window of the training."""
        done = window / self.total_windows
        over = [name for name, one in self._parts().items() if not one.start <= done < one.stop]
        return replace(self, **dict.fromkeys(over))

    def probabilities(self) -> dict[str, float]:
        """Of all that is on, by name."""
        return {name: one.probability for name, one in self._parts().items() if one.probability > 0}

    def _parts(self) -> dict[str, Scheduled]:
        return {f.name: one for f in fields(self) if isinstance(one := getattr(self, f.name), Scheduled)}

    def worst_size(self, policy: Augmentation) -> Size:
        """A size that no plan passes whose shape is not its image's own; (0, 0) where there is none."""
        side = 0
        if _may(self.iou_crop) and not policy.square:  # the long side is bounded, but for the short one's rounding
            side = min(int(MOST_ASPECT * policy.largest), policy.max_size + int(MOST_ASPECT))
            side = max(side, policy.largest if policy.largest <= policy.max_size else 0)
        if _may(self.large_scale_jitter):
            side = max(side, self.large_scale_jitter.size or 0)
        return side, side

    def crops_originals(self) -> bool:
        """Whether a plan may cut out of the image at its own size, so that no smaller copy will do."""
        return _may(self.iou_crop) or _may(self.large_scale_jitter)

    def most_boxes(self, of_one: int) -> int:
        """The greatest number of boxes in one image of a batch, where an image of the source has at most ``of_one``."""
        return of_one * (4 if _may(self.mosaic) else 1) * (2 if _may(self.mixup) else 1)


KINDS = {
    "photometric": Photometric, "zoom_out": ZoomOut, "iou_crop": IouCrop, "large_scale_jitter": LargeScaleJitter,
    "mosaic": Mosaic, "mixup": Mixup,
}  # fmt: skip


def strong_of(total_windows: int, settings: dict[str, Any]) -> Strong | None:
    """
    Args:
        settings: for each of ``KINDS`` a dict of its fields; other keys are passed over.
    Returns:
        None where all of it is off.
    """
    on = {
        name: kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings[name].items()})
        for name, kind in KINDS.items()
        if settings[name]["probability"] > 0
    }
    return Strong(total_windows, **on) if on else None


def _may(one: Scheduled | None) -> bool:
    return one is not None and one.probability > 0


@dataclass(frozen=True)
class _Slot:
    """Whose plan is drawn: an image at a position of an epoch, at the scale of its window."""

    source: Source
    policy: Augmentation
    seed: int
    epoch: int
    position: int
    index: int
    scale: int | None

    def draws(self, stream: int) -> np.random.Generator:
        return seeds.generator(self.seed, stream, self.epoch, self.position)

    def base(self, size_px: Size | None = None) -> Plan:
        """DETR's plan; with a size, that of a part of the image which gets no crop of its own."""
        rng = seeds.generator(self.seed, seeds.GEOMETRY, self.epoch, self.index)
        policy = self.policy if size_px is None else replace(self.policy, crop=0.0)
        return train_plan(rng, size_px or self.source.size_px(self.index), policy, self.scale)


def strong_plan(
    strong: Strong, source: Source, policy: Augmentation, *, seed: int, epoch: int, position: int, index: int,
    scale: int | None,
) -> Plan:  # fmt: skip
    """Draw the plan of one image.

    Args:
        strong: what is on in this window (``Strong.at``).
        position: of the image in the epoch; further images are drawn from it.
        scale: the short side of this window; None draws one for the image.
    """
    slot = _Slot(source, policy, seed, epoch, position, index, scale)
    plan = (
        _tried(strong.mosaic, slot, seeds.MOSAIC, _mosaic)
        or _tried(strong.large_scale_jitter, slot, seeds.LARGE_SCALE_JITTER, _large_scale_jitter)
        or _zoom_and_crop(strong, slot)
        or slot.base()
    )
    plan = _tried(strong.mixup, slot, seeds.MIXUP, partial(_mixup, plan=plan, mosaic=strong.mosaic)) or plan
    return _coloured(slot.draws(seeds.PHOTOMETRIC), strong.photometric, plan)


def _tried(settings: Scheduled | None, slot: _Slot, stream: int, make: Callable) -> Plan | None:
    if settings is None:
        return None
    rng = slot.draws(stream)
    return make(rng, slot, settings) if rng.random() < settings.probability else None


def _zoom_and_crop(strong: Strong, slot: _Slot) -> Plan | None:
    """A zoom-out, then a crop around boxes, either of which may not come."""
    orig = slot.source.size_px(slot.index)
    top, left, times, frame, kinds = 0.0, 0.0, 1.0, orig, []  # the frame stands at top, left, each pixel ``times`` wide
    rng = slot.draws(seeds.ZOOM_OUT)
    if strong.zoom_out is not None and rng.random() < strong.zoom_out.probability:
        times = rng.uniform(*strong.zoom_out.side)
        top, left = (float(-u * (times - 1) * side) for u, side in zip(rng.random(2), orig, strict=True))
        kinds.append("zoom-out")
    rng, crop = slot.draws(seeds.IOU_CROP), None
    if strong.iou_crop is not None and rng.random() < strong.iou_crop.probability:
        boxes = (slot.source.boxes_xyxy_px(slot.index) - (left, top, left, top)) / times
        crop = _crop_around(rng, frame, boxes, strong.iou_crop)
    if crop is not None:
        top, left, frame = top + crop[0] * times, left + crop[1] * times, crop[2:]
        kinds.append("IoU crop")
    if not kinds:
        return None
    base = slot.base(frame)
    view = (top, left, frame[0] * times, frame[1] * times)
    return replace(placed(orig, base.flip, view, base.size_px, by_centre=crop is not None), kinds=tuple(kinds))


def _crop_around(
    rng: np.random.Generator, frame_px: Size, boxes_xyxy_px: np.ndarray, settings: IouCrop
) -> tuple[int, int, int, int] | None:
    """Draw tries, of which one must hold the centre of a box and overlap such a box as much as wanted; where none does,
    another least IoU is wanted, in a drawn order. An IoU of 1 wants the image whole.

    Returns:
        top, left, height, width; None where the image stays whole.
    """
    wanted = rng.permutation(settings.min_iou)
    sides = np.maximum(1, (rng.uniform(settings.least_side, 1, (_TRIES, 2)) * frame_px).astype(np.int64))
    tops_lefts = (rng.random((_TRIES, 2)) * (np.array(frame_px) - sides + 1)).astype(np.int64)
    if not len(boxes_xyxy_px):
        return None
    low, high = tops_lefts[:, None, ::-1], (tops_lefts + sides)[:, None, ::-1]  # [T, 1, 2] as x, y
    box_low, box_high = boxes_xyxy_px[None, :, :2], boxes_xyxy_px[None, :, 2:]  # [1, N, 2]
    centres = (box_low + box_high) / 2
    inside = ((centres > low) & (centres < high)).all(-1)  # [T, N]
    shared = (np.minimum(high, box_high) - np.maximum(low, box_low)).clip(0).prod(-1)
    iou = shared / ((high - low).prod(-1) + (box_high - box_low).prod(-1) - shared)
    best = np.where(inside, iou, -1.0).max(1)  # [T]
    best[sides.max(1) > MOST_ASPECT * sides.min(1)] = -1.0
    for least in wanted:
        if least >= 1:
            return None
        if (best >= least).any():
            chosen = int((best >= least).argmax())
            return (*tops_lefts[chosen].tolist(), *sides[chosen].tolist())
    return None


def _large_scale_jitter(rng: np.random.Generator, slot: _Slot, settings: LargeScaleJitter) -> Plan:
    orig = slot.source.size_px(slot.index)
    base = slot.base(orig)
    size = base.size_px if settings.size is None else (settings.size, settings.size)
    by = rng.uniform(*settings.scale)
    pixels = [of / side for of, side in zip(orig, size, strict=True)]  # the original's to one of these, down and across
    pixels = pixels if slot.policy.square else [max(pixels)] * 2
    height, width = (side * (pixel / by) for side, pixel in zip(size, pixels, strict=True))
    u, v = rng.random(2)
    view = (float(u * (orig[0] - height)), float(v * (orig[1] - width)), height, width)
    return replace(placed(orig, base.flip, view, size), kinds=("large-scale jitter",))


def _mosaic(rng: np.random.Generator, slot: _Slot, settings: Mosaic) -> Plan | None:
    """The image itself goes to a drawn quarter; the canvas is what it would have filled alone."""
    base = slot.base(slot.source.size_px(slot.index))
    if min(base.size_px) < 2:
        return None
    (_, plan), *others = _tiles(rng, slot, settings, slot.index, base.flip, base.size_px)
    return replace(plan, layers=tuple(Layer(*other) for other in others), kinds=("mosaic",))


def _tiles(
    rng: np.random.Generator, slot: _Slot, settings: Mosaic, own: int, flip: bool, canvas_px: Size
) -> list[tuple[int, Plan]]:
    """Four images, ``own`` the first of them, and where each lies around a drawn point."""
    h, w = canvas_px
    cy, cx = (
        min(max(round(side * (0.5 + rng.uniform(-settings.shift, settings.shift))), 1), side - 1) for side in (h, w)
    )
    quarters = [(0, 0, cy, cx), (0, cx, cy, w - cx), (cy, 0, h - cy, cx), (cy, cx, h - cy, w - cx)]
    order = rng.permutation(4)
    others = rng.integers(len(slot.source), size=3)
    plans = []
    for number, (index, quarter) in enumerate(zip([own, *others.tolist()], order.tolist(), strict=True)):
        turned = flip if number == 0 else bool(rng.random() < slot.policy.flip)
        size_px = slot.source.size_px(index)
        by = rng.uniform(*settings.scale)
        down, across = _fit(size_px, (h / 2, w / 2), slot.policy)
        first = max(1, round(size_px[0] * (down * by))), max(1, round(size_px[1] * (across * by)))
        plans.append((index, _tile(rng, size_px, turned, quarters[quarter], canvas_px, first)))
    return plans


def _fit(size_px: Size, into_px: tuple[float, float], policy: Augmentation) -> tuple[float, float]:
    """Factors on height and width with which an image fits: the same, unless the policy squeezes images."""
    down, across = into_px[0] / size_px[0], into_px[1] / size_px[1]
    return (down, across) if policy.square else (min(down, across),) * 2


def _tile(
    rng: np.random.Generator, size_px: Size, flip: bool, quarter: tuple[int, int, int, int], canvas_px: Size,
    first: Size,
) -> Plan:  # fmt: skip
    """An image, resized to ``first``, in a quarter of a canvas, at the corner where the four meet; what does not fit is
    cut at random."""
    top, left, high, wide = quarter
    height, width = min(first[0], high), min(first[1], wide)
    crop = (int(rng.integers(first[0] - height + 1)), int(rng.integers(first[1] - width + 1)), height, width)
    place = (top or high - height, left or wide - width, height, width)
    return Plan(size_px, flip, first, crop, canvas_px, place_px=place)


def _mixup(rng: np.random.Generator, slot: _Slot, settings: Mixup, plan: Plan, mosaic: Mosaic | None) -> Plan:
    """A second image on top, which is a mosaic itself as often as the first."""
    index = int(rng.integers(len(slot.source)))
    flip = bool(rng.random() < slot.policy.flip)
    size_px, (h, w) = slot.source.size_px(index), plan.size_px
    fit = _fit(size_px, (h, w), slot.policy)
    height, width = (
        min(max(1, round(side * by)), most) for side, by, most in zip(size_px, fit, (h, w), strict=True)
    )
    place = (int(rng.integers(h - height + 1)), int(rng.integers(w - width + 1)), height, width)
    second = Plan(size_px, flip, None, None, plan.size_px, place_px=place)
    weight, seconds = 1 - rng.uniform(*settings.weight), [(index, second)]
    if mosaic is not None and min(h, w) > 1 and rng.random() < mosaic.probability:
        seconds = _tiles(rng, slot, mosaic, index, flip, plan.size_px)
    layers = tuple(Layer(*one, weight) for one in seconds)
    return replace(plan, layers=(*plan.layers, *layers), kinds=(*plan.kinds, "mixup"))


def _coloured(rng: np.random.Generator, settings: Photometric | None, plan: Plan) -> Plan:
    """Draw the colours of each image on the canvas."""
    if settings is None:
        return plan
    layers = plan.layers
    own = _jitter(rng, settings)
    layers = tuple(replace(one, plan=replace(one.plan, jitter=_jitter(rng, settings))) for one in layers)
    changed = own is not None or any(one.plan.jitter is not None for one in layers)
    return replace(plan, jitter=own, layers=layers, kinds=(*plan.kinds, *["colours"] * changed))


def _jitter(rng: np.random.Generator, settings: Photometric) -> Jitter | None:
    """The same number of draws whatever comes of them."""
    hits, places = rng.random(4) < settings.probability, rng.random(4)
    first = bool(rng.random() < 0.5)
    ranges = (settings.brightness, settings.contrast, settings.saturation, settings.hue)
    values = [
        low + (high - low) * float(u) if hit else None for hit, u, (low, high) in zip(hits, places, ranges, strict=True)
    ]
    return Jitter(*values, contrast_first=first) if hits.any() else None
