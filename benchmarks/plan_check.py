"""What ``detr-accel plan`` says a step holds in memory, against what torch.profiler sees the same step hold.

    python benchmarks/plan_check.py --out benchmarks/results/plan_check.json

Four detectors at three sizes, float32 on the CPU, one window of two micro-batches, square canvases, as many boxes an
image as there are queries, random weights (the plan needs none): the window, clipping, AdamW's step and the average, as
the loop runs them; evaluation is left out on both sides. "Measured" is the highest running total of the allocator's
events (``profile_memory=True``, from before the model is built). "Resident" is the operating system's high-water mark
in a second run, in a process of its own and without the profiler, the imported libraries included; "libraries" is what
of it was there before. Levers are checked on each detector's largest size.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402

from detr_accel import data, models  # noqa: E402
from detr_accel import recipe as recipes  # noqa: E402
from detr_accel.monitor import memory  # noqa: E402
from detr_accel.structures import Batch, Targets  # noqa: E402
from detr_accel.train import dry_step, plan  # noqa: E402
from detr_accel.train.ema import Ema  # noqa: E402
from detr_accel.train.optim import allocate_state, build_optimizer  # noqa: E402
from detr_accel.train.window import WindowRunner  # noqa: E402


def window(demands: data.Demands, micro: int, count: int) -> list[Batch]:
    """``count`` micro-batches on the worst canvas, with the most boxes."""
    gen, size = torch.Generator().manual_seed(1), demands.canvas_px
    batches = []
    for _ in range(count):
        targets = [
            Targets(
                i, torch.randint(0, demands.num_classes, (demands.most_boxes,), generator=gen),
                torch.rand(demands.most_boxes, 4, generator=gen) * 0.3 + 0.3, size, size,
            )
            for i in range(micro)
        ]  # fmt: skip
        images = torch.randn(micro, 3, *size, generator=gen)
        batches.append(Batch(images, torch.zeros(micro, *size, dtype=torch.bool), targets, tuple(range(micro))))
    return batches


class Marks:
    """Stands where the run measures its phases, and writes them into the profiler's trace."""

    def begin(self, name: str) -> None:
        with torch.profiler.record_function(f"moment/{name}"):
            pass


