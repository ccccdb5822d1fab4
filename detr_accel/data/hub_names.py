"""Class names that the files of a Hugging Face set carry, each in its own footer. The library takes those of one file
for all, so that a number in another file would mean another class."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from detr_accel.data import hub_columns
from detr_accel.data.hub_columns import Columns
from detr_accel.data.hub_where import Where, is_saved
from detr_accel.structures import UserError


def check(where: Where, splits: Mapping[str, Any], asked: Columns) -> None:
    """
    Args:
        splits: as opened.
    Raises:
        UserError: a parquet or Arrow file numbers the classes otherwise than the set does; names files and lists.
    """
    if is_saved(where):
        return  # a split has names of its own there
    files = _files(where)
    if len(files) < 2:
        return
    with ThreadPoolExecutor(8) as pool:
        lists = dict(zip(files, pool.map(lambda name: _names(_features(name), asked), files), strict=True))
    taken = next((names for one in splits.values() if (names := _names(one.features, asked))), None)
    taken = taken or next((names for names in lists.values() if names), ())
    for file, names in lists.items():
        if names and names != taken[: len(names)]:
            like = next((f for f, others in lists.items() if others == taken), str(where))
            raise UserError(
                f"{file} lists the classes as {_told(names)} and {like} as {_told(taken)}, and their numbers are read "
                "by one list: write the files anew with the same ClassLabel"
            )


def _files(where: Where) -> list[str]:
    """Those of every split that carry names."""
    import datasets

    if Path(where.path).is_file():
        return []
    try:
        found = datasets.load_dataset_builder(where.path, where.config, revision=where.revision).config.data_files or {}
    except Exception:  # noqa: BLE001  a set of the hub's, opened from the cache while the hub cannot be reached
        return []
    return [str(name) for names in found.values() for name in names if str(name).endswith((".parquet", ".arrow"))]


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
