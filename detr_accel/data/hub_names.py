"""Class names that the files of a Hugging Face set carry, each in its own footer. The library takes those of one file
for all, so that a number in another file would mean another class."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from detr_accel.data import hub_columns, hub_types
from detr_accel.data.hub_columns import Columns
from detr_accel.data.hub_where import Opened
from detr_accel.structures import UserError


def check(found: Opened, splits: Mapping[str, Any], asked: Columns) -> None:
    """
    Args:
        splits: as opened.
    Raises:
        UserError: a parquet or Arrow file numbers the classes otherwise than the set does, or has numbers where another
            one has names; tells the files and what they hold.
    """
    files = [name for name in found.files() if name.endswith((".parquet", ".arrow"))]
    if len(files) < 2:  # none of a set that was saved: a split has names of its own there
        return
    with ThreadPoolExecutor(8) as pool:
        features = list(pool.map(_features, files))
    _check_kinds({file: _kind(one, asked) for file, one in zip(files, features, strict=True)})
    lists = {file: _names(one, asked) for file, one in zip(files, features, strict=True)}
    taken = next((names for one in splits.values() if (names := _names(one.features, asked))), None)
    taken = taken or next((names for names in lists.values() if names), ())
    for file, names in lists.items():
        if names and names != taken[: len(names)]:
            like = next((f for f, others in lists.items() if others == taken), str(found.where))
            raise UserError(
                f"{file} lists the classes as {_told(names)} and {like} as {_told(taken)}, and their numbers are read "
                "by one list: write the files anew with the same ClassLabel"
            )


def _check_kinds(kinds: Mapping[str, Any]) -> None:
    """The library makes one type of all: a number would become a name, and another class than that of the name."""
    known = {file: kind for file, kind in kinds.items() if kind is not None}
    first = next(iter(known), None)
    for file, kind in known.items():
        if hub_types.is_text(kind) != hub_types.is_text(known[first]):
            raise UserError(
                f"{file} holds the categories as {hub_types.told(kind)} and {first} as {hub_types.told(known[first])}: "
                "write the files anew with one type"
            )


def _kind(features: Any, asked: Columns) -> Any:
    if features is None:
        return None
    try:
        kind = hub_columns.category_kind(features, asked, "")
    except UserError:  # told when the set is read
        return None
    return kind if hub_types.is_text(kind) or hub_types.is_number(kind) else None


def _features(name: str) -> Any:
    """What a file says of its columns; None where it cannot be read, which is told when its rows are."""
    import datasets
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with fsspec.open(name, "rb") as file:
            schema = pq.read_schema(file) if name.endswith(".parquet") else pa.ipc.open_stream(file).schema
        return datasets.Features.from_arrow_schema(schema)
    except Exception:  # noqa: BLE001  of the network, the file system, Arrow or the library
        return None


def _names(features: Any, asked: Columns) -> tuple[str, ...] | None:
    if features is None:
        return None
    try:
        return hub_columns.resolve(features, replace(asked, class_names=()), "").class_names
    except UserError:  # no names in it, or no such column: told when the set is read
        return None


def _told(names: tuple[str, ...]) -> str:
    return f"[{', '.join(names[:12])}{', ...' if len(names) > 12 else ''}]"
