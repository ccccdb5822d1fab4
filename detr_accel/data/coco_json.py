"""Read a COCO json into flat arrays; what would silently become a wrong target is mended, left out or refused.

Python objects are kept by nobody: worker processes are forked, and every look at an object's reference count would copy
its memory page into each of them.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detr_accel.data.dirt import Dirt
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
    again: np.ndarray  # bool [A]: an earlier one of the image has the same category and box
    categories: dict[int, str]  # id -> name, ascending

    def __len__(self) -> int:
        return len(self.image_ids)


def read(path: Path, dirt: Dirt | None = None) -> Table:
    """Read and check one json.

    Args:
        dirt: counts and decides; None refuses whatever is odd.
    Raises:
        UserError: naming the file, the record and its value.
    """
    dirt = Dirt("stop") if dirt is None else dirt
    tree = _load(path)
    categories = _categories(path, _without_heads(path, tree, dirt), dirt)
    images, left_out = _images(path, tree["images"], dirt)
    row_of = {image_id: row for row, image_id in enumerate(images)} | dict.fromkeys(left_out, -1)
    columns = _annotations(path, tree["annotations"], row_of, categories, dirt)
    order = np.argsort(columns["row"], kind="stable")
    counts = np.bincount(columns["row"], minlength=len(images))
    return Table(
        path=path,
        image_ids=np.array(list(images), np.int64),
        file_names=Strings([name for name, _ in images.values()]),
        sizes_px=np.array([size for _, size in images.values()], np.int32).reshape(-1, 2),
        offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        annotation_ids=_usable_ids(path, columns["id"], dirt)[order],
        category_ids=columns["category"][order],
        boxes_xywh_px=columns["box"][order],
        areas_px=columns["area"][order],
        crowd=columns["crowd"][order],
        again=np.zeros(len(order), bool),
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


def _without_heads(path: Path, tree: dict, dirt: Dirt) -> list:
    """The categories without those that Roboflow writes as the supercategory of one of the same name."""
    rows = tree["categories"]
    names = [str(row.get("name")) if isinstance(row, dict) else "" for row in rows]
    twice = {name for name, count in Counter(names).items() if count > 1 and name}
    under = {n for n, row in zip(names, rows, strict=True) if n in twice and str(row.get("supercategory")) == n}
    heads = [i for i, n in enumerate(names) if n in under and str(rows[i].get("supercategory")) != n]
    used = {str(a.get("category_id")) for a in tree["annotations"] if isinstance(a, dict)} if heads else set()
    heads = [number for number in heads if str(rows[number].get("id")) not in used]
    for number in heads:
        dirt.note("category.head", f"{path}: categories[{number}]: {rows[number].get('name')!r} has no box of its own")
    return [row for number, row in enumerate(rows) if number not in heads]


def _categories(path: Path, records: list, dirt: Dirt) -> dict[int, str]:
    names: dict[int, str] = {}
    for number, record in enumerate(records):
        where = f"{path}: categories[{number}]"
        category_id = _integer(record, "id", where, dirt)
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


def _images(path: Path, records: list, dirt: Dirt) -> tuple[dict[int, tuple[str, tuple[int, int]]], set[int]]:
    """Id -> (file name, (h, w) px, 0 where unknown) in the file's order; and the ids of images that are left out."""
    found: dict[int, tuple[str, tuple[int, int]]] = {}
    left_out: set[int] = set()
    for number, record in enumerate(records):
        where = f"{path}: images[{number}]"
        try:
            image_id = _integer(record, "id", where, dirt)
        except _Odd as odd:
            odd.tell(dirt, "image.record")
            continue
        try:
            row = _image(record, image_id, where, dirt)
        except _Odd as odd:
            odd.tell(dirt, "image.record")
            left_out.add(image_id)
            continue
        if image_id not in found:
            found[image_id] = row
        elif found[image_id][0] == row[0]:
            dirt.note("image.record_twice", f"{where}: id {image_id} and {row[0]!r} stand in an earlier record, too")
            found[image_id] = (row[0], row[1] if row[1] == found[image_id][1] else (0, 0))
        else:
            names = f"{found[image_id][0]!r} and {row[0]!r}"
            dirt.note("image.id_twice", f"{where}: id {image_id} is used for {names}: ids must differ")
            left_out.add(image_id)
    kept = {image_id: row for image_id, row in found.items() if image_id not in left_out}
    if not kept:
        why = next((texts[0] for kind, texts in dirt.examples.items() if kind.startswith("image.")), None)
        raise UserError(f"{path} lists no images" + (f" that can be used: {why}" if why else ""))
    return kept, left_out


def _image(record: dict, image_id: int, where: str, dirt: Dirt) -> tuple[str, tuple[int, int]]:
    name = record.get("file_name")
    if not isinstance(name, str) or not name.strip():
        raise _Odd(f"{where} (id {image_id}) has no file_name: give it one or remove the record")
    if "\0" in name:
        raise _Odd(f"{where} (id {image_id}): file_name {name!a} holds a zero byte: write it anew")
    _check_text(name, "file_name", where, "surrogateescape")
    try:
        return name, (_side(record, "height", where, dirt), _side(record, "width", where, dirt))
    except _Odd as odd:
        if odd.kind == _TOLD or not dirt.note("image.size", odd):
            raise _Odd(str(odd), _TOLD) from None
        return name, (0, 0)


