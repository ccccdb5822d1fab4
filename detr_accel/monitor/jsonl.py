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
        owed: the beginning of a key; rows of the window keep_until itself that have such a key are written again, too.
    """

    def __init__(self, path: Path, keep_until: int | None = None, owed: str | None = None) -> None:
        self.path = path
        _trim(path, keep_until, owed)
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
    return [json.loads(line) for line in _lines(path)[:-1]] if path.exists() else []


def _lines(path: Path) -> list[bytes]:
    """Without their ends; the last one is what a kill cut short, or empty. Unicode has other ends of lines, which names
    and texts may hold."""
    return path.read_bytes().split(b"\n")


def _trim(path: Path, keep_until: int | None, owed: str | None) -> None:
    if not path.exists():
        return
    *whole, cut = _lines(path)
    kept = whole if keep_until is None else [line for line in whole if _stays(json.loads(line), keep_until, owed)]
    if cut or len(kept) != len(whole):
        beside = path.with_suffix(path.suffix + ".tmp")
        beside.write_bytes(b"".join(line + b"\n" for line in kept))
        os.replace(beside, path)


def _stays(row: dict[str, Any], keep_until: int, owed: str | None) -> bool:
    window = row.get("window") or 0
    again = owed is not None and window == keep_until and any(key.startswith(owed) for key in row)
    return window <= keep_until and not again
