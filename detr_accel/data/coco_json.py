"""Read a COCO json into flat arrays, refusing what would silently become a wrong target.

Python objects are kept by nobody: worker processes are forked, and every look at an object's reference count would copy
its memory page into each of them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detr_accel.structures import UserError


class Strings:
    """A read-only list of strings in one block of bytes."""

    def __init__(self, items: list[str]):
        encoded = [s.encode("utf-8", "surrogateescape") for s in items]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self._bytes[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Table:
    """One json. I images in the file's order, A annotations sorted by image; crowd regions and odd boxes included."""

    path: Path
    image_ids: np.ndarray  # int64 [I]
    file_names: Strings  # I, as written
    sizes_px: np.ndarray  # int32 [I, 2], (h, w); 0 where the record has none
    offsets: np.ndarray  # int64 [I + 1]: the annotations of image i are offsets[i] .. offsets[i + 1]
    annotation_ids: np.ndarray  # int64 [A]
    category_ids: np.ndarray  # int64 [A]
    boxes_xywh_px: np.ndarray  # float64 [A, 4], as written
    areas_px: np.ndarray  # float64 [A]; the box's where the record has none
    crowd: np.ndarray  # bool [A]
    categories: dict[int, str]  # id -> name, ascending

    def __len__(self) -> int:
        return len(self.image_ids)


def read(path: Path) -> Table:
    """Read and check one json.

    Raises:
        UserError: naming the file, the record and its value.
    """
    tree = _load(path)
    categories = _categories(path, tree["categories"])
    ids, names, sizes = _images(path, tree["images"])
    row_of = {image_id: row for row, image_id in enumerate(ids)}
    columns = _annotations(path, tree["annotations"], row_of, categories)
    order = np.argsort(columns["row"], kind="stable")
    counts = np.bincount(columns["row"], minlength=len(ids))
    return Table(
        path=path,
        image_ids=np.array(ids, np.int64),
        file_names=Strings(names),
        sizes_px=np.array(sizes, np.int32).reshape(-1, 2),
        offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        annotation_ids=_usable_ids(columns["id"])[order],
        category_ids=columns["category"][order],
        boxes_xywh_px=columns["box"][order],
        areas_px=columns["area"][order],
        crowd=columns["crowd"][order],
        categories=categories,
    )


def _load(path: Path) -> dict:
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid json: {error}") from None
    except RecursionError:
        raise UserError(
            f"{path} is no COCO detection json: its values are nested without end; export it anew"
        ) from None
    keys = ("images", "annotations", "categories")
    missing = [k for k in keys if not isinstance(tree, dict) or not isinstance(tree.get(k), list)]
    if missing:
        raise UserError(f"{path} is no COCO detection json: it has no list named {' or '.join(missing)}")
    return tree


def _categories(path: Path, records: list) -> dict[int, str]:
    names: dict[int, str] = {}
    for number, record in enumerate(records):
        where = f"{path}: categories[{number}]"
        category_id = _integer(record, "id", where)
        name = record.get("name")
        if name is None or str(name).strip() == "":
            raise UserError(f"{where} (id {category_id}) has no name: give it one")
        _check_text(str(name), "name", where)
        if category_id in names:
            raise UserError(f"{where}: {names[category_id]!r} and {name!r} share the id {category_id}: ids must differ")
        if str(name) in names.values():
            raise UserError(f"{where}: the name {name!r} is used twice: merge the two categories or rename one")
        names[category_id] = str(name)
    if not names:
        raise UserError(f"{path} has no categories: there is nothing to detect")
    return dict(sorted(names.items()))


