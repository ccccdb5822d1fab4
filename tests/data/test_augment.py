"""Stronger augmentation: boxes follow pixels, draws follow (seed, epoch, position), and it is off when it should be."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from detr_accel import data
from detr_accel import recipe as recipes
from detr_accel.data import augment
from detr_accel.data.collate import make_batch, plan_batch
from detr_accel.data.compose import colours, compose, mean_levels
from detr_accel.data.geometry import Augmentation, Jitter, apply_boxes
from detr_accel.data.pixels import transform
from detr_accel.data.sampler import TrainTasks
from detr_accel.data.shapes import ShapesSource
from detr_accel.data.source import Subset
from detr_accel.structures import Sample

DATA = Path(__file__).parents[3] / "shared/data"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POLICY = Augmentation(0.5, (96, 120, 150), 240, 0.6, (80, 110), (60, 100))
ON = {
    "photometric": augment.Photometric(1.0, 0.0, 1.0, (0.875, 1.125), (0.5, 1.5), (0.5, 1.5), (-0.05, 0.05)),
    "zoom_out": augment.ZoomOut(1.0, 0.0, 1.0, (1.0, 4.0)),
    "iou_crop": augment.IouCrop(1.0, 0.0, 1.0, (0.0, 0.1, 0.3, 0.5, 0.7, 0.9), 0.3),
    "large_scale_jitter": augment.LargeScaleJitter(1.0, 0.0, 1.0, (0.1, 2.0), None),
    "mosaic": augment.Mosaic(1.0, 0.0, 1.0, (0.5, 1.5), 0.1),
    "mixup": augment.Mixup(1.0, 0.0, 1.0, (0.45, 0.55)),
}
GEOMETRIC = [name for name in ON if name != "photometric"]
HALF = {name: replace(one, probability=0.5) for name, one in ON.items()}


class Boxes:
    """Black images with one white box each, and some without any."""

    def __init__(self, num: int, boxes: int = 1):
        self.rng, self.boxes = np.random.default_rng(4), []
        self.sizes = [(int(h), int(w)) for h, w in self.rng.integers(100, 260, (num, 2))]
        for i, (h, w) in enumerate(self.sizes):
            low = self.rng.integers(0, (w - 30, h - 30), (boxes if i % 7 else 0, 2))
            high = self.rng.integers(low + 20, (w + 1, h + 1))
            self.boxes.append(np.concatenate((low, high), 1).astype(np.float32).reshape(-1, 4))

    def __len__(self):
        return len(self.sizes)

    def size_px(self, index):
        return self.sizes[index]

    def most_boxes(self):
        return max(map(len, self.boxes))

    def boxes_xyxy_px(self, index):
        return self.boxes[index]

    def sample(self, index, at_least_px=None):
        image = np.zeros((*self.sizes[index], 3), np.uint8)
        for x0, y0, x1, y1 in self.boxes[index].astype(int):
            image[y0:y1, x0:x1] = 255
        return Sample(image, index, self.boxes[index], np.full(len(self.boxes[index]), index % 5))


def tasks(source, settings: dict, end=20, micro=4, total=1000, policy=POLICY, start=0, rank=0, num_ranks=1, size=8):
    strong = augment.Strong(total, **settings)
    return TrainTasks(source, policy, size, micro, 7, rank, num_ranks, start, end, strong=strong)


def plans(some):
    """Everything that is decided, by (window, position)."""
    return {
        (t.window, p): (t.epoch, i, plan, t.canvas_px)
        for t in some
        for p, i, plan in zip(t.positions, t.indices, t.plans, strict=True)
    }


def check_piece(source: Boxes, index: int, plan) -> str:
    """One image of a plan, alone on its canvas: the box is where the white is, or was dropped for a reason."""
    sample = source.sample(index)
    alone = replace(plan, layers=(), jitter=None)
    white = compose([transform(sample.image, alone)], alone, torch.zeros(3, 1, 1))[0].numpy() > 127
    assert white.shape == plan.size_px
    boxes, labels = apply_boxes(plan, sample.boxes_xyxy_px, sample.labels)
    assert len(boxes) == len(labels) and boxes.dtype == np.float32
    if not len(sample.labels):
        assert not white.any()
        return "empty"
    ys, xs = np.flatnonzero(white.any(1)), np.flatnonzero(white.any(0))
    if not len(boxes):
        return "dropped" if len(ys) else "gone"
    assert labels.tolist() == sample.labels.tolist()
    assert (boxes[:, :2] - boxes[:, 2:] / 2 > -1e-6).all() and (boxes[:, :2] + boxes[:, 2:] / 2 < 1 + 1e-6).all()
    cx, cy, w, h = boxes[0] * (plan.size_px[::-1] * 2)
    if not len(ys):
        assert min(w, h) < 3  # the filter spreads it too thin
        return "thin"
    edges = (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1)
    # half a pixel of each of the two grids, of which the coarser one may be the original's
    by = max(a / b for a, b in zip(plan.inner_px, (plan.crop_px or (0, 0, *plan.orig_px))[2:], strict=True))
    assert np.abs(np.subtract((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), edges)).max() < 1.5 + max(1, by)
    return "kept"


@pytest.mark.parametrize("name", GEOMETRIC)
def test_boxes_follow_the_pixels(name):
    source, seen, policy = Boxes(60), [], replace(POLICY, crop=0.0)
    for task in tasks(source, {name: ON[name]}, size=6, end=30, policy=policy):
        for index, plan in zip(task.indices, task.plans, strict=True):
            assert plan.kinds or name == "iou_crop"
            seen += [check_piece(source, i, one) for i, one, _ in plan.images(index)]
    assert seen.count("kept") > 100 and seen.count("empty") > 5
    if name in ("zoom_out", "mixup", "iou_crop"):
        assert not {"dropped", "gone"} & set(seen), "every box is whole, or the crop was made around it"


def test_zoom_out_then_crop_still_follows_the_pixels():
    source, seen = Boxes(60), []
    for task in tasks(source, {n: ON[n] for n in ("zoom_out", "iou_crop")}, size=6, end=30):
        for index, plan in zip(task.indices, task.plans, strict=True):
            seen.append((check_piece(source, index, plan), plan.kinds))
    assert seen.count(("kept", ("zoom-out", "IoU crop"))) > 100
    assert {kinds for what, kinds in seen if what == "empty"} == {("zoom-out",)}, "nothing to crop around"


@pytest.mark.parametrize("name", GEOMETRIC)
def test_what_reaches_the_model_is_white_in_its_boxes(name):
    """The whole way: sampler, loader's batch, the model's own normalisation."""
    num_boxes = 0
    for task in tasks(Boxes(60), {name: ON[name]}, size=6, end=10):
        batch = make_batch(Boxes(60), task, (0.0,) * 3, (1.0,) * 3)
        for image, target in zip(batch.images, batch.targets, strict=True):
            h, w = target.size_px
            for cx, cy, bw, bh in (target.boxes_cxcywh * torch.tensor((w, h, w, h))).tolist():
                inside = image[0, int(cy - bh / 4) : int(cy + bh / 4) + 1, int(cx - bw / 4) : int(cx + bw / 4) + 1]
                # in a mosaic with its neighbours beside it, in a mixup with the other image on top of it
                assert min(bw, bh) < 4 or inside.mean() > (0.4 if name == "mixup" else 0.9)
                num_boxes += 1
    assert num_boxes > 40


@pytest.mark.parametrize("size", [None, 130])
def test_large_scale_jitter_fills_a_fixed_size(size):
    source, sizes, scales = Boxes(40), set(), []
    settings = replace(ON["large_scale_jitter"], size=size)
    for task in tasks(source, {"large_scale_jitter": settings}, size=8, end=40):
        for index, plan in zip(task.indices, task.plans, strict=True):
            check_piece(source, index, plan)
            _, _, h, w = plan.crop_px or (0, 0, *plan.orig_px)
            ratio = min(plan.size_px[0] / plan.orig_px[0], plan.size_px[1] / plan.orig_px[1])
            scales.append(max(plan.inner_px[0] / h, plan.inner_px[1] / w) / ratio)
            sizes.add(plan.size_px)
    assert sizes == {(130, 130)} if size else {96, 120, 150} <= {min(s) for s in sizes}
    assert min(scales) < 0.25 and 1.9 < max(scales) < 2.1
    assert np.mean(scales) == pytest.approx(1.05, abs=0.15)


def test_a_crop_holds_a_centre_overlaps_as_drawn_and_is_not_too_long():
    source, ious = Boxes(80, boxes=3), []
    settings = replace(ON["iou_crop"], min_iou=(0.5,))
    for task in tasks(source, {"iou_crop": settings}, end=30):
        for index, plan in zip(task.indices, task.plans, strict=True):
            if "IoU crop" not in plan.kinds:
                continue
            top, left, h, w = plan.crop_px or (0, 0, *plan.orig_px)
            assert max(h, w) <= 2 * min(h, w) and h >= int(0.3 * plan.orig_px[0]) and w >= int(0.3 * plan.orig_px[1])
            boxes = source.boxes[index]
            if plan.flip:
                boxes = boxes[:, [2, 1, 0, 3]] * (-1, 1, -1, 1) + (plan.orig_px[1], 0, plan.orig_px[1], 0)
            best, kept = 0.0, 0
            for x0, y0, x1, y1 in boxes:
                if left < (x0 + x1) / 2 < left + w and top < (y0 + y1) / 2 < top + h:
                    shared = (min(x1, left + w) - max(x0, left)) * (min(y1, top + h) - max(y0, top))
                    best = max(best, shared / ((x1 - x0) * (y1 - y0) + h * w - shared))
                    kept += 1
            assert best >= 0.5
            assert len(apply_boxes(plan, source.boxes[index], np.zeros(len(boxes)))[0]) == kept
            ious.append(best)
    assert len(ious) > 60


def test_a_mosaic_holds_four_images_that_do_not_cover_each_other():
    source, quarters = Boxes(50), set()
    for task in tasks(source, {"mosaic": ON["mosaic"]}):
        for index, plan in zip(task.indices, task.plans, strict=True):
            images = plan.images(index)
            assert len(images) == 4 and images[0][0] == index
            covered = np.zeros(plan.size_px, int)
            for i, one, weight in images:
                top, left, h, w = one.place_px
                assert one.size_px == plan.size_px and one.orig_px == source.size_px(i) and weight == 1
                assert top >= 0 and left >= 0 and top + h <= plan.size_px[0] and left + w <= plan.size_px[1]
                covered[top : top + h, left : left + w] += 1
            assert covered.max() == 1
            top, left, h, w = plan.place_px
            quarters.add((top + h / 2 < plan.size_px[0] / 2, left + w / 2 < plan.size_px[1] / 2))
    assert len(quarters) == 4, "the image itself goes to any of them"


def test_mixup_weighs_both_and_keeps_both_boxes():
    source = Boxes(50)
    for task in tasks(source, {"mixup": ON["mixup"]}):
        batch = make_batch(source, task, (0.0,) * 3, (1.0,) * 3)
        for row, (index, plan) in enumerate(zip(task.indices, task.plans, strict=True)):
            (layer,) = plan.layers
            assert 0.45 <= layer.weight <= 0.55
            target, both = batch.targets[row], (index, layer.index)
            assert len(target.labels) == sum(len(source.boxes[i]) for i in both) or plan.crop_px is not None
            assert target.image_id == index and target.orig_size_px == source.size_px(index)
            values = batch.images[row, 0].unique()
            assert values.max() <= 1 + 1e-6 and (not len(source.boxes[layer.index]) or (values >= 0.44).any())


def test_the_second_image_of_a_mixup_is_a_mosaic_as_often_as_the_first():
    """Dense one-to-one matching: 3.75 images on a canvas in the mean where both are drawn half of the time."""
    source, settings = Boxes(50, boxes=2), {"mosaic": HALF["mosaic"], "mixup": HALF["mixup"]}
    rows = [row[2] for row in plans(tasks(source, settings, end=100)).values()]
    counts = [1 + len(plan.layers) for plan in rows]
    assert set(counts) == {1, 2, 4, 5, 8} and np.mean(counts) == pytest.approx(3.75, abs=0.15)
    for task in tasks(source, settings, end=12):
        batch = make_batch(source, task, (0.0,) * 3, (1.0,) * 3)
        for row, plan in enumerate(task.plans):
            seconds = [layer for layer in plan.layers if layer.weight != 1]
            assert len(seconds) in (0, 1, 4) and len({layer.weight for layer in seconds}) <= 1
            covered = np.zeros(plan.size_px, int)
            for layer in seconds:
                top, left, h, w = layer.plan.place_px
                covered[top : top + h, left : left + w] += 1
            assert covered.max() <= 1, "no pixel is blended twice"
            assert len(batch.targets[row].labels) <= 2 * 8
    alone = plans(tasks(source, {"mosaic": HALF["mosaic"]}, end=100))
    together = plans(tasks(source, settings, end=100))
    assert all((row[2].kinds[:1] == ("mosaic",)) == ("mosaic" in alone[key][2].kinds) for key, row in together.items())


# -- colours


@pytest.mark.parity
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("values", [(1.1, None, None, None), (0.9, 1.4, None, None), (None, 0.6, 1.5, None)])
@pytest.mark.parametrize("hue", [None, 0.05, -0.3])
def test_colours_are_those_of_torchvision(first, values, hue):
    """On float images, to a thousandth of a level."""
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    image = torch.from_numpy(ShapesSource(3, "train", 1, 128).sample(0).image).permute(2, 0, 1).float()
    image[:, :4] = torch.arange(4).view(4, 1) * 85.0  # greys, of which the hue is not defined
    brightness, contrast, saturation, _ = values
    expected = image / 255
    for function, value, when in (
        (functional.adjust_brightness, brightness, True),
        (functional.adjust_contrast, contrast, first),
        (functional.adjust_saturation, saturation, True),
        (functional.adjust_hue, hue, True),
        (functional.adjust_contrast, contrast, not first),
    ):
        expected = function(expected, value) if value is not None and when else expected
    ours = colours(image, Jitter(*values[:3], hue, first))
    assert (ours - expected * 255).abs().max() < 1e-2
    assert (ours - expected * 255).abs().mean() < 1e-3


def test_colours_leave_geometry_fill_and_boxes_as_they_are():
    source = Boxes(40)
    plain = plans(TrainTasks(source, POLICY, 8, 4, 7, 0, 1, 0, 20))
    coloured = plans(tasks(source, {"photometric": ON["photometric"]}))
    assert any(row[2].jitter is not None for row in coloured.values())
    assert {k: (e, i, replace(p, jitter=None, kinds=()), c) for k, (e, i, p, c) in coloured.items()} == plain
    settings = {n: ON[n] for n in ("photometric", "zoom_out")}
    for task in tasks(source, settings, end=6):
        batch = make_batch(source, task, MEAN, STD)
        for row, plan in enumerate(task.plans):
            (top, left, h, w), around = plan.place_px, torch.ones(plan.size_px, dtype=torch.bool)
            around[top : top + h, left : left + w] = False
            fill = batch.images[row, :, : plan.size_px[0], : plan.size_px[1]][:, around]
            assert fill.abs().max() < 0.01 if around.any() else True, "near 0, as padding"


@pytest.mark.parametrize("probability", [0.3, 0.8])
def test_each_colour_is_tried_with_the_probability_and_in_its_range(probability):
    settings = {"photometric": replace(ON["photometric"], probability=probability)}
    drawn = [row[2].jitter or Jitter() for row in plans(tasks(Boxes(80), settings, end=100)).values()]
    for name in ("brightness", "contrast", "saturation", "hue"):
        values = [v for j in drawn if (v := getattr(j, name)) is not None]
        low, high = getattr(settings["photometric"], name)
        assert abs(len(values) / len(drawn) - probability) < 0.06
        assert low <= min(values) < low + 0.1 * (high - low) and high - 0.1 * (high - low) < max(values) <= high


# -- draws and schedule


def everything(**changed):
    return HALF | changed


@pytest.mark.law1
@pytest.mark.parametrize(("num_ranks", "micro"), [(1, 1), (1, 3), (2, 2), (3, 2)])
def test_ranks_and_cuts_share_one_plan(num_ranks, micro):
    source = Boxes(21)
    parts = [tasks(source, everything(), 7, micro, 9, rank=r, num_ranks=num_ranks) for r in range(num_ranks)]
    together = {}
    for part in parts:
        together |= plans(part)
    whole = plans(tasks(source, everything(), 7, 8, 9))
    assert together == whole
    assert {kind for row in whole.values() for kind in row[2].kinds} == {
        "colours", "zoom-out", "IoU crop", "large-scale jitter", "mosaic", "mixup"
    }  # fmt: skip


@pytest.mark.law2
@pytest.mark.parametrize("start", [0, 1, 4, 6])
def test_any_start_gives_the_tail(start):
    source = Boxes(21)
    whole = [t for t in tasks(source, everything(), 7, 3, 9) if t.window >= start]
    assert list(tasks(source, everything(), 7, 3, 9, start=start)) == whole


def test_draws_change_with_seed_epoch_and_position():
    source = Boxes(8)
    first, again = (plans(tasks(source, {"mosaic": ON["mosaic"]}, 8)) for _ in range(2))
    assert first == again and len({row[2] for row in first.values()}) == 64
    other = replace(tasks(source, {"mosaic": ON["mosaic"]}, 8), seed=8)
    assert not {row[2] for row in plans(other).values()} & {row[2] for row in first.values()}


def test_a_crop_of_iou_1_is_the_whole_image():
    """RT-DETR's crop has seven choices, one of which leaves the image as it is."""
    settings = replace(HALF["iou_crop"], probability=1.0, min_iou=(1.0,))
    assert not any(row[2].kinds for row in plans(tasks(Boxes(40, boxes=2), {"iou_crop": settings})).values())
    settings = replace(settings, min_iou=(0.0, 1.0))
    rows = plans(tasks(Boxes(40, boxes=2), {"iou_crop": settings}, end=100)).values()
    assert np.mean([bool(row[2].kinds) for row in rows]) == pytest.approx(0.5, abs=0.06)


