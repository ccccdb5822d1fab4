"""What watching for overfitting costs: the losses of both splits at each evaluation, as a share of the run's time.

    python benchmarks/overfit_cost.py --out benchmarks/results/overfit_cost.json
    python benchmarks/overfit_cost.py --recipe benchmarks/bccd_detr.yaml data.root=... --out ...

Trains some windows, evaluates once, and times inside that evaluation the matching and losses on the validation images
and the pass over training images. The share is of everything between two evaluations, the evaluation included.
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
from detr_accel.monitor import Silent  # noqa: E402
from detr_accel.train import parts, resuming  # noqa: E402
from detr_accel.train.launch import make_accelerator  # noqa: E402
from detr_accel.train.set_loss import SetLoss  # noqa: E402
from detr_accel.train.stopping import StopSignal  # noqa: E402
from detr_accel.train.validation import Validation  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default=str(ROOT / "recipes" / "detr_shapes.yaml"))
    parser.add_argument("--windows", type=int, default=30)
    parser.add_argument("--out", type=Path, required=True)
    args, overrides = parser.parse_known_args()
    recipe = recipes.load(args.recipe, [*overrides, "log.wandb.enabled=false"])
    built = parts.build(recipe, make_accelerator("no", "cpu"), data.build(recipe), resume=False)
    parts.prepare(built)
    seconds = train(built, args.windows)
    found = evaluate(built)
    every = max(1, round(recipe.evaluate.every_epochs * built.length.per_epoch))
    between = every * statistics.median(seconds) + found["evaluation_seconds"]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    result = {
        "command": " ".join(sys.argv), "commit": commit.strip(), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "window_seconds": statistics.median(seconds),
        "windows_between_evaluations": every, **found,
        "share_of_the_time": (found["validation_loss_seconds"] + found["train_loss_seconds"]) / between,
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def train(built: parts.Parts, num_windows: int) -> list[float]:
    """Seconds of each window after the first three, the wait for data included."""
    windows = data.train_windows(
        built.recipe, built.splits.train, rank=0, num_ranks=1, start_window=0, end_window=num_windows,
        mean=built.bare.mean, std=built.bare.std, micro=built.recipe.batch.micro,
    )  # fmt: skip
    seconds, begun = [], time.perf_counter()
    for batches in windows:
        built.optimizer.zero_grad(set_to_none=True)
        built.runner.run(batches)
        built.prepared.step()
        seconds.append(time.perf_counter() - begun)
        begun = time.perf_counter()
    return seconds[3:]


def evaluate(built: parts.Parts) -> dict[str, float]:
    """One evaluation as the loop makes it, and the seconds spent in its parts."""
    spent, plain = {"validation": 0.0}, SetLoss.add
    validate = Validation(built, Silent())
    passes = validate._train_loss

    def timed_add(self, outputs, batch) -> None:
        begun = time.perf_counter()
        plain(self, outputs, batch)
        spent["validation"] += time.perf_counter() - begun

    def timed_pass() -> dict[str, float]:
        before, begun = spent["validation"], time.perf_counter()
        values = passes()
        spent["train"], spent["validation"] = time.perf_counter() - begun, before
        return values

    SetLoss.add, validate._train_loss = timed_add, timed_pass
    state, begun = resuming.fresh_state(built), time.perf_counter()
    validate(state, StopSignal())
    whole = time.perf_counter() - begun
    SetLoss.add = plain
    return {
        "evaluation_seconds": whole, "validation_images": len(built.splits.val),
        "training_images": len(validate.trained), "validation_loss_seconds": spent["validation"],
        "train_loss_seconds": spent["train"],
    }  # fmt: skip


if __name__ == "__main__":
    main()
