"""Append-only files of json rows that survive a kill at any byte."""

from __future__ import annotations

import contextlib
import errno
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
        # unbuffered: to the operating system at once, which outlives this process; the disk is not waited for
        self._file = path.open("ab", buffering=0)

    def write(self, row: dict[str, Any]) -> None:
        """
        Raises:
            OSError: the disk is full; nothing of the row is left in the file.
        """
        line = json.dumps(finite(row), ensure_ascii=False).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise

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
