"""Reads the file of an offline W&B run: what was really written there, without a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from detr_accel.train.rehearsal_compare import offline_records


def records(run_folder: Path) -> list[Any]:
    """All records of the one offline run below a folder."""
    (path,) = run_folder.glob("wandb/offline-run-*/run-*.wandb")
    return list(offline_records(path))


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
