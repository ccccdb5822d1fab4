"""Draw a run that overfits: the loss of validation and of training images, measured the same way, AP, and where early
stopping ended it.

    python benchmarks/plot_overfit.py runs/NAME/metrics.jsonl --stopped 1036 --out overfit.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path)
    parser.add_argument("--stopped", type=int, required=True, help="window after which early stopping ended the run")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = [r for r in map(json.loads, args.metrics.read_text().splitlines()) if "val/loss" in r]
    epochs = [r["epoch"] for r in rows]
    best = min((r for r in rows if r["window"] <= args.stopped), key=lambda r: r["val/loss"])
    stop = next(r["epoch"] for r in rows if r["window"] == args.stopped)
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.axvspan(stop, epochs[-1], color="0.93", label="the same run without early stopping")
    axes.plot(epochs, [r["val/loss"] for r in rows], color="tab:red", marker=".", label="validation images")
    axes.plot(epochs, [r["val/train_loss"] for r in rows], color="tab:blue", marker=".", label="training images")
    axes.plot(best["epoch"], best["val/loss"], "*", color="black", markersize=13, label="lowest validation loss")
    axes.axvline(stop, color="black", linewidth=1, linestyle="--", label="early stopping ends the run")
    axes.set(xlabel="epoch", ylabel="loss, without augmentation and dropout", ylim=(0, None))
    right = axes.twinx()
    right.plot(epochs, [100 * r["val/AP"] for r in rows], color="tab:orange", label="validation AP (right)")
    right.set(ylabel="AP, percent", ylim=(0, 2 * 100 * max(r["val/AP"] for r in rows)))
    handles = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
