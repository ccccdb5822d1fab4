"""What each stronger augmentation costs a loader process, against DETR's policy alone in the same turns.

    python benchmarks/augment_cost.py --data ../shared/data/coco_free --out benchmarks/results/augment_cost.json

CPU time of one thread for each image of a window of 16, every augmentation on every image: planning, to a normalised
batch (CPU machines), and what a worker does where a GPU works on the pixels. The first turn is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from detr_accel import data  # noqa: E402
from detr_accel import recipe as recipes  # noqa: E402
from detr_accel.data.collate import make_batch, plan_batch  # noqa: E402

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAMES = ["none", "photometric", "zoom_out", "iou_crop", "large_scale_jitter", "mosaic", "mixup"]
WHAT = ("plan", "batch on the CPU", "decoded for a GPU")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="a COCO folder")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    seconds = {name: {what: [] for what in WHAT} for name in NAMES}
    for turn in range(args.turns + 1):
        for name in NAMES:
            for what, value in measure(args.data, name, args.windows, turn).items():
                seconds[name][what] += [value] * (turn > 0)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    result = {
        "command": " ".join(sys.argv), "commit": commit.strip(), "torch": torch.__version__, "turns": args.turns,
        "milliseconds_an_image": {n: {w: spread(v) for w, v in of.items()} for n, of in seconds.items()},
        "ratio_to_none": {n: {w: ratio(v, seconds["none"][w]) for w, v in of.items()} for n, of in seconds.items()},
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["ratio_to_none"], indent=1))


def measure(root: str, name: str, windows: int, seed: int) -> dict[str, float]:
    """Seconds an image."""
    augment = {} if name == "none" else {name: {"probability": 1.0}}
    recipe = recipes.Recipe.model_validate({"seed": seed, "data": {"root": root, "augment": augment}})
    source = data.build(recipe).train
    at = [time.process_time()]
    tasks = list(data._tasks(recipe, source, recipe.batch.size, 0, 1, 0, windows))
    at.append(time.process_time())
    for make in (make_batch, plan_batch):
        for task in tasks:
            make(source, task, MEAN, STD)
        at.append(time.process_time())
    num_images = sum(len(task.plans) for task in tasks)
    return {what: (after - before) / num_images for what, before, after in zip(WHAT, at, at[1:], strict=False)}


def spread(values: list[float]) -> dict[str, float]:
    ms = [1000 * v for v in values]
    return {"median": statistics.median(ms), "least": min(ms), "most": max(ms)}


def ratio(values: list[float], reference: list[float]) -> float:
    return statistics.median(v / r for v, r in zip(values, reference, strict=True))


if __name__ == "__main__":
    main()
