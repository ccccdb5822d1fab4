"""The few types that cross a wall between rooms.

Legend: B batch, H W padded canvas, N boxes of one image, Q queries, C classes.
Boxes are always named with their format: ``boxes_xyxy_px`` in pixels, ``boxes_cxcywh`` in 0..1 of the un-padded image.
Sizes are (height, width) in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch


class UserError(ValueError):
    """A mistake the person can mend; the command line prints it as one sentence and exits with code 2."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def writing(path: str | Path, *also: type[Exception]) -> Iterator[None]:
    """Turn what a full or read-only disk raises into one sentence.

    Args:
        also: what writers in other languages raise in the place of OSError.
    Raises:
        UserError: names the path and the reason.
    """
    try:
        yield
    except (UserError, BrokenPipeError):
        raise
    except (OSError, *also) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        reason = reason or first_line(error)
        raise UserError(f"cannot write {path}: {reason}; free space there or choose another path") from None


def check_free(path: str | Path, *, or_empty: bool = False) -> None:
    """Refuse to write over what is there.

    Args:
        or_empty: an empty folder will do.
    Raises:
        UserError: the path is taken.
    """
    path = Path(path)
    if path.exists() and not (or_empty and path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists already: choose another path or remove it first")


@dataclass(frozen=True)
class Classes:
    """The table between contiguous labels and a data set's own category ids.

    Label ``i`` is ``names[i]`` and leaves the program as ``category_ids[i]``. ``None`` marks a label that no category
    uses (the official DETR checkpoints keep 91 labels for 80 categories).
    """

    names: tuple[str | None, ...]
    category_ids: tuple[int | None, ...]

    def __post_init__(self) -> None:
        assert len(self.names) == len(self.category_ids)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def label_of(self) -> dict[int, int]:
        """Category id -> label."""
        return {c: i for i, c in enumerate(self.category_ids) if c is not None}

    def to_json(self) -> dict:
        return {"names": list(self.names), "category_ids": list(self.category_ids)}

    @classmethod
    def from_json(cls, data: dict) -> Classes:
        return cls(tuple(data["names"]), tuple(data["category_ids"]))


@dataclass(frozen=True)
class Sample:
    """One image as its source hands it over: decoded, not yet transformed. Crowd regions are already left out."""

    image: np.ndarray  # uint8 [H, W, 3], RGB; a fraction of the file's size where a smaller one was asked for
    image_id: int
    boxes_xyxy_px: np.ndarray  # float32 [N, 4]
    labels: np.ndarray  # int64 [N], contiguous
    num_cut: int = 0  # boxes that ran out of the image by more than rounding, and were cut at its border


@dataclass
class Targets:
    """What one image should be found to contain."""

    image_id: int
    labels: torch.Tensor  # int64 [N]
    boxes_cxcywh: torch.Tensor  # float32 [N, 4], 0..1 of ``size_px``
    size_px: tuple[int, int]  # (h, w) of the un-padded image that reaches the model
    orig_size_px: tuple[int, int]  # (h, w) of the file
    num_cut: int = 0  # as in Sample
    is_blank: bool = False  # every pixel of the file has one colour

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        return replace(
            self,
            labels=self.labels.to(device, non_blocking=non_blocking),
            boxes_cxcywh=self.boxes_cxcywh.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True)
class ImageCost:
    """Seconds of a loader process per image, and how many times more pixels are decoded than used."""

    read: float
    decode: float
    pixels: float
    excess: float
    stream: float = 0.0  # of the training process, waiting for a stream's rows; no loader process shares in it

    @property
    def total(self) -> float:
        """Of a loader process."""
        return self.read + self.decode + self.pixels


@dataclass
class LoaderTime:
    """What a loader process spent on some images, in seconds: it travels with the batch that came of it."""

    read: float = 0.0  # files, or the cells of a Hugging Face set
    decode: float = 0.0
    pixels: float = 0.0  # resize, normalise, lay out, hand over
    images: int = 0
    decoded_px: int = 0  # of the files, as stored
    used_px: int = 0  # of these, what the first resize leaves
    stream: float = 0.0  # what the training process waited for a stream's rows, in seconds

    def __add__(self, other: LoaderTime) -> LoaderTime:
        return LoaderTime(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @classmethod
    def of(cls, batches: Iterable[Batch]) -> LoaderTime:
        """What the making of some batches took."""
        return sum((b.spent for b in batches if b.spent is not None), cls())

    def per_image(self) -> ImageCost:
        n = max(1, self.images)
        excess = self.decoded_px / max(1, self.used_px)
        return ImageCost(self.read / n, self.decode / n, self.pixels / n, excess, self.stream / n)


Lost = tuple[int, str]  # the id of an image, and why it could not be read


@dataclass
class Batch:
    """One micro-batch, padded bottom and right to the window's canvas."""

    images: torch.Tensor  # float32 [B, 3, H, W], normalised, 0 where padded
    mask: torch.Tensor  # bool [B, H, W], True = padding
    targets: list[Targets]
    positions: tuple[int, ...]  # each image's global position in the epoch (training) or in the split (evaluation)
    window: int = 0
    epoch: int = 0
    lost: tuple[Lost, ...] = ()  # images that belong here and could not be read: their places are empty
    spent: LoaderTime | None = None  # what its making took
    places: tuple[int, ...] = ()  # each image's in the micro-batch as planned; empty where none of it is lost

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def canvas_px(self) -> tuple[int, int]:
        """(h, w) of every image with its padding."""
        return tuple(self.images.shape[-2:])

    def part(self, start: int, stop: int) -> Batch:
        """Images start .. stop - 1 on the same canvas; what is lost, and what it took, is told by the whole alone."""
        cut = slice(start, stop)
        return replace(
            self, images=self.images[cut], mask=self.mask[cut], targets=self.targets[cut], lost=(),
            positions=self.positions[cut], spent=None, places=self.places[cut],
        )  # fmt: skip

    def padded(self, canvas_px: tuple[int, int]) -> Batch:
        """The same images on a canvas (h, w) that is at least as large."""
        more = (0, canvas_px[1] - self.images.shape[-1], 0, canvas_px[0] - self.images.shape[-2])
        if more == (0, 0, 0, 0):
            return self
        pad = torch.nn.functional.pad
        return replace(self, images=pad(self.images, more), mask=pad(self.mask, more, value=True))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            mask=self.mask.to(device, non_blocking=non_blocking),
            targets=[t.to(device, non_blocking) for t in self.targets],
        )

    def share_memory_(self) -> None:
        self.images.share_memory_()
        self.mask.share_memory_()

    def pin_memory(self) -> Batch:
        if not len(self):  # all are lost: nothing to pin
            return self
        return replace(self, images=self.images.pin_memory(), mask=self.mask.pin_memory())


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first; ties keep the order of the queries."""

    image_id: int
    scores: np.ndarray  # float32 [K]
    labels: np.ndarray  # int64 [K], the model's own labels
    boxes_xyxy_px: np.ndarray  # float32 [K, 4], pixels of the original file


@dataclass
class StepStats:
    """One window as the monitors see it. Losses are already divided by their global counts."""

    window: int  # windows trained so far, this one included; only ever grows
    step: int  # accepted optimizer updates so far
    epoch: float  # windows / windows per epoch
    loss: float
    losses: dict[str, float]  # loss_ce, loss_bbox, loss_giou, loss_ce_0, ...
    grad_norm: float  # before clipping, over all parameters
    grad_norms: dict[str, float]  # the same per parameter group
    lr: dict[str, float]  # per parameter group
    num_images: int
    num_boxes: int
    seconds: float  # the whole window
    wait_seconds: float  # of which: waiting for data
    accepted: bool = True
    num_dropped: int = 0  # images so far whose places were left empty, because they could not be read
    extra: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)  # of the targets, over all processes: see train.window.FACTS
    sections: dict[str, float] = field(default_factory=dict)  # seconds of this process since the window before, by part
    loader: LoaderTime = field(default_factory=LoaderTime)  # what making this process's images took
    workers: int = 0  # loader processes that made them
    prefetch: int = 2  # micro-batches that each of these keeps ready
    memory_fraction: float | None = None  # how much of the device's memory is taken; None where nobody looked
