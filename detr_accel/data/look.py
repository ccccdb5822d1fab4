"""A look at a data set before a long run: boxes in another format, classes that never come, images in both splits.

Legend: A annotations. What is found is put into words; the caller decides whether it is a reason to stop.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass

import numpy as np
import torch

from detr_accel.boxes import cxcywh_to_xyxy
from detr_accel.data.box_formats import READINGS, inside
from detr_accel.data.coco import CocoSource
from detr_accel.data.source import Source
from detr_accel.data.stream import FirstRows
from detr_accel.structures import Batch

LEAVING = 0.1  # a larger share of boxes that leave their images is no sloppy border any more
FITS = 0.98  # least share of boxes that another reading must put inside its image


@dataclass(frozen=True)
class Finding:
    text: str
    remedy: str = ""
    bad: bool = False  # a run would train on it, and learn something else than was meant


def boxes(source: Source) -> list[Finding]:
    """Are the boxes what COCO says, [x, y, width, height] in pixels from the left top corner? Nothing is decoded."""
    if not isinstance(source, CocoSource):
        return []  # made in the right format
    boxes_px, sizes_px, _, _ = source.written()
    found = box_format(boxes_px, sizes_px)
    return [] if found is None else [Finding(f"{source.table.path}: {found.text}", found.remedy, found.bad)]


def box_format(boxes_px: np.ndarray, sizes_px: np.ndarray) -> Finding | None:
    """
    Args:
        boxes_px: [A, 4] as written.
        sizes_px: [A, 2], (h, w) of each one's image.
    """
    if not len(boxes_px):
        return None
    b, (h, w) = boxes_px.T.astype(np.float64), sizes_px.T.astype(np.float64)
    if boxes_px.max() <= 1.5 and sizes_px.min() > 16:
        return Finding(
            f"all {len(boxes_px)} boxes lie between 0 and {boxes_px.max():.3g}: fractions of the image, not pixels",
            "multiply them by the image's width and height", bad=True,
        )  # fmt: skip
    outside = 1 - inside(b[0], b[1], b[0] + b[2], b[1] + b[3], h, w).mean()
    if outside == 0:
        return None
    number = round(outside * len(boxes_px))
    text = f"{number} of {len(boxes_px)} boxes leave their image when read as [x, y, width, height]"
    if outside <= LEAVING:
        return Finding(text)
    for name, reading in READINGS.items():
        left, top, right, bottom = reading(*b)
        if inside(left, top, right, bottom, h, w).mean() >= FITS and ((right >= left) & (bottom >= top)).mean() >= FITS:
            return Finding(f"{text}, and none does when read as {name}", _MEND, bad=True)
    return Finding(text, "check the boxes' format and whether the images were resized", bad=True)


_MEND = "export the json in COCO's format [x, y, width, height]"


def classes(train: Source, val: Source) -> list[Finding]:
    """Classes that validation asks for and training never shows."""
    if not (isinstance(train, CocoSource) and isinstance(val, CocoSource)):
        return []
    seen, asked = (
        {s.table.categories[c] for c in np.unique(s.written()[2]).tolist()} for s in (train, val)
    )  # fmt: skip
    never = sorted(asked - seen)
    if not never:
        return []
    named = ", ".join(never[:5]) + (", ..." if len(never) > 5 else "")
    text = f"{len(never)} of the {len(asked)} classes in the validation boxes have no box to train on ({named})"
    remedy = "check the category ids of both jsons and how the images were divided"
    return [Finding(text, remedy, bad=len(never) == len(asked))]


def shared_images(train: Source, val: Source, seconds: float) -> list[Finding]:
    """Files of the same content in both splits: sizes are compared first, contents where sizes are equal.

    Args:
        seconds: files are read no longer than this.
    """
    if not (isinstance(train, CocoSource) and isinstance(val, CocoSource)):
        return []
    until = time.monotonic() + seconds
    val_of_size: dict[int, list[int]] = {}
    for i in range(len(val)):
        val_of_size.setdefault(_num_bytes(val, i), []).append(i)
    twins: list[tuple[str, str]] = []
    digests: dict[str, str] = {}
    for i in range(len(train)):
        if time.monotonic() > until:
            break
        for j in val_of_size.get(_num_bytes(train, i) or -1, []):
            if _digest(train, i, digests) == _digest(val, j, digests):
                twins.append((train.name(i), val.name(j)))
    if not twins:
        return []
    first = f"{twins[0][0]!r} and {twins[0][1]!r}"
    text = f"{len(twins)} training images are validation images, too ({first}): the validation figures will flatter"
    return [Finding(text, "take them out of one of the splits")]


def _num_bytes(source: CocoSource, index: int) -> int:
    """0 for a file that is not there, which is told elsewhere."""
    held = source.held(index)
    if held is not None:
        return len(held)
    try:
        return os.path.getsize(source.file(index))
    except OSError:
        return 0


def _digest(source: CocoSource, index: int, known: dict[str, str]) -> str:
    path = source.file(index)
    if path not in known:
        known[path] = hashlib.sha256(source.encoded(index)).hexdigest()
    return known[path]


def truth(source: Source, index: int) -> tuple[np.ndarray, np.ndarray]:
    """The annotations of one image past the way that targets take: boxes xyxy px inside the image [N, 4] and category
    ids [N]; crowd regions, boxes without area and boxes given twice left out."""
    if isinstance(source, FirstRows):
        ids = np.array([source.classes.category_ids[i] for i in source.labels(index)], np.int64)
        return source.boxes_xyxy_px(index).astype(np.float64).reshape(-1, 4), ids
    if not isinstance(source, CocoSource):
        sample = source.sample(index)
        ids = np.array([source.classes.category_ids[i] for i in sample.labels], np.int64)
        return sample.boxes_xyxy_px.astype(np.float64).reshape(-1, 4), ids
    t, row = source.table, int(source._rows[index])
    mine = np.arange(t.offsets[row], t.offsets[row + 1])
    mine = mine[~t.crowd[mine] & ~t.again[mine]]
    h, w = source.size_px(index)
    x, y, bw, bh = t.boxes_xywh_px[mine].T
    boxes_px = np.stack((x, y, x + bw, y + bh), 1).clip(0, (w, h, w, h))
    keep = (boxes_px[:, 2:].astype(np.float32) > boxes_px[:, :2].astype(np.float32)).all(1)
    return boxes_px[keep], t.category_ids[mine][keep]


def targets(source: Source, batch: Batch, indices: list[int]) -> Finding | None:
    """Do the targets that reach the model say what the annotations say?

    Args:
        batch: of images without crop or flip.
        indices: its images, into the source.
    """
    remedy = "this is a mistake in the program, not in the data: please report it"
    for target, index in zip(batch.targets, indices, strict=True):
        boxes_px, ids = truth(source, index)
        h, w = target.orig_size_px
        got = cxcywh_to_xyxy(target.boxes_cxcywh.double()) * torch.tensor([w, h, w, h])
        where = f"image {source.name(index)!r}"
        if len(got) != len(boxes_px):
            return Finding(f"{where} has {len(boxes_px)} boxes and {len(got)} targets", remedy, bad=True)
        if len(got) and np.abs(got.numpy() - boxes_px).max() > max(1.0, 1e-3 * max(h, w)):
            return Finding(f"the target boxes of {where} are not its annotations' boxes (box format)", remedy, bad=True)
        if [source.classes.category_ids[i] for i in target.labels.tolist()] != ids.tolist():
            return Finding(
                f"the target labels of {where} are not its annotations' category ids", remedy, bad=True
            )  # fmt: skip
    return None
