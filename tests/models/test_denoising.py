"""Denoising queries: what they are made of, and that neither the cut nor the neighbours of an image change them."""

import numpy as np
import pytest
import torch

from detr_accel.models.denoising import DenoisingQueries, DenoisingSize, Noise, generators
from detr_accel.structures import Batch, Targets

CLASSES = 5


def target(num: int, seed: int = 0, image_id: int = 0) -> Targets:
    gen = torch.Generator().manual_seed(seed)
    boxes = torch.rand(num, 4, generator=gen) * 0.2 + 0.3
    labels = torch.randint(0, CLASSES, (num,), generator=gen)
    return Targets(image_id, labels, boxes, (64, 64), (64, 64))


def queries(sizes, noise=None, most=None, positions=None) -> tuple[list[Targets], DenoisingQueries | None]:
    targets = [target(n, seed) for seed, n in enumerate(sizes)]
    dice = generators(3, 1, positions or range(len(sizes)))
    return targets, (noise or Noise()).queries(targets, dice, CLASSES, max(sizes) if most is None else most)


@pytest.mark.parametrize(
    "most, wanted, groups", [(1, 100, 100), (7, 100, 14), (100, 100, 1), (101, 100, 1), (400, 100, 1), (3, 1, 1)]
)
def test_as_many_groups_as_the_wanted_number_holds_and_one_at_least(most, wanted, groups):
    size = DenoisingSize.of(most, wanted)
    assert (size.num_groups, size.num_slots, size.num_queries) == (groups, most, 2 * groups * most)


@pytest.mark.parametrize("wanted", [0, 1, 12, 100])
def test_the_most_demanding_window_makes_as_many_queries_as_any(wanted):
    noise = Noise(wanted)

    def made(boxes):
        size = DenoisingSize.of(boxes, wanted)
        return 0 if size is None else size.num_queries

    for most in (0, 1, 7, 51, 99, 100, 101, 150):
        assert made(noise.most_demanding(most)) == max(made(boxes) for boxes in range(most + 1))


def test_a_window_without_boxes_or_a_recipe_without_denoising_has_none():
    assert DenoisingSize.of(0, 100) is None and DenoisingSize.of(5, 0) is None
    assert queries([0, 0])[1] is None
    assert queries([2, 1], Noise(num_denoising=0))[1] is None


def test_without_noise_the_first_half_of_a_group_is_the_truth():
    targets, found = queries([3, 0, 2], Noise(12, label=0.0, box=0.0))
    assert found.size == DenoisingSize(4, 3) and found.labels.shape == (3, 24)
    for i, t in enumerate(targets):
        labels = found.labels[i].view(4, 2, 3)
        boxes = found.boxes_cxcywh[i].view(4, 2, 3, 4)
        n = len(t.labels)
        assert torch.equal(labels[..., :n], t.labels.expand(4, 2, n))
        torch.testing.assert_close(boxes[..., :n, :], t.boxes_cxcywh.expand(4, 2, n, 4), rtol=1e-6, atol=1e-7)
        assert (labels[..., n:] == CLASSES).all() and (boxes[..., n:, :] == 0).all(), "empty slots"


def test_the_first_half_stays_nearer_than_one_half_side_and_the_second_lies_farther():
    targets, found = queries([4], Noise(4000, label=0.5, box=0.4))
    (t,), size = targets, found.size
    corner = torch.tensor([[-0.5, -0.5, 0.5, 0.5]])
    xyxy = t.boxes_cxcywh[:, [0, 1, 0, 1]] + t.boxes_cxcywh[:, [2, 3, 2, 3]] * corner
    disturbed = found.boxes_cxcywh[0].view(size.num_groups, 2, 4, 4)
    disturbed = disturbed[..., [0, 1, 0, 1]] + disturbed[..., [2, 3, 2, 3]] * corner
    moved = (disturbed - xyxy).abs() / (t.boxes_cxcywh[:, [2, 3, 2, 3]] / 2)  # in half sides
    near, far = moved[:, 0], moved[:, 1]
    assert near.max() <= 0.4 + 1e-5 and near.max() > 0.39 and near.min() < 0.01
    assert far.min() >= 0.4 - 1e-5 and far.max() <= 0.8 + 1e-5 and far.max() > 0.78
    signs = (disturbed - xyxy)[:, 0].sign()
    assert abs(signs.mean()) < 0.05, "to either side alike"
    wrong = (found.labels[0].view(-1, 4) != t.labels).float().mean().item()
    assert wrong == pytest.approx(0.25 * (1 - 1 / CLASSES), abs=0.02), "a quarter drawn anew, some of them as before"


