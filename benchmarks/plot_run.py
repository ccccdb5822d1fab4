"""Draw a run: training loss and validation AP50 over windows.

python benchmarks/plot_run.py runs/NAME/metrics.jsonl --out run.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("metrics", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.metrics.read_text().splitlines()]
    train = [(r["window"], r["train/loss"]) for r in rows if "train/loss" in r]
    val = [(r["window"], 100 * r["val/AP50"]) for r in rows if "val/AP50" in r]
    figure, left = plt.subplots(figsize=(8, 4), layout="constrained")
    left.plot(*zip(*train, strict=True), color="tab:blue", label="training loss (left)")
    left.set(xlabel="window", ylabel="loss, sum of all terms", ylim=(0, None))
    right = left.twinx()
    right.plot(*zip(*val, strict=True), color="tab:orange", marker="o", label="validation AP50 (right)")
    right.set(ylabel="AP50, percent", ylim=(0, max(5.0, 1.2 * max(v for _, v in val))))
    figure.legend(loc="upper right", bbox_to_anchor=(0.92, 0.95))
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
