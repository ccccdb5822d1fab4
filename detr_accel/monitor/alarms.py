"""Who speaks up: every window is judged by a table of small functions, each of which knows one thing that goes wrong.

An alarm says what happened, since when, the most likely cause, and what to change in the recipe. Judging is a function
of what every process sees alike, so the same alarms come again when a run is repeated or resumed (its memory is saved
with every checkpoint); alarms about time and memory are the machine's, and remember nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from detr_accel.monitor.alarm_rules import AT_EVALUATION, EVERY_WINDOW, STARTS, About, Alarm, Past, Rule
from detr_accel.monitor.machine_rules import MACHINE
from detr_accel.structures import StepStats

__all__ = ["OUT_OF_REACH", "TITLES", "About", "Alarm", "Alarms", "Past", "judge_rows"]

OUT_OF_REACH = "Objects out of reach"  # of the validation split
TITLES = (*EVERY_WINDOW, *MACHINE, *AT_EVALUATION, OUT_OF_REACH)


@dataclass
class Memory:
    """What judging remembers; saved with every checkpoint, and plain enough for json."""

    recent: dict[str, list[float]] = field(default_factory=dict)  # of the last windows, by name: see Past
    blocks: list[float] = field(default_factory=list)  # mean loss of each block of windows so far
    evaluations: list[dict[str, float]] = field(default_factory=list)
    # by title: first and last window of the episode, window when it was last said, windows in it, times said
    episodes: dict[str, list[int]] = field(default_factory=dict)
    head_loaded: float = 0.0  # share of the class rows that model.init_from brought

    def begin_anew(self) -> None:
        """Other weights (earlier ones again) or other pictures: losses so far, but for the first, are no measure."""
        for name in self.recent.keys() - set(STARTS.values()):
            del self.recent[name]
        self.blocks.clear()


class Alarms:
    """Judges every window and every evaluation, and holds its tongue about what it has just said.

    Args:
        about: the recipe's numbers that the words need.
        memory: brought up to date; belongs to the run's state.
        off: titles that are not to speak.
        again_after: windows until an alarm that goes on is said again.
    """

    def __init__(self, about: About, memory: Memory, *, off: Iterable[str] = (), again_after: int = 1000) -> None:
        self.about, self.memory, self.off, self.again_after = about, memory, frozenset(off), again_after
        self.past = Past(memory.recent, memory.blocks, memory.evaluations, memory.head_loaded)
        self._machine: dict[str, list[int]] = {}

    def begun(self, window: int, beyond_limits: str) -> list[Alarm]:
        """What is to be said before the first window, once in a run: what can never be found, in words or empty."""
        if not beyond_limits or OUT_OF_REACH in self.off or OUT_OF_REACH in self.memory.episodes:
            return []
        return self._once(Alarm(beyond_limits, title=OUT_OF_REACH), self.memory.episodes, window)

    def judge(self, stats: StepStats) -> list[Alarm]:
        """What is to be said after this window; call it once for each, in order."""
        to_judge = self.past.add(stats)

        def call(rule: Rule) -> Alarm | None:
            return rule(stats, self.past, self.about)

        said = self._ask(EVERY_WINDOW, self.memory.episodes, stats.window, call) if to_judge else []
        return said + self._ask(MACHINE, self._machine, stats.window, call)

    def evaluated(self, window: int, epoch: float, metrics: dict[str, float]) -> list[Alarm]:
        """What is to be said after an evaluation.

        Args:
            metrics: ``val/loss``, the loss on validation images, and ``val/train_loss``, that on as many training
                images: same transform, dropout off, evaluated weights. Without them there is nothing to say.
        """
        self.past.add_evaluation(window, epoch, metrics)
        return self._ask(AT_EVALUATION, self.memory.episodes, window, lambda rule: rule(self.past, self.about))

    def _ask(self, table: dict, episodes: dict[str, list[int]], window: int, call: Callable) -> list[Alarm]:
        said = []
        for title, rule in table.items():
            alarm = None if title in self.off else _careful(call, rule, title)
            if alarm is not None:
                said += self._once(replace(alarm, title=title), episodes, window)
        return said

    def _once(self, alarm: Alarm, episodes: dict[str, list[int]], window: int) -> list[Alarm]:
        """The alarm where it is due: at first, and again after long, with the count of its windows."""
        first, last, spoken, count, times = episodes.get(alarm.title, (window, window, -math.inf, 0, 0))
        if window - last > self.again_after:  # it was over; this is another episode
            first, spoken, count, times = window, -math.inf, 0, 0
        due = window - spoken >= self.again_after
        count, times = count + 1, times + due
        episodes[alarm.title] = [first, window, window if due else spoken, count, times]
        if not due:
            return []
        if times == 1:
            return [alarm]
        return [replace(alarm, text=f"{alarm.text} (time {times}; in {count} windows since window {first})")]


def _careful(call: Callable, rule: Callable, title: str) -> Alarm | None:
    """A mistake of ours in a rule is said as what it is, and does not end the training that it watches."""
    try:
        return call(rule)
    except Exception as error:
        return Alarm(f"this alarm itself failed ({type(error).__name__}: {error}): report it; alarms.off silences it")


def judge_rows(rows: Iterable[dict[str, Any]], about: About, head_loaded: float = 0.0) -> list[tuple[int, Alarm]]:
    """Judge the rows of a ``metrics.jsonl`` again; exact where it was written with log.every 1
    and nothing began anew on the way.

    Returns:
        (window, alarm) of each alarm that would have been raised.
    """
    alarms, said = Alarms(about, Memory(head_loaded=head_loaded)), []
    for row in rows:
        if "train/loss" in row:
            said += [(row["window"], alarm) for alarm in alarms.judge(stats_of(row))]
        else:
            said += [(row["window"], alarm) for alarm in alarms.evaluated(row["window"], row["epoch"], row)]
    return said


def stats_of(row: dict[str, Any]) -> StepStats:
    """A row of ``metrics.jsonl`` as the window it came from; null is read as not a number."""

    def number(value: Any) -> float:
        return math.nan if value is None else float(value)

    def under(prefix: str) -> dict[str, float]:
        names = {key.removeprefix(prefix): number(v) for key, v in row.items() if key.startswith(prefix)}
        return {name: value for name, value in names.items() if "/" not in name}

    losses, facts = under("train/"), under("data/")
    return StepStats(
        window=row["window"], step=row["step"], epoch=row["epoch"], loss=losses.pop("loss"), losses=losses,
        grad_norm=number(row["health/grad_norm"]), grad_norms=under("health/grad_norm/"), lr=under("train/lr/"),
        num_images=int(facts.pop("num_images")), num_boxes=int(facts.pop("num_boxes")), seconds=0.0, wait_seconds=0.0,
        accepted=bool(row["health/accepted"]), facts=facts,
    )  # fmt: skip
