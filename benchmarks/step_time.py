"""Time, peak memory and device reads of one training step of DETR-R101: this toolkit against facebookresearch/detr.

    git clone https://github.com/facebookresearch/detr reference     # bring it yourself; nothing of it is copied here
    python benchmarks/step_time.py --reference reference --out benchmarks/results/step_time.json

A step is what trains: forward, matching, losses, backward, clipping at 0.1, AdamW; batch 2 of 480 x 640, 91 classes, 7
boxes an image, random weights with frozen norms, dropout 0.1, two threads. The reference runs through its own
``engine.train_one_epoch``, ours through ``WindowRunner``. Every variant is a process of its own, all alive at once;
they take turns, one step each, ``--turns`` times after one step of warm-up, so that a slow minute of a shared machine
slows all of them. A variant's figure is the median of its steps; a ratio is the median over turns of the ratio within
a turn.
Peak memory is the operating system's figure for the process (VmHWM), its share before the first step taken away in
``step_gib``. Reads of the device inside AdamW are left out on both sides: its step counters live on the host.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from device_reads import CountReads
from hardware import hardware

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
        groups, lr=o.lr, lr_backbone=o.lr_backbone, weight_decay=o.weight_decay, betas=o.betas, eps=o.eps, fused=True
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


def serve(variant: str, reference: Path | None) -> None:
    """One process: each line on stdin asks for a step, each line on stdout gives its seconds; ``reads`` asks for the
    device reads and the memory, and ends."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    torch.manual_seed(0)
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed stays out of the answers
    found: dict = {}

    def marks():
        found["start_gib"] = peak_gib()
        for line in sys.stdin:
            if line.strip() == "reads":
                break
            start = time.perf_counter()
            yield
            print(time.perf_counter() - start, file=answers, flush=True)
        found["peak_gib"] = peak_gib()
        with CountReads(moves=False) as mode:
            found["mode"] = mode
            yield
        found["reads"] = len(found.pop("mode").reads)
        print(json.dumps(found), file=answers, flush=True)

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


def summarise(seconds: dict[str, list[float]], found: dict[str, dict]) -> dict:
    rows = {}
    for variant, mine in seconds.items():
        rows[variant] = {
            "seconds": statistics.median(mine),
            "spread_seconds": [min(mine), max(mine)],
            "peak_gib": found[variant]["peak_gib"],
            "step_gib": found[variant]["peak_gib"] - found[variant]["start_gib"],
            "reads": found[variant]["reads"],
        }
        if "reference" in seconds:
            ratios = [a / b for a, b in zip(mine, seconds["reference"], strict=True)]
            rows[variant] |= {
                "time_ratio": statistics.median(ratios),
                "time_ratios": [min(ratios), max(ratios)],
                "memory_ratio": rows[variant]["peak_gib"] / found["reference"]["peak_gib"],
                "step_memory_ratio": rows[variant]["step_gib"]
                / (found["reference"]["peak_gib"] - found["reference"]["start_gib"]),
            }
    return rows


def table(rows: dict) -> str:
    lines = [
        "| variant | s/step (range) | time (range) | peak GiB | memory | of the step alone | device reads |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, r in rows.items():
        low, high = r["spread_seconds"]
        ratios = "{:.2f}-{:.2f}".format(*r["time_ratios"]) if "time_ratios" in r else "-"
        lines.append(
            f"| {name} | {r['seconds']:.2f} ({low:.2f}-{high:.2f}) | {r.get('time_ratio', 1):.2f}x ({ratios}) | "
            f"{r['peak_gib']:.2f} | {r.get('memory_ratio', 1):.2f}x | {r['step_gib']:.2f} GiB, "
            f"{r.get('step_memory_ratio', 1):.2f}x | {r['reads']} |"
        )
    return "\n".join(lines)


def take_turns(variants: list[str], reference: Path | None, turns: int) -> tuple[dict[str, list[float]], dict]:
    workers = {}
    for variant in variants:
        command = [sys.executable, __file__, "--one", variant]
        command += ["--reference", str(reference.resolve())] if reference else []
        workers[variant] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(variant: str, word: str) -> str:
        worker = workers[variant]
        try:
            print(word, file=worker.stdin, flush=True)
            answer = worker.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return answer or sys.exit(f"{variant} ended with code {worker.wait()}; its own words are above")

    seconds: dict[str, list[float]] = {v: [] for v in variants}
    try:
        for turn in range(turns + 1):  # one to warm up
            for variant in variants if turn % 2 == 0 else reversed(variants):
                took = float(ask(variant, "step"))
                if turn:
                    seconds[variant].append(took)
            print(f"turn {turn}: " + ", ".join(f"{v} {s[-1]:.2f} s" for v, s in seconds.items() if s), file=sys.stderr)
        return seconds, {v: json.loads(ask(v, "reads")) for v in variants}
    finally:
        for worker in workers.values():
            worker.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="checkout of facebookresearch/detr; left out: ours alone")
    parser.add_argument("--turns", type=int, default=10, help="timed steps of each variant")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=list(VARIANTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        serve(args.one, args.reference)
        return
    variants = [v for v in VARIANTS if v != "reference" or args.reference]
    seconds, found = take_turns(variants, args.reference, args.turns)
    rows = summarise(seconds, found)
    print(table(rows))
    if args.out:
        content = {"command": " ".join(sys.argv), **hardware(), "threads": 2, "variants": rows, "seconds": seconds}
        args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
