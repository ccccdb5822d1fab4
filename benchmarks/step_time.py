"""Time, peak memory and device reads of one training step of DETR-R101: this toolkit against facebookresearch/detr.

    git clone https://github.com/facebookresearch/detr reference     # bring it yourself; nothing of it is copied here
    python benchmarks/step_time.py --reference reference --out benchmarks/results/step_time.json

A step is what trains: forward, matching, losses, backward, clipping at 0.1, AdamW; batch 2 of 480 x 640, 91 classes, 7
boxes an image, random weights with frozen norms, dropout 0.1, two threads. The reference runs through its own
``engine.train_one_epoch``, ours through ``WindowRunner``. Every measurement is a process of its own; the variants take
turns, ``--rounds`` times: a noisy machine slows all of them. A variant's figure is the median over rounds of the
median step after one step of warm-up; a ratio is the median over rounds of the ratio within a round. Peak memory is
the operating system's figure for the process (VmHWM), its share before the first step taken away in ``step_gib``.
Reads of the device inside AdamW are left out on both sides: its step counters live on the host.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from device_reads import CountReads

ROOT = Path(__file__).resolve().parents[1]
BATCH, HEIGHT, WIDTH, NUM_CLASSES, NUM_BOXES = 2, 480, 640, 91, 7
VARIANTS = {
    "reference": None,
    "ours": [],
    "ours, checkpointing": ["backbone", "encoder", "decoder"],
    "ours, checkpointing the backbone": ["backbone"],
}


def inputs() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    gen = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, HEIGHT, WIDTH, generator=gen)
    mask = torch.zeros(BATCH, HEIGHT, WIDTH, dtype=torch.bool)
    mask[1, :, WIDTH - 40 :] = True
    images[1, :, :, WIDTH - 40 :] = 0
    boxes = [torch.rand(NUM_BOXES, 4, generator=gen) * 0.3 + 0.3 for _ in range(BATCH)]
    labels = [torch.randint(0, NUM_CLASSES, (NUM_BOXES,), generator=gen) for _ in range(BATCH)]
    return images, mask, boxes, labels


def run_reference(folder: Path, marks) -> None:
    """``marks`` yields once a step; what stands between two yields is the step."""
    sys.path.insert(0, str(folder))
    import engine
    import models.backbone
    from models import build_model
    from util.misc import NestedTensor

    models.backbone.is_main_process = lambda: False  # so that no weights are downloaded
    options = argparse.Namespace(
        dataset_file="coco", device="cpu", lr_backbone=1e-5, masks=False, backbone="resnet101", dilation=False,
        position_embedding="sine", hidden_dim=256, dropout=0.1, nheads=8, dim_feedforward=2048, enc_layers=6,
        dec_layers=6, pre_norm=False, num_queries=100, aux_loss=True, frozen_weights=None, set_cost_class=1,
        set_cost_bbox=5, set_cost_giou=2, bbox_loss_coef=5, giou_loss_coef=2, eos_coef=0.1,
    )  # fmt: skip
    model, criterion, _ = build_model(options)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named if "backbone" not in n]},
            {"params": [p for n, p in named if "backbone" in n], "lr": 1e-5},
        ],
        lr=1e-4,
        weight_decay=1e-4,
    )
    images, mask, boxes, labels = inputs()

    class Loader:
        def __len__(self) -> int:
            return 10**6

        def __iter__(self):
            for _ in marks:
                targets = [{"labels": x, "boxes": b} for x, b in zip(labels, boxes, strict=True)]
                yield NestedTensor(images, mask), targets

    with contextlib.redirect_stdout(io.StringIO()):
        engine.train_one_epoch(model, criterion, Loader(), optimizer, torch.device("cpu"), 0, 0.1)


def run_ours(checkpointed: list[str], marks) -> None:
    sys.path.insert(0, str(ROOT))
    from accelerate import Accelerator

    from detr_accel import models, recipe
    from detr_accel.structures import Batch, Targets
    from detr_accel.train.optim import build_optimizer
    from detr_accel.train.window import WindowRunner

    loaded = recipe.load(ROOT / "recipes" / "detr_r101_coco.yaml", ["data.root=/x"])
    loaded.model.activation_checkpointing = checkpointed
    model = models.build(loaded, NUM_CLASSES, load_weights=False)
    criterion = models.build_criterion(loaded, NUM_CLASSES)
    accelerator = Accelerator(cpu=True)
    groups = models.param_groups(model)
    o = loaded.optim
    optimizer = build_optimizer(
        groups, lr=o.lr, lr_backbone=o.lr_backbone, weight_decay=o.weight_decay, betas=o.betas, eps=o.eps
    )
    names = criterion.loss_names(loaded.model.num_decoder_layers)
    runner = WindowRunner(accelerator, model, criterion, groups, loss_names=names, seed=0)
    images, mask, boxes, labels = inputs()
    size = (HEIGHT, WIDTH)
    for _ in marks:
        targets = [Targets(i, x, b, size, size) for i, (x, b) in enumerate(zip(labels, boxes, strict=True))]
        optimizer.zero_grad(set_to_none=True)
        result = runner.run([Batch(images, mask, targets, (0, 1))])
        runner.clip(result, o.clip_norm, None)
        optimizer.step()


def peak_gib() -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**20


def measure(variant: str, reference: Path | None, steps: int) -> dict:
    """One process: times of ``steps`` steps, then the reads of one more."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    torch.manual_seed(0)
    stamps: list[float] = []
    found: dict = {}

    def marks():
        found["start_gib"] = peak_gib()
        for _ in range(steps + 1):  # one to warm up
            stamps.append(time.perf_counter())
            yield
        stamps.append(time.perf_counter())
        found["peak_gib"] = peak_gib()
        with CountReads(moves=False) as mode:
            found["mode"] = mode
            yield
        mode = found.pop("mode")
        found["reads"] = len(mode.reads)

    adamw = torch.optim.AdamW.step

    def uncounted(*args, **kwargs):
        before = len(found["mode"].reads) if "mode" in found else 0
        result = adamw(*args, **kwargs)
        if "mode" in found:
            del found["mode"].reads[before:]
        return result

    torch.optim.AdamW.step = uncounted

    if variant == "reference":
        run_reference(reference, marks())
    else:
        run_ours(VARIANTS[variant], marks())
    seconds = [b - a for a, b in zip(stamps, stamps[1:], strict=False)][1:]
    return {"seconds": statistics.median(seconds), "all_seconds": seconds, **found}


