"""AP and latency with fewer decoder layers: what `--decoder-layers N` of eval and predict saves and costs.

    python benchmarks/decoder_layers.py runs/detr_shapes --out benchmarks/results/decoder_layers.json

AP is the run's own, on its validation split. Latency is a forward of one image, in turns of all numbers of layers, for
the run's model at its evaluation size and for DETR-R101 (random weights) at 480 x 640: medians, and ratios to all
layers.
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

from detr_accel import models, recipe  # noqa: E402
from detr_accel.infer import detector, evaluation  # noqa: E402


def latencies_ms(make, height: int, width: int, turns: int) -> dict[int, float]:
    """Number of decoder layers -> median milliseconds of a forward of one image.

    Args:
        make: a function from a number of layers (None: all) to a model.
    """
    whole = make(None)
    total = whole.num_decoder_layers
    nets = {n: make(n) for n in range(1, total)} | {total: whole}
    image, mask = torch.randn(1, 3, height, width), torch.zeros(1, height, width, dtype=torch.bool)
    taken: dict[int, list[float]] = {n: [] for n in nets}
    with torch.inference_mode():
        for turn in range(turns + 1):
            for n, net in nets.items():
                begun = time.perf_counter()
                net(image, mask)
                taken[n] += [1e3 * (time.perf_counter() - begun)] if turn else []
    return {n: statistics.median(values) for n, values in taken.items()}


def large(num_layers: int | None):
    loaded = recipe.load(ROOT / "recipes" / "detr_r101_coco.yaml", ["data.root=/x"])
    torch.manual_seed(0)
    model = models.build(loaded, 91, load_weights=False).eval()
    return model if num_layers is None else models.keep_decoder_layers(model, num_layers)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    loaded = detector.load(args.run)
    size = loaded.recipe.data.eval_size
    own = latencies_ms(lambda n: detector.load(args.run, decoder_layers=n).model, size, size, args.turns)
    ap = {}
    for n in own:
        metrics, _ = evaluation.evaluate_checkpoint(args.run, decoder_layers=n, quiet=True)
        ap[n] = {name: metrics.values[name] for name in ("AP", "AP50")}
    r101 = latencies_ms(large, 480, 640, max(4, args.turns // 3))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    result = {
        "command": " ".join(sys.argv), "commit": commit.strip(), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "run": str(args.run), "metrics": ap, "latency_ms": own,
        "latency_ratio": {n: ms / own[max(own)] for n, ms in own.items()},
        "detr_r101_latency_ms": r101, "detr_r101_latency_ratio": {n: ms / r101[max(r101)] for n, ms in r101.items()},
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
