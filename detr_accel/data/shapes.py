"""A procedural data set: made on the fly from (seed, index), no file. It tests a detector without a download.

Six classes of filled shapes with colour, texture, rotation and occlusion, on noisy backgrounds with unlabelled clutter.
Boxes are tight on the pixels that remain visible; an object of which little remains is not labelled.
Colour, texture and position say nothing about the class: only the outline does.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from PIL import Image, ImageDraw

from detr_accel.data import source as seeds
from detr_accel.structures import Classes, Sample

VERSION = 1  # part of the fingerprint: raise it when any pixel or box changes
_VISIBLE = 0.35  # least share of an object's drawn pixels that others and the border may leave
_REACH = 1.3  # an object's mask is drawn in a square of this many times its size
_SIZES = ((0.06, 0.14, 0.30), (0.18, 0.42, 0.45), (0.45, 0.70, 0.25))  # share of the long side: from, to; probability


def _ring(n: int, inner: float = 1.0) -> np.ndarray:
    """n corners around the unit circle; every second one at radius ``inner``."""
    angle = np.arange(n) * (2 * math.pi / n)
    radius = np.where(np.arange(n) % 2, inner, 1.0)
    return np.stack((radius * np.sin(angle), -radius * np.cos(angle)), 1)


_THICK = 0.33
_CROSS = np.array(
    [(-_THICK, -1), (_THICK, -1), (_THICK, -_THICK), (1, -_THICK), (1, _THICK), (_THICK, _THICK), (_THICK, 1)]
    + [(-_THICK, 1), (-_THICK, _THICK), (-1, _THICK), (-1, -_THICK), (-_THICK, -_THICK)]
)
# class name -> corners of the outline and of the hole, in units of half the size
_OUTLINES: dict[str, tuple[np.ndarray, np.ndarray | None]] = {
    "circle": (_ring(40), None),
    "square": (_ring(4) * 1.15, None),
    "triangle": (_ring(3) * 1.1, None),
    "star": (_ring(10, 0.42) * 1.1, None),
    "ring": (_ring(40), _ring(40) * 0.55),
    "cross": (_CROSS, None),
}
CLASSES = Classes(tuple(_OUTLINES), tuple(range(1, len(_OUTLINES) + 1)))


class ShapesSource:
    """One split of the procedural data set.

    Args:
        seed: of the whole data set; another one is another data set.
        split: ``train`` or ``val``: different streams of the generator, so no image is in both.
        num_images: length of the split; a longer split starts with the same images.
        image_size: long side in pixels; the other side is 0.75 to 1 of it.
        max_objects: most objects in one image.
        empty_fraction: share of images without any.
    """

    classes = CLASSES

    def __init__(
        self,
        seed: int,
        split: str,
        num_images: int,
        image_size: int,
        max_objects: int = 6,
        empty_fraction: float = 0.05,
    ):
        self.split, self.num_images, self.image_size = split, num_images, image_size
        self.seed, self.max_objects, self.empty_fraction = seed, max_objects, empty_fraction
        self._stream = {"train": seeds.SHAPES_TRAIN, "val": seeds.SHAPES_VAL}[split]
        draws = seeds.generator(seed, seeds.SHAPES_SIZES, self._stream).random((num_images, 2))
        short = np.rint(image_size * (0.75 + 0.25 * draws[:, 0])).astype(np.int32)
        long = np.full_like(short, image_size)
        self._sizes = np.where(draws[:, 1:] < 0.5, np.stack((short, long), 1), np.stack((long, short), 1))
        self._truth: dict | None = None

    def __len__(self) -> int:
        return self.num_images

    def size_px(self, index: int) -> tuple[int, int]:
        return int(self._sizes[index, 0]), int(self._sizes[index, 1])

    def image_id(self, index: int) -> int:
        return index + 1

    def name(self, index: int) -> str:
        return f"shapes/{self.split}/{index}"

    def fingerprint(self) -> str:
        what = (VERSION, self.seed, self.split, self.num_images, self.image_size, self.max_objects, self.empty_fraction)
        return hashlib.sha256(repr(what).encode()).hexdigest()

    def sample(self, index: int) -> Sample:
        rng = seeds.generator(self.seed, self._stream, index)
        image, boxes, labels = draw(rng, self.size_px(index), self.max_objects, self.empty_fraction)
        return Sample(image, self.image_id(index), boxes, labels)

    def ground_truth(self) -> dict:
        """Drawn once and kept: every image of the split is made for it. The area is the box's."""
        if self._truth is None:
            self._truth = self._make_truth()
        return self._truth

    def _make_truth(self) -> dict:
        images, annotations = [], []
        for i in range(len(self)):
            h, w = self.size_px(i)
            images.append({"id": self.image_id(i), "file_name": self.name(i), "height": h, "width": w})
            sample = self.sample(i)
            for (x0, y0, x1, y1), label in zip(sample.boxes_xyxy_px.tolist(), sample.labels.tolist(), strict=True):
                w, h = x1 - x0, y1 - y0
                row = {"id": len(annotations) + 1, "image_id": self.image_id(i), "bbox": [x0, y0, w, h]}
                annotations.append(row | {"category_id": CLASSES.category_ids[label], "area": w * h, "iscrowd": 0})
        categories = [{"id": c, "name": n} for c, n in zip(CLASSES.category_ids, CLASSES.names, strict=True)]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def draw(
    rng: np.random.Generator, size_px: tuple[int, int], max_objects: int, empty_fraction: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one image.

    Returns:
        uint8 [h, w, 3]; float32 [N, 4] xyxy pixels; int64 [N] labels.
    """
    image, mood = _background(rng, size_px)
    empty = rng.random() < empty_fraction
    _clutter(rng, image, mood)
    owner = np.full(size_px, -1, np.int16)  # which object each pixel shows
    labels, drawn = [], []
    for _ in range(0 if empty else int(rng.integers(1, max_objects + 1))):
        label = int(rng.integers(len(CLASSES)))
        placed = _place(rng, size_px, label, owner)
        if placed is not None:
            where, mask, full = placed
            owner[where][mask] = len(labels)
            _paint(rng, image[where], mask, mood)
            labels.append(label)
            drawn.append((where, full))
    noise = rng.integers(-10, 11, size=size_px, dtype=np.int16)[..., None]
    image = np.clip(image + noise, 0, 255).astype(np.uint8)
    boxes, kept = _visible_boxes(owner, drawn)
    return image, boxes, np.array([labels[i] for i in kept], np.int64)


def _background(rng: np.random.Generator, size_px: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A blurred patchwork around one colour, int16 [h, w, 3], and that colour [3]."""
    mood = rng.integers(30, 226, size=3)
    cells = int(rng.integers(2, 7))
    patch = np.clip(mood + rng.integers(-38, 39, size=(cells, cells, 3)), 0, 255).astype(np.uint8)
    smooth = Image.fromarray(patch).resize(size_px[::-1], Image.Resampling.BILINEAR)
    return np.asarray(smooth).astype(np.int16), mood


def _clutter(rng: np.random.Generator, image: np.ndarray, mood: np.ndarray) -> None:
    """Lines, arcs and crumbs that no label speaks of, beneath the objects."""
    picture = Image.fromarray(image.astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    h, w = image.shape[:2]
    unit = max(h, w) / 192
    for _ in range(int(rng.integers(2, 9))):
        x, y, dx, dy = rng.random(4) * (w, h, w / 2, h / 2)
        colour, width = tuple(_colour(rng, mood, 25).tolist()), max(1, round(unit * rng.integers(1, 4)))
        match int(rng.integers(3)):
            case 0:
                pen.line((x, y, x + 2 * dx - w / 2, y + 2 * dy - h / 2), colour, width)
            case 1:
                start = rng.integers(0, 360)
                pen.arc((x - dx / 2, y - dx / 2, x + dx / 2 + 2, y + dx / 2 + 2), start, start + 110, colour, width)
            case _:
                for cx, cy in (rng.random((6, 2)) - 0.5) * 40 * unit:
                    pen.rectangle((x + cx, y + cy, x + cx + 2 * unit, y + cy + 2 * unit), colour)
    image[:] = np.asarray(picture)


def _colour(rng: np.random.Generator, mood: np.ndarray, least: int) -> np.ndarray:
    """A random colour at least ``least`` away from the background's on average: [3] in 0..255."""
    for _ in range(8):
        colour = rng.integers(0, 256, size=3)
        if np.abs(colour - mood).mean() >= least:
            return colour
    return 255 * (mood < 128)


def _place(rng: np.random.Generator, size_px: tuple[int, int], label: int, owner: np.ndarray):
    """Find a place that hides no earlier object too far; None after four tries.

    Returns:
        the rectangle as slices; the mask inside it, bool; the number of pixels before the border cut it.
    """
    low, high, _ = _SIZES[int(rng.choice(3, p=[p for *_, p in _SIZES]))]
    diameter = max(9.0, max(size_px) * rng.uniform(low, high))
    mask = _mask(rng, label, diameter)
    side, full = len(mask), int(mask.sum())
    for _ in range(4):
        top = int(rng.integers(-side // 5, max(1, size_px[0] - side * 4 // 5)))
        left = int(rng.integers(-side // 5, max(1, size_px[1] - side * 4 // 5)))
        where = (slice(max(0, top), min(size_px[0], top + side)), slice(max(0, left), min(size_px[1], left + side)))
        part = mask[where[0].start - top : where[0].stop - top, where[1].start - left : where[1].stop - left]
        if part.sum() >= 0.7 * full and (owner[where][part] >= 0).mean() < 0.35:
            return where, part, full
    return None


def _mask(rng: np.random.Generator, label: int, diameter: float) -> np.ndarray:
    """The rotated, slightly stretched outline: bool [side, side]."""
    outline, hole = _OUTLINES[CLASSES.names[label]]
    side = int(math.ceil(diameter * _REACH))
    angle = rng.uniform(0, 2 * math.pi)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    frame = turn * rng.uniform(0.85, 1.0, size=2) * (diameter / 2)
    picture = Image.new("L", (side, side))
    pen = ImageDraw.Draw(picture)
    for corners, value in ((outline, 1), (hole, 0)):
        if corners is not None:
            pen.polygon([tuple(p) for p in (corners @ frame + side / 2).tolist()], fill=value)
    return np.asarray(picture).astype(bool)


def _paint(rng: np.random.Generator, view: np.ndarray, mask: np.ndarray, mood: np.ndarray) -> None:
    """Fill the mask with one of four textures of two near colours."""
    first = _colour(rng, mood, 45)
    second = np.clip(first + rng.integers(-70, 71, size=3), 0, 255)
    y, x = np.ogrid[: mask.shape[0], : mask.shape[1]]
    pitch = int(rng.integers(3, 9))
    match int(rng.integers(4)):
        case 0:
            blend = np.zeros(mask.shape)
        case 1:
            blend = ((x + y * int(rng.integers(-1, 2))) // pitch % 2).astype(float)
        case 2:
            blend = ((x // pitch + y // pitch) % 2).astype(float)
        case _:
            blend = (x + y) / (sum(mask.shape))
    blend = np.broadcast_to(blend, mask.shape)[mask][:, None]
    view[mask] = (first + blend * (second - first)).astype(np.int16)


def _visible_boxes(owner: np.ndarray, drawn: list) -> tuple[np.ndarray, list[int]]:
    """Boxes around the pixels that still show each object, for those that show enough."""
    boxes, kept = [], []
    for number, ((rows, cols), full) in enumerate(drawn):
        seen = owner[rows, cols] == number
        if seen.sum() < _VISIBLE * full:
            continue
        ys, xs = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        boxes.append((cols.start + xs[0], rows.start + ys[0], cols.start + xs[-1] + 1, rows.start + ys[-1] + 1))
        kept.append(number)
    return np.array(boxes, np.float32).reshape(-1, 4), kept