def hardware() -> dict:
    model = next((x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), "?")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return {
        "cpu": model, "cores": os.cpu_count(), "threads": 2, "python": platform.python_version(),
        "torch": torch.__version__, "commit": commit.strip(),
    }  # fmt: skip


def summarise(rounds: list[dict]) -> dict:
    rows = {}
    for variant in rounds[0]:
        mine = [r[variant] for r in rounds]
        ratios = [r[variant]["seconds"] / r["reference"]["seconds"] for r in rounds] if "reference" in rounds[0] else []
        memory = statistics.median(m["peak_gib"] for m in mine)
        rows[variant] = {
            "seconds": statistics.median(m["seconds"] for m in mine),
            "spread_seconds": [min(m["seconds"] for m in mine), max(m["seconds"] for m in mine)],
            "peak_gib": memory,
            "step_gib": statistics.median(m["peak_gib"] - m["start_gib"] for m in mine),
            "reads": mine[0]["reads"],
        }
        if ratios:
            base = statistics.median(r["reference"]["peak_gib"] for r in rounds)
            rows[variant] |= {
                "time_ratio": statistics.median(ratios),
                "time_ratios": ratios,
                "memory_ratio": memory / base,
            }
    return rows


def table(rows: dict) -> str:
    lines = ["| variant | s/step | time | peak GiB | memory | device reads |", "|---|---|---|---|---|---|"]
    for name, r in rows.items():
        lines.append(
            f"| {name} | {r['seconds']:.2f} ({r['spread_seconds'][0]:.2f}-{r['spread_seconds'][1]:.2f}) | "
            f"{r.get('time_ratio', 1):.2f}x | {r['peak_gib']:.2f} | {r.get('memory_ratio', 1):.2f}x | {r['reads']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="checkout of facebookresearch/detr; left out: ours alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="timed steps a process")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=list(VARIANTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.reference, args.steps)))
        return
    variants = [v for v in VARIANTS if v != "reference" or args.reference]
    rounds = []
    for i in range(args.rounds):
        rounds.append({})
        for variant in variants if i % 2 == 0 else reversed(variants):
            command = [sys.executable, __file__, "--one", variant, "--steps", str(args.steps)]
            command += ["--reference", str(args.reference.resolve())] if args.reference else []
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{variant} failed:\n{done.stderr[-2000:]}")
            rounds[-1][variant] = json.loads(done.stdout.splitlines()[-1])
            print(f"round {i + 1}: {variant}: {rounds[-1][variant]['seconds']:.2f} s a step", file=sys.stderr)
        rounds[-1] = {v: rounds[-1][v] for v in variants}
    rows = summarise(rounds)
    print(table(rows))
    if args.out:
        content = {"command": " ".join(sys.argv), **hardware(), "variants": rows, "rounds": rounds}
        args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