def test_draws_of_one_do_not_move_those_of_another():
    source = Boxes(40)
    together = plans(tasks(source, everything()))
    alone = plans(tasks(source, {"mosaic": HALF["mosaic"]}))
    for key, (_, _, plan, _) in alone.items():
        assert ("mosaic" in plan.kinds) == ("mosaic" in together[key][2].kinds)
        if "mosaic" in plan.kinds:
            assert together[key][2].place_px == plan.place_px


def test_shares_are_the_probabilities():
    for name, settings in HALF.items():
        if name == "photometric":
            continue
        rows = plans(tasks(Boxes(40, boxes=2), {name: settings}, end=100)).values()
        assert abs(np.mean([bool(row[2].kinds) for row in rows]) - 0.5) < (0.12 if name == "iou_crop" else 0.06)


@pytest.mark.parametrize("name", list(ON))
def test_it_is_on_between_its_start_and_its_stop_and_off_at_the_end(name):
    source, total = Boxes(40), 25  # five windows an epoch
    settings = {name: replace(ON[name], start=0.2, stop=0.8)}
    rows, plain = (
        plans(tasks(source, settings, total, total=total)),
        plans(TrainTasks(source, POLICY, 8, 4, 7, 0, 1, 0, total)),
    )
    changed = {window for (window, position), row in rows.items() if row != plain[window, position]}
    assert changed == set(range(5, 20)), "fractions of the training, in windows"
    assert all(not row[2].kinds for (window, _), row in rows.items() if window not in changed)


