"""One data set cut in two, and what is said about both parts."""

from __future__ import annotations

import numpy as np

from detr_accel.data import source as seeds
from detr_accel.data.coco import CocoSource
from detr_accel.data.source import Source
from detr_accel.structures import UserError


def draw_split(source: CocoSource, val_fraction: float, seed: int) -> dict:
    """A function of the seed and the set of image ids, whatever their order in the file."""
    ids = np.sort(source.table.image_ids)
    if len(ids) < 2:
        raise UserError(f"{source.table.path} lists one image: a training and a validation split need two")
    num_val = min(max(1, round(len(ids) * val_fraction)), len(ids) - 1)
    order = seeds.generator(seed, seeds.SPLIT).permutation(len(ids))
    parts = {"train": ids[np.sort(order[num_val:])], "val": ids[np.sort(order[:num_val])]}
    return {"seed": seed, "val_fraction": val_fraction, **{name: part.tolist() for name, part in parts.items()}}


def line(split: str, source: CocoSource) -> str:
    """For the console."""
    return f"data: {split}: {describe(source)}"


def describe(source: Source) -> str:
    """Which images these are, in one line."""
    if isinstance(source, CocoSource):
        return f"{source.describe()}; {source.table.path}, images in {source.folder}"
    return f"{len(source)} procedural shapes"


def unused(train: CocoSource) -> list[str]:
    used = set(np.unique(train.table.category_ids).tolist())
    names = [n for c, n in train.table.categories.items() if c not in used]
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return [f"data: {len(names)} classes have no box in the training json: {shown}"] if names else []


def check_targets(train: CocoSource) -> None:
    """
    Raises:
        UserError: not one box to learn from.
    """
    if train.num_targets() == 0:
        raise UserError(
            f"{train.table.path}: no image of the training split has a box that could be learned from "
            f"({train.describe()}): add annotations, or set data.train_annotations to the right json"
        )


def no_boxes(val: CocoSource) -> list[str]:
    if val.num_targets():
        return []
    return [f"data: warning: the validation split has no boxes ({val.table.path}), so its metrics will be empty"]


def shared_files(train: CocoSource, val: CocoSource) -> list[str]:
    if train.folder != val.folder:
        return []
    num = len({train.name(i) for i in range(len(train))} & {val.name(i) for i in range(len(val))})
    return [f"data: warning: {num} images are in both splits, so the validation figures will flatter"] if num else []
