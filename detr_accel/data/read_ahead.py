"""A thread that keeps a few items ready."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """The same items, made by a thread a little ahead of their use, so that a slow read is waited for by nobody.

    Args:
        ahead: items that may wait.
        noted: gets an item and the seconds that its user waited for it, and gives the item back.
    """

    def __init__(
        self, items: Iterable[T], ahead: int, noted: Callable[[T, float], T] = lambda item, seconds: item
    ) -> None:
        self.items, self.ahead, self.noted = items, ahead, noted

    def __iter__(self) -> Iterator[T]:
        waiting: queue.Queue = queue.Queue(self.ahead)
        over = threading.Event()
        thread = threading.Thread(target=self._fill, args=(waiting, over), name="stream", daemon=True)
        thread.start()
        try:
            while True:
                begun = time.perf_counter()
                item, error = waiting.get()
                seconds = time.perf_counter() - begun
                if error is not None:
                    raise error
                if item is _END:
                    return
                yield self.noted(item, seconds)
        finally:
            over.set()
            if thread is not threading.current_thread():  # which may be the one that collects the garbage
                thread.join(5)  # a read that hangs is left behind

    def _fill(self, waiting: queue.Queue, over: threading.Event) -> None:
        def put(entry: tuple) -> None:
            while not over.is_set():
                try:
                    return waiting.put(entry, timeout=0.2)
                except queue.Full:
                    continue

        try:
            for item in self.items:
                put((item, None))
                if over.is_set():
                    return
            put((_END, None))
        except Exception as error:
            put((None, error))


_END = object()
