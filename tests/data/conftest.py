"""Small COCO folders, written as other programs write them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr_accel.recipe import Recipe

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}]  # gaps, and not in order


def image_bytes(number: int, size_px=(20, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size_px, 3), dtype=np.uint8))


@pytest.fixture
def write_split():
    """Write images and their json; returns the tree, whose records a test may spoil and write again."""

    def write(json_path: Path, images: Path, num: int, *, first=1, prefix="", ext="png", categories=None) -> dict:
        images.mkdir(parents=True, exist_ok=True)
        json_path.parent.mkdir(parents=True, exist_ok=True)
        tree = {"images": [], "annotations": [], "categories": categories or CATEGORIES}
        for i in range(first, first + num):
            image_bytes(i).save(images / f"im{i}.{ext}")
            tree["images"].append({"id": i, "file_name": f"{prefix}im{i}.{ext}", "height": 20, "width": 30})
            for k in range(i % 3):  # every third image is empty
                row = {"id": 10 * i + k, "image_id": i, "category_id": (2, 7)[k], "bbox": [3 * k + 1, 2, 9, 8 + i % 5]}
                tree["annotations"].append(row | {"area": 50.0, "iscrowd": 0})
        json_path.write_text(json.dumps(tree))
        return tree

    return write


@pytest.fixture
def recipe_for():
    """A recipe of a folder, sizes small."""

    def make(root: Path | None = None, **data) -> Recipe:
        augment = {"scales": [24, 32, 40], "max_size": 64, "crop_scales": [28, 36], "crop_size": (16, 30)}
        where = {"root": str(root)} if root is not None else {"format": "shapes", "shapes": {"image_size": 64}}
        base = {"workers": 0, "eval_size": 32, "eval_max_size": 64, "augment": augment}
        return Recipe.model_validate({"data": base | where | data, "batch": {"size": 8, "micro": 2}, "seed": 5})

    return make


@pytest.fixture
def hub_coco(tmp_path, write_split, monkeypatch):
    """Write a COCO folder that Hugging Face data sets are made of; their cache is the test's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def write(num_train: int, num_val: int) -> Path:
        kinds = [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
        for split, first, num in (("train", 1, num_train), ("val", 101, num_val)):
            path = tmp_path / f"coco/annotations/instances_{split}.json"
            tree = write_split(path, tmp_path / "coco" / split, num, first=first, ext="jpg", categories=kinds)
            for row in tree["annotations"]:
                row["category_id"] //= 7
                row["iscrowd"] = int(row["image_id"] == 5 and row["category_id"])
            path.write_text(json.dumps(tree))
        return tmp_path / "coco"

    return write
