"""What every data set looks like to the loader, and seeds that depend on nothing but their meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from detr_accel.structures import Classes, Sample

# First word after the seed: keeps the streams of different purposes apart.
ORDER, GEOMETRY, SPLIT, SHAPES_TRAIN, SHAPES_VAL, SHAPES_SIZES, WINDOWS, WINDOW_SCALE, SHARDS, BLOCK = range(10)
PHOTOMETRIC, ZOOM_OUT, IOU_CROP, LARGE_SCALE_JITTER, MOSAIC, MIXUP = range(100, 106)


class Source(Protocol):
    """A split of a data set. Indices run over ``range(len(source))``; everything may be called in a worker process."""

    classes: Classes

    def __len__(self) -> int: ...

    def size_px(self, index: int) -> tuple[int, int]:
        """(h, w) in pixels, without decoding."""

    def image_id(self, index: int) -> int: ...

    def name(self, index: int) -> str:
        """For messages: the file, or what stands for it."""

    def most_boxes(self) -> int:
        """The greatest number of targets in one image, without decoding."""

    def boxes_xyxy_px(self, index: int) -> np.ndarray:
        """float32 [N, 4] as ``sample`` gives them, without reading an image file."""

    def sample(self, index: int, at_least_px: tuple[int, int] | None = None) -> Sample:
        """Decode one image. Raises UserError naming the record when that cannot be done.

        Args:
            at_least_px: (h, w) that it will be resized to; it may be decoded smaller than it is, never below this.
        """

    def ground_truth(self) -> dict:
        """The split as a COCO json, with the data set's own ids, crowd regions included."""

    def fingerprint(self) -> str:
        """sha256 over names, sizes and annotations: equal exactly when the training data are."""


class Subset:
    """Some images of a source, in the order given, as a source of their own.

    Args:
        indices: of ``source``.
    """

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices, self.classes = source, list(indices), source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def size_px(self, index: int) -> tuple[int, int]:
        return self.source.size_px(self.indices[index])

    def image_id(self, index: int) -> int:
        return self.source.image_id(self.indices[index])

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def sample(self, index: int, at_least_px: tuple[int, int] | None = None) -> Sample:
        return self.source.sample(self.indices[index], at_least_px)

    def most_boxes(self) -> int:
        return self.source.most_boxes()

    def boxes_xyxy_px(self, index: int) -> np.ndarray:
        return self.source.boxes_xyxy_px(self.indices[index])


def generator(seed: int, stream: int, *words: int) -> np.random.Generator:
    """A counter-based generator of (seed, stream, words): the same numbers in any process, order and layout.

    Args:
        seed: 0 .. 2**32 - 1.
        stream: one of the constants above.
        words: at most two, such as epoch and image; one that is left out counts as 0.
    """
    assert len(words) <= 2
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, stream, *words))))
