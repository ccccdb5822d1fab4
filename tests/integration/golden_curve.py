"""The first 20 losses of RECIPES, kept in golden_shapes.json. Make them anew after a change of numbers:

python tests/integration/golden_curve.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from detr_accel.recipe import folder, load
from detr_accel.train.loop import train

GOLDEN = Path(__file__).with_name("golden_shapes.json")
RECIPES = ("shapes.yaml", "detr_shapes.yaml")
STEPS = 20
# what the curve does not depend on is made small: the validation split, the tracker, the number of loader processes
QUICK = [
    "schedule.epochs=1", f"schedule.steps={STEPS}", "log.every=1", "log.wandb.enabled=false", "data.shapes.num_val=1",
    "data.workers=0", "device=cpu", "precision=no",
]  # fmt: skip


def curve(recipe: str, runs: Path) -> list[float]:
    """The loss of each of the first windows, before its update."""
    recipe = load(folder() / recipe, [*QUICK, "name=golden"])
    rows = (train(recipe, runs=runs) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["train/loss"] for row in map(json.loads, rows) if "train/loss" in row]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        found = {recipe: curve(recipe, Path(place) / recipe) for recipe in RECIPES}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {GOLDEN}")
