"""Where the time goes: seconds by section, each second counted once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Sections may nest; an inner one's time is taken from the outer one. On a GPU each end of a section waits for the
    device, so that work is counted where it was asked for: for looking, not for training.

    Args:
        device: whose work is waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        """Book the time since the last turn on the section that is open."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Time every call of a method of one object."""
        plain = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.section(name):
                return plain(*args, **kwargs)

        object.__setattr__(owner, attribute, timed)

    def take(self) -> dict[str, float]:
        """The seconds so far; starts anew."""
        taken, self.seconds = self.seconds, {}
        return taken