def _side(record: dict, key: str, where: str, dirt: Dirt) -> int:
    value = record.get(key)
    if value is None:
        return 0  # read from the image's header later
    if isinstance(value, str) and _SPELT.fullmatch(value) and int(value) > 0:
        text = f"{where} (id {record.get('id')}): {key} {value!r} is not a number"
        if not dirt.note("number.text", text):
            raise _Odd(text, _TOLD)
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**31 or value != int(value):
        raise _Odd(f"{where} (id {record.get('id')}): {key} {_short(value)} is not a positive whole number of pixels")
    return int(value)


def _annotations(
    path: Path, records: list, row_of: dict[int, int], categories: dict[int, str], dirt: Dirt
) -> dict[str, np.ndarray]:
    rows, ids, labels, boxes, areas, crowd = [], [], [], [], [], []
    for number, record in enumerate(records):
        try:
            found = _annotation(_Here(path, number, record), record, row_of, categories, dirt)
        except _Odd as odd:
            odd.tell(dirt, "annotation.record")
            continue
        if found is None:
            continue
        row, category_id, box = found
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


def _annotation(
    here: _Here, record: Any, row_of: dict[int, int], categories: dict[int, str], dirt: Dirt
) -> tuple[int, int, list] | None:
    """Row of the image, category id and box as written; None where the image is left out.

    Raises:
        _Odd: it cannot be used.
    """
    row = row_of.get(_integer(record, "image_id", here, dirt, "annotation.image"))
    if row is None:
        text = f"{here}: no image has the id {record['image_id']}: add the image or remove the annotation"
        raise _Odd(text, "annotation.image")
    category_id = _integer(record, "category_id", here, dirt, "annotation.category")
    if category_id not in categories:
        known = ", ".join(map(str, list(categories)[:10])) + (", ..." if len(categories) > 10 else "")
        text = f"{here}: category_id {category_id} is not in the categories ({known}): add or mend it"
        raise _Odd(text, "annotation.category")
    box = record.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_finite, box)):
        box = _spelt_box(box, here, dirt)
    return None if row < 0 else (row, category_id, box)


def _spelt_box(box: Any, here: _Here, dirt: Dirt) -> list[float]:
    """Four numbers of which some are written as text.

    Raises:
        _Odd: they are not.
    """
    text = f"{here}: bbox {_short(box)} is not four finite numbers [x, y, width, height]: mend or remove it"
    if not isinstance(box, list) or len(box) != 4:
        raise _Odd(text, "annotation.box")
    read = [float(v) if isinstance(v, str) and _NUMBER.fullmatch(v) else v for v in box]
    if not all(map(_finite, read)):
        raise _Odd(text, "annotation.box")
    if not dirt.note("number.text", text):
        raise _Odd(text, _TOLD)
    return read


_TOLD = "told"


class _Odd(UserError):
    """A record that cannot be used as it is: why, and as which kind it is counted (``_TOLD``: it was)."""

    def __init__(self, text: str, kind: str = "") -> None:
        super().__init__(text)
        self.kind = kind

    def tell(self, dirt: Dirt, kind: str) -> None:
        """``kind``: of one that has none of its own."""
        if self.kind != _TOLD:
            dirt.note(self.kind or kind, self)


_SPELT = re.compile(r"[+-]?[0-9]{1,18}", re.ASCII)
_NUMBER = re.compile(r"[+-]?([0-9]{1,18}(\.[0-9]{0,18})?|\.[0-9]{1,18})", re.ASCII)


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
        raise _Odd(f"{where}: {key} {text!a} holds half a character (a lone surrogate): write it anew") from None


def _integer(record: Any, key: str, where: object, dirt: Dirt, kind: str = "") -> int:
    """An id, also one that is written as 12.0 or "12".

    Args:
        kind: as which one that cannot be used is counted.
    """
    if not isinstance(record, dict):
        raise _Odd(f"{where} is not an object but {str(record)[:40]!r}")
    value = record.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and not _is_integer(value):
        raise _Odd(f"{where}: {key} {_short(value)} does not fit 64 bits: give smaller ids", kind)
    if not _is_integer(value):
        text = f"{where}: {key} {_short(value)} is not an integer, which the COCO format asks for"
        if not (isinstance(value, str) and _SPELT.fullmatch(value)):
            raise _Odd(text, kind)
        if not dirt.note("number.text", text):
            raise _Odd(text, _TOLD)
        value = int(value)
    return value


def _finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _usable_ids(path: Path, ids: np.ndarray, dirt: Dirt) -> np.ndarray:
    """The annotations' own ids, or 1..A where some are missing, doubled or not positive.

    Nothing refers to them, but COCO evaluation takes id 0 for "unmatched" and keeps one annotation per id.
    """
    distinct, counts = np.unique(ids[ids > 0], return_counts=True)
    odd = len(ids) - int((counts == 1).sum())
    if not odd:
        return ids
    again = distinct[counts > 1]
    first = f"id {again[0]} is used {counts[counts > 1][0]} times" if len(again) else "some are missing or not positive"
    dirt.note("annotation.ids", f"{path}: {first}", num=odd)
    return np.arange(1, len(ids) + 1)