def train_one_window(recipe: recipes.Recipe, demands: data.Demands, micro: int, marks: Marks) -> None:
    """What the loop does with a window, from building the detector to the average."""
    torch.manual_seed(0)
    AcceleratorState._reset_state(reset_partial_state=True)  # it is one for a process, and keeps its precision
    accelerator = Accelerator(cpu=True, mixed_precision=recipe.precision or "no")
    model = models.build(recipe, demands.num_classes, load_weights=False)
    criterion, groups, o = models.build_criterion(recipe, demands.num_classes), models.param_groups(model), recipe.optim
    optimizer = build_optimizer(
        groups, lr=o.lr, lr_backbone=o.lr_backbone, weight_decay=o.weight_decay, betas=o.betas, eps=o.eps, fused=True
    )
    allocate_state(optimizer)
    ema = Ema(model, recipe.ema.decay, recipe.ema.warmup_steps) if recipe.ema.enabled else None
    names = criterion.loss_names(recipe.model.num_decoder_layers)
    runner = WindowRunner(accelerator, model, criterion, groups, loss_names=names, seed=0)
    runner.phases = marks
    runner.model = accelerator.prepare_model(model, evaluation_mode=True)
    batches = window(demands, micro, recipe.batch.size // micro)
    result = runner.run(batches)
    marks.begin("optimizer")
    runner.clip(result, o.clip_norm, None)
    optimizer.step()
    if ema is not None:
        ema.update(model)


def live_bytes(recipe: recipes.Recipe, demands: data.Demands, micro: int) -> dict[str, int]:
    """The profiler's peak of live bytes in each moment of a step, and "all": over the step."""
    gc.collect()  # what an earlier step left must not be freed in this one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
            train_one_window(recipe, demands, micro, Marks())
            gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    events = [e for e in events if e.get("name") == "[memory]" or str(e.get("name")).startswith("moment/")]
    moment, held, peaks = None, 0, {}
    for event in sorted(events, key=lambda e: e["ts"]):
        if event["name"] == "[memory]":
            held += event["args"]["Bytes"]
        else:
            moment = event["name"].removeprefix("moment/")
        if moment is not None:
            peaks[moment] = max(peaks.get(moment, 0), held)
    return peaks | {"all": max(peaks.values())}


def resident_bytes(recipe: recipes.Recipe, demands: data.Demands, micro: int) -> tuple[int, int]:
    """The same window by the operating system's count: before the model is built, and at the most."""
    before = memory.start_peak(torch.device("cpu"))
    train_one_window(recipe, demands, micro, Marks())
    return before, memory.peak_bytes(torch.device("cpu"))


# --- the detectors


MICRO = 1
RECIPES = {
    "shapes' DETR": ("detr_shapes", (128, 256, 384), ["data.shapes.num_train=40", "data.shapes.num_val=4"]),
    "DETR, tf_efficientnet_lite0 with live norms": (
        "detr_r101_coco", (320, 480, 640),
        ["model.backbone.name=tf_efficientnet_lite0", "model.backbone.weights=none", "ema.enabled=true"],
    ),
    "DETR-R101": ("detr_r101_coco", (320, 480, 640), []),
    "RT-DETR-R50": (
        "detr_r101_coco", (320, 480, 640),
        ["model.name=rtdetr", "model.backbone.name=resnet50d.ra2_in1k", "ema.enabled=true"],
    ),
}  # fmt: skip


def load(name: str, size: int, settings: list[str]) -> tuple[recipes.Recipe, data.Demands]:
    stem, _, own = RECIPES[name]
    fixed = [f"batch.size={2 * MICRO}", f"batch.micro={MICRO}", "device=cpu"]
    fixed += ["data.root=nowhere"] if "coco" in stem else []  # procedural shapes read no files
    fixed += [f"data.augment.{key}" for key in (f"max_size={size}", f"scales=[{size}]", "crop=0")]
    recipe = recipes.load(ROOT / "recipes" / f"{stem}.yaml", [*own, *fixed, *settings])
    return recipe, data.demands(recipe, data.build(recipe) if data.is_there(recipe) else None)


def planned_bytes(peaks: dry_step.Peaks) -> dict[str, int]:
    """In the measurement's moments: losses are a part of forward there."""
    moments = {m: peaks.moments[m] for m in ("backward", "optimizer")}
    moments["forward"] = max(peaks.moments["forward"], peaks.moments["losses"])
    return moments | {"all": max(moments.values())}


def planned(name: str, size: int, settings: list[str]) -> dict:
    recipe, demands = load(name, size, settings)
    begun = time.process_time()
    peaks = dry_step.run(recipe, demands, MICRO, dry_step.Layout(1, False, recipe.precision or "no"))
    return planned_bytes(peaks) | {"cpu_seconds": time.process_time() - begun}


def measured(name: str, size: int, settings: list[str]) -> dict:
    return live_bytes(*load(name, size, settings), MICRO)


def resident(name: str, size: int) -> list[int]:
    command = [sys.executable, __file__, "--resident", name, str(size)]
    done = subprocess.run(command, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else sys.exit(done.stderr[-3000:])


def check_sizes(name: str) -> list[dict]:
    rows = []
    for size in RECIPES[name][1]:
        said, seen, (before, most) = planned(name, size, []), measured(name, size, []), resident(name, size)
        rows.append(
            {
                "size_px": size, "planned_bytes": said["all"], "measured_bytes": seen["all"],
                "ratio": said["all"] / seen["all"], "planned_moments": said, "measured_moments": seen,
                "resident_bytes": most, "libraries_bytes": before,
            }
        )  # fmt: skip
        print(name, rows[-1], file=sys.stderr)
    return rows


def check_levers(name: str) -> list[dict]:
    """Every lever that the plan offers, on the largest size."""
    size = RECIPES[name][1][-1]
    offered = plan.plan(load(name, size, [])[0], 2**40, device="cpu").levers
    rows, plain_said, plain_seen = [], planned(name, size, [])["all"], measured(name, size, [])["all"]
    for setting in [x.setting for x in offered]:
        said = plain_said - planned(name, size, [setting])["all"]
        seen = plain_seen - measured(name, size, [setting])["all"]
        rows.append(
            {
                "setting": setting, "planned_bytes": said, "measured_bytes": seen,
                "ratio": said / seen if seen else None,
            }
        )  # fmt: skip
        print(name, rows[-1], file=sys.stderr)
    return rows


def table(found: dict[str, dict]) -> str:
    mib = 2**20
    lines = [
        "| detector | size | planned MiB | measured MiB | planned / measured | resident MiB (of which libraries) |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        lines += [
            f"| {name} | {r['size_px']} | {r['planned_bytes'] / mib:.1f} | {r['measured_bytes'] / mib:.1f} | "
            f"{r['ratio']:.3f} | {r['resident_bytes'] / mib:.0f} ({r['libraries_bytes'] / mib:.0f}) |"
            for r in rows["sizes"]
        ]
    lines += ["", "| detector | lever | planned saving MiB | measured saving MiB | ratio |", "|---|---|---|---|---|"]
    for name, rows in found.items():
        lines += [
            f"| {name} | `{r['setting']}` | {r['planned_bytes'] / mib:.1f} | {r['measured_bytes'] / mib:.1f} | "
            f"{'-' if r['ratio'] is None else format(r['ratio'], '.3f')} |"
            for r in rows["levers"]
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="json")
    parser.add_argument("--only", choices=list(RECIPES), action="append", help="detectors (default: all)")
    parser.add_argument("--resident", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.resident:
        name, size = args.resident
        print(json.dumps(resident_bytes(*load(name, int(size), []), MICRO)))
        return
    found = {n: {"sizes": check_sizes(n), "levers": check_levers(n)} for n in args.only or RECIPES}
    print(table(found))
    if args.out:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        content = {
            "command": " ".join(sys.argv), "commit": commit.stdout.strip(), "torch": torch.__version__,
            "python": platform.python_version(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "detectors": found,
        }  # fmt: skip
        args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
