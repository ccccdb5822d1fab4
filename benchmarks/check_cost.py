"""What always looking for poison costs: remembering and checking running statistics, and judging the window.

    python benchmarks/check_cost.py --out benchmarks/results/check_cost.json

DETR-R101 with live norms (the costly case: frozen ones have no statistics), one step of 2 images of 480 x 640 on the
CPU, and the extra work of the same step timed by itself, in turns; figures are medians. The gradient norm is not
counted: clipping needs it anyway. Nothing here reads the device: the results ride on the one read of the window.
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

from accelerate import Accelerator  # noqa: E402

from detr_accel import models, recipe  # noqa: E402
from detr_accel.structures import Batch, Targets  # noqa: E402
from detr_accel.train.health import Health, HealthState  # noqa: E402
from detr_accel.train.window import WindowRunner  # noqa: E402

HEIGHT, WIDTH, NUM_CLASSES, NUM_BOXES, BATCH = 480, 640, 91, 7, 2


def window() -> list[Batch]:
    gen = torch.Generator().manual_seed(1)
    size = (HEIGHT, WIDTH)
    targets = [
        Targets(
            i,
            torch.randint(0, NUM_CLASSES, (NUM_BOXES,)),
            torch.rand(NUM_BOXES, 4, generator=gen) * 0.3 + 0.3,
            size,
            size,
        )
        for i in range(BATCH)
    ]
    images = torch.randn(BATCH, 3, HEIGHT, WIDTH, generator=gen)
    return [Batch(images, torch.zeros(BATCH, HEIGHT, WIDTH, dtype=torch.bool), targets, tuple(range(BATCH)))]


def timed(action) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    loaded = recipe.load(ROOT / "recipes" / "detr_r101_coco.yaml", ["data.root=/x", "model.backbone.weights=none"])
    model = models.build(loaded, NUM_CLASSES)
    criterion, groups = models.build_criterion(loaded, NUM_CLASSES), models.param_groups(model)
    accelerator = Accelerator(cpu=True)
    runner = WindowRunner(accelerator, model, criterion, groups, loss_names=criterion.loss_names(6), seed=0)
    policy = Health("skip", strikes=3, within=200, lr_factor=0.5, give_up_after=50, overflow_patience=50)
    state, batches = HealthState(), window()

    def checks(result) -> None:
        runner.forward_state.remember()
        runner.forward_state.health(accelerator.device)
        policy.judge(state, result, 1, scaler=False, precision="no", images=[])

    steps, extra = [], []
    for turn in range(args.turns + 1):
        kept = []
        step = timed(lambda kept=kept: kept.append(runner.run(batches)))
        cost = timed(lambda kept=kept: checks(kept[0]))
        runner.discard()
        if turn:
            steps.append(step)
            extra.append(cost)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    result = {
        "command": " ".join(sys.argv), "commit": commit.strip(), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "step_seconds": statistics.median(steps),
        "check_seconds": statistics.median(extra), "check_spread_seconds": [min(extra), max(extra)],
        "share_of_step": statistics.median(extra) / statistics.median(steps),
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
