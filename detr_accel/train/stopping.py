"""When a run is asked to stop: by Ctrl-C, by the launcher, or by a scheduler whose time is up."""

from __future__ import annotations

import os
import signal
import time

SAME_REQUEST_S = 2.0  # schedulers signal the whole group, and launchers relay it: one request, several signals
WINDOW_S = 10.0  # how long a window may go on after the request; the elastic agent kills after 30 s
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")  # the last one: a terminal was closed
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


class StopSignal:
    """A signal asks for a stop: the window in hand is finished, or given up where it lasts too long, and the state
    saved. A second Ctrl-C, later, interrupts at once. What nohup has told to ignore stays ignored.

    Python runs the handler between two instructions of the main thread, so a long kernel delays it.

    Args:
        watch_parent: a launcher that is gone (killed, so that it could not pass anything on) is a request, too.
    """

    def __init__(self, watch_parent: bool = False) -> None:
        self._since: float | None = None
        self._parent = os.getppid() if watch_parent else None
        heard = [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
        self._before = {s: signal.signal(s, self._on) for s in heard}

    @property
    def requested(self) -> bool:
        if self._since is None and self._parent is not None and os.getppid() != self._parent:
            self._since = time.monotonic()
        return self._since is not None

    @property
    def overdue(self) -> bool:
        """Whether the window in hand has had its time since the request."""
        return self._since is not None and time.monotonic() - self._since > WINDOW_S

    def _on(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._since is None:
            self._since = now
        elif number == signal.SIGINT and now - self._since > SAME_REQUEST_S:
            raise KeyboardInterrupt

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
