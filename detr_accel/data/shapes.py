"""A procedural data set: made on the fly from (seed, index), no file. It tests a detector without a download.

Six classes of filled shapes with colour, texture, rotation and occlusion, on noisy backgrounds with unlabelled clutter.
Boxes are tight on the pixels that remain visible; an object of which little remains is not labelled.
Texture and position say nothing about the class: the outline does, and colour as far as ``colour_cue`` wants it.
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
_SIZES = ((0.30, 0.06, 0.14), (0.72, 0.18, 0.42), (1.00, 0.45, 0.70))  # cumulated probability; share of the long side
_CLASS_COLOURS = ((225, 40, 40), (40, 200, 60), (50, 80, 225), (225, 205, 40), (205, 50, 205), (40, 205, 215))
_NOISE = 10  # amplitude; colours keep as far from 0 and 255, so that adding it needs no clipping


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
        colour_cue: share of objects that have their class's colour; all others have any.
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
        colour_cue: float = 0.0,
    ):
        self.split, self.num_images, self.image_size = split, num_images, image_size
        self.seed, self.max_objects, self.empty_fraction = seed, max_objects, empty_fraction
        self.colour_cue = colour_cue
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

    def most_boxes(self) -> int:
        return self.max_objects

    def image_id(self, index: int) -> int:
        return index + 1

    def name(self, index: int) -> str:
        return f"shapes/{self.split}/{index}"

    def fingerprint(self) -> str:
        what = (VERSION, self.seed, self.split, self.num_images, self.image_size, self.max_objects, self.empty_fraction)
        what += (self.colour_cue,)
        return hashlib.sha256(repr(what).encode()).hexdigest()

    def sample(self, index: int, at_least_px: tuple[int, int] | None = None) -> Sample:
        rng = seeds.generator(self.seed, self._stream, index)
        image, boxes, labels = draw(rng, self.size_px(index), self.max_objects, self.empty_fraction, self.colour_cue)
        return Sample(image, self.image_id(index), boxes, labels)

    def head(self, num_images: int) -> ShapesSource:
        """The first images of the split as a split of their own."""
        num_images = min(num_images, len(self))
        return ShapesSource(
            self.seed, self.split, num_images, self.image_size, self.max_objects, self.empty_fraction, self.colour_cue
        )

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
    rng: np.random.Generator, size_px: tuple[int, int], max_objects: int, empty_fraction: float, colour_cue: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one image.

    Returns:
        uint8 [h, w, 3]; float32 [N, 4] xyxy pixels; int64 [N] labels.
    """
    picture, mood = _background(rng, size_px)
    empty = rng.random() < empty_fraction
    _clutter(rng, picture, mood)
    image = np.array(picture)
    owner = np.full(size_px, -1, np.int8)  # which object each pixel shows
    labels, drawn = [], []
    for _ in range(0 if empty else int(rng.integers(1, max_objects + 1))):
        label = int(rng.integers(len(CLASSES)))
        placed = _place(rng, size_px, label, owner)
        if placed is not None:
            where, mask, full = placed
            owner[where][mask] = len(labels)
            own = _CLASS_COLOURS[label] if colour_cue and rng.random() < colour_cue else None
            _paint(rng, image[where], mask, mood, own)
            labels.append(label)
            drawn.append((where, full))
    image += rng.integers(0, 2 * _NOISE + 1, size=size_px, dtype=np.uint8)[..., None]
    image -= _NOISE
    boxes, kept = _visible_boxes(owner, drawn)
    return image, boxes, np.array([labels[i] for i in kept], np.int64)


def _background(rng: np.random.Generator, size_px: tuple[int, int]) -> tuple[Image.Image, list[int]]:
    """A blurred patchwork around one colour, and that colour."""
    mood = rng.integers(30, 226, size=3)
    cells = int(rng.integers(2, 7))
    patch = np.clip(mood + rng.integers(-38, 39, size=(cells, cells, 3)), _NOISE, 255 - _NOISE).astype(np.uint8)
    return Image.fromarray(patch).resize(size_px[::-1], Image.Resampling.BILINEAR), mood.tolist()


def _clutter(rng: np.random.Generator, picture: Image.Image, mood: list[int]) -> None:
    """Lines, arcs and crumbs that no label speaks of, beneath the objects."""
    pen = ImageDraw.Draw(picture)
    w, h = picture.size
    unit = max(h, w) / 192
    for _ in range(int(rng.integers(2, 9))):
        x, y, dx, dy = (rng.random(4) * (w, h, w, h)).tolist()
        colour, width = tuple(_colour(rng, mood, 25)), max(1, round(unit * int(rng.integers(1, 4))))
        match int(rng.integers(3)):
            case 0:
                pen.line((x, y, x + dx - w / 2, y + dy - h / 2), colour, width)
            case 1:
                start, half = 3.6 * dy / h * 100, dx / 4
                pen.arc((x - half, y - half, x + half + 2, y + half + 2), start, start + 110, colour, width)
            case _:
                for cx, cy in ((rng.random((6, 2)) - 0.5) * 40 * unit).tolist():
                    pen.rectangle((x + cx, y + cy, x + cx + 2 * unit, y + cy + 2 * unit), colour)


