"""Who gets which image when is arithmetic on (seed, epoch, position); ranks, cuts and starts change nothing."""

import pytest

from detr_accel.data.geometry import Augmentation
from detr_accel.data.sampler import EvalTasks, TrainTasks, permutation, share, windows_per_epoch
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
