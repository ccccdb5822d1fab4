"""The folder of one run: who may write in it, and what it says of itself."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from detr_accel.structures import UserError


def write_atomic(path: Path, text: str) -> None:
    """Write a small file so that a reader, or a kill, sees the old one or the new one and nothing between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class RunFolder:
    """``runs/NAME``, held by one process at a time.

    The lock is the kernel's (POSIX record lock): it ends with the process that holds it, is not inherited by loader
    workers, and so shows exactly the orphans of a killed launcher that still write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = None
        self.began = False  # whether this process has said that the run is running

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            UserError: another process holds it, named with its id and host; or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "lock", "a+", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"cannot write in the run folder {self.path}: {error.strerror}; choose another with --runs"
            ) from None
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            raise UserError(
                f"{self.path} is being written by {holder}: stop that one first (a killed launcher can leave its "
                "training process behind), or give this run another name with name=..."
            ) from None
        try:
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._lock.flush()
        except OSError as error:
            raise UserError(f"cannot write in the run folder {self.path}: {error.strerror}; free space there") from None

    def held_by_another(self) -> bool:
        """Whether another process writes here; nothing is changed."""
        try:
            with open(self.path / "lock", "r+", encoding="utf-8") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def status(self, state: str, **more: object) -> None:
        """Write ``status.json``: state is running, resume, done or failed (launchers hide exit codes)."""
        assert state in ("running", "resume", "done", "failed"), state
        self.began |= state == "running"
        row = {"state": state, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "pid": os.getpid(), **more}
        write_atomic(self.path / "status.json", json.dumps(row, indent=1) + "\n")