def _colour(rng: np.random.Generator, mood: list[int], least: int) -> list[int]:
    """A random colour at least ``least`` away from the background's on average."""
    for colour in rng.integers(_NOISE, 256 - _NOISE, size=(6, 3)).tolist():
        if sum(abs(a - b) for a, b in zip(colour, mood, strict=True)) >= 3 * least:
            return colour
    return [255 - _NOISE if channel < 128 else _NOISE for channel in mood]


def _place(rng: np.random.Generator, size_px: tuple[int, int], label: int, owner: np.ndarray):
    """Find a place that is mostly free; None after a few tries.

    Returns:
        the rectangle as slices; the mask inside it, bool; the number of pixels before the border cut it.
    """
    lot = rng.random()
    low, high = next((low, high) for upto, low, high in _SIZES if lot < upto)
    mask = _mask(rng, label, max(9.0, max(size_px) * rng.uniform(low, high)))
    side, full = len(mask), np.count_nonzero(mask)
    for u, v in rng.random((6, 2)).tolist():
        top = int((size_px[0] - 0.6 * side) * u - 0.2 * side)
        left = int((size_px[1] - 0.6 * side) * v - 0.2 * side)
        where = (slice(max(0, top), min(size_px[0], top + side)), slice(max(0, left), min(size_px[1], left + side)))
        part = mask[where[0].start - top : where[0].stop - top, where[1].start - left : where[1].stop - left]
        inside = np.count_nonzero(part)
        if inside >= 0.7 * full and np.count_nonzero(part & (owner[where] >= 0)) < 0.35 * inside:
            return where, part, full
    return None


def _mask(rng: np.random.Generator, label: int, diameter: float) -> np.ndarray:
    """The rotated, slightly stretched outline: bool [side, side]."""
    outline, hole = _OUTLINES[CLASSES.names[label]]
    side = math.ceil(diameter * _REACH)
    angle, stretch_x, stretch_y = (rng.random(3) * (2 * math.pi, 0.15, 0.15) + (0, 0.85, 0.85)).tolist()
    sin, cos = math.sin(angle) * diameter / 2, math.cos(angle) * diameter / 2
    frame = np.array([[cos * stretch_x, -sin * stretch_x], [sin * stretch_y, cos * stretch_y]])
    picture = Image.new("L", (side, side))
    pen = ImageDraw.Draw(picture)
    for corners, value in ((outline, 1), (hole, 0)):
        if corners is not None:
            pen.polygon((corners @ frame + side / 2).ravel().tolist(), fill=value)
    return np.asarray(picture).view(bool)


def _paint(
    rng: np.random.Generator, view: np.ndarray, mask: np.ndarray, mood: list[int], own: tuple[int, ...] | None
) -> None:
    """Fill the mask with one of four textures between two near colours, the first of them near ``own`` if given."""
    first = np.array(_colour(rng, mood, 45) if own is None else own + rng.integers(-25, 26, size=3))
    first = np.clip(first, _NOISE, 255 - _NOISE)
    second = np.clip(first + rng.integers(-70, 71, size=3), _NOISE, 255 - _NOISE)
    ramp = np.linspace(first, second, 16).astype(np.uint8)
    kind, slope, pitch = int(rng.integers(4)), int(rng.integers(-1, 2)), int(rng.integers(3, 9))
    y, x = np.nonzero(mask)
    if kind == 0:  # plain
        view[y, x] = ramp[0]
    elif kind == 1:  # stripes
        view[y, x] = ramp[(x + y * slope) // pitch % 2 * 15]
    elif kind == 2:  # checks
        view[y, x] = ramp[(x // pitch + y // pitch) % 2 * 15]
    else:  # gradient
        view[y, x] = ramp[(x + y) * 16 // sum(mask.shape)]


def _visible_boxes(owner: np.ndarray, drawn: list) -> tuple[np.ndarray, list[int]]:
    """Boxes around the pixels that still show each object, for those that show enough."""
    boxes, kept = [], []
    for number, ((rows, cols), full) in enumerate(drawn):
        seen = owner[rows, cols] == number
        if np.count_nonzero(seen) < _VISIBLE * full:
            continue
        ys, xs = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        boxes.append((cols.start + xs[0], rows.start + ys[0], cols.start + xs[-1] + 1, rows.start + ys[-1] + 1))
        kept.append(number)
    return np.array(boxes, np.float32).reshape(-1, 4), kept
