"""How many loader processes are best on a CPU that also trains, and what the clock of the sections costs there.

    OMP_NUM_THREADS=2 python benchmarks/loader_workers.py --out benchmarks/results/loader_workers.json
    python benchmarks/loader_workers.py --recipe R.yaml data.root=... --out ...

Rounds of some windows with 0, 1 and 2 loader processes in turn, so that a busy machine is busy for all alike. Of each
the fastest and the median round count.
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
from detr_accel.monitor.stopwatch import Stopwatch  # noqa: E402
from detr_accel.train import parts  # noqa: E402
from detr_accel.train.launch import make_accelerator  # noqa: E402

WORKERS, WARM = (0, 1, 2), 2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default=str(ROOT / "recipes" / "detr_shapes.yaml"))
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    args, overrides = parser.parse_known_args()
    recipe = recipes.load(args.recipe, [*overrides, "log.wandb.enabled=false", "data.prefetch=auto"])
    built = parts.build(recipe, make_accelerator("no", "cpu"), data.build(recipe), resume=False)
    parts.prepare(built)
    rounds = {count: [] for count in WORKERS}
    for number in range(args.rounds):
        for count in WORKERS:
            rounds[count].append(round_of(built, count, args.windows, number))
    per_window = section_cost() * sections(built)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    result = {
        "command": " ".join(sys.argv), "commit": commit.strip(), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "windows": args.windows, "rounds": args.rounds,
        "seconds_per_window": {c: {"fastest": min(s), "median": statistics.median(s)} for c, s in rounds.items()},
        "clock_seconds_per_window": per_window, "clock_share": per_window / min(min(s) for s in rounds.values()),
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def round_of(built: parts.Parts, count: int, num_windows: int, number: int) -> float:
    """Seconds of a window, the wait for data included; the same windows for each count."""
    micro, start = built.recipe.batch.micro, number * num_windows
    by, _ = data.loading(built.recipe, built.splits.train, micro=micro, num_ranks=1, device="cpu", count=count)
    windows = data.train_windows(
        built.recipe, built.splits.train, rank=0, num_ranks=1, start_window=start, end_window=start + num_windows,
        mean=built.bare.mean, std=built.bare.std, micro=micro, by=by,
    )  # fmt: skip
    begun = 0.0
    for done, batches in enumerate(windows):
        if done == WARM:
            begun = time.perf_counter()
        built.optimizer.zero_grad(set_to_none=True)
        built.runner.run(batches)
        built.prepared.step()
    return (time.perf_counter() - begun) / (num_windows - WARM)


def sections(built: parts.Parts) -> int:
    """In a window of the training."""
    share = -(-built.recipe.batch.size // built.recipe.batch.micro)
    return 5 * share + 4  # copy, forward, loss, matcher, backward; wait, twice reduce, optimizer


def section_cost() -> float:
    """Seconds of one section of the clock."""
    clock = Stopwatch(torch.device("cpu"), wait=False, rest="other")
    times = []
    for _ in range(20):
        begun = time.perf_counter()
        for _ in range(500):
            with clock.section("a"):
                pass
        times.append((time.perf_counter() - begun) / 500)
    return statistics.median(times)


if __name__ == "__main__":
    main()
