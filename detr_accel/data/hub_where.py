"""Where a Hugging Face data set lies, what splits and files it has, and how the library opens it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detr_accel.data.hub_columns import no_rows
from detr_accel.structures import UserError, first_line

VAL_NAMES = ("validation", "val", "valid", "dev")
_NO_ROWS = re.compile(r'Instruction "([^"]+)" corresponds to no data')  # the library's words
_FILES = {".parquet": "parquet", ".arrow": "arrow"}


@dataclass(frozen=True)
class Where:
    """A data set: ``path`` is a folder, a .parquet or .arrow file, or a name on the hub."""

    path: str
    config: str | None = None
    revision: str | None = None

    @property
    def on_disk(self) -> bool:
        return Path(self.path).exists()

    @property
    def folder(self) -> str | None:
        """What relative paths of its images start from; None on the hub."""
        path = Path(self.path)
        return str(path if path.is_dir() else path.parent) if self.on_disk else None

    def __str__(self) -> str:
        return self.path if self.config is None else f"{self.path} ({self.config})"


def load(where: Where, streaming: bool = False) -> Mapping[str, Any]:
    """Open every split.

    Returns:
        split -> ``datasets.Dataset``, or ``datasets.IterableDataset`` when streaming.
    Raises:
        UserError: nothing there, no network, or not a data set.
    """
    import datasets

    path, saved = Path(where.path), is_saved(where)
    if saved and streaming:
        raise UserError(f"{where} was written by save_to_disk and is read in place: set data.hub.streaming=false")
    with _opening(where):
        if saved:
            _check_saved(where)
            found = datasets.load_from_disk(where.path)
            return found if isinstance(found, Mapping) else {"train": found}
        if path.is_file():
            if path.suffix not in _FILES:
                raise UserError(
                    f"{where} is no .parquet or .arrow file: set data.root to one, or to the folder of a data set"
                )
            return datasets.load_dataset(_FILES[path.suffix], data_files=where.path, streaming=streaming)
        return datasets.load_dataset(where.path, where.config, revision=where.revision, streaming=streaming)


def is_saved(where: Where) -> bool:
    """Whether ``save_to_disk`` wrote the folder."""
    path = Path(where.path)
    return path.is_dir() and any((path / name).exists() for name in ("dataset_dict.json", "state.json"))


def _check_saved(where: Where) -> None:
    """
    Raises:
        UserError: a split has no rows, which the library cannot open.
    """
    for path in sorted((*Path(where.path).glob("state.json"), *Path(where.path).glob("*/state.json"))):
        if not json.loads(path.read_text(encoding="utf-8")).get("_data_files"):
            split = "train" if path.parent == Path(where.path) else path.parent.name
            raise no_rows(f"{where}, split {split}")


def files(where: Where, split: str) -> list[str]:
    """The files of a split, paths or URLs, in the order of the shards."""
    import datasets

    if Path(where.path).is_file():
        return [where.path]
    with _opening(where):
        builder = datasets.load_dataset_builder(where.path, where.config, revision=where.revision)
        return [str(name) for name in (builder.config.data_files or {}).get(split, [])]


def split_list(where: Where) -> Mapping[str, Any]:
    """The splits by name, without fetching their files where that can be."""
    return load(where, streaming=not (is_saved(where) or Path(where.path).is_file()))


def load_one(where: Where, split: str) -> Any:
    """One split whole, where the others are streamed: only its files are read."""
    import datasets

    if is_saved(where) or Path(where.path).is_file():
        return load(where)[split]
    with _opening(where):
        builder = datasets.load_dataset_builder(where.path, where.config, revision=where.revision)
        of_split = {split: list(builder.config.data_files[split])}
        return datasets.load_dataset(builder.name, data_files=of_split, features=builder.info.features)[split]


def told_length(dataset: Any, split: str) -> int | None:
    """How many rows a streamed set says it has, where its card tells."""
    known = (dataset.info.splits or {}).get(split)
    return known.num_examples if known is not None and known.num_examples else None


class _opening:
    """Whatever the library raises, as one sentence."""

    def __init__(self, where: Where) -> None:
        self.where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if error is None or isinstance(error, UserError) or not isinstance(error, Exception):
            return
        reason = first_line(error)
        if empty := _NO_ROWS.search(reason):
            raise no_rows(f"{self.where}, split {empty[1]}") from None
        if self.where.on_disk:
            what = "give a folder with parquet files, or with images and a metadata.jsonl, or a .parquet file"
        else:
            what = (
                "check data.hub.name; on a machine without network, fetch it elsewhere and set data.root to the folder"
            )
        raise UserError(f"the data set {self.where} cannot be opened: {reason}; {what}") from None


def split_names(splits: Mapping[str, Any], train: str, val: str | None, where: Where) -> tuple[str, str | None]:
    """Which splits to train and to validate on; the latter None where there is a single one.

    Args:
        val: None takes the first of VAL_NAMES.
    Raises:
        UserError: a split is not there; names those that are.
    """
    there = ", ".join(splits)
    if train not in splits:
        if len(splits) != 1:
            raise UserError(f"{where} has no split {train!r} ({there}): set data.hub.train_split")
        (train,) = splits
    if val is None:
        return train, next((name for name in VAL_NAMES if name in splits and name != train), None)
    if val not in splits:
        raise UserError(f"{where} has no split {val!r} ({there}): set data.hub.val_split")
    return train, val
