"""A process that died under the others: who it was, and what to do, instead of a traceback about sockets.

On a CPU (gloo) the others learn of it in the next exchange, at once. On GPUs (NCCL) that exchange hangs until
the launcher ends them all, which it does half a minute later; then only the launcher has words.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import psutil
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object

from detr_accel.monitor.jsonl import JsonLines
from detr_accel.train.checkpoint import State
from detr_accel.train.run_folder import RunFolder
from detr_accel.train.window import Lonely

TITLE = "Dead process"
PATIENCE_S = 3.0  # its sockets close a little before the system counts it as gone
_TOLD = ("closed by peer", "reset by peer", "broken pipe", "connection refused", "remote process exited", "timed out")


class Roll:
    """All processes of a run. Make it on every one of them: they tell each other who they are.

    Args:
        timeout_minutes: how long an exchange waits for the others.
    """

    def __init__(self, accelerator: Accelerator, timeout_minutes: float) -> None:
        self.rank, self.timeout_minutes = accelerator.process_index, timeout_minutes
        here = (socket.gethostname(), os.getpid())
        self.members = gather_object([here]) if accelerator.num_processes > 1 else [here]
        self.host = here[0]

    @contextlib.contextmanager
    def watch(self, sinks, run: RunFolder, state: State) -> Iterator[None]:
        """Around everything that exchanges something with the others.

        Raises:
            Lonely: an exchange failed because a process is gone; said by every process that is left.
        """
        try:
            yield
        except RuntimeError as error:
            if len(self.members) == 1 or not is_lost_connection(error):
                raise
            gone = self._gone()
            text = self._words(gone, state.window)
            sinks.alarm(TITLE, text, level="ERROR", window=state.window)
            if 0 in gone and self.rank == min(set(range(len(self.members))) - set(gone)):
                _in_its_place(run, text, state.window)
            raise Lonely(f"{TITLE.lower()}: {text}") from error

    def _gone(self) -> list[int]:
        """Ranks on this machine whose process is no more; those elsewhere cannot be seen from here."""
        until = time.monotonic() + PATIENCE_S
        while True:
            gone = [rank for rank, (host, pid) in enumerate(self.members) if host == self.host and not _alive(pid)]
            if gone or time.monotonic() > until:
                return gone
            time.sleep(0.05)

    def _words(self, gone: list[int], window: int) -> str:
        if gone:
            names = " and ".join(f"{rank} (process {self.members[rank][1]})" for rank in gone)
            who = f"rank {names} of {len(self.members)} is gone since window {window}"
        else:
            who = (
                f"after window {window} one of the {len(self.members)} processes, on another machine, is gone or has "
                f"not answered for dist.timeout_minutes ({self.timeout_minutes:g})"
            )
        return (
            f"{who}: look at its last lines, and at the system's log: most often it was ended for lack of memory "
            "(lower batch.micro or data.workers) or its device failed; then go on with --resume"
        )


def is_lost_connection(error: BaseException) -> bool:
    """Whether an exchange between processes failed because of a process, not of what was exchanged."""
    return isinstance(error, dist.DistError) or any(words in str(error).lower() for words in _TOLD)


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _in_its_place(run: RunFolder, text: str, window: int) -> None:
    """The main process is the one that died: whoever is first among the others writes what it can no longer write."""
    with contextlib.suppress(OSError):
        file = JsonLines(run.path / "alarms.jsonl")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        file.write({"window": window, "time": now, "level": "ERROR", "title": TITLE, "text": text})
        file.close()
        run.status("failed", reason=text)
