"""What it costs to reduce gradients after the window instead of during its last backward.

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 benchmarks/reduce_cost.py \
      --out benchmarks/results/reduce_cost.json

DETR-R101, one image of 240 x 320 a process, all processes on one machine. The two ways take turns, one window each; a
figure is the median over turns, a ratio the median of the ratios within a turn. For other interconnects the time of
a reduction is reckoned: a ring sends 2 (n - 1) / n times the gradient's bytes through each process's link.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from detr_accel import models, recipe  # noqa: E402
from detr_accel.structures import Batch, Targets  # noqa: E402
from detr_accel.train.launch import make_accelerator  # noqa: E402
from detr_accel.train.window import WindowRunner  # noqa: E402

HEIGHT, WIDTH, NUM_CLASSES, NUM_BOXES = 240, 320, 91, 7
LINKS_GB_PER_S = {
    "NVLink (H100, 450)": 450, "PCIe 4 x16 (25)": 25, "100 Gbit Ethernet (12)": 12, "25 Gbit Ethernet (3)": 3,
    "10 Gbit Ethernet (1.2)": 1.2,
}  # fmt: skip


def batch(rank: int) -> Batch:
    gen = torch.Generator().manual_seed(rank)
    boxes = torch.rand(NUM_BOXES, 4, generator=gen) * 0.3 + 0.3
    labels = torch.randint(0, NUM_CLASSES, (NUM_BOXES,), generator=gen)
    size = (HEIGHT, WIDTH)
    images = torch.randn(1, 3, HEIGHT, WIDTH, generator=gen)
    return Batch(
        images, torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool), [Targets(rank, labels, boxes, size, size)], (rank,)
    )


def timed(accelerator, action) -> float:
    accelerator.wait_for_everyone()
    begun = time.perf_counter()
    action()
    accelerator.wait_for_everyone()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    accelerator = make_accelerator("no", "cpu", overlap=True)
    loaded = recipe.load(ROOT / "recipes" / "detr_r101_coco.yaml", ["data.root=/x"])
    bare = models.build(loaded, NUM_CLASSES, load_weights=False)
    criterion, groups = models.build_criterion(loaded, NUM_CLASSES), models.param_groups(bare)
    wrapped = accelerator.prepare_model(bare)
    names = criterion.loss_names(6)
    runners = {
        "after the window": WindowRunner(accelerator, bare, criterion, groups, loss_names=names, seed=0),
        "during backward": WindowRunner(
            accelerator, wrapped, criterion, groups, loss_names=names, seed=0, overlap=True
        ),
    }
    mine = [batch(accelerator.process_index)]
    seconds: dict[str, list[float]] = {name: [] for name in [*runners, "reduction alone"]}
    for turn in range(args.turns + 1):
        for name, runner in runners.items():
            bare.zero_grad(set_to_none=True)
            taken = timed(accelerator, lambda runner=runner: runner.run(mine))
            seconds[name] += [taken] if turn else []
        taken = timed(accelerator, runners["after the window"].reducer)
        seconds["reduction alone"] += [taken] if turn else []
    if accelerator.is_main_process:
        write(args.out, seconds, sum(p.numel() * 4 for rows in groups.values() for _, p in rows))


def write(out: Path, seconds: dict[str, list[float]], num_bytes: int) -> None:
    ratios = [a / b for a, b in zip(seconds["after the window"], seconds["during backward"], strict=True)]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    result = {
        "command": "accelerate launch --multi_gpu --num_processes 2 " + " ".join(sys.argv), "commit": commit.strip(),
        "torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads(),
        "gradient_mb": num_bytes / 1e6,
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "spread_seconds": {name: [min(values), max(values)] for name, values in seconds.items()},
        "after_over_during": {"median": statistics.median(ratios), "spread": [min(ratios), max(ratios)]},
        "reckoned_ms_for_8_processes": {
            link: 1e3 * 2 * 7 / 8 * num_bytes / (rate * 1e9) for link, rate in LINKS_GB_PER_S.items()
        },
    }  # fmt: skip
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
