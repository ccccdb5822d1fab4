"""Hugging Face data sets: a name on the hub, or a folder or file on disk, as a source.

The annotations become the same flat arrays as those of a COCO json, so that everything after them is the same too; the
images stay in the memory-mapped Arrow file, as they were encoded, and are decoded like any other.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from detr_accel.data import decode, hub_columns, settle
from detr_accel.data.box_formats import READINGS
from detr_accel.data.coco import CocoSource
from detr_accel.data.coco_json import Strings, Table
from detr_accel.data.decode import header, read_rgb
from detr_accel.data.dirt import EXAMPLES, Dirt
from detr_accel.data.hub_columns import Columns, Flat
from detr_accel.data.layout import MOST_MISSING
from detr_accel.structures import Classes, UserError

_ROWS = 1000  # of annotations in one step
_PATH = 300  # letters of a path that are shown: the column may hold images as text
_CATEGORY, _FEW = "annotation.category", 0.01  # a larger share of boxes without a class is no accident
_BOX, _SOME = "annotation.box", 4  # fewer boxes say nothing about the rest


class ArrowImages:
    """The images of a split, encoded, in a memory-mapped file.

    Args:
        dataset: ``datasets.Dataset``.
        column: of the images: ``datasets.Image``, bytes, or paths.
        folder: of relative paths.
    """

    def __init__(self, dataset: Any, column: str, name: str, folder: str | None = None) -> None:
        self.dataset, self.column, self.name = undecoded(dataset, column).select_columns([column]), column, name
        self.folder = folder

    def __getitem__(self, row: int) -> tuple[str, bytes | None]:
        """The name of an image, or its path where the file holds no bytes, and the bytes."""
        with decode.reading():
            cell = self.dataset[int(row)][self.column]
        return encoded(cell, f"{self.name}, row {row}", self.folder)

    def files(self, rows: np.ndarray) -> Iterator[str]:
        """Where the pixels of these rows lie; no image is read for it."""
        yield from (str(file["filename"]) for file in self.dataset.cache_files)
        wanted = np.zeros(len(self.dataset), bool)
        wanted[rows] = True
        for number, some in enumerate(self.dataset.with_format("arrow").iter(batch_size=_ROWS)):
            paths = hub_columns.paths(some.column(self.column))
            mine = wanted[number * _ROWS : number * _ROWS + len(paths)]
            yield from (path for path, of_mine in zip(paths, mine, strict=True) if of_mine and path)


def undecoded(dataset: Any, column: str) -> Any:
    """The same set, giving the bytes of its images as they are."""
    import datasets

    if isinstance((dataset.features or {}).get(column), datasets.Image):
        return dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def encoded(cell: Any, name: str, folder: str | None = None) -> tuple[str, bytes | None]:
    """A cell of an image column, as name or path, and bytes.

    Args:
        folder: what a relative path starts from; None leaves it as it is.
    Raises:
        UserError: it is empty.
    """
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str) and cell:
        return (cell if folder is None or "://" in cell else os.path.join(folder, cell)), None
    if not isinstance(cell, bytes):
        raise UserError(f"{name} has no image: remove the row")
    return name, cell


def refuse_missing(cells: list[tuple[str, bytes | None]], name: str, folder: str | None) -> list[str]:
    """The paths of images, as ``encoded``, that are not there.

    Raises:
        UserError: more than MOST_MISSING of them.
    """
    missing = [path for path, data in cells if data is None and not os.path.isfile(path)]
    if len(missing) > MOST_MISSING * len(cells):
        where = f"relative paths start from {folder}" if folder is not None else "it holds paths and not the images"
        raise UserError(
            f"{name}: {len(missing)} of {len(cells)} image files looked at are not there, the first: "
            f"{missing[0][:_PATH]}; {where}: put the images there, or write the set with the images inside"
        )
    return missing


class HubSource(CocoSource):
    """Some or all images of a split.

    Args:
        table: its annotations; every size is known.
        at: int64 [I], the row in the set of each image of the table.
        turned: bool [I], images that a viewer shows turned or mirrored, of sets that tell no sizes.
        scale: as of CocoSource.
        seen: the classes are those that its boxes have; nothing lists them.
    """

    def __init__(
        self, table: Table, images: ArrowImages, classes: Classes, at: np.ndarray, turned: np.ndarray, scale: bool,
        seen: bool = False,
    ) -> None:  # fmt: skip
        self.images, self.at, self.turned, self.seen = images, at, turned, seen
        super().__init__(table, Path(images.name), table.file_names, classes, scale=scale)

    def _file(self, row: int) -> str:
        """A path, or a name where the set itself holds the image."""
        name, data = self._cell(row)
        return f"{self.folder}, {self.table.file_names[row]}" if data is not None else name

    def _cell(self, row: int) -> tuple[str, bytes | None]:
        """As ``ArrowImages``; of an empty cell its name only."""
        try:
            return self.images[self.at[row]]
        except UserError:
            return f"{self.folder}, {self.table.file_names[row]}", None

    def held(self, index: int) -> bytes | None:
        return self._cell(self._rows[index])[1]

    def encoded(self, index: int) -> bytes:
        name, data = self.images[self.at[self._rows[index]]]
        return decode.read_bytes(name) if data is None else data

    def stamp(self) -> str:
        """sha256 over size and time of change of what holds the pixels: the library's files, and those they name."""
        digest = hashlib.sha256()
        for path in self.images.files(self.at[self._rows]):
            try:
                found = os.stat(path)
                digest.update(f"{found.st_size} {found.st_mtime_ns}\n".encode())
            except OSError:
                digest.update(b"gone\n")
        return digest.hexdigest()

    def _read(self, row: int, size_px: tuple[int, int], at_least_px: tuple[int, int] | None) -> np.ndarray:
        name, data = self.images[self.at[row]]
        return read_rgb(name, None if self.turned[row] else size_px, at_least_px, data, scale=self.scale)


