"""Preprocessing against others: transformers' image processor in evaluation, torchvision's steps in training."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr_accel import data
from detr_accel.data.geometry import Augmentation, eval_plan, train_plan
from detr_accel.data.pixels import normalise_into, transform
from detr_accel.data.source import GEOMETRY, generator
from detr_accel.recipe import Recipe

pytestmark = [pytest.mark.parity, pytest.mark.law6]

ROOT = Path(__file__).parents[2].parent / "shared/data/coco_free"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUM_BATCHES = 8
needs_data = pytest.mark.skipif(not ROOT.is_dir(), reason=f"{ROOT} is absent")


@pytest.fixture(scope="module")
def processor():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: dev)")
    kind = getattr(transformers, "DetrImageProcessorPil", None) or transformers.DetrImageProcessor
    return kind(size={"shortest_edge": 800, "longest_edge": 1333}, image_mean=MEAN, image_std=STD)


@needs_data
def test_evaluation_equals_the_image_processor(processor):
    """Same sizes, padding, mask, boxes and labels. Pixels: 2e-6, the rounding of float32; the processor multiplies by
    1/255 where DETR and we divide by 255. Its boxes are fractions of the padded canvas, DETR's and ours of the picture:
    compared in pixels, to 1e-3."""
    recipe = Recipe.model_validate({"data": {"root": str(ROOT), "workers": 0}, "evaluate": {"batch": 2}})
    source = data.build(recipe).val
    tree = json.loads((ROOT / "annotations/instances_val.json").read_text())
    files = {i["id"]: ROOT / "val" / i["file_name"] for i in tree["images"]}
    stream = data.eval_batches(recipe, source, rank=0, num_ranks=1, mean=MEAN, std=STD)
    crowd = boxes = 0
    for batch in itertools.islice(stream, NUM_BATCHES):
        ids = [t.image_id for t in batch.targets]
        rows = [[a for a in tree["annotations"] if a["image_id"] == i] for i in ids]
        theirs = processor(
            images=[Image.open(files[i]).convert("RGB") for i in ids],
            annotations=[{"image_id": i, "annotations": a} for i, a in zip(ids, rows, strict=True)],
            return_tensors="pt",
        )
        assert batch.images.shape == theirs["pixel_values"].shape
        assert torch.equal(~batch.mask, theirs["pixel_mask"].bool())
        torch.testing.assert_close(batch.images, theirs["pixel_values"], rtol=0, atol=2e-6)
        for ours, other, image_id in zip(batch.targets, theirs["labels"], ids, strict=True):
            assert list(ours.orig_size_px) == other["orig_size"].tolist() and int(other["image_id"]) == image_id
            category_ids = [source.classes.category_ids[i] for i in ours.labels]
            assert category_ids == other["class_labels"].tolist()
            ours_px = ours.boxes_cxcywh * torch.tensor(ours.size_px[::-1] * 2)
            theirs_px = other["boxes"].reshape(-1, 4) * torch.tensor(other["size"].tolist()[::-1] * 2)
            torch.testing.assert_close(ours_px, theirs_px.float(), rtol=0, atol=1e-3)
        crowd += sum(a["iscrowd"] for group in rows for a in group)
        boxes += sum(map(len, rows))
    assert boxes > 20 and crowd > 0


def test_sizes_equal_the_image_processor_where_the_long_side_is_free():
    """Where the bound of the long side is in force, transformers scales by the unrounded short side and DETR, like us,
    by the rounded one: the long sides differ by half the aspect ratio and a cut, the short sides never do."""
    transforms = pytest.importorskip("transformers.image_transforms", reason="transformers is not installed")
    rng = np.random.default_rng(0)
    bounded = 0
    for h, w in rng.integers(100, 1500, (3000, 2)).tolist():
        ours = eval_plan((h, w), 800, 1333).size_px
        theirs = transforms.get_size_with_aspect_ratio((h, w), 800, 1333)
        if max(h, w) / min(h, w) * 800 <= 1333:
            assert ours == theirs
        else:
            bounded += 1
            assert min(ours) == min(theirs) and abs(max(ours) - max(theirs)) <= max(h, w) / min(h, w) / 2 + 1
    assert bounded > 500


def test_training_pixels_equal_the_steps_of_torchvision():
    """Flip, resize, crop, resize, to-tensor, normalise on the same Pillow image: bit for bit with exact kernels, and
    with the fast ones within two of 255 steps, one for each resize."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    policy = Augmentation(0.5, (96, 120, 150), 240, 0.6, (80, 110), (60, 100))
    image = np.random.default_rng(1).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    kinds = set()
    for i in range(40):
        plan = train_plan(generator(2, GEOMETRY, 0, i), (90, 130), policy)
        kinds.add((plan.flip, plan.crop_px is not None))
        picture = Image.fromarray(image)
        if plan.flip:
            picture = functional.hflip(picture)
        if plan.crop_px is not None:
            picture = functional.crop(functional.resize(picture, list(plan.first_px)), *plan.crop_px)
        picture = functional.resize(picture, list(plan.size_px))
        expected = functional.normalize(functional.to_tensor(picture), MEAN, STD)
        ours = torch.zeros(3, *plan.size_px)
        normalise_into(ours, transform(image, replace(plan, exact=True)), MEAN, STD)
        assert torch.equal(ours, expected)
        fast = transform(image, plan).int() - transform(image, replace(plan, exact=True)).int()
        assert fast.abs().max() <= (2 if plan.crop_px is not None else 1)
        assert fast.float().abs().mean() < 0.3 and abs(fast.float().mean()) < 0.1
    assert len(kinds) == 4
