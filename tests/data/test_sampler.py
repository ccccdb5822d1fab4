"""Who gets which image when is arithmetic on (seed, epoch, position); ranks, cuts and starts change nothing."""

import numpy as np
import pytest

from detr_accel.data.augment import IouCrop, LargeScaleJitter, Strong
from detr_accel.data.geometry import Augmentation
from detr_accel.data.sampler import (
    EvalTasks,
    TrainTasks,
    by_shape,
    permutation,
    shapes_of,
    share,
    windows_per_epoch,
)
from detr_accel.data.shapes import ShapesSource

POLICY = Augmentation(0.5, (24, 32, 40), 64, 0.5, (28, 36), (16, 30))
SOURCE = ShapesSource(1, "train", 21, 64)  # with windows of 8: 8, 8, 5


def tasks(rank=0, num_ranks=1, micro=8, start=0, end=7):
    return TrainTasks(SOURCE, POLICY, 8, micro, 5, rank, num_ranks, start, end)


def flat(some):
    """What each image goes through, by (window, position), and each window's canvas."""
    rows = {}
    for t in some:
        for position, index, plan in zip(t.positions, t.indices, t.plans, strict=True):
            assert (t.window, position) not in rows
            rows[t.window, position] = (t.epoch, index, plan, t.canvas_px)
    return rows


def test_shares_are_contiguous_and_near_equal():
    assert [len(share(8, r, 3)) for r in range(3)] == [3, 3, 2]
    assert [list(share(2, r, 3)) for r in range(3)] == [[0], [1], []]
    for num in range(12):
        for ranks in range(1, 6):
            assert [i for r in range(ranks) for i in share(num, r, ranks)] == list(range(num))


def test_permutation_is_whole_and_new_each_epoch():
    orders = [tuple(permutation(5, epoch, 21)) for epoch in range(3)]
    assert all(sorted(o) == list(range(21)) for o in orders)
    assert len(set(orders)) == 3 and tuple(permutation(5, 0, 21)) == orders[0] != tuple(permutation(6, 0, 21))


def test_each_epoch_has_each_image_once_the_short_window_included():
    assert windows_per_epoch(21, 8) == 3
    rows = flat(tasks(end=6))
    assert len(rows) == 42
    for epoch in (0, 1):
        assert sorted(index for e, index, *_ in rows.values() if e == epoch) == list(range(21))


@pytest.mark.law1
@pytest.mark.parametrize(("num_ranks", "micro"), [(1, 1), (1, 3), (2, 4), (2, 2), (3, 2), (6, 1)])
def test_ranks_and_cuts_share_one_plan(num_ranks, micro):
    parts = [tasks(rank, num_ranks, micro) for rank in range(num_ranks)]
    together = [t for part in parts for t in part]
    assert flat(together) == flat(tasks())
    assert max(len(t.positions) for t in together) <= micro


@pytest.mark.law1
def test_a_short_window_may_leave_a_rank_without_images():
    counts = [[tasks(rank, 6, 1).num_tasks(w) for w in range(3)] for rank in range(6)]
    assert [sum(column) for column in zip(*counts, strict=True)] == [8, 8, 5]
    assert counts[5] == [1, 1, 0]


@pytest.mark.law2
@pytest.mark.parametrize("start", range(7))
def test_any_start_gives_the_tail(start):
    whole = [t for t in tasks(1, 2, 3) if t.window >= start]
    assert list(tasks(1, 2, 3, start=start)) == whole


@pytest.mark.law1
def test_announced_number_of_tasks_is_the_number_of_tasks():
    for rank in range(3):
        part = tasks(rank, 3, 2)
        assert len(part) == len(list(part))
        for window in range(7):
            assert part.num_tasks(window) == sum(t.window == window for t in part)


@pytest.mark.law5
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 9])
def test_evaluation_deals_whole_batches_in_turn(num_ranks):
    parts = [list(EvalTasks(SOURCE, 4, 32, 64, rank, num_ranks)) for rank in range(num_ranks)]
    alone = list(EvalTasks(SOURCE, 4, 32, 64, 0, 1))
    assert [len(EvalTasks(SOURCE, 4, 32, 64, rank, num_ranks)) for rank in range(num_ranks)] == list(map(len, parts))
    dealt = [parts[n % num_ranks][n // num_ranks] for n in range(len(alone))]
    assert dealt == alone and sum(map(len, parts)) == len(alone)
    assert [i for t in alone for i in t.indices] == list(range(21))


class Sizes:
    """A source of which only sizes are asked."""

    def __init__(self, sizes_px):
        self.sizes_px = sizes_px

    def __len__(self):
        return len(self.sizes_px)

    def size_px(self, index):
        return self.sizes_px[index]


@pytest.mark.parametrize("counts", [(40, 30, 50), (3, 0, 90), (0, 0, 17), (1, 1, 1)])
def test_windows_by_shape_hold_one_shape_each_image_once_and_come_mixed(counts):
    shapes = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], counts))
    orders = []
    for epoch in range(3):
        order = by_shape(shapes, 8, 5, epoch)
        assert sorted(order) == list(range(len(shapes)))
        cuts = [order[i : i + 8].tolist() for i in range(0, len(order), 8)]
        assert sum(len(set(shapes[cut])) > 1 for cut in cuts) <= 2
        for shape in range(3):  # each shape keeps the order that was drawn, window by window
            assert all(cut == sorted(cut) for cut in cuts if set(shapes[cut]) == {shape})
        orders.append(tuple(order))
    assert len(set(orders)) == 3 or len(shapes) < 24