def test_default_is_detrs_policy_and_a_recipe_says_when():
    base = "data: {format: shapes, shapes: {num_train: 40, image_size: 64}%s}\nbatch: {size: 8}\nschedule: {epochs: 10}"
    plain = recipes.loads(base % "")
    assert data.sizes.strong_policy(plain, 40) is None and data._tasks(plain, Boxes(40), 4, 0, 1, 0, 9).strong is None
    text = ", augment: {mosaic: {probability: 0.5, start: 0.07, stop: 0.57}, photometric: {probability: 0.5}}"
    strong = data.sizes.strong_policy(recipes.loads(base % text), 40)
    assert strong.total_windows == 50
    assert [sorted(strong.at(w).probabilities()) for w in (0, 3, 4, 28, 29, 44, 45, 49)] == [
        ["photometric"], ["photometric"], ["mosaic", "photometric"], ["mosaic", "photometric"], ["photometric"],
        ["photometric"], [], [],
    ]  # fmt: skip
    names = {f.name for f in fields(augment.Strong)} - {"total_windows"}
    assert names == set(augment.KINDS) == {n for n in type(plain.data.augment).model_fields if n in names}


@pytest.mark.parametrize(("name", "more"), [*((name, "") for name in ON), ("large_scale_jitter", ", size: 170")])
@pytest.mark.parametrize("max_size", [130, 400])
def test_the_worst_window_holds_every_window(name, more, max_size):
    sizes = f"scales: [60, 90], max_size: {max_size}, crop_scales: [60, 80], crop_size: [30, 70]"
    recipe = recipes.loads(f"data: {{format: shapes, augment: {{{sizes}, {name}: {{probability: 1.0{more}}}}}}}")
    source = Boxes(40, boxes=3)
    (height, width), most = data.worst_window(recipe, source)
    for task in data._tasks(recipe, source, 8, 0, 1, 0, 40):
        assert task.canvas_px[0] <= height and task.canvas_px[1] <= width
        batch = make_batch(source, task, MEAN, STD)
        assert max(len(t.labels) for t in batch.targets) <= most
    assert most == {"mosaic": 12, "mixup": 6}.get(name, 3)


