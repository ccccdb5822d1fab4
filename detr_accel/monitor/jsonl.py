"""Append-only files of json rows that survive a kill at any byte."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from detr_accel.monitor.rows import finite


class JsonLines:
    """One file, one json object a line, flushed line by line.

    Args:
        path: the file; made when it is not there.
        keep_until: rows of later windows are dropped on opening, as is a last line that a kill cut short: a resumed
            run writes them again, so the file becomes that of the run that was never killed. None keeps all rows.
    """

    def __init__(self, path: Path, keep_until: int | None = None) -> None:
        self.path = path
        _trim(path, keep_until)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(finite(row), ensure_ascii=False) + "\n")
        self._file.flush()  # to the operating system: outlives this process, and the disk is not waited for

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows


def _trim(path: Path, keep_until: int | None) -> None:
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    kept = whole if keep_until is None else [x for x in whole if (json.loads(x).get("window") or 0) <= keep_until]
    if len(kept) != len(lines):
        beside = path.with_suffix(path.suffix + ".tmp")
        beside.write_bytes(b"".join(kept))
        os.replace(beside, path)
