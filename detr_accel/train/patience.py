"""Waiting for something better: early stopping, and the schedule that drops on a plateau."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Waiting:
    """What is remembered between evaluations; saved with every checkpoint."""

    best: float | None = None
    waited: int = 0  # evaluations since the best one
    drops: int = 0  # of the learning rate, so far


@dataclass(frozen=True)
class Patience:
    """Is it over? The same answer on every process, since all get the same numbers.

    Args:
        metric: what is watched; ``loss`` is better when it is smaller, everything else when it is greater.
        evaluations: how many in a row may bring nothing better.
        min_delta: by how much a value must beat the best one to count as better.
    """

    metric: str
    evaluations: int
    min_delta: float = 0.0

    def note(self, waiting: Waiting, value: float) -> None:
        """Take an evaluation's value into account. nan (nothing to score against) says nothing either way."""
        if math.isnan(value):
            return
        gain = 0.0 if waiting.best is None else (waiting.best - value) * (1 if self.metric == "loss" else -1)
        if waiting.best is None or gain > self.min_delta:
            waiting.best, waiting.waited = value, 0
        else:
            waiting.waited += 1

    def over(self, waiting: Waiting) -> bool:
        return waiting.waited >= self.evaluations
