"""Reads the file of an offline W&B run: what was really written there, without a server."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7  # LevelDB's log format; the file's own 7-byte header counts in the first block
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(run_folder: Path) -> list[Any]:
    """All records of the one offline run below a folder."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run_folder.glob("wandb/offline-run-*/run-*.wandb")
    data, found, part, at = path.read_bytes(), [], b"", 7
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # a header is never split: the rest of the block is padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        part = (b"" if kind in (FULL, FIRST) else part) + data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (FULL, LAST):
            found.append(Record.FromString(part))
    return found


def of_kind(found: list[Any], kind: str) -> list[Any]:
    return [getattr(r, kind) for r in found if r.WhichOneof("record_type") == kind]


def _items(items: Any) -> dict[str, Any]:
    return {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}


def history(found: list[Any]) -> list[dict[str, Any]]:
    """The logged rows, in order."""
    return [_items(h.item) for h in of_kind(found, "history")]


def config(found: list[Any]) -> dict[str, Any]:
    """The configuration as last set."""
    values: dict[str, Any] = {}
    for record in [r.config for r in of_kind(found, "run")] + of_kind(found, "config"):
        values |= _items(record.update)
    return values


def summary(found: list[Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for record in of_kind(found, "summary"):
        values |= _items(record.update)
    return values