def test_shapes_are_told_by_the_longer_side():
    assert shapes_of([(100, 100), (114, 100), (116, 100), (100, 114), (100, 116)]).tolist() == [1, 1, 0, 1, 2]


STRONGER = Strong(
    40, iou_crop=IouCrop(0.5, 0.0, 1.0, (0.1,), 0.3), large_scale_jitter=LargeScaleJitter(0.3, 0.0, 1.0, (0.5, 1), 48)
)


@pytest.mark.parametrize("strong", [None, STRONGER], ids=["crop", "stronger"])
@pytest.mark.parametrize("scale_by", ["image", "window"])
def test_a_window_holds_one_shape_after_crop_and_stronger_augmentation(strong, scale_by):
    """What is grouped is what training sees, not the file; no augmentation changes with where the image goes."""
    source = ShapesSource(1, "train", 80, 64)
    policy = Augmentation(0.5, (240, 320, 400), 640, 0.5, (280, 360), (160, 300), scale_by)
    epoch_of = [
        list(TrainTasks(source, policy, 8, 8, 5, 0, 1, 10, 20, group_by_shape=grouped, strong=strong))
        for grouped in (False, True)
    ]
    plain, by = ({i: p for t in tasks for i, p in zip(t.indices, t.plans, strict=True)} for tasks in epoch_of)
    if scale_by == "image":
        assert by == plain  # another window, the same picture
    mixed = [len({*shapes_of([p.size_px for p in t.plans]).tolist()}) > 1 for t in epoch_of[1]]
    assert sum(mixed) <= 2 < sum(len({*shapes_of([p.size_px for p in t.plans]).tolist()}) > 1 for t in epoch_of[0])


@pytest.mark.law2
def test_windows_by_shape_start_anywhere():
    def by(start, rank=0, num_ranks=1, micro=8):
        return TrainTasks(SOURCE, POLICY, 8, micro, 5, rank, num_ranks, start, 7, True, STRONGER)

    whole = list(by(0))
    assert flat(whole) != flat(tasks())
    for start in range(7):
        assert list(by(start)) == [t for t in whole if t.window >= start]
    assert flat([*by(0, 0, 2, 3), *by(0, 1, 2, 3)]) == flat(whole)


def test_less_of_a_window_is_padding():
    rng = np.random.default_rng(0)
    sizes = [(480, 640) if rng.random() < 0.7 else (640, 480) for _ in range(160)]

    def padding(grouped, scale_by="image") -> float:
        policy = Augmentation(0.5, (480, 640, 800), 1333, 0.0, (400,), (384, 600), scale_by)
        filled = held = 0
        for task in TrainTasks(Sizes(sizes), policy, 8, 8, 5, 0, 1, 0, 20, grouped):
            held += len(task.plans) * task.canvas_px[0] * task.canvas_px[1]
            filled += sum(p.size_px[0] * p.size_px[1] for p in task.plans)
        return 1 - filled / held

    assert padding(False) > 0.4 and padding(False) > padding(True) > padding(True, "window")
    assert padding(True, "window") < 0.05


@pytest.mark.parametrize("step", [1, 32, 48])
def test_canvases_may_come_from_a_finite_set(step):
    policy = Augmentation(0.5, (240, 272, 320, 400), 640, 0.5, (280, 360), (160, 300), "window", step)
    seen = set()
    for task in TrainTasks(ShapesSource(1, "train", 80, 64), policy, 8, 8, 5, 0, 1, 0, 40):
        tight = [max(sides) for sides in zip(*(p.size_px for p in task.plans), strict=True)]
        for side, least in zip(task.canvas_px, tight, strict=True):
            assert 0 <= side - least < step and side % step == 0
        seen.add(task.canvas_px)
    assert len(seen) <= (640 // step + 1) ** 2 and (step > 1 or len(seen) > 20)


def test_a_window_may_have_one_scale():
    policy = Augmentation(0.5, (24, 32, 40), 200, 0.5, (28, 36), (16, 30), "window")
    shorts = {}
    for task in TrainTasks(SOURCE, policy, 8, 8, 5, 0, 1, 0, 40):
        (shorts[task.window],) = {min(plan.size_px) for plan in task.plans}
    assert set(shorts.values()) == {24, 32, 40}