def test_boxes_stay_inside_the_image():
    _, found = queries([4], Noise(400, box=3.0))
    half = found.boxes_cxcywh[..., 2:].abs() / 2
    assert (found.boxes_cxcywh[..., :2] - half).min() >= -1e-6
    assert (found.boxes_cxcywh[..., :2] + half).max() <= 1 + 1e-6


@pytest.mark.law1
def test_an_images_noise_follows_from_its_position_alone():
    sizes, noise = [3, 0, 5, 1], Noise(20)
    _, whole = queries(sizes, noise)
    for i in range(4):
        targets = [target(sizes[i], i)]
        alone = noise.queries(targets, generators(3, 1, [i]), CLASSES, 5)
        assert torch.equal(alone.labels[0], whole.labels[i])
        assert torch.equal(alone.boxes_cxcywh[0], whole.boxes_cxcywh[i])
        one = whole.only(i)
        assert torch.equal(one.labels, alone.labels) and torch.equal(one.boxes_cxcywh, alone.boxes_cxcywh)
    for other in (generators(3, 1, [7]), generators(3, 2, [0]), generators(4, 1, [0])):
        again = noise.queries([target(3, 0)], other, CLASSES, 5)
        assert not torch.equal(again.boxes_cxcywh[0], whole.boxes_cxcywh[0]), "another place, epoch or seed"


@pytest.mark.law1
def test_the_criterions_noise_is_the_runs_place(make_rtdetr_recipe):
    from detr_accel import models

    criterion = models.build_criterion(make_rtdetr_recipe(), CLASSES)
    targets = [target(3, 0), target(2, 1)]
    batch = Batch(torch.zeros(2, 3, 8, 8), torch.zeros(2, 0, 0, dtype=torch.bool), targets, (6, 7), epoch=2)
    whole, part = criterion.disturb(batch, 3, 5), criterion.disturb(batch.part(1, 2), 3, 5)
    assert torch.equal(whole.boxes_cxcywh[1:], part.boxes_cxcywh) and torch.equal(whole.labels[1:], part.labels)


def test_groups_know_of_nobody_else_and_queries_of_no_group():
    _, found = queries([2, 1], Noise(6))
    size = found.size
    assert size == DenoisingSize(3, 2)
    may = found.may_see(5)[0, 0]
    n = size.num_queries
    for row in range(n + 5):
        for column in range(n + 5):
            own_group = row < n and column < n and row // 4 == column // 4
            assert may[row, column] == (column >= n or own_group), (row, column)


def test_double_precision_stays():
    t = target(2)
    t.boxes_cxcywh = t.boxes_cxcywh.double()
    found = Noise(4).queries([t], generators(0, 0, [0]), CLASSES, 2)
    assert found.boxes_cxcywh.dtype == torch.float64 and found.labels.dtype == torch.int64
    assert np.isfinite(found.boxes_cxcywh.numpy()).all()


def test_corners_that_have_changed_sides_span_a_box_where_that_is_wanted():
    """DEIM's: the same corners, and no negative without area."""
    (plain, mirrored) = (queries([3, 1], Noise(12, 0.5, 1.0, mirror))[1].boxes_cxcywh for mirror in (False, True))
    assert (plain[..., 2:] < 0).any() and (mirrored[..., 2:] >= 0).all()
    assert torch.equal(plain[..., :2], mirrored[..., :2]) and torch.equal(plain[..., 2:].abs(), mirrored[..., 2:])
