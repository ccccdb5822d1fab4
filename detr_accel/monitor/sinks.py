"""Where a run's numbers go: console, json files, W&B. The loop says what happened; each sink shows it its own way."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from detr_accel.monitor import memory, rows, timing
from detr_accel.monitor.console import Console
from detr_accel.monitor.jsonl import JsonLines, read
from detr_accel.monitor.timing import Eta, Meter
from detr_accel.monitor.wandb_sink import PanelItem, WandbSink
from detr_accel.structures import Classes, StepStats

T = TypeVar("T")


class Sinks:
    """All sinks of a run, on its main process.

    Args:
        run_folder: holds ``metrics.jsonl`` (what follows from recipe, data and seed: the same rows whenever the run is
            repeated), ``speed.jsonl`` (clock and memory) and ``alarms.jsonl``.
        start_window: windows done before; later rows of the two first files are dropped, to be written again. W&B has
            had them already, and does not get them twice.
        evaluation_owed: an evaluation after start_window is still to come, and its row, if there is one, with it.
        device: whose memory is reported.
        metric: by which evaluations are compared.
        best: value and window of the best evaluation so far.
    """

    def __init__(
        self,
        run_folder: Path,
        console: Console,
        eta: Eta,
        wandb: WandbSink | None,
        *,
        name: str,
        start_window: int = 0,
        evaluation_owed: bool = False,
        device: Any = "cpu",
        metric: str = "AP",
        best: tuple[float, int] | None = None,
    ) -> None:
        run_folder.mkdir(parents=True, exist_ok=True)
        self.console, self.eta, self.wandb, self.name, self.device = console, eta, wandb, name, device
        self.phases = memory.Phases(torch.device(device))
        self._sent = _Sent(run_folder / "wandb_sent.json", start_window)
        self._unwritten = False
        self.metrics = JsonLines(run_folder / "metrics.jsonl", start_window, owed="val/" if evaluation_owed else None)
        self.speed = JsonLines(run_folder / "speed.jsonl", start_window)
        # alarms of a run that goes on stay: what was wrong then may not come again. One that does is not written or
        # sent a second time
        self.alarms = JsonLines(run_folder / "alarms.jsonl", None if start_window else -1)
        self._alarmed = {(row["window"], row["title"]) for row in read(run_folder / "alarms.jsonl")}
        self.meter = Meter()
        self.metric, self.best = metric, best
        self._said_eta = 0

    def say(self, text: str) -> None:
        """A line for the person, above the bars."""
        self.console.say(text)

    def tick(self, stats: StepStats) -> None:
        """Every window: moves the bars and the clocks, writes nothing."""
        self.meter.add(stats)
        self.eta.add(stats.window, stats.seconds)
        self.console.tick(stats, self.eta.seconds_left() if self.eta.ready else None)
        self._say_eta()

    def _say_eta(self) -> None:
        """Once when enough windows were seen, and once more when evaluations and checkpoints have been measured."""
        known = self.eta.ready + (self.eta.ready and not self.eta.unmeasured)
        if known > self._said_eta:
            self._said_eta = known
            self.console.say(f"time: {self.eta.sentence()}")

    def log(self, stats: StepStats) -> None:
        """Every ``log.every`` windows: one row in each file, one in W&B, a line where there is no bar."""
        speed = self.meter.take()
        if self.eta.ready:
            speed["seconds_left"] = self.eta.seconds_left()
        held = {"peak_gib": memory.peak_gib(self.device)} | self.phases.take()
        reserved = memory.reserved_gib(self.device)
        if reserved is not None:
            held["reserved_gib"] = reserved
        place = {"window": stats.window, "step": stats.step, "epoch": stats.epoch}
        row = rows.train_row(stats)
        machine = {f"speed/{k}": v for k, v in speed.items()} | {f"memory/{k}": v for k, v in held.items()}
        self._write(self.metrics, place | row)
        self._write(self.speed, place | {"time": _now()} | machine)
        self.console.log(stats, speed, speed.get("seconds_left"))
        if self.wandb is not None and self._sent.is_new("train", stats.window):
            self._tell_wandb(lambda wandb: wandb.log(rows.axes(**place) | row | machine))

    def last(self, stats: StepStats, sections: dict[str, float]) -> None:
        """At the run's end: where the time since the last row went, such as into the last evaluation.

        Args:
            stats: of the last window, which has been ``tick``ed.
            sections: seconds after it.
        """
        place = {"window": stats.window, "step": stats.step, "epoch": stats.epoch}
        row = timing.shares(Counter(self.meter.sections) + Counter(sections))
        self._write(self.speed, place | {"time": _now()} | {f"speed/{k}": v for k, v in row.items()})

    def evaluation(
        self,
        metrics: Any,
        *,
        window: int,
        step: int,
        epoch: float,
        weights: str,
        panel: Sequence[PanelItem] = (),
        classes: Classes | None = None,
        extra: dict[str, float] | None = None,
    ) -> None:
        """After an evaluation: a table, a row, and in W&B the classes' table and the panel.

        Args:
            metrics: values, per_class, num_objects, threshold, f1, num_images, num_detections, out_of_reach, to_json(),
                table().
            weights: ``ema`` or ``raw``: which weights were evaluated.
            panel: (image uint8 [H, W, 3], true boxes xyxy px [N, 4], true labels [N], Detections, image id).
            classes: names of the panel's labels.
            extra: further numbers of the row, such as ``val/loss`` and ``val/train_loss``.
        """
        place = {"window": window, "step": step, "epoch": epoch}
        row = rows.val_row(metrics) | (extra or {})
        details = {"val/weights": weights, "val/backend": metrics.backend, "val/per_class": metrics.per_class}
        self._write(self.metrics, place | row | details)
        machine = {f"memory/{k}": v for k, v in self.phases.take().items()}
        if "memory/evaluation_gib" in machine:
            self._write(self.speed, place | {"time": _now()} | machine)
        best = self._note_best(metrics.values[self.metric], window)
        self.console.evaluation(metrics, window=window, epoch=epoch, weights=weights, best=best, extra=extra or {})
        if self.wandb is None or not self._sent.is_new("val", window):
            return
        names = {i: n for i, n in enumerate(classes.names) if n is not None} if classes is not None else {}
        self._tell_wandb(lambda wandb: wandb.evaluation(rows.axes(**place) | row | machine, metrics, panel, names))
        told: dict[str, Any] = {"val/weights": weights}
        if self.best is not None:  # W&B's own maximum begins anew with a resume
            told |= {f"best/{self.metric}": self.best[0], "best/window": self.best[1]}
        self._tell_wandb(lambda wandb: wandb.summary(told))

    def _note_best(self, value: float, window: int) -> str:
        """Remember the best value so far; returns the words about it."""
        before = self.best
        if value == value and (before is None or value > before[0]):  # nan is never the best
            self.best = (value, window)
            return "" if before is None else f", {self.metric} up from {100 * before[0]:.1f}"
        return "" if before is None else f", best {self.metric} {100 * before[0]:.1f} at window {before[1]}"

    def alarm(self, title: str, text: str, level: str = "WARN", window: int | None = None) -> None:
        """Something the person should know: console, alarms.jsonl, W&B.

        Args:
            title: a few words; text: what happened, the likely cause, what to change.
            level: INFO, WARN or ERROR.
        """
        assert level in ("INFO", "WARN", "ERROR"), level
        self.console.say(f"{level}: {title}: {text}")
        if window is not None and (window, title) in self._alarmed:
            return
        self._write(self.alarms, {"window": window, "time": _now(), "level": level, "title": title, "text": text})
        self._tell_wandb(lambda wandb: wandb.alarm(title, text, level))

    def artifact(self, folder: Path, aliases: Sequence[str] = ("best",), metadata: dict | None = None) -> None:
        """Send a model folder to W&B."""
        self._tell_wandb(lambda wandb: wandb.artifact(Path(folder), self.name, aliases, metadata or {}))

    def _write(self, file: JsonLines, row: dict[str, Any]) -> None:
        """A row that finds no room on the disk is dropped, and the run goes on; it is said once."""
        try:
            file.write(row)
        except OSError as error:
            if not self._unwritten:
                self.console.say(f"ERROR: rows are missing from {file.path}: {error.strerror}; free space there")
            self._unwritten = True

    def _tell_wandb(self, action: Callable[[WandbSink], None]) -> None:
        """W&B that fails (its own disk is full, say) is left alone from then on, and the run goes on."""
        if self.wandb is None:
            return
        try:
            action(self.wandb)
        except Exception as error:
            self.console.say(f"ERROR: W&B failed and gets no more of this run ({type(error).__name__}: {error})")
            self.wandb = None

    @contextlib.contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Around an ``evaluation`` or a ``checkpoint``, so that the time left includes it, and memory is not the
        window's."""
        begun = time.perf_counter()
        self.phases.watch(kind == "evaluation")
        self.phases.begin("evaluation" if kind == "evaluation" else None)
        yield
        self.phases.begin(None)
        self.eta.add_other(kind, time.perf_counter() - begun)

    def progress(self, items: Iterable[T], description: str = "evaluate", total: int | None = None) -> Iterable[T]:
        """Wrap a loop that can last."""
        return self.console.progress(items, description, total)

    @property
    def wandb_run_id(self) -> str | None:
        return None if self.wandb is None else self.wandb.run_id

    def close(self, ok: bool = True) -> None:
        """Once, at the end, also after a failure (``ok`` False marks the W&B run as failed). A file that cannot be
        closed (a full disk) keeps nothing else from being closed."""
        with contextlib.ExitStack() as stack:
            if self.wandb is not None:
                stack.callback(self.wandb.close, ok)
            for file in (self.metrics, self.speed, self.alarms):
                stack.callback(file.close)
            stack.callback(self.console.close)

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(kind is None)


