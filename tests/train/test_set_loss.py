"""The loss of a set of images is a training window's, and the same however the set is dealt."""

from pathlib import Path

import pytest
import torch
from shared import load_module

from detr_accel import data
from detr_accel import recipe as recipes
from detr_accel.structures import UserError
from detr_accel.train import parts
from detr_accel.train.launch import make_accelerator
from detr_accel.train.loop import train
from detr_accel.train.set_loss import SetLoss, num_images, over

inject = load_module(Path(__file__).with_name("injecting.py"))
injected = load_module(Path(__file__).with_name("injected.py"))


@pytest.fixture(scope="module")
def built():
    recipe = recipes.loads(injected.TINY + "name: probe\n")
    parts.seed_everything(1, False)
    return parts.build(recipe, make_accelerator("no", "cpu"), data.build(recipe), resume=False)


def batches(built, of: int, **keep):
    recipe = built.recipe.model_copy(deep=True)
    recipe.evaluate.batch = of
    bare = built.bare
    return data.eval_batches(recipe, built.splits.train, rank=0, num_ranks=1, mean=bare.mean, std=bare.std, **keep)


@pytest.mark.law5
def test_it_is_the_loss_of_one_window_of_all_images(built):
    model, criterion = built.bare.double().eval(), built.criterion
    (everything,) = batches(built, 22)
    images = everything.images.double()
    with torch.no_grad():
        outputs = model(images, everything.mask)
        counts = criterion.normalisers(criterion.count(everything.targets))
        wanted = criterion(outputs, everything.targets, counts)
    found = SetLoss(criterion)
    for start, stop in ((0, 5), (5, 6), (6, 22)):
        part = everything.part(start, stop)
        with torch.no_grad():
            found.add(model(part.images.double(), part.mask), part)
    values = found.result()
    built.bare.float()
    assert values["loss"] == pytest.approx(float(wanted.total), rel=1e-9)
    assert {k: v for k, v in values.items() if k != "loss"} == pytest.approx(
        {k: float(v) for k, v in wanted.losses.items()}, rel=1e-9
    )


def test_a_label_without_a_class_is_refused_in_words(built):
    (batch,) = list(batches(built, 22))
    batch.targets[3].labels = torch.full((1,), 99)
    batch.targets[3].boxes_cxcywh = torch.full((1, 4), 0.5)
    found = SetLoss(built.criterion)
    with torch.no_grad():
        found.add(built.bare.eval()(batch.images, batch.mask), batch)
    with pytest.raises(UserError, match="label 99"):
        found.result()


@pytest.mark.law8
def test_images_that_cannot_be_read_are_left_out(built):
    whole = list(batches(built, 4))
    broken = [whole[0], UserError("gone"), *whole[2:]]
    kept = [whole[0], *whole[2:]]
    model = built.bare.eval()
    with_fault = over(broken, model, built.criterion, built.accelerator)
    assert with_fault == over(kept, model, built.criterion, built.accelerator)


def test_a_stop_breaks_it_off(built):
    """A launcher waits 30 seconds, and a laptop may need minutes for these images."""
    seen, asked = [], iter((False, True, True, True))

    def counted():
        for batch in batches(built, 2):
            seen.append(batch)
            yield batch

    model = built.bare.eval()
    assert over(counted(), model, built.criterion, built.accelerator, lambda: next(asked)) is None
    assert len(seen) == 2


def test_how_many_training_images_are_looked_at():
    assert num_images("auto", 4000, 4000) == 80
    assert num_images("auto", 118_000, 118_287) == 512
    assert num_images("auto", 20, 5) == 1
    assert num_images(50, 20, 22) == 22 and num_images(0, 20, 22) == 0


def test_the_probe_leaves_the_training_as_it_was(tmp_path):
    runs = []
    for name, images in (("with", 9), ("without", 0)):
        more = f"evaluate: {{train_images: {images}}}\n" + injected.EPOCHS
        runs.append(train(recipes.loads(injected.TINY + f"name: {name}\n" + more), runs=tmp_path))
    assert inject.differing(*(inject.weights(run) for run in runs)) == []