def _images(path: Path, records: list) -> tuple[list[int], list[str], list[tuple[int, int]]]:
    seen: dict[int, str] = {}
    sizes: list[tuple[int, int]] = []
    for number, record in enumerate(records):
        where = f"{path}: images[{number}]"
        image_id = _integer(record, "id", where)
        name = record.get("file_name")
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{where} (id {image_id}) has no file_name: give it one or remove the record")
        _check_text(name, "file_name", where, "surrogateescape")
        if image_id in seen:
            raise UserError(f"{where}: id {image_id} is used for {seen[image_id]!r} and {name!r}: ids must differ")
        seen[image_id] = name
        sizes.append((_side(record, "height", where), _side(record, "width", where)))
    if not seen:
        raise UserError(f"{path} lists no images")
    return list(seen), list(seen.values()), sizes


def _side(record: dict, key: str, where: str) -> int:
    value = record.get(key)
    if value is None:
        return 0  # read from the image's header later
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**31 or value != int(value):
        raise UserError(f"{where} (id {record.get('id')}): {key} {value!r} is not a positive whole number of pixels")
    return int(value)


def _annotations(
    path: Path, records: list, row_of: dict[int, int], categories: dict[int, str]
) -> dict[str, np.ndarray]:
    rows, ids, labels, boxes, areas, crowd = [], [], [], [], [], []
    for number, record in enumerate(records):
        here = _Here(path, number, record)
        row = row_of.get(_integer(record, "image_id", here))
        if row is None:
            raise UserError(f"{here}: no image has the id {record['image_id']}: add the image or remove the annotation")
        category_id = _integer(record, "category_id", here)
        if category_id not in categories:
            known = ", ".join(map(str, list(categories)[:10])) + (", ..." if len(categories) > 10 else "")
            raise UserError(f"{here}: category_id {category_id} is not in the categories ({known}): add or mend it")
        box = record.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_finite, box)):
            raise UserError(
                f"{here}: bbox {_short(box)} is not four finite numbers [x, y, width, height]: mend or remove it"
            )
        area = record.get("area")
        rows.append(row)
        ids.append(record.get("id"))
        labels.append(category_id)
        boxes.append(box)
        areas.append(area if _finite(area) else float(box[2]) * float(box[3]))
        crowd.append(record.get("iscrowd") in (1, True, "1"))
    return {
        "row": np.array(rows, np.int64),
        "id": np.array([i if _is_integer(i) else -1 for i in ids], np.int64),
        "category": np.array(labels, np.int64),
        "box": np.array(boxes, np.float64).reshape(-1, 4),
        "area": np.array(areas, np.float64),
        "crowd": np.array(crowd, bool),
    }


class _Here:
    """Where an annotation stands; put into words only when something is wrong with it."""

    def __init__(self, path: Path, number: int, record: Any):
        self.path, self.number, self.record = path, number, record

    def __str__(self) -> str:
        known = f" (id {self.record['id']})" if isinstance(self.record, dict) and "id" in self.record else ""
        return f"{self.path}: annotations[{self.number}]{known}"


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_text(text: str, key: str, where: str, errors: str = "strict") -> None:
    """``errors``: ``surrogateescape`` lets the bytes of a file name pass that are no UTF-8 on disk either."""
    try:
        text.encode("utf-8", errors)
    except UnicodeEncodeError:
        raise UserError(f"{where}: {key} {text!a} holds half a character (a lone surrogate): write it anew") from None


def _integer(record: Any, key: str, where: object) -> int:
    if not isinstance(record, dict):
        raise UserError(f"{where} is not an object but {str(record)[:40]!r}")
    value = record.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and not _is_integer(value):
        raise UserError(f"{where}: {key} {_short(value)} does not fit 64 bits: give smaller ids")
    if not _is_integer(value):
        raise UserError(f"{where}: {key} {_short(value)} is not an integer, which the COCO format asks for")
    return value


def _finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _usable_ids(ids: np.ndarray) -> np.ndarray:
    """The annotations' own ids, or 1..A where some are missing, doubled or not positive.

    Nothing refers to them, but COCO evaluation takes id 0 for "unmatched" and keeps one annotation per id.
    """
    if len(ids) and ids.min() > 0 and len(np.unique(ids)) == len(ids):
        return ids
    return np.arange(1, len(ids) + 1)
