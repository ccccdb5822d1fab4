"""How long an epoch takes, how much is left, and where the time goes."""

from __future__ import annotations

from collections import deque
from statistics import median

from detr_accel.structures import LoaderTime, StepStats


class Eta:
    """Time per epoch and time left, from the windows seen so far, with evaluations and checkpoints included.

    Windows count by their median, so that the first, slow ones (workers starting, kernels being chosen) do not matter.
    The other work counts by its own mean; until a first evaluation was seen, the estimate says that it is without one.

    Args:
        total_windows: length of the run.
        windows_per_epoch: length of an epoch.
        start_window: windows done before this process began.
        num_evaluations: how many evaluations the whole run makes.
        num_checkpoints: how many checkpoints the whole run makes.
        after: windows to see before saying anything.
    """

    def __init__(
        self,
        total_windows: int,
        windows_per_epoch: int,
        *,
        start_window: int = 0,
        num_evaluations: float = 0.0,
        num_checkpoints: float = 0.0,
        after: int = 20,
    ) -> None:
        self.total, self.per_epoch, self.after = total_windows, windows_per_epoch, after
        self.window, self.seen = start_window, 0
        self.recent: deque[float] = deque(maxlen=500)
        self.per_window = {
            "evaluation": num_evaluations / max(1, total_windows),
            "checkpoint": num_checkpoints / max(1, total_windows),
        }
        self.spent: dict[str, list[float]] = {"evaluation": [], "checkpoint": []}

    def add(self, window: int, seconds: float) -> None:
        """Note a window and how long it took, waiting for data included."""
        self.window, self.seen = window, self.seen + 1
        self.recent.append(seconds)

    def add_other(self, kind: str, seconds: float) -> None:
        """Note an ``evaluation`` or a ``checkpoint``."""
        self.spent[kind].append(seconds)

    @property
    def ready(self) -> bool:
        return self.seen >= self.after

    @property
    def unmeasured(self) -> list[str]:
        """What the run will do, and has not done yet."""
        return [kind for kind, times in self.spent.items() if self.per_window[kind] and not times]

    def seconds_per_window(self) -> float:
        """One window's share of everything, in seconds."""
        other = sum(
            self.per_window[kind] * sum(times) / len(times) for kind, times in self.spent.items() if times
        )  # fmt: skip
        return median(self.recent) + other

    def seconds_left(self) -> float:
        return max(0, self.total - self.window) * self.seconds_per_window()

    def sentence(self) -> str | None:
        """One line for a person, or None before enough was seen."""
        if not self.ready:
            return None
        epoch = words(self.per_epoch * self.seconds_per_window())
        missing = " and ".join(f"{kind}s" for kind in self.unmeasured)
        note = f", {missing} not yet measured" if missing else ", evaluations and checkpoints included"
        left = f"{words(self.seconds_left())} left ({self.total - self.window} of {self.total} windows)"
        return f"{median(self.recent):.3g} s per window, {epoch} per epoch, {left}{note}"


class Meter:
    """What happened since the last logged row: windows, images, seconds and their parts, padding, and what the loader
    processes of this process did."""

    def __init__(self) -> None:
        self.windows = self.images = 0
        self.seconds = self.wait_seconds = self.padding = self.worker_seconds = 0.0
        self.sections: dict[str, float] = {}
        self.loader = LoaderTime()

    def add(self, stats: StepStats) -> None:
        self.windows += 1
        self.images += stats.num_images
        self.seconds += stats.seconds
        self.wait_seconds += stats.wait_seconds
        self.padding += stats.facts.get("padding", 0.0)
        self.worker_seconds += stats.seconds * max(1, stats.workers)
        self.loader += stats.loader
        for name, seconds in stats.sections.items():
            self.sections[name] = self.sections.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """The figures so far, per window and per second; starts anew. ``share_...`` are parts of the time on this
        process; ``read_ms``, ``decode_ms`` and ``pixels_ms`` are a loader process's, per image."""
        windows, seconds = max(1, self.windows), max(self.seconds, 1e-9)
        row = {
            "seconds": self.seconds / windows,
            "wait_seconds": self.wait_seconds / windows,
            "wait_fraction": self.wait_seconds / seconds,
            "images_per_second": self.images / seconds,
            "padding": self.padding / windows,
        }
        row |= shares(self.sections)
        if self.loader.images:
            cost = self.loader.per_image()
            row |= {f"{name}_ms": 1e3 * getattr(cost, name) for name in ("read", "decode", "pixels")}
            row |= {"stream_ms": 1e3 * cost.stream} if cost.stream else {}
            row["loader_busy"] = cost.total * self.loader.images / max(self.worker_seconds, 1e-9)
        self.__init__()
        return row


def shares(sections: dict[str, float]) -> dict[str, float]:
    """``share_...``: each section's part of their sum."""
    whole = max(sum(sections.values()), 1e-9)
    return {f"share_{name}": spent / whole for name, spent in sections.items()}


def words(seconds: float) -> str:
    """Seconds as a person says them: 43 s, 12 min, 3 h 05 min, 2 d 4 h."""
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"
