"""Where the time goes: seconds by section, each second counted once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_DRAIN = 256  # pairs of events that may wait to be read


class Stopwatch:
    """Sections may nest; an inner one's time is taken from the outer one.

    On a GPU there are two ways to count work where it was asked for. Looking waits for the device at each end of a
    section, and slows what it looks at. Training (``wait`` False) puts an event into the device's queue instead, and
    reads the time between two of them once both are past: no wait, some microseconds a section.

    Args:
        device: whose work is timed.
        wait: as said; without a GPU there is nothing to wait for.
        rest: what time outside all sections is booked on; None: on nothing.
    """

    def __init__(self, device: torch.device, *, wait: bool = True, rest: str | None = None) -> None:
        self.device, self.rest = device, rest
        self.seconds: dict[str, float] = {}
        self._events = device.type == "cuda" and not wait
        self._open: list[str] = []
        self._since = None
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def inside(self) -> str | None:
        """The innermost section that is open."""
        return self._open[-1] if self._open else None

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
        name = self.inside or self.rest
        now = self._now()
        if name is not None and self._since is not None:
            if self._events:
                self._pending.append((name, self._since, now))
            else:
                self._book(name, now - self._since)
        self._since = now
        if len(self._pending) > _DRAIN:
            self._read_past()

    def _now(self):
        """A time in seconds, or an event in the device's queue."""
        if self._events:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            return event
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _book(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def _read_past(self) -> None:
        while self._pending and self._pending[0][2].query():
            name, begun, ended = self._pending.popleft()
            self._book(name, begun.elapsed_time(ended) / 1e3)

    def take(self) -> dict[str, float]:
        """The seconds so far; starts anew. What the device has not come to yet is left for the next time."""
        if self.rest is not None:
            self._turn()
        self._read_past()
        taken, self.seconds = self.seconds, {}
        return taken
