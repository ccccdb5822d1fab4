"""Pixels worked on where the model is: the batch that the workers would have made."""

from pathlib import Path

import numpy as np
import pytest
import torch

from detr_accel import data
from detr_accel import recipe as recipes
from detr_accel.data.collate import make_batch, plan_batch
from detr_accel.data.device import PlannedBatch, _one_ahead, ahead
from detr_accel.data.geometry import Augmentation
from detr_accel.data.sampler import TrainTasks
from detr_accel.data.shapes import ShapesSource
from detr_accel.structures import Batch, UserError

COCO_FREE = Path(__file__).parents[3] / "shared/data/coco_free"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POLICY = Augmentation(0.5, (96, 120, 150), 240, 0.6, (80, 110), (60, 100))


def levels(images: torch.Tensor) -> torch.Tensor:
    return (images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255


def compare(source, policy: Augmentation, batches: int, device: str = "cpu") -> None:
    tasks = TrainTasks(source, policy, 4, 2, 7, 0, 1, 0, batches)
    kinds = set()
    for task in tasks:
        worker, there = make_batch(source, task, MEAN, STD), plan_batch(source, task, MEAN, STD).to(device)
        there = there.to("cpu")
        assert torch.equal(worker.mask, there.mask) and worker.images.shape == there.images.shape
        assert (worker.positions, worker.window, worker.epoch) == (there.positions, there.window, there.epoch)
        for one, other in zip(worker.targets, there.targets, strict=True):
            assert torch.equal(one.boxes_cxcywh, other.boxes_cxcywh) and torch.equal(one.labels, other.labels)
            assert (one.image_id, one.size_px, one.orig_size_px) == (other.image_id, other.size_px, other.orig_size_px)
        for row, plan in enumerate(task.plans):
            h, w = plan.size_px
            off = (levels(worker.images[row]) - levels(there.images[row]))[:, :h, :w].abs()
            assert off.max() < (2 if plan.crop_px is not None else 1) + 1e-3
            assert off.mean() < 0.3
            padding = there.images[row].masked_select(there.mask[row])
            assert not padding.any()
            kinds.add((plan.flip, plan.crop_px is not None))
    assert len(kinds) == 4


def test_the_device_makes_what_the_workers_make():
    compare(ShapesSource(1, "train", 40, 128), POLICY, 8)


@pytest.mark.skipif(not COCO_FREE.is_dir(), reason=f"{COCO_FREE} is absent")
def test_real_photographs_at_the_sizes_of_detr():
    recipe = recipes.Recipe.model_validate({"data": {"root": str(COCO_FREE)}})
    compare(data.build(recipe).train, data.sizes.base_policy(recipe, 22), 3)


@pytest.mark.gpu
def test_a_gpu_makes_what_the_workers_make():
    compare(ShapesSource(1, "train", 40, 128), POLICY, 8, device="cuda")


def test_parts_are_the_same_images_on_the_same_canvas():
    source = ShapesSource(1, "train", 12, 128)
    (task,) = TrainTasks(source, POLICY, 8, 8, 7, 0, 1, 0, 1)
    planned = plan_batch(source, task, MEAN, STD)
    whole = planned.to("cpu")
    parts = [planned.part(0, 3).to("cpu"), planned.part(3, 4).to("cpu"), planned.part(4, 8).to("cpu")]
    assert torch.equal(torch.cat([p.images for p in parts]), whole.images)
    assert torch.equal(torch.cat([p.mask for p in parts]), whole.mask)
    assert [t.image_id for p in parts for t in p.targets] == [t.image_id for t in whole.targets]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("pixels", ["auto", "workers", "device"])
def test_the_recipe_decides_where(pixels, workers):
    recipe = recipes.loads(
        f"data: {{format: shapes, workers: {workers}, pixels: {pixels}, shapes: {{num_train: 9, image_size: 64}},"
        " augment: {scales: [64]}}\nbatch: {size: 4, micro: 2}"
    )
    source = data.build(recipe).train
    windows = list(
        data.train_windows(
            recipe, source, rank=0, num_ranks=1, start_window=0, end_window=3, mean=MEAN, std=STD, device="cpu"
        )
    )
    assert [[len(b) for b in w] for w in windows] == [[2, 2], [2, 2], [1]]
    kind = PlannedBatch if pixels == "device" else Batch
    assert all(isinstance(b, kind) for w in windows for b in w)


def test_one_window_waits_ahead_and_an_error_comes_in_its_place():
    taken, given = [], []

    def source():
        for i in range(4):
            taken.append(i)
            if i == 3:
                raise UserError("image 3")
            yield i

    with pytest.raises(UserError, match="image 3"):
        for item in _one_ahead(source()):
            given.append((item, len(taken)))
    assert given == [(0, 2), (1, 3), (2, 4)], "each is given out once the next one is on its way"
    assert list(_one_ahead(iter([]))) == []
    assert list(ahead(iter([[1], [2]]), torch.device("cpu"))) == [[1], [2]]


@pytest.mark.gpu
def test_copies_to_a_gpu_arrive_before_they_are_read():
    source = ShapesSource(1, "train", 64, 256)
    tasks = TrainTasks(source, POLICY, 8, 8, 7, 0, 1, 0, 8)
    planned = [plan_batch(source, task, MEAN, STD) for task in tasks]
    wanted = [p.to("cuda").images.cpu() for p in planned]
    pinned = [[p.pin_memory()] for p in planned]
    for (batch,), expected in zip(ahead(iter(pinned), torch.device("cuda")), wanted, strict=True):
        assert batch.pixels.is_cuda
        torch.cuda._sleep(10_000_000)  # the device lags behind, as in training
        assert np.array_equal(batch.to("cuda").images.cpu().numpy(), expected.numpy())
