"""Columns of a Hugging Face data set to flat arrays, in both layouts that ``objects`` comes in: a struct of lists and a
list of structs. Nothing is decoded and no Python object is made for a box.

Legend: I images of a table, A boxes of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from detr_accel.data import hub_types
from detr_accel.structures import UserError

BOX_NAMES = ("bbox", "bboxes", "boxes", "box")
CATEGORY_NAMES = ("category", "categories", "category_id", "category_ids", "label", "labels", "class", "classes")
CROWD_NAMES = ("iscrowd", "is_crowd", "crowd")
FORMATS = ("xywh_px", "xyxy_px", "cxcywh_px", "xywh_rel", "xyxy_rel", "cxcywh_rel")
_ENOUGH = 20  # boxes from which on their range tells something about their unit


@dataclass(frozen=True)
class Columns:
    """What is where. None in ``box`` and ``category``: the first of the usual names that is there."""

    image: str = "image"
    objects: str | None = "objects"  # None: boxes and categories are columns of their own
    box: str | None = None
    category: str | None = None
    box_format: str = "xywh_px"
    class_names: tuple[str, ...] = ()  # where the set itself does not name them
    sized: bool = False  # has the columns width and height
    image_ids: bool = False  # has the column image_id
    named: bool = True  # categories are strings, not numbers
    area: str | None = None
    crowd: str | None = None
    ids: str | None = None

    @property
    def small(self) -> list[str]:
        """Every column that is read but the image."""
        some = [self.objects] if self.objects else [self.box, self.category, self.area, self.crowd, self.ids]
        some += ["width", "height"] * self.sized + ["image_id"] * self.image_ids
        return [name for name in some if name is not None]


@dataclass(frozen=True)
class Flat:
    """One table. Boxes as written."""

    counts: np.ndarray  # int64 [I], boxes of each image
    boxes: np.ndarray  # float64 [A, 4], in the set's own format
    labels: np.ndarray  # int64 [A], positions in class_names
    areas: np.ndarray  # float64 [A], nan where not given
    crowd: np.ndarray  # bool [A]
    ids: np.ndarray  # int64 [A], -1 where not given
    image_ids: np.ndarray  # int64 [I], -1 where not given
    sizes_px: np.ndarray  # int32 [I, 2], (h, w); 0 where not given
    faults: dict[int, str]  # row -> what is wrong with its objects, which are left out
    bad: dict[int, tuple[str, str]]  # place in A -> kind of dirt (dirt.KINDS), what is wrong


def resolve(features: Mapping[str, Any], asked: Columns, where: str) -> Columns:
    """Find the columns of a set, and its class names.

    Args:
        features: of the set (``datasets.Features``).
        asked: what the recipe says.
        where: the set, for messages.
    Raises:
        UserError: a column is missing, or the class names are known to nobody; names those that are there.
    """
    import datasets

    if asked.image not in features:
        raise UserError(f"{where} has no column {asked.image!r} ({_list(features)}): set data.hub.image")
    hub_types.check_image(features[asked.image], asked.image, where)
    fields, others = _fields(features, asked.objects, where)
    box = _pick(fields, others, asked.box, BOX_NAMES, "box", where)
    category = _pick(fields, others, asked.category, CATEGORY_NAMES, "category", where)
    names, kind = asked.class_names, fields[category]
    hub_types.check_box(fields[box], box, where)
    hub_types.check_category(kind, category, where)
    own = tuple(kind.names) if isinstance(kind, datasets.ClassLabel) and kind.names else ()
    if own and names and names != own:
        raise UserError(f"{where} names its classes itself ({_list(own)}): take data.hub.class_names out of the recipe")
    named = hub_types.is_text(kind) and not own
    if not named and not own and not names:
        raise UserError(
            f"{where}: {category!r} holds numbers without names: list the class names in order, "
            "data.hub.class_names=[first,second,...]"
        )
    known = {name: True for name in fields}
    return replace(
        asked, box=box, category=category, class_names=own or names, named=named,
        sized={"width", "height"} <= features.keys(), image_ids=_is_integer(features.get("image_id")),
        area="area" if "area" in known else None, ids="id" if _is_integer(fields.get("id")) else None,
        crowd=next((n for n in CROWD_NAMES if n in known), None),
    )  # fmt: skip


def category_kind(features: Mapping[str, Any], asked: Columns, where: str) -> Any:
    """The type of what stands for an object's class.

    Raises:
        UserError: as ``resolve``.
    """
    fields, others = _fields(features, asked.objects, where)
    return fields[_pick(fields, others, asked.category, CATEGORY_NAMES, "category", where)]


def _fields(features: Mapping[str, Any], objects: str | None, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What one object has, by name; and what else is there, which is no list."""
    if objects is None:
        return _lists(features)
    if objects not in features:
        raise UserError(
            f"{where} has no column {objects!r} ({_list(features)}): set data.hub.objects, to null where boxes and "
            "categories are columns of their own"
        )
    kind = features[objects]
    if isinstance(kind, Mapping):  # a struct of lists
        return _lists(kind)
    inner = hub_types.inner(kind)
    if isinstance(inner, Mapping):  # a list of structs
        return dict(inner), {}
    raise UserError(
        f"{where}: {objects!r} holds {hub_types.told(kind)} and is neither a struct of lists nor a list of structs: "
        "write it as one of them, or set data.hub.objects to what is"
    )


