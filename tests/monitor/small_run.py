"""Everything that a training says to its sinks, without the training: ``small_run.py FOLDER WINDOWS START``."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from detr_accel import evaluate, monitor, recipe
from detr_accel.structures import Classes, Detections, StepStats

PER_EPOCH, CLASSES = 15, Classes(("cat", "dog", "yak"), (1, 2, 9))
RECIPE = """
name: small
data: {format: shapes}
log: {every: 5, wandb: {project: testing, tags: [one, two]}}
"""


def stats(window: int) -> StepStats:
    return StepStats(
        window=window, step=window - 1, epoch=window / PER_EPOCH, loss=10.0 / window,
        losses={"loss_ce": 1.0 / window, "loss_bbox": 2.0 / window, "loss_ce_0": 3.0 / window},
        grad_norm=0.5, grad_norms={"backbone": 0.3, "transformer": 0.4}, lr={"backbone": 1e-5, "transformer": 1e-4},
        num_images=8, num_boxes=30, seconds=0.5, wait_seconds=0.1,
    )  # fmt: skip


def score(quality: float) -> tuple[evaluate.Metrics, list[tuple]]:
    """An evaluation that finds the larger part of the objects the better it is, and its panel of two pictures."""
    truth: dict = {"images": [], "annotations": [], "categories": []}
    truth["categories"] = [{"id": c, "name": n} for n, c in zip(CLASSES.names, CLASSES.category_ids, strict=True)]
    found, panel = [], []
    for i in range(10):
        truth["images"].append({"id": i, "width": 300 + i, "height": 200})
        truth["annotations"].append({"image_id": i, "category_id": 1 + i % 2, "bbox": [10, 20, 50, 60]})
        hit = i < 10 * quality
        boxes = np.array([[10, 20, 60, 80], [100, 100, 140, 140]], np.float32) + (0 if hit else 90)
        found.append(Detections(i, np.array([0.9, 0.2], np.float32), np.array([i % 2, 2]), boxes))
        if i < 2:
            image = np.full((200 * (1 + 7 * i), 300 * (1 + 7 * i), 3), 40, np.uint8)
            panel.append((image, np.array([[10.0, 20, 60, 80]], np.float32), np.array([i % 2]), found[-1], i))
    return evaluate.score(truth, found, {0: 1, 1: 2, 2: 9}), panel


def main(folder: Path, windows: int, start: int, *extra: str) -> None:
    run = recipe.loads(RECIPE)
    log_with = "wandb" if run.log.wandb.enabled else None
    accelerator = Accelerator(cpu=True, log_with=log_with, project_dir=folder)
    sinks = monitor.build(
        run, folder, accelerator, total_windows=30, windows_per_epoch=PER_EPOCH, start_window=start,
        fingerprint={"train": "feed", "val": "beef"},
    )  # fmt: skip
    sinks.say("model: 41 parameters")
    for window in range(start + 1, windows + 1):
        sinks.tick(stats(window))
        if window % run.log.every == 0:
            sinks.log(stats(window))
        if window % PER_EPOCH == 0:
            with sinks.timed("evaluation"):
                metrics, panel = score(0.8 if window == PER_EPOCH else 0.4)
            sinks.evaluation(
                metrics, window=window, step=window - 1, epoch=window / PER_EPOCH, weights="ema", panel=panel,
                classes=CLASSES,
            )  # fmt: skip
    for _ in range(2):
        sinks.alarm("Loss spike", "it rose; lower optim.lr", window=12)
    if "artifact" in extra:
        (folder / "model").mkdir()
        (folder / "model" / "classes.json").write_text("{}")
        sinks.artifact(folder / "model", metadata={"AP": 0.5})
    assert accelerator.is_main_process == (getattr(sinks, "wandb", None) is not None)
    assert sinks.wandb_run_id is None, "offline, which nobody can go on with"
    sinks.close(True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
