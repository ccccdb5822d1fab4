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
_WRAPPED = "An error occurred while generating the dataset"  # what is wrong is its cause
_CONFIG = re.compile("Config name is missing|BuilderConfig '.*' not found")
_CAST = re.compile("Couldn't cast|Failed to parse string")  # one file's column is not of the others' type
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


class Opened:
    """A data set that has been found: the hub is asked once what it has, and everything else follows from the answer.

    Raises:
        UserError: nothing there, no network, or not a data set.
    """

    def __init__(self, where: Where) -> None:
        import datasets

        path, self.where, self._builder = Path(where.path), where, None
        self.is_saved = is_saved(where)
        if self.is_saved:
            return
        if path.is_file() and path.suffix not in _FILES:
            raise UserError(
                f"{where} is no .parquet or .arrow file: set data.root to one, or to the folder of a data set"
            )
        with _opening(where):
            if path.is_file():
                self._builder = datasets.load_dataset_builder(_FILES[path.suffix], data_files=where.path)
            else:
                self._builder = datasets.load_dataset_builder(where.path, where.config, revision=where.revision)

    def splits(self, streaming: bool = False) -> Mapping[str, Any]:
        """Every split.

        Returns:
            split -> ``datasets.Dataset``, or ``datasets.IterableDataset`` when streaming.
        Raises:
            UserError: it cannot be read, or not so.
        """
        if self.is_saved and streaming:
            raise UserError(
                f"{self.where} was written by save_to_disk and is read in place: set data.hub.streaming=false"
            )
        with _opening(self.where):
            if self.is_saved:
                return _saved(self.where)
            if streaming:
                return self._builder.as_streaming_dataset()
            self._builder.download_and_prepare()
            return self._builder.as_dataset()

    def names(self) -> Mapping[str, Any]:
        """The splits by name, without fetching their files where that can be."""
        return self.splits(streaming=not self.is_saved)

    def files(self, split: str | None = None) -> list[str]:
        """The files of a split, or of all, paths or URLs, in the order of the shards; none of a set that
        ``save_to_disk`` wrote, and of one of the hub's that is opened from the cache."""
        found = (self._builder.config.data_files or {}) if self._builder is not None else {}
        return [str(name) for own, names in found.items() if split in (None, own) for name in names]

    def one(self, split: str) -> Any:
        """One split whole: only its files are fetched."""
        import datasets

        if self.is_saved or not self.files(split):
            return self.splits()[split]
        known = self._builder
        with _opening(self.where):
            alone = type(known)(
                cache_dir=known._cache_dir_root, dataset_name=known.dataset_name, config_name=known.config.name,
                hash=known.hash, base_path=known.base_path, features=known.info.features, token=known.token,
                repo_id=known.repo_id, storage_options=known.storage_options,
                data_files=datasets.data_files.DataFilesDict({split: known.config.data_files[split]}),
            )  # fmt: skip
            alone.download_and_prepare(verification_mode="no_checks")  # the card counts every split
            return alone.as_dataset(split=split)


def is_saved(where: Where) -> bool:
    """Whether ``save_to_disk`` wrote the folder."""
    path = Path(where.path)
    return path.is_dir() and any((path / name).exists() for name in ("dataset_dict.json", "state.json"))


def _saved(where: Where) -> Mapping[str, Any]:
    """
    Raises:
        UserError: a split has no rows, which the library cannot open.
    """
    import datasets

    for path in sorted((*Path(where.path).glob("state.json"), *Path(where.path).glob("*/state.json"))):
        if not json.loads(path.read_text(encoding="utf-8")).get("_data_files"):
            split = "train" if path.parent == Path(where.path) else path.parent.name
            raise no_rows(f"{where}, split {split}")
    found = datasets.load_from_disk(where.path)
    return found if isinstance(found, Mapping) else {"train": found}


def told_length(dataset: Any, split: str) -> int | None:
    """How many rows a streamed set says it has, where its card tells."""
    known = (dataset.info.splits or {}).get(split)
    return known.num_examples if known is not None and known.num_examples else None


def why(error: BaseException) -> tuple[str, str | None]:
    """What an error of the library says, in one line; and what to do, where it is plain."""
    if str(error).startswith(_WRAPPED) and error.__cause__ is not None:
        error = error.__cause__
    told = " ".join(str(error).split())[:400]
    if _CAST.search(told):
        return told, "its files differ in the types of their columns: write them anew with the same"
    if _CONFIG.match(told):
        return told, "set data.hub.config to one of them"
    return first_line(error), None


class _opening:
    """Whatever the library raises, as one sentence."""

    def __init__(self, where: Where) -> None:
        self.where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if error is None or isinstance(error, UserError) or not isinstance(error, Exception):
            return
        reason, remedy = why(error)
        if empty := _NO_ROWS.search(reason):
            raise no_rows(f"{self.where}, split {empty[1]}") from None
        if remedy:
            what = remedy
        elif self.where.on_disk:
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