def _lists(features: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    fields = {name: inner for name, kind in features.items() if (inner := hub_types.inner(kind)) is not None}
    return fields, {name: kind for name, kind in features.items() if name not in fields}


def _pick(
    fields: Mapping[str, Any], others: Mapping[str, Any], asked: str | None, usual: tuple[str, ...], what: str,
    where: str,
) -> str:  # fmt: skip
    wanted = usual if asked is None else (asked,)
    found = next((name for name in wanted if name in fields), None)
    if found is None:
        if odd := next((name for name in wanted if name in others), None):
            hub_types.refuse_list(others[odd], odd, what, where)
        missing = repr(asked) if asked is not None else f"{what} among its objects' fields"
        raise UserError(f"{where} has no {missing} ({_list(fields)}): set data.hub.{what} to the right one")
    return found


def _is_integer(kind: Any) -> bool:
    return str(getattr(kind, "dtype", "")).startswith(("int", "uint"))


def _list(names: Any) -> str:
    some = [str(n) for n in list(names)[:12]]
    return ", ".join(some) + (", ..." if len(names) > len(some) else "") or "none at all"


# --- from Arrow


def flatten(table: Any, columns: Columns) -> Flat:
    """One Arrow table.

    Args:
        table: pyarrow.Table with ``columns.small``.
        columns: resolved; ``class_names`` complete.
    """
    faults: dict[int, str] = {}
    counts, fields = _objects(table, columns, faults)
    bad: dict[int, tuple[str, str]] = {}
    boxes = _boxes(fields[columns.box])
    labels = _labels(fields[columns.category], columns)
    for a in np.flatnonzero(~np.isfinite(boxes).all(1)).tolist():
        text = str(fields[columns.box][a].as_py())[:80]
        bad[a] = "annotation.box", f"{columns.box} {text} is not four finite numbers: mend or remove it"
    for a in np.flatnonzero((labels < 0) | (labels >= len(columns.class_names))).tolist():
        told = f"{columns.category} {fields[columns.category][a].as_py()!r} is none of the {len(columns.class_names)}"
        bad[a] = "annotation.category", f"{told} classes: mend it, or complete data.hub.class_names"
    num = len(labels)
    crowd = _crowd(fields[columns.crowd]) if columns.crowd else np.zeros(num, bool)
    return Flat(
        counts, boxes, labels, _numbers(fields[columns.area], "float64", np.nan) if columns.area else
        np.full(num, np.nan), crowd, _numbers(fields[columns.ids], "int64", -1) if columns.ids else
        np.full(num, -1), _numbers(table.column("image_id"), "int64", -1) if columns.image_ids else
        np.full(len(counts), -1), _sizes(table, columns), faults, bad,
    )  # fmt: skip


def _objects(table: Any, columns: Columns, faults: dict[int, str]) -> tuple[np.ndarray, dict[str, Any]]:
    """Boxes of each image, and each field over all of them. A row without objects (null), or whose fields differ in
    length, counts as empty and is a fault."""
    import pyarrow as pa
    import pyarrow.compute as pc

    names = [n for n in (columns.box, columns.category, columns.area, columns.crowd, columns.ids) if n is not None]
    if columns.objects is None:
        lists = {name: _one(table.column(name)) for name in names}
    else:
        column = _one(table.column(columns.objects))
        if not pa.types.is_struct(column.type):
            _note_nulls([column], faults)
            inner = column.flatten()
            return _lengths(column), {name: pc.struct_field(inner, name) for name in names}
        lists = {name: pc.struct_field(column, name) for name in names}
    _note_nulls([lists[columns.box], lists[columns.category]], faults)
    lengths = {name: _lengths(some) for name, some in lists.items()}
    counts = lengths[columns.box]
    odd = np.any([of != counts for of in lengths.values()], axis=0)
    for row in np.flatnonzero(odd).tolist():
        if row in faults:
            continue
        told = ", ".join(f"{of[row]} {name}" for name, of in lengths.items())
        faults[row] = f"its objects' fields differ in length ({told}): mend the row"
    if odd.any():
        keep = pa.array(~odd)
        lists = {name: pc.if_else(keep, some, pa.scalar(None, some.type)) for name, some in lists.items()}
        counts = np.where(odd, 0, counts)
    return counts, {name: some.flatten() for name, some in lists.items()}


def _note_nulls(lists: list[Any], faults: dict[int, str]) -> None:
    """Whether such an image has no object, or nobody has looked, is not to be known."""
    nulls = np.any([some.is_null().to_numpy(zero_copy_only=False) for some in lists], axis=0)
    told = "its objects are null: write empty lists where there is none, or remove the row"
    faults.update(dict.fromkeys(np.flatnonzero(nulls).tolist(), told))


def _one(column: Any) -> Any:
    return column.combine_chunks()


def _lengths(lists: Any) -> np.ndarray:
    import pyarrow.compute as pc

    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)