def open_split(
    dataset: Any, asked: Columns, name: str, dirt: Dirt, classes: Classes | None = None, folder: str | None = None
) -> HubSource:
    """Read a split's annotations.

    Args:
        dataset: ``datasets.Dataset``.
        name: for messages.
        dirt: counts what is odd, and decides.
        classes: of the training split; the names must be the same.
        folder: of relative paths of images.
    Raises:
        UserError: a column is missing, nothing is left, or the policy is to stop.
    """
    if not len(dataset):
        raise hub_columns.no_rows(name)
    columns = hub_columns.resolve(dataset.features, asked, name)
    small = dataset.select_columns(columns.small).with_format("arrow")
    if columns.named and not columns.class_names:
        columns = _named(columns, classes, small, name)
    parts = [hub_columns.flatten(some, columns) for some in small.iter(batch_size=_ROWS)]
    check_names(parts, asked, name)
    check_boxes(parts, name)
    images = ArrowImages(dataset, columns.image, name, folder)
    _look_for_files(images, len(dataset), dirt)
    table, at, turned = _table(parts, columns, images, name, dirt)
    own = Classes(columns.class_names, tuple(range(len(columns.class_names))))
    if classes is not None and classes.names != own.names:
        raise UserError(f"{name} has other classes than the training split: both must have the same names")
    return HubSource(table, images, own, at, turned, dirt.policy == "mend", columns.named and not asked.class_names)


