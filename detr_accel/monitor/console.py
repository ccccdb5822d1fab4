"""What a person sees while a run goes on: two bars in a terminal, plain lines everywhere else.

In a pipe, a log file or a batch system there is no bar, no colour and no control character: one line per logged row.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

from detr_accel.monitor.timing import words
from detr_accel.structures import StepStats

T = TypeVar("T")


class Console:
    """Bars for epochs and windows, lines above them.

    Args:
        total_windows: length of the run; windows_per_epoch: of an epoch; start_window: done before.
        stream: where to write; bars only when it is a terminal.
    """

    def __init__(
        self, total_windows: int, windows_per_epoch: int, start_window: int = 0, stream: TextIO | None = None
    ) -> None:
        self.stream = sys.stdout if stream is None else stream
        self.total, self.per_epoch = total_windows, windows_per_epoch
        self.bars: tuple[Any, Any] | None = None
        if _is_terminal(self.stream):
            self.bars = self._make_bars(start_window)

    def _make_bars(self, start_window: int) -> tuple[Any, Any]:
        from tqdm import tqdm

        common = {"file": self.stream, "dynamic_ncols": True, "mininterval": 0.2, "leave": False}
        epochs = tqdm(
            total=self.total / self.per_epoch, initial=start_window / self.per_epoch, desc="epochs", position=0,
            bar_format="{desc} {n:.2f}/{total:.4g} |{bar}| {elapsed}{unit}", unit="", **common,
        )  # fmt: skip
        windows = tqdm(
            total=self._epoch_length(start_window), initial=start_window % self.per_epoch, desc="steps", unit="",
            position=1,
            bar_format="{desc}  {n_fmt}/{total_fmt} |{bar}| {unit}", **common,
        )  # fmt: skip
        return epochs, windows

    def _epoch_length(self, window: int) -> int:
        begun = window // self.per_epoch * self.per_epoch
        return max(1, min(self.per_epoch, self.total - begun))

    def say(self, text: str) -> None:
        """Write lines without breaking the bars. What cannot be written is lost: the run and its files go on."""
        try:
            self._say(text)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # whoever read has gone (| head), or the terminal
                self._fall_silent()

    def _say(self, text: str) -> None:
        if self.bars is not None:
            from tqdm import tqdm

            tqdm.write(text, file=self.stream)
            return
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self.stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        self.stream.flush()

    def _fall_silent(self) -> None:
        with contextlib.suppress(OSError):
            self.close()
        self.bars = None
        nowhere = open(os.devnull, "w", encoding="utf-8")
        if self.stream is sys.stdout:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # or Python fails again on it when it ends
        self.stream = nowhere

    def tick(self, stats: StepStats, seconds_left: float | None = None) -> None:
        """Move the bars by a window."""
        if self.bars is None:
            return
        epochs, windows = self.bars
        done = (stats.window - 1) % self.per_epoch + 1
        if done < windows.n or done == 1:
            windows.reset(total=self._epoch_length(stats.window - 1))
        windows.unit = _figures(stats, _speed_of(stats))  # tqdm's own postfix would begin with a comma
        windows.update(done - windows.n)
        epochs.unit = "" if seconds_left is None else f", {words(seconds_left)} left"  # tqdm's own knows no evaluations
        epochs.update(stats.window / self.per_epoch - epochs.n)

    def log(self, stats: StepStats, speed: dict[str, float], seconds_left: float | None) -> None:
        """The logged row, as a line, where there is no bar."""
        if self.bars is not None:
            return
        left = f", {words(seconds_left)} left" if seconds_left is not None else ""
        padding = f", padding {100 * speed['padding']:.0f} %" if "padding" in speed else ""
        place = f"epoch {stats.epoch:.2f} window {stats.window}/{self.total}"
        self.say(f"{place}: {_figures(stats, speed)}{padding}{left}")

    def evaluation(
        self, metrics: Any, *, window: int, epoch: float, weights: str, best: str, extra: dict[str, float]
    ) -> None:
        """A table. ``metrics``: anything with ``table()``; ``extra``: losses, and the trained weights' AP."""
        head = f"evaluation after epoch {epoch:.2f} (window {window}), {weights} weights{best}"
        shown = {"validation loss": extra.get("val/loss"), "same on training images": extra.get("val/train_loss")}
        lines = [*metrics.table().splitlines(), ", ".join(f"{k} {v:.4g}" for k, v in shown.items() if v is not None)]
        if "val/raw/AP" in extra:
            lines.append(f"raw weights: AP {100 * extra['val/raw/AP']:.1f}, AP50 {100 * extra['val/raw/AP50']:.1f}")
        self.say(head + "\n" + "\n".join("  " + row for row in lines if row))

    def progress(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Wrap a loop that can last: a bar that goes away in a terminal, nothing elsewhere."""
        if self.bars is None:
            yield from items
            return
        from tqdm import tqdm

        yield from tqdm(
            items, desc=description, total=total, file=self.stream, leave=False, position=2, dynamic_ncols=True
        )

    def close(self) -> None:
        for bar in reversed(self.bars or ()):
            bar.close()
        self.bars = None


def _is_terminal(stream: TextIO) -> bool:
    """A terminal with room for a bar: some containers' have a width of 0, where a bar would draw nothing at all."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def _speed_of(stats: StepStats) -> dict[str, float]:
    seconds = max(stats.seconds, 1e-9)
    return {"images_per_second": stats.num_images / seconds, "wait_fraction": stats.wait_seconds / seconds}


def _figures(stats: StepStats, speed: dict[str, float]) -> str:
    lr = max(stats.lr.values(), default=0.0)
    return (
        f"loss {stats.loss:.4g}, lr {lr:.3g}, grad {stats.grad_norm:.3g}, "
        f"{speed['images_per_second']:.3g} images/s, data wait {100 * speed['wait_fraction']:.0f} %"
    )
