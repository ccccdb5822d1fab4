"""The plan decides everything: sizes as DETR computes them, draws within their bounds, boxes that follow the pixels."""

from dataclasses import replace

import numpy as np
import pytest

from detr_accel.data.geometry import (
    Augmentation,
    Plan,
    apply_boxes,
    canvas,
    eval_plan,
    largest_first,
    resized,
    train_plan,
)
from detr_accel.data.pixels import transform
from detr_accel.data.source import GEOMETRY, generator

DETR = Augmentation(0.5, tuple(range(480, 801, 32)), 1333, 0.5, (400, 500, 600), (384, 600))


@pytest.mark.parametrize(
    ("size_px", "short", "max_size", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1066)),  # 1066.67 is cut, not rounded
        ((640, 480), 800, 1333, (1066, 800)),
        ((427, 640), 800, 1333, (800, 1199)),
        ((480, 480), 512, 1333, (512, 512)),
        ((800, 1000), 800, 1333, (800, 1000)),  # already there
        ((300, 640), 800, 1333, (625, 1333)),  # 624.84 is rounded, then 1333.33 is cut
        ((333, 500), 400, None, (400, 600)),
        ((1, 5000), 800, 1333, (1, 1333)),  # DETR would ask for 0 pixels
        ((5400, 2), 800, 1333, (1333, 1)),
    ],
)
def test_resize_follows_the_rule_of_detr(size_px, short, max_size, expected):
    assert resized(size_px, short, max_size) == expected


def test_draws_keep_their_bounds_and_shares():
    plans = [train_plan(generator(3, GEOMETRY, 0, i), (480, 640), DETR) for i in range(2000)]
    assert 0.45 < np.mean([p.flip for p in plans]) < 0.55
    cropped = [p for p in plans if p.crop_px is not None]
    assert 0.45 < len(cropped) / len(plans) < 0.55
    assert {min(p.first_px) for p in cropped} == {400, 500, 600}
    sides = np.array([p.crop_px[2:] for p in cropped])
    assert sides.min() >= 384 and sides.max() == 600  # both ends can be drawn
    assert min(sides.min(0)) < 395
    for p in cropped:
        top, left, h, w = p.crop_px
        assert 0 <= top <= p.first_px[0] - h and 0 <= left <= p.first_px[1] - w
    assert {min(p.size_px) for p in plans if p.crop_px is None} == set(DETR.scales)
    assert max(max(p.size_px) for p in plans) <= 1333


def test_plan_depends_on_seed_epoch_and_image_alone():
    policy = replace(DETR, crop=1.0)  # with a crop in it no two plans meet by chance
    draw = lambda *key: train_plan(generator(key[0], GEOMETRY, *key[1:]), (480, 640), policy)  # noqa: E731
    assert draw(1, 2, 3) == draw(1, 2, 3)
    keys = [(s, e, i) for s in range(4) for e in range(4) for i in range(4)]
    assert len({draw(*k) for k in keys}) == 64


def test_crop_of_an_image_below_its_least_side_takes_the_whole_side():
    policy = Augmentation(0, (100,), 200, 1.0, (50,), (384, 600))
    plan = train_plan(generator(0, GEOMETRY), (60, 90), policy)
    assert plan.crop_px == (0, 0, 50, 75)


def test_boxes_follow_the_pixels():
    """A white box on black goes through the pixels; its edges come out where the plan puts the box."""
    policy = Augmentation(0.5, (150, 200, 260), 400, 0.6, (120, 160), (70, 130))
    seen = 0
    for i in range(150):
        rng = generator(9, GEOMETRY, 0, i)
        h, w = (int(v) for v in rng.integers(120, 260, 2))
        x0, y0 = int(rng.integers(0, w - 30)), int(rng.integers(0, h - 30))
        x1, y1 = int(rng.integers(x0 + 20, w + 1)), int(rng.integers(y0 + 20, h + 1))
        image = np.zeros((h, w, 3), np.uint8)
        image[y0:y1, x0:x1] = 255
        plan = train_plan(rng, (h, w), policy)
        boxes, labels = apply_boxes(plan, np.array([[x0, y0, x1, y1]], np.float32), np.array([4]))
        bright = transform(image, plan)[0].numpy() > 127
        assert bright.shape == plan.size_px
        if not len(boxes):
            assert bright.sum() == 0
            continue
        seen += 1
        assert labels.tolist() == [4] and boxes.dtype == np.float32
        cx, cy, bw, bh = boxes[0] * (plan.size_px[::-1] * 2)
        ys, xs = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
        edges = (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1)
        # half a pixel of each of the two grids
        assert np.abs(np.subtract((cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2), edges)).max() < 2.5
    assert seen > 100


def test_crop_drops_boxes_outside_and_clips_the_rest():
    plan = Plan((100, 100), False, (50, 50), (10, 10, 20, 20), (40, 40))
    boxes = np.array([[0, 0, 20, 90], [0, 0, 40, 40], [70, 70, 90, 90]], np.float32)
    out, labels = apply_boxes(plan, boxes, np.array([1, 2, 3]))
    assert labels.tolist() == [2]  # the first touches the crop's edge only
    np.testing.assert_allclose(out, [[0.25, 0.25, 0.5, 0.5]])
    none, labels = apply_boxes(plan, boxes[2:], np.array([3]))
    assert none.shape == (0, 4) and labels.shape == (0,)


def test_canvas_holds_every_plan():
    assert canvas([eval_plan((480, 640), 80, 200), eval_plan((640, 480), 80, 200)]) == (106, 106)


def test_a_line_of_pixels_is_not_blown_up_to_a_wall():
    policy = Augmentation(0.5, (480, 800), 1333, 1.0, (400, 600), (384, 600))
    for size_px in ((1, 5000), (5000, 1), (2, 900)):
        plan = train_plan(np.random.default_rng(0), size_px, policy)
        assert plan.first_px is None or np.prod(plan.first_px) <= 2**25
        assert max(plan.size_px) <= 1.02 * 1333 and np.prod(largest_first(size_px, policy)) <= 2**25


def test_a_picture_that_is_large_by_itself_is_cropped_all_the_same():
    """Tiles of an aerial picture at its own scale: 48 million pixels, none of them made up."""
    policy = Augmentation(0.5, (800,), 1333, 1.0, (6000,), (800, 800))
    plan = train_plan(np.random.default_rng(0), (6000, 8000), policy)
    assert plan.first_px == (6000, 8000) and plan.crop_px is not None and plan.crop_px[2:] == (800, 800)
    assert largest_first((6000, 8000), policy) == (6000, 8000)