def _boxes(boxes: Any) -> np.ndarray:
    """float64 [A, 4]; nan where there are no four numbers."""
    lengths = _lengths(boxes)
    values = _numbers(boxes.flatten(), "float64", np.nan)
    four = lengths == 4
    out = np.full((len(lengths), 4), np.nan)
    out[four] = values[np.repeat(four, lengths)].reshape(-1, 4)
    return out


def _labels(values: Any, columns: Columns) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    if columns.named:
        values = pc.index_in(values, value_set=pa.array(columns.class_names, values.type), skip_nulls=True)
    return _numbers(values, "int64", -1)


def _numbers(values: Any, dtype: str, missing: float) -> np.ndarray:
    """numpy [N]; ``missing`` for nulls, and for what cannot be read as such a number."""
    import pyarrow as pa

    if isinstance(values, pa.ChunkedArray):
        values = _one(values)
    try:
        return values.cast(dtype).fill_null(pa.scalar(missing, dtype)).to_numpy(zero_copy_only=False).copy()
    except pa.ArrowNotImplementedError:  # no kind of number
        return np.full(len(values), missing, dtype)
    except pa.ArrowInvalid:  # one cell is enough: down to it by halves
        if len(values) <= 1:
            return np.full(len(values), missing, dtype)
        half = len(values) // 2
        return np.concatenate([_numbers(part, dtype, missing) for part in (values[:half], values[half:])])


def _crowd(values: Any) -> np.ndarray:
    """bool [A]; False where it is no such thing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        values = pc.is_in(pc.utf8_lower(values), value_set=pa.array(["1", "true", "yes"], values.type))
    return _numbers(values, "int64", 0) == 1


def _sizes(table: Any, columns: Columns) -> np.ndarray:
    if not columns.sized:
        return np.zeros((table.num_rows, 2), np.int32)
    sides = [_numbers(table.column(name), "int64", 0) for name in ("height", "width")]
    sizes = np.stack(sides, 1)
    sizes[((sizes <= 0) | (sizes >= 2**31)).any(1)] = 0  # the image's header knows
    return sizes.astype(np.int32)


def distinct(table: Any, columns: Columns) -> set[str]:
    """The category names in a table that has them as strings."""
    import pyarrow.compute as pc

    _, fields = _objects(table, columns, {})
    return {name for name in pc.unique(fields[columns.category]).to_pylist() if name is not None}


def paths(images: Any) -> list[str]:
    """Of a column of images, the path of each that lies in a file of its own; "" of the others, and of empty cells.
    The bytes are not looked at, only their lengths."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_struct(images.type):
        texts = pa.types.is_string(images.type) or pa.types.is_large_string(images.type)
        return [path or "" for path in images.to_pylist()] if texts else [""] * len(images)
    data, path = pc.struct_field(images, "bytes"), pc.struct_field(images, "path")
    held = pc.fill_null(pc.greater(pc.binary_length(data), 0), False)
    return pc.fill_null(pc.if_else(held, "", path), "").to_pylist()


def no_rows(where: str) -> UserError:
    """What to say of an empty split."""
    return UserError(
        f"{where} has no rows: fill it, or remove it and choose another (data.hub.train_split, data.hub.val_split)"
    )


# --- boxes


def to_xywh_px(boxes: np.ndarray, sizes_px: np.ndarray, box_format: str) -> np.ndarray:
    """Any of FORMATS to x, y, width, height in pixels.

    Args:
        boxes: float64 [A, 4].
        sizes_px: [A, 2], (h, w) of each box's image.
    """
    corner, unit = box_format.split("_")
    boxes = boxes.copy()
    if unit == "rel":
        boxes *= sizes_px[:, [1, 0, 1, 0]]
    if corner == "xyxy":
        boxes[:, 2:] -= boxes[:, :2]
    elif corner == "cxcywh":
        boxes[:, :2] -= boxes[:, 2:] / 2
    return boxes


def check_unit(boxes: np.ndarray, box_format: str, where: str, at_least: int = _ENOUGH) -> None:
    """
    Args:
        boxes: float64 [A, 4], as written; fewer than ``at_least`` of them say nothing.
    Raises:
        UserError: pixels that are fractions, or the other way round.
    """
    boxes, fractions = boxes[np.isfinite(boxes).all(1)], box_format.endswith("_rel")
    if len(boxes) < at_least:
        return
    greatest = float(boxes.max())
    if not fractions and 0 < greatest <= 1:
        raise UserError(
            f"{where}: every number of its boxes lies within 0..1, which are no pixels: set data.hub.box_format to "
            "xywh_rel, xyxy_rel or cxcywh_rel"
        )
    if fractions and (boxes > 2).any(1).mean() > 0.5:  # fewer are dirt: they end at a border or outside
        raise UserError(
            f"{where}: its boxes hold numbers up to {greatest:g} where data.hub.box_format={box_format} asks for "
            f"fractions of the image in 0..1: set it to {box_format.replace('_rel', '_px')}"
        )
