"""Squares and the scales of windows, as RT-DETR trains: every plan is one, boxes follow, and nothing forgets it."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from detr_accel import data
from detr_accel import recipe as recipes
from detr_accel.data import augment, workers
from detr_accel.data.collate import make_batch, plan_batch
from detr_accel.data.geometry import Augmentation, apply_boxes, eval_plan, largest_first, worst_canvas
from detr_accel.data.pixels import transform
from detr_accel.data.sampler import EvalTasks, TrainTasks
from detr_accel.data.shapes import ShapesSource
from tests.data.test_augment import HALF, ON, Boxes

SCALES = (480, 512, 544, 576, 608, 640, 640, 640, 672, 704, 736, 768, 800)  # RT-DETR's
SQUARES = Augmentation(0.5, SCALES, 1333, 0.0, (400,), (384, 600), "window", square=True, final_scale=640)
SMALL = replace(SQUARES, scales=(60, 90, 120), final_scale=None)
BLACK, UNIT = (0.0,) * 3, (1.0,) * 3


def test_a_window_has_one_square_of_a_finite_set_and_the_last_ones_that_of_evaluation():
    tasks = TrainTasks(Boxes(40), replace(SQUARES, final_from=900), 4, 4, 7, 0, 1, 0, 1000)
    sides = {}
    for task in tasks:
        assert {plan.size_px for plan in task.plans} == {task.canvas_px}
        sides[task.window] = task.canvas_px[0]
        assert task.canvas_px[0] == task.canvas_px[1]
    seen = Counter(side for window, side in sides.items() if window < 900)
    assert set(seen) == set(SCALES) and {side for window, side in sides.items() if window >= 900} == {640}
    others = np.mean([count for side, count in seen.items() if side != 640])
    assert 2.4 < seen[640] / others < 3.6, "what stands there three times comes three times as often"


@pytest.mark.parametrize("name", ["", *ON])
def test_boxes_follow_the_pixels_into_squares(name):
    """Each box is white on black: what the plan says of it is where it lies."""
    source, seen = Boxes(60), 0
    strong = augment.Strong(1000, **({name: ON[name]} if name and name != "photometric" else {}))
    for task in TrainTasks(source, SMALL, 8, 8, 7, 0, 1, 0, 20, strong=strong):
        for index, plan in zip(task.indices, task.plans, strict=True):
            assert plan.size_px[0] == plan.size_px[1]
            for at, one, _ in plan.images(index):
                boxes, _ = apply_boxes(one, source.boxes_xyxy_px(at), np.zeros(len(source.boxes_xyxy_px(at))))
                bright = transform(source.sample(at).image, one)[0].numpy() > 127
                if not len(boxes) or not bright.any():
                    continue
                seen += 1
                top, left = (one.place_px or (0, 0))[:2]
                ys, xs = np.flatnonzero(bright.any(1)) + top, np.flatnonzero(bright.any(0)) + left
                cx, cy, w, h = boxes[0] * plan.size_px[0]
                edges = (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1)
                off = np.subtract((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), edges)
                assert np.abs(off).max() < 2.5, (plan.kinds, off)
    assert seen > 80


@pytest.mark.parametrize("name", ["mosaic", "mixup", "large_scale_jitter"])
def test_further_images_are_squeezed_as_the_first_one_is(name):
    """A wide image on a square, wherever it lands, has lost the same part of its width."""
    source = Boxes(12)
    source.sizes = [(100, 200)] * 12
    ratios = []
    for task in TrainTasks(source, SMALL, 4, 4, 7, 0, 1, 0, 9, strong=augment.Strong(1000, **{name: ON[name]})):
        for plan in task.plans:
            for one in [plan, *(layer.plan for layer in plan.layers)]:
                height, width = one.crop_px[2:] if one.crop_px is not None else one.first_px or one.orig_px
                _, _, to_height, to_width = one.place_px or (0, 0, *one.size_px)
                if one.first_px is not None:  # a tile: resized, then cut
                    ratios.append(one.first_px[1] / one.first_px[0])
                elif height >= 20 and width >= 40:
                    ratios.append(to_width / width / (to_height / height) * 2)
    assert len(ratios) > 20 and np.allclose(ratios, 1, atol=0.12), ratios


@pytest.mark.parametrize("name", list(ON))
@pytest.mark.parametrize("max_size", [80, 400])
def test_the_worst_window_holds_every_square(name, max_size):
    recipe = recipes.loads(
        f"data: {{format: shapes, square: true, eval_size: 110, augment: {{scales: [60, 90], max_size: {max_size}, "
        f"scales_stop: 0.5, {name}: {{probability: 1.0}}}}}}\nschedule: {{steps: 20}}\n"
    )
    source = Boxes(40, boxes=3)
    canvas, _ = data.worst_window(recipe, source)
    assert canvas == (min(110, max_size),) * 2, "and no more: the last windows have the size of evaluation"
    assert all(t.canvas_px <= canvas for t in data._tasks(recipe, source, 8, 0, 1, 0, 20))
    assert data.demands(recipe, None).canvas_px == canvas == data.demands(recipe, None).eval_canvas_px or max_size == 80


def test_without_data_a_plan_counts_with_the_squares():
    text = "data: {root: /nowhere, square: true, eval_size: 640, augment: {scales: [480, 800]}}\nevaluate: {batch: %d}"
    for batch in (1, 4):
        found = data.demands(recipes.loads(text % batch), None)
        assert (found.canvas_px, found.eval_canvas_px) == ((800, 800), (640, 640))


def test_evaluation_squeezes_too_and_remembers_the_files_size():
    source = ShapesSource(1, "val", 5, 120)
    for task in EvalTasks(source, 2, 64, 96, 0, 1, square=True):
        assert task.canvas_px == (64, 64)
        batch = make_batch(source, task, BLACK, UNIT)
        assert not batch.mask.any() and all(t.size_px == (64, 64) for t in batch.targets)
        assert [t.orig_size_px for t in batch.targets] == [source.size_px(i) for i in task.indices]
    assert eval_plan((50, 300), 640, 500, True).size_px == (500, 500), "the bound still holds"
    recipe = recipes.loads("data: {format: shapes, square: true, eval_size: 64, workers: 0}")
    (first, *_) = data.eval_batches(recipe, source, rank=0, num_ranks=1, mean=BLACK, std=UNIT)
    (still,) = data.still_window(recipe, source, [0, 1], rank=0, num_ranks=1, micro=2, mean=BLACK, std=UNIT)
    assert first.images.shape[2:] == still.images.shape[2:] == (64, 64)


def test_the_device_makes_the_squares_that_the_workers_make():
    source = ShapesSource(1, "train", 40, 128)
    for task in TrainTasks(source, SMALL, 4, 4, 7, 0, 1, 0, 6, strong=augment.Strong(1000, **HALF)):
        worker, there = make_batch(source, task, BLACK, UNIT), plan_batch(source, task, BLACK, UNIT).to("cpu")
        assert torch.equal(worker.mask, there.mask) and not worker.mask.any()
        assert (worker.images - there.images).abs().max() < 6.01 / 255
        for one, other in zip(worker.targets, there.targets, strict=True):
            assert torch.equal(one.boxes_cxcywh, other.boxes_cxcywh)


def test_a_cache_keeps_squares_and_what_a_crop_of_another_shape_needs(tmp_path):
    text = "data: {format: shapes, square: true, cache: disk, cache_folder: '%s', workers: 0, eval_size: 48,"
    text += " shapes: {num_train: 6, num_val: 2}, augment: {scales: [%s], crop: 0}}"
    sizes = []
    for scales in ("48", "48, 64"):
        recipe = recipes.loads(text % (tmp_path, scales))
        cached = data.with_cache(recipe, data.build(recipe), quiet=True)
        assert cached.val.sample(0).image.shape == (48, 48, 3)
        sizes.append(cached.train.sample(0).image.shape)
    assert sizes == [(48, 48, 3), (64, 64, 3)]
    policy = replace(SMALL, scales=(800,), crop=0.5, crop_scales=(600,))
    assert largest_first((2000, 6000), policy) == (800, 1800), "800 for the whole image, 600 x 1800 for its crop"
    assert largest_first((2000, 6000), replace(policy, crop=0.0)) == (800, 800)
    assert worst_canvas([(2000, 6000)], policy) == (800, 800)


def test_a_long_image_is_decoded_whole_for_its_square_and_counted_so():
    policy = replace(SMALL, scales=(640,))
    assert workers.decoded_bytes([(1000, 3000)], policy, None) == 3 * 1000 * 3000, "half of it has 500 lines: too few"
    assert workers.decoded_bytes([(4000, 4000)], policy, None) == 3 * 1000 * 1000, "a quarter"


@pytest.mark.parametrize(
    "model, words",
    [
        ("{name: rtdetr}", "stride 8 px, 300 queries"),
        ("{name: rtdetr, rtdetr: {num_points: [4, 4, 4, 4]}}", "stride 4 px, 300 queries"),
        ("{name: rtdetr, rtdetr: {num_points: [4, 4]}}", "stride 16 px, 300 queries"),
        ("{backbone: {dc5: true}}", "stride 16 px, 100 queries"),
    ],
)
def test_check_data_measures_boxes_on_the_squares_and_by_the_finest_map(model, words, monkeypatch):
    recipe = recipes.loads(f"data: {{root: /x, square: true, eval_size: 640}}\nmodel: {model}")
    monkeypatch.setattr(data.opening, "to_check", lambda *args: [])
    monkeypatch.setattr(data.checks, "check", lambda splits, model, **options: model.words())
    assert data.check(recipe) == f"{words}, images squeezed to 640x640"