def _look_for_files(images: ArrowImages, num: int, dirt: Dirt) -> None:
    """Whether the files of a set that holds paths are there, of some of its rows."""
    cells = []
    for row in range(0, num, -(-num // settle.LOOKED_AT)):
        try:
            cells.append(images[row])
        except UserError:  # an empty cell: told when its turn comes
            continue
    try:
        missing = refuse_missing(cells, images.name, images.folder)
    except UserError:
        if not dirt.look:
            raise
        missing = [path for path, data in cells if data is None and not os.path.isfile(path)]
    if missing:
        dirt.note("image.missing", f"{images.name}: {missing[0]} is not there", len(missing), missing[:EXAMPLES])


def _named(columns: Columns, classes: Classes | None, small: Any, name: str) -> Columns:
    """Categories that are strings: their names in alphabetical order, or those of the training split.

    Raises:
        UserError: there are none; or some that training does not have, so that the figures would leave them out.
    """
    names: set[str] = set()
    for some in small.iter(batch_size=_ROWS):
        names |= hub_columns.distinct(some, columns)
    if classes is not None:
        if new := sorted(names - set(classes.names)):
            shown = ", ".join(map(repr, new[:5])) + (", ..." if len(new) > 5 else "")
            raise UserError(
                f"{name} has categories that the training split has not: {shown}; mend them, or list every class in "
                "data.hub.class_names"
            )
        return replace(columns, class_names=tuple(str(n) for n in classes.names))
    if not names:
        raise UserError(f"{name} has no categories: there is nothing to detect")
    return replace(columns, class_names=tuple(sorted(names)))


def _rows_of(part: Flat) -> np.ndarray:
    return np.repeat(np.arange(len(part.counts)), part.counts)


def check_names(parts: list[Flat], asked: Columns, name: str) -> None:
    """
    Raises:
        UserError: the recipe names fewer classes than the set uses. A few odd categories are dirt.
    """
    if not asked.class_names:
        return
    odd = [(n, a, text) for n, part in enumerate(parts) for a, (kind, text) in part.bad.items() if kind == _CATEGORY]
    if len(odd) > max(1, _FEW * sum(len(part.labels) for part in parts)):
        number, a, text = odd[0]
        raise UserError(f"{name}, row {number * _ROWS + _rows_of(parts[number])[a]}: {text}")


def check_boxes(parts: list[Flat], name: str) -> None:
    """
    Raises:
        UserError: not one box can be read. A few odd ones are dirt.
    """
    odd = [(n, a, text) for n, part in enumerate(parts) for a, (kind, text) in part.bad.items() if kind == _BOX]
    if len(odd) >= _SOME and len(odd) == sum(len(part.labels) for part in parts):
        number, a, text = odd[0]
        row = number * _ROWS + _rows_of(parts[number])[a]
        raise UserError(f"{name}: not one of its {len(odd)} boxes can be read, the first in row {row}: {text}")


def _table(
    parts: list[Flat], columns: Columns, images: ArrowImages, name: str, dirt: Dirt
) -> tuple[Table, np.ndarray, np.ndarray]:
    """The annotations that can be used; the row in the set of each image; and which images are stored turned."""

    def joined(key: str) -> np.ndarray:
        return np.concatenate([getattr(part, key) for part in parts])

    counts, sizes, boxes = joined("counts"), joined("sizes_px"), joined("boxes")
    hub_columns.check_unit(boxes, columns.box_format, name, at_least=1)
    told = (sizes > 0).all(1)
    good = _good(parts, name, dirt)
    gone, turned = _headers(parts, images, sizes, name, dirt)
    with np.errstate(over="ignore", invalid="ignore"):
        boxes = hub_columns.to_xywh_px(boxes, np.repeat(sizes, counts, axis=0), columns.box_format)
    areas = joined("areas")
    areas = np.where(np.isfinite(areas), areas, boxes[:, 2] * boxes[:, 3])
    row_of = np.repeat(np.arange(len(counts)), counts)[good]
    offsets = np.concatenate(([0], np.cumsum(np.bincount(row_of, minlength=len(counts))))).astype(np.int64)
    table = Table(
        Path(name), unique_or(joined("image_ids"), np.arange(len(counts))),
        Strings([f"row {row}" for row in range(len(counts))]), sizes, offsets,
        unique_or(joined("ids"), np.arange(1, len(boxes) + 1), least=1)[good], joined("labels")[good], boxes[good],
        areas[good], joined("crowd")[good], np.zeros(len(row_of), bool), dict(enumerate(columns.class_names)),
    )  # fmt: skip
    at = np.flatnonzero(~gone)
    if not len(at):
        raise UserError(f"{name}: none of its images can be used: {next(iter(dirt.examples.values()))[0]}")
    if gone.any():
        table = settle.regroup(table, np.where(gone, -1, np.arange(len(gone))))
    table = settle.settle_boxes(table, dirt, remedies(columns.box_format))

    def picture(row: int) -> tuple[str, bytes | None] | None:
        try:
            return images[at[row]] if told[at[row]] else None
        except UserError:  # an empty cell: told when its turn comes
            return None

    settle.look_at_sizes(table, picture, dirt)
    return table, at, turned[at]


def _good(parts: list[Flat], name: str, dirt: Dirt) -> np.ndarray:
    """bool [A]: the boxes that can be read, with a category that there is."""
    good = np.ones(sum(len(part.labels) for part in parts), bool)
    start = 0
    for number, part in enumerate(parts):
        rows = _rows_of(part)
        for a, (kind, text) in part.bad.items():
            dirt.note(kind, f"{name}, row {number * _ROWS + rows[a]}: {text}")
            good[start + a] = False
        start += len(part.labels)
    return good


def _headers(
    parts: list[Flat], images: ArrowImages, sizes: np.ndarray, name: str, dirt: Dirt
) -> tuple[np.ndarray, np.ndarray]:
    """Fill in the sizes that the set does not tell.

    Returns:
        bool [I]: which images are left out, and which are stored turned.
    """
    gone, turned = np.zeros((2, len(sizes)), bool)
    for number, part in enumerate(parts):
        for row, text in part.faults.items():
            dirt.note("image.objects", f"{name}, row {number * _ROWS + row}: {text}")
            gone[number * _ROWS + row] = True
    for row in np.flatnonzero((sizes == 0).any(1) & ~gone).tolist():
        try:
            sizes[row], turned[row] = header(*images[row])
        except UserError as error:
            dirt.note("image.no_size", error)
            gone[row] = True
    return gone, turned


def remedies(box_format: str) -> dict[str, str]:
    """What to set where the boxes look like something else than COCO's."""
    if box_format != "xywh_px":
        return {"": f"data.hub.box_format={box_format} does not fit them"}
    corners, centres, _ = READINGS
    return {
        corners: "set data.hub.box_format=xyxy_px", centres: "set data.hub.box_format=cxcywh_px",
        "": "set data.hub.box_format to what they are, or write them anew",
    }  # fmt: skip


def unique_or(ids: np.ndarray, otherwise: np.ndarray, least: int = 0) -> np.ndarray:
    """The set's own ids, or others where some are missing or doubled."""
    usable = len(ids) and ids.min() >= least and len(np.unique(ids)) == len(ids)
    return ids if usable else otherwise


def reaches_out(source: HubSource, box_format: str) -> list[str]:
    """A warning where the boxes look like corners that were taken for width and height."""
    table = source.table
    sizes = np.repeat(table.sizes_px, np.diff(table.offsets), axis=0)
    out = (table.boxes_xywh_px[:, :2] + table.boxes_xywh_px[:, 2:] > sizes[:, ::-1] * 1.01 + 1).any(1)
    if box_format != "xywh_px" or 3 * int(out.sum()) < len(out) or not len(out):
        return []
    return [
        f"data: warning: {int(out.sum())} of {len(out)} boxes of {table.path} reach out of their image: if they are "
        "corners, set data.hub.box_format=xyxy_px"
    ]