class Silent:
    """The same methods on every other process: they do nothing."""

    wandb_run_id: str | None = None
    phases = memory.Phases(torch.device("cpu"), on=False)

    def say(self, text: str) -> None: ...

    def tick(self, stats: StepStats) -> None: ...

    def log(self, stats: StepStats) -> None: ...

    def last(self, stats: StepStats, sections: dict[str, float]) -> None: ...

    def evaluation(self, metrics: Any, **where: Any) -> None: ...

    def alarm(self, title: str, text: str, level: str = "WARN", window: int | None = None) -> None: ...

    def artifact(self, folder: Path, aliases: Sequence[str] = ("best",), metadata: dict | None = None) -> None: ...

    def timed(self, kind: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def progress(self, items: Iterable[T], description: str = "evaluate", total: int | None = None) -> Iterable[T]:
        return items

    def close(self, ok: bool = True) -> None: ...

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None: ...


class _Sent:
    """The last windows whose rows W&B has had, over all processes of a run: a resumed run makes the rows after its
    checkpoint again, perhaps several times, and W&B gets each once. On disk, since no checkpoint can know it.

    Args:
        start_window: 0 for a run that begins, whose file is not of this run.
    """

    def __init__(self, path: Path, start_window: int) -> None:
        self.path = path
        self.last = {"train": 0, "val": 0}
        if start_window and path.exists():
            with contextlib.suppress(ValueError):  # cut short by a kill: rows may come twice, none is lost
                self.last |= json.loads(path.read_text(encoding="utf-8"))

    def is_new(self, kind: str, window: int) -> bool:
        """Whether W&B has not had this row; from now on it has."""
        if window <= self.last[kind]:
            return False
        self.last[kind] = window
        with contextlib.suppress(OSError):
            beside = self.path.with_suffix(".tmp")
            beside.write_text(json.dumps(self.last), encoding="utf-8")
            beside.replace(self.path)
        return True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
