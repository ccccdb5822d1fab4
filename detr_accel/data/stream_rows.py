"""Rows of a stream: a block of a table to images on their way, with what is wrong with each and what is done about it.

Legend: I rows of a block, A boxes of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from detr_accel.data import hub_columns, settle
from detr_accel.data.coco import clip, reach_out
from detr_accel.data.decode import header, size_fault
from detr_accel.data.dirt import KINDS, Dirt
from detr_accel.data.hub import check_boxes, check_names, encoded, refuse_missing, remedies
from detr_accel.data.hub_columns import Columns
from detr_accel.structures import UserError

LOOKED_AT = 256  # rows at the start that are looked at before training


@dataclass(frozen=True)
class Row:
    """One image on its way to the process that decodes it; it takes the place of an index."""

    name: str  # or its path, where there is no data
    image_id: int
    size_px: tuple[int, int]
    data: bytes | None = None
    turned: bool = False  # a viewer shows it turned or mirrored, and the set tells no size
    boxes_xyxy_px: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    num_cut: int = 0  # boxes that ran out of it
    fault: str | None = None  # why it cannot be used, told when its turn comes
    dirt: tuple[tuple[str, str], ...] = ()  # kind (dirt.KINDS) and sentence, of everything odd about it


@dataclass(frozen=True)
class Reading:
    """What the rows of a stream have in common.

    Args:
        columns: resolved.
        title: the set, for messages.
        on_bad: ``mend``, ``drop`` or ``stop``.
        folder: of relative paths of images; None: they are left as they are.
    """

    columns: Columns
    title: str
    on_bad: str = "mend"
    folder: str | None = None


class Block:
    """Consecutive rows of a shard.

    Args:
        table: pyarrow.Table of I rows.
        first: the place of its first row in the shard.
    Raises:
        UserError: boxes are in another unit or format than is said.
    """

    def __init__(self, table: Any, how: Reading, shard: int, first: int) -> None:
        self.how, self.shard, self.first = how, shard, first
        self.flat = hub_columns.flatten(table.select(how.columns.small), how.columns)
        self.images = table.column(how.columns.image)
        self.ends = np.cumsum(self.flat.counts)
        self.sizes, self.turned = self.flat.sizes_px.copy(), np.zeros(table.num_rows, bool)
        hub_columns.check_unit(self.flat.boxes, how.columns.box_format, how.title)
        self.faults = {row: ("image.objects", f"{self.name(row)}: {why}") for row, why in self.flat.faults.items()}
        for row in np.flatnonzero((self.sizes == 0).any(1)).tolist():
            self._measure(row)
        box_format = how.columns.box_format
        sizes = np.repeat(self.sizes, self.flat.counts, axis=0)
        with np.errstate(over="ignore", invalid="ignore"):
            self.written = hub_columns.to_xywh_px(self.flat.boxes, sizes, box_format)  # [A, 4], xywh px
        self.good = np.isfinite(self.written).all(1)
        self.good[list(self.flat.bad)] = False
        sure = self.good & ~self.flat.crowd & (sizes > 0).all(1)
        enough = sure.sum() >= settle.FEWEST  # a block in the middle of a training is not ended for a few boxes
        kind, text = settle.other_format(self.written[sure], sizes[sure]) if enough else ("", "")
        if kind:
            told = remedies(box_format)
            raise UserError(f"{how.title}: {text}: {told.get(kind, told[''])}")

    def __len__(self) -> int:
        return len(self.flat.counts)

    def name(self, row: int) -> str:
        return f"{self.how.title}, shard {self.shard}, row {self.first + row}"

    def cell(self, row: int) -> tuple[str, bytes | None]:
        """As ``hub.encoded``."""
        return encoded(self.images[row].as_py(), self.name(row), self.how.folder)

    def _measure(self, row: int) -> None:
        """The size of an image from its header."""
        if row in self.faults:
            return
        try:
            self.sizes[row], self.turned[row] = header(*self.cell(row))
        except UserError as error:
            self.faults[row] = "image.no_size", str(error)

    def row(self, row: int, image_id: int) -> Row:
        """One image.

        Args:
            row: 0 .. I - 1.
        """
        name, size = self.name(row), tuple(self.sizes[row].tolist())
        if row in self.faults:
            return Row(name, image_id, (1, 1), fault=self.faults[row][1], dirt=(self.faults[row],))
        try:
            path, data = self.cell(row)
        except UserError as error:
            return Row(name, image_id, (1, 1), fault=str(error))
        own = np.arange(self.ends[row] - self.flat.counts[row], self.ends[row])
        bad = [self.flat.bad[a] for a in own.tolist() if a in self.flat.bad]
        dirt = [(kind, f"{name}: {text}") for kind, text in bad]
        own = own[self.good[own] & ~self.flat.crowd[own]]
        written, labels = self.written[own], self.flat.labels[own]
        first = first_ones(written, labels)
        for kind, odd in settle.odd_boxes(written, np.array(size), ~first).items():
            dirt += [(kind, f"{name}: {_box(box, size)}: mend or remove it") for box in written[odd]]
        fault = next((text for kind, text in dirt if self.how.on_bad == "stop" and KINDS[kind].stops), None)
        if fault is not None:
            return Row(name, image_id, (1, 1), fault=fault, dirt=tuple(dirt))
        boxes, keep = clip(written, np.array(size))
        num_cut = int(reach_out(written[first], np.array(size)).sum())
        keep &= first
        turned = bool(self.turned[row])
        return Row(path, image_id, size, data, turned, boxes[keep], labels[keep], num_cut, dirt=tuple(dirt))


def _box(box_xywh_px: np.ndarray, size_px: tuple[int, int]) -> str:
    return f"({size_px[1]}x{size_px[0]}) box [{', '.join(f'{v:g}' for v in box_xywh_px)}] (x, y, width, height)"


def first_ones(boxes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """bool [N]: no equal box [N, 4] of the same class stands before it."""
    first = np.zeros(len(labels), bool)
    if len(labels):
        first[np.unique(np.column_stack((labels, boxes)), axis=0, return_index=True)[1]] = True
    return first


def look(block: Block, asked: Columns) -> list[str]:
    """What the first rows of a stream tell: lines for the console.

    Args:
        asked: the columns as the recipe has them.
    Raises:
        UserError: the recipe names too few classes, most files are missing, or something is odd and the policy is to
            stop.
    """
    how, dirt = block.how, Dirt(block.how.on_bad)
    check_names([block.flat], asked, f"{how.title}, shard {block.shard}")
    check_boxes([block.flat], f"{how.title}, the first {len(block)} rows")
    cells = {}
    for number in range(len(block)):
        row = block.row(number, -1)
        for kind, text in row.dirt:
            dirt.note(kind, text)
        if row.fault is None:
            cells[number] = row.name, row.data
    for path in refuse_missing(list(cells.values()), how.title, how.folder):
        dirt.note("image.missing", f"{how.title}: {path} is not there")
    for number, (path, data) in cells.items():
        told = tuple(block.flat.sizes_px[number].tolist())
        kind, text = size_fault(path, told, data) if min(told) > 0 else ("", "")
        if kind:
            dirt.note(kind, text)
    return dirt.lines(f"train, the first {len(block)} images")
