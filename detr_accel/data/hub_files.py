"""The files of a streamed split, without reading them: how many rows each has, and what tells it from another one."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from detr_accel.structures import UserError, first_line


@dataclass(frozen=True)
class File:
    """One file.

    Args:
        rows: None where only reading tells.
        stamp: another one where the file holds something else; where it lies is not in it.
    """

    rows: int | None
    stamp: str


def look_at(names: list[str]) -> list[File]:
    """
    Args:
        names: paths or URLs.
    Raises:
        UserError: a parquet file is cut off, or not there.
    """
    look = _parquet if names and all(name.endswith(".parquet") for name in names) else _other
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(look, names))


def shard_rows(files: list[File]) -> list[int] | None:
    """Rows of each file; None where one does not tell."""
    rows = [file.rows for file in files]
    return None if not rows or None in rows else rows


def fingerprint(split: str, files: list[File]) -> str:
    """Of a split, wherever its files lie."""
    return hashlib.sha256(repr((split, [file.stamp for file in files])).encode()).hexdigest()


def _parquet(name: str) -> File:
    """Rows, and a stamp of the base name, the size and the footer: it tells of each column's bytes, least and most."""
    import fsspec
    import pyarrow.parquet as pq

    try:
        with fsspec.open(name, "rb") as file:
            rows = pq.read_metadata(file).num_rows
            size = file.seek(0, os.SEEK_END)
            file.seek(size - 8)
            footer = int.from_bytes(file.read(8)[:4], "little")
            file.seek(size - 8 - footer)
            digest = hashlib.sha256(file.read(footer)).hexdigest()
    except Exception as error:  # of Arrow, the file system or the network
        reason = first_line(error)
        raise UserError(f"{name} cannot be read as parquet: {reason}; fetch or write the file anew") from None
    return File(rows, f"{Path(name).name} {size} {digest}")


def _other(name: str) -> File:
    """A stamp of the base name and size, and of what annotations lie beside images; of a URL, the URL."""
    if not os.path.isfile(name):
        return File(None, name)
    base = Path(name).name
    digest = hashlib.sha256(Path(name).read_bytes()).hexdigest() if base.startswith("metadata.") else ""
    return File(None, f"{base} {os.path.getsize(name)} {digest}")
