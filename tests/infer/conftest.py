"""A small detector with random weights, saved as a run, and COCO folders of shapes for it to look at."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from detr_accel import models
from detr_accel import recipe as recipes
from detr_accel.data.shapes import CLASSES, ShapesSource
from detr_accel.models import weights

META = {
    "weights": "ema", "metric": "AP", "metrics": {"AP": 0.25}, "window": 12, "step": 12, "metrics_window": 12,
    "threshold": 0.4,
}  # fmt: skip
RECIPE = """
name: small
data: {{format: coco, root: "{root}", eval_size: 64, eval_max_size: 96, workers: 0, val_fraction: 0.3}}
model:
  backbone: {{name: resnet10t, weights: none}}
  hidden_dim: 32
  num_heads: 4
  num_encoder_layers: 1
  num_decoder_layers: 3
  dim_feedforward: 32
  num_queries: 60
evaluate: {{batch: 2}}
"""


@pytest.fixture(scope="session")
def state():
    """Weights whose scores are spread and whose boxes differ from query to query."""
    torch.manual_seed(0)
    model = models.build(recipes.loads(RECIPE.format(root="/data")), len(CLASSES))
    with torch.no_grad():
        model.class_embed.weight.mul_(30)
        model.query_embed.weight.mul_(3)
        model.bbox_embed.layers[-1].weight.mul_(5)
    return model.state_dict()


@pytest.fixture
def make_run(tmp_path, state):
    """``make_run(root, **meta)``: a run with one checkpoint; returns the checkpoint's folder."""

    def make(root="/data", changes="", split=None, **meta) -> Path:
        checkpoints = tmp_path / "run" / "checkpoints"
        text = recipes.dumps(recipes.loads(RECIPE.format(root=root) + changes))
        weights.save(checkpoints / "window-00000012", state, text, CLASSES, META | meta, split)
        (checkpoints / "best").symlink_to("window-00000012")
        return checkpoints / "window-00000012"

    return make


def _coco(folder: Path, num_images: int, *, split: str = "", categories=None) -> Path:
    """Shapes as files under ``folder``; one json that names ``split``, or none. Existing images are kept."""
    source = ShapesSource(1, "val", num_images, 64)
    truth = source.ground_truth()
    images = folder / split if split else folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for i, record in enumerate(truth["images"]):
        record["file_name"] = f"{i}.png"
        Image.fromarray(source.sample(i).image).save(images / record["file_name"])
    if categories is not None:
        of_old = {c["id"]: new["id"] for c, new in zip(truth["categories"], categories, strict=False)}
        truth["categories"] = categories
        for annotation in truth["annotations"]:
            annotation["category_id"] = of_old[annotation["category_id"]]
    name = f"{split}/_annotations.coco.json" if split else "labels.json"
    (folder / name).write_text(json.dumps(truth))
    return folder


@pytest.fixture
def make_coco():
    return _coco
