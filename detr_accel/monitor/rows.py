"""The names under which numbers are logged: one vocabulary for ``metrics.jsonl``, ``speed.jsonl`` and W&B.

Everything in ``train/ health/ val/ data/`` follows from the recipe, the data and the seed; whatever the clock or the
machine has a say in is in ``speed/`` and ``memory/``.
"""

from __future__ import annotations

import math
from typing import Any

from detr_accel.structures import StepStats

BIGGER_IS_BETTER = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl", "f1")


def train_row(stats: StepStats) -> dict[str, float]:
    """A window's losses, learning rates, gradient norms and counts, flat."""
    row: dict[str, float] = {"train/loss": stats.loss}
    row |= {f"train/{name}": value for name, value in stats.losses.items()}
    row |= {f"train/lr/{group}": value for group, value in stats.lr.items()}
    row["health/grad_norm"] = stats.grad_norm
    row |= {f"health/grad_norm/{group}": value for group, value in stats.grad_norms.items()}
    row["health/accepted"] = int(stats.accepted)
    row["data/num_images"] = stats.num_images
    row["data/num_boxes"] = stats.num_boxes
    row["data/dropped"] = stats.num_dropped
    row |= {f"data/{name}": value for name, value in stats.facts.items()}
    return row | {f"health/{name}": value for name, value in stats.extra.items()}


def val_row(metrics: Any) -> dict[str, float]:
    """An evaluation's numbers, flat. ``metrics``: values, threshold, f1, num_images, num_detections, out_of_reach."""
    row = {f"val/{name}": value for name, value in metrics.values.items()}
    row["val/f1"] = math.nan if metrics.f1 is None else metrics.f1
    row["val/threshold"] = math.nan if metrics.threshold is None else metrics.threshold
    row["val/num_images"] = metrics.num_images
    row["val/num_detections"] = metrics.num_detections
    row["val/out_of_reach"] = metrics.out_of_reach
    return row


def axes(window: int, step: int, epoch: float) -> dict[str, float]:
    return {"train/window": window, "train/step": step, "train/epoch": epoch}


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """json knows no nan: undefined numbers become null, infinite ones text."""

    def mend(value: Any) -> Any:
        if isinstance(value, dict):
            return finite(value)
        if isinstance(value, float) and not math.isfinite(value):
            return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
        return value

    return {key: mend(value) for key, value in row.items()}