# -- workers and device


def levels(images: torch.Tensor) -> torch.Tensor:
    return (images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255


def compare(source, settings: dict, windows: int, policy=POLICY, device="cpu") -> None:
    """The same boxes, sizes and mask. Pixels: a step for each resize, which colours may widen to six in places."""
    for task in tasks(source, settings, windows, policy=policy, size=4):
        worker = make_batch(source, task, MEAN, STD)
        there = plan_batch(source, task, MEAN, STD).to(device).to("cpu")
        assert torch.equal(worker.mask, there.mask)
        for one, other in zip(worker.targets, there.targets, strict=True):
            assert torch.equal(one.boxes_cxcywh, other.boxes_cxcywh) and torch.equal(one.labels, other.labels)
            assert (one.image_id, one.size_px, one.orig_size_px) == (other.image_id, other.size_px, other.orig_size_px)
        off = (levels(worker.images) - levels(there.images)).abs().masked_fill(worker.mask[:, None], 0)
        assert off.max() < (6 if "photometric" in settings else 2) + 1e-2
        assert off.mean() < 0.4
        assert not there.images.masked_select(there.mask[:, None]).any()


@pytest.mark.parametrize("name", list(ON))
def test_the_device_makes_what_the_workers_make(name):
    compare(ShapesSource(1, "train", 40, 128), {name: ON[name]}, 5)


def test_the_device_makes_what_the_workers_make_of_everything_at_once():
    compare(ShapesSource(1, "train", 40, 128), HALF, 10)


@pytest.mark.gpu
def test_a_gpu_makes_what_the_workers_make():
    compare(ShapesSource(1, "train", 40, 128), HALF, 10, device="cuda")


@pytest.mark.skipif(not (DATA / "coco_free").is_dir(), reason=f"{DATA / 'coco_free'} is absent")
def test_photographs_that_are_decoded_smaller_keep_their_boxes_and_pixels():
    recipe = recipes.Recipe.model_validate({"data": {"root": str(DATA / "coco_free")}})
    source = data.build(recipe).train
    policy = Augmentation(0.5, (160, 224), 400, 0.0, (160,), (100, 150))
    compare(source, HALF, 4, policy)
    for task in tasks(source, {"mosaic": ON["mosaic"]}, 2, policy=policy):
        for index, plan in zip(task.indices, task.plans, strict=True):
            needs, size = plan.needs_px, source.size_px(index)
            assert needs == plan.first_px and source.sample(index, needs).image.shape[0] <= size[0]


def test_parts_are_the_same_images_on_the_same_canvas():
    source = ShapesSource(1, "train", 12, 128)
    (task,) = tasks(source, HALF, 1, 8)
    assert len({len(p.layers) for p in task.plans}) > 1
    planned = plan_batch(source, task, MEAN, STD)
    whole, parts = planned.to("cpu"), [planned.part(a, b).to("cpu") for a, b in ((0, 3), (3, 4), (4, 8))]
    assert torch.equal(torch.cat([p.images for p in parts]), whole.images)
    assert [t.image_id for p in parts for t in p.targets] == [t.image_id for t in whole.targets]


# -- odd images


def test_crowded_empty_and_narrow_images():
    source = Boxes(12, boxes=90)
    source.sizes[1:4] = [(1, 900), (900, 1), (2, 2)]
    for i in (1, 2, 3):
        h, w = source.sizes[i]
        source.boxes[i] = np.array([[0, 0, w, h]], np.float32)
    for settings in ({name: one} for name, one in ON.items()):
        for task in tasks(source, settings, 12, policy=replace(POLICY, scales=(30, 40), max_size=80)):
            batch = make_batch(source, task, MEAN, STD)
            assert batch.images.isfinite().all()
            for target in batch.targets:
                assert (target.boxes_cxcywh[:, 2:] > 0).all() and len(target.boxes_cxcywh) == len(target.labels)
    compare(source, HALF, 6)


def test_a_source_tells_its_boxes_without_an_image(write_split, recipe_for, tmp_path):
    write_split(tmp_path / "annotations/instances_train.json", tmp_path / "train", 6)
    write_split(tmp_path / "annotations/instances_val.json", tmp_path / "val", 3, first=20)
    coco = data.build(recipe_for(tmp_path)).train
    wanted = [coco.sample(i).boxes_xyxy_px for i in range(6)]
    for path in (tmp_path / "train").iterdir():
        path.unlink()
    assert all(np.array_equal(coco.boxes_xyxy_px(i), wanted[i]) for i in range(6))
    shapes = ShapesSource(1, "train", 5, 64)
    assert all(np.array_equal(shapes.boxes_xyxy_px(i), shapes.sample(i).boxes_xyxy_px) for i in range(5))
    assert np.array_equal(Subset(shapes, [3]).boxes_xyxy_px(0), shapes.boxes_xyxy_px(3))


@pytest.mark.parametrize("name", list(ON))
def test_a_cache_keeps_what_a_crop_needs(name, tmp_path):
    """Images from a cache, smaller where they may be, give the same boxes and near the same pixels."""
    text = "data: {format: shapes, cache: disk, cache_folder: '%s', workers: 0, shapes: {num_train: 12, num_val: 2},"
    text += " augment: {scales: [48], max_size: 64, crop: 0, %s: {probability: 1.0}}, eval_size: 48}"
    recipe = recipes.loads(text % (tmp_path, name))
    splits = data.build(recipe)
    cached = data.with_cache(recipe, splits, quiet=True).train
    smaller = cached.sample(0).image.shape[0] < splits.train.size_px(0)[0]
    assert smaller == (name not in ("iou_crop", "large_scale_jitter"))
    for task in data._tasks(recipe, splits.train, 4, 0, 1, 0, 3):
        one, other = (make_batch(source, task, (0.0,) * 3, (1.0,) * 3) for source in (splits.train, cached))
        assert all(torch.equal(a.boxes_cxcywh, b.boxes_cxcywh) for a, b in zip(one.targets, other.targets, strict=True))
        assert (one.images - other.images).abs().mean() < 0.02


def test_the_mean_fills_with_whole_levels():
    assert mean_levels(MEAN).flatten().tolist() == [124.0, 116.0, 104.0]


@pytest.mark.law2
@pytest.mark.parametrize("first", [True, False])
def test_contrast_does_not_depend_on_the_number_of_threads(first):
    """A sum over a whole picture is split among them; loader processes have one, the training process more."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            gen = torch.Generator().manual_seed(1)
            images = [torch.rand(3, 640, 641, generator=gen) * 255 for _ in range(4)]
            found.append([colours(i, Jitter(contrast=0.7, contrast_first=first)) for i in images])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))


def test_the_windows_are_known_in_which_other_pictures_begin():
    recipe = recipes.load(recipes.folder() / "rtdetr_r101_deim_coco.yaml", ["data.root=/d", "schedule.steps=1000"])
    found = data.changes_of_augmentation(recipe, 16_000)
    assert found == {67, 567, 967}
    strong, policy = data.strong_policy(recipe, 16_000), data.base_policy(recipe, 16_000)
    for window in range(1, 1000):
        differs = (strong.at(window), policy.at(window)) != (strong.at(window - 1), policy.at(window - 1))
        assert differs == (window in found), window
    plain = recipes.loads("data: {format: shapes}\nschedule: {steps: 100}")
    assert data.changes_of_augmentation(plain, 100) == set()
