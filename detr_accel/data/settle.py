"""A table and its files brought together: doubled records, missing sizes, odd boxes.

Legend: I images, A annotations of one json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from detr_accel.data.box_formats import READINGS, inside
from detr_accel.data.coco import clip, reach_out
from detr_accel.data.coco_json import Strings, Table
from detr_accel.data.decode import header_size, size_fault
from detr_accel.data.dirt import EXAMPLES, Dirt
from detr_accel.data.layout import one_name
from detr_accel.structures import UserError

LOOKED_AT = 500  # files whose size is compared with their record's before training
FEWEST, LEAVING, FITS = 20, 0.3, 0.99  # when boxes are in another format: so many; shares that leave, that then fit


def settle(table: Table, folder: Path, paths: Strings, dirt: Dirt) -> tuple[Table, Strings]:
    """Join, complete, leave out; count the boxes that are no targets.

    Args:
        paths: each image's file relative to the folder, "" where it is not there.
    Returns:
        the images that stay, with sizes; and their files.
    Raises:
        UserError: nothing is left, boxes are in another format, or the policy is to stop.
    """
    target = np.arange(len(table))
    sizes = table.sizes_px.copy()
    _join_doubles(table, paths, target, sizes, dirt)
    for row in np.flatnonzero((sizes == 0).any(1) & (target == np.arange(len(table)))):
        try:
            sizes[row] = header_size(f"{folder}/{paths[row] or table.file_names[row]}")
        except UserError as error:
            dirt.note("image.no_size", f"{table.path}: image id {table.image_ids[row]}: {error}")
            target[row] = -1
    table = replace(table, sizes_px=sizes)
    if (target != np.arange(len(table))).any():
        table, paths = regroup(table, target), Strings([paths[i] for i in _stay(target)])
    if len(table) == 0:
        raise UserError(f"{table.path}: none of its images can be used: {next(iter(dirt.examples.values()))[0]}")
    table = settle_boxes(table, dirt)
    look_at_sizes(table, lambda row: (f"{folder}/{paths[row]}", None) if paths[row] else None, dirt)
    return table, paths


def settle_boxes(table: Table, dirt: Dirt, remedies: Mapping[str, str] | None = None) -> Table:
    """Mark the boxes given twice, and count those that are no targets.

    Args:
        remedies: what to do about boxes in one of ``READINGS`` or in ``fractions``; "" has the one for all others.
    Raises:
        UserError: boxes are in another format, or the policy is to stop.
    """
    table = replace(table, again=_again(table))
    _count_boxes(table, dirt, {"": _MEND} if remedies is None else remedies)
    return table


def look_at_sizes(table: Table, picture: Callable[[int], tuple[str, bytes | None] | None], dirt: Dirt) -> None:
    """Sizes of some files against their records: a folder that was resized shows at once, and the headers of 100,000
    files are not read. Decoding looks at each; ``check-data`` tells of all.

    Args:
        picture: of a row, its path and None, or its name and what it holds; None where it is not there.
    """
    looked = range(0, len(table), -(-len(table) // LOOKED_AT))
    found: dict[str, list[tuple[int, str]]] = {}
    for row in looked:
        held = picture(row)
        if held is not None:
            kind, text = size_fault(held[0], tuple(table.sizes_px[row].tolist()), held[1])
            if kind:
                found.setdefault(kind, []).append((row, text))
    for kind, rows in found.items():
        places = [(table.file_names[row], None) for row, _ in rows]
        texts = [f"{text} ({len(looked)} of {len(table)} files looked at)" for _, text in rows[:EXAMPLES]]
        dirt.note(kind, f"{table.path}: {rows[0][1]}", len(rows), texts, places)


def _stay(target: np.ndarray) -> np.ndarray:
    return np.flatnonzero(target == np.arange(len(target)))


def _join_doubles(table: Table, paths: Strings, target: np.ndarray, sizes: np.ndarray, dirt: Dirt) -> None:
    """Records of one file become the first of them, where they speak of one size and name no two folders."""
    first: dict[str, int] = {}
    longest: dict[str, str] = {}  # of the names that the records of a file have
    apart: set[str] = set()  # files that records of several folders lay claim to
    for row in range(len(table)):
        path = paths[row]
        if not path:
            continue
        start, name = first.setdefault(path, row), table.file_names[row]
        if start == row:
            longest[path] = name
            continue
        fits, longest[path] = one_name(longest[path], name), max(longest[path], name, key=len)
        text = (
            f"{table.path}: images[{start}] ({table.file_names[start]!r}) and images[{row}] "
            f"({table.file_names[row]!r}) are the same file {path}: keep one record for each image"
        )
        known = (sizes[start] > 0).all(), (sizes[row] > 0).all()
        if not fits or path in apart:
            apart.add(path)
            other = f"{text}; the folders of its records differ, and whose picture it is nobody can tell"
            dirt.note("image.file_conflict", other, places=[(table.file_names[row], None)])
            target[[start, row]] = -1
        elif all(known) and (sizes[start] != sizes[row]).any():
            dirt.note("image.file_conflict", text, places=[(table.file_names[row], None)])
            target[[start, row]] = -1
        elif dirt.note("image.file_twice", text):
            target[row] = start
            sizes[start] = sizes[row] if known[1] else sizes[start]
        else:
            target[[start, row]] = -1
    for row in np.flatnonzero(target >= 0):  # joined to one that a third record has taken away
        target[row] = -1 if target[target[row]] < 0 else target[row]


def regroup(table: Table, target: np.ndarray) -> Table:
    """Images joined or left out, with their annotations.

    Args:
        target: int64 [I]: itself where an image stays, the one that its annotations go to, or -1.
    """
    stay = _stay(target)
    place = np.full(len(table) + 1, -1)  # the last one: of those that are left out
    place[stay] = np.arange(len(stay))
    row = place[target[np.repeat(np.arange(len(table)), np.diff(table.offsets))]]
    pick = np.flatnonzero(row >= 0)
    pick = pick[np.argsort(row[pick], kind="stable")]
    counts = np.bincount(row[pick], minlength=len(stay))
    return replace(
        table, image_ids=table.image_ids[stay], file_names=Strings([table.file_names[i] for i in stay]),
        sizes_px=table.sizes_px[stay], offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        annotation_ids=table.annotation_ids[pick], category_ids=table.category_ids[pick],
        boxes_xywh_px=table.boxes_xywh_px[pick], areas_px=table.areas_px[pick], crowd=table.crowd[pick],
        again=table.again[pick],
    )  # fmt: skip


def _rows(table: Table) -> np.ndarray:
    """The image of each annotation, int64 [A]."""
    return np.repeat(np.arange(len(table)), np.diff(table.offsets))


def _again(table: Table) -> np.ndarray:
    """bool [A]: there is an equal one before it; crowd regions aside."""
    label = np.searchsorted(np.array(list(table.categories), np.int64), table.category_ids)
    keys = (_rows(table), table.crowd, label, *table.boxes_xywh_px.T)
    order = np.lexsort(keys)  # stable: of equal ones the first stays in front
    equal = np.logical_and.reduce([key[order][1:] == key[order][:-1] for key in keys])
    again = np.zeros(len(order), bool)
    again[order[1:]] = equal
    return again & ~table.crowd


def _count_boxes(table: Table, dirt: Dirt, remedies: Mapping[str, str]) -> None:
    rows = _rows(table)
    sizes = table.sizes_px[rows]
    format_, text = other_format(table.boxes_xywh_px[~table.crowd], sizes[~table.crowd])
    if format_:
        text = f"{text}: {remedies.get(format_, remedies[''])}"
        dirt.note("box.format", f"{table.path}: {text}", int((~table.crowd).sum()), [text])
    boxes = table.boxes_xywh_px
    for kind, found in odd_boxes(boxes, sizes, table.again).items():
        found = np.flatnonzero(found & ~table.crowd)
        shown = [_where(table, rows[a], a) for a in found[:EXAMPLES]]
        if shown:
            places = [(table.file_names[rows[a]], tuple(boxes[a].tolist())) for a in found[:EXAMPLES]]
            dirt.note(kind, f"{shown[0]}: mend or remove it", len(found), shown, places)


def odd_boxes(boxes_xywh_px: np.ndarray, sizes_px: np.ndarray, again: np.ndarray) -> dict[str, np.ndarray]:
    """Kind of dirt -> which boxes [A, 4] are of it, bool [A].

    Args:
        sizes_px: (h, w), [2] or [A, 2].
        again: bool [A], an equal one stands before it.
    """
    _, keep = clip(boxes_xywh_px, sizes_px)
    inverted = (boxes_xywh_px[:, 2:] < 0).any(1)
    flat = ~inverted & (boxes_xywh_px[:, 2:] == 0).any(1)
    return {
        "box.inverted": inverted, "box.flat": flat, "box.outside": ~keep & ~inverted & ~flat, "box.twice": again,
        "box.cut": keep & reach_out(boxes_xywh_px, sizes_px),
    }  # fmt: skip


def _where(table: Table, row: int, annotation: int) -> str:
    box = ", ".join(f"{v:g}" for v in table.boxes_xywh_px[annotation])
    h, w = table.sizes_px[row]
    name, number = table.file_names[row], table.annotation_ids[annotation]
    return f"{table.path}: annotation {number} of {name!r} ({w}x{h}): bbox [{box}]"


def other_format(boxes_px: np.ndarray, sizes_px: np.ndarray) -> tuple[str, str]:
    """Whether boxes are not [x, y, width, height] in pixels, and what they are; empty where they are, or nobody can
    tell.

    Args:
        boxes_px: float64 [N, 4], as written.
        sizes_px: [N, 2], (h, w) of each one's image.
    """
    boxes, (h, w) = boxes_px.T.astype(np.float64), sizes_px.T.astype(np.float64)
    few = boxes.shape[1] < FEWEST
    if boxes.size and 0 < boxes.max() <= (1 if few else 1.5) and min(h.min(), w.min()) > 16:
        # a few boxes of one pixel are whole numbers, and a few at the border may begin outside
        if not few or ((boxes % 1 > 0).any() and boxes.min() >= 0):
            return "fractions", f"the boxes look like fractions of their images (none is above {boxes.max():g})"
    if few:
        return "", ""
    with np.errstate(over="ignore", invalid="ignore"):
        leaving = 1 - _inside(boxes[0], boxes[1], boxes[0] + boxes[2], boxes[1] + boxes[3], h, w)
        if leaving < LEAVING:
            return "", ""
        for name, read in READINGS.items():
            left, top, right, bottom = read(*boxes)
            if _inside(left, top, right, bottom, h, w) >= FITS:
                share = f"{100 * leaving:.0f} % of them leave their images"
                return name, f"the boxes look like {name} ({share} when read as [x, y, width, height])"
    return "", ""


_MEND = "export them as [x, y, width, height] in pixels"


def _inside(left, top, right, bottom, h: np.ndarray, w: np.ndarray) -> float:
    """Share of the boxes that have an area and lie in their images."""
    return float((inside(left, top, right, bottom, h, w) & (right > left) & (bottom > top)).mean())
