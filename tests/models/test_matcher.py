import itertools

import numpy as np
import pytest
import torch
from torchvision.ops import generalized_box_iou

from detr_accel.boxes import cxcywh_to_xyxy
from detr_accel.models.matcher import Matcher, assign


def _outputs(num_layers, num_images, num_queries, num_classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_layers, num_images, num_queries, num_classes + 1, generator=generator)
    boxes = torch.rand(num_layers, num_images, num_queries, 4, generator=generator) * 0.4 + 0.3
    return logits, boxes


def _targets(sizes, num_classes=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (sum(sizes),), generator=generator)
    return labels, torch.rand(sum(sizes), 4, generator=generator) * 0.4 + 0.3


def _total_cost(logits, boxes, labels, targets, pairs):
    """Written out term by term, with torchvision's GIoU."""
    overlap = generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets))
    probability = logits.softmax(-1)
    return sum(
        float(5 * (boxes[q] - targets[t]).abs().sum() - probability[q, labels[t]] - 2 * overlap[q, t]) for q, t in pairs
    )


@pytest.mark.parametrize("sizes", [[2, 0, 3], [1, 4, 2], [6, 1, 0]])  # more targets than queries, too
def test_each_layer_and_image_gets_its_cheapest_assignment(sizes):
    num_queries = 4
    logits, boxes = _outputs(3, 3, num_queries)
    labels, targets = _targets(sizes)
    match = Matcher(1, 5, 2)(logits, boxes, labels, targets, sizes)
    assert match.query_index.shape == match.target_index.shape == (3, sum(min(s, num_queries) for s in sizes))
    assert not match.bad_image.any()
    starts = np.concatenate(([0], np.cumsum(sizes)))
    for layer, image in itertools.product(range(3), range(3)):
        mine = match.query_index[layer] // num_queries == image
        queries = (match.query_index[layer][mine] - image * num_queries).tolist()
        chosen = (match.target_index[layer][mine] - starts[image]).tolist()
        own = slice(starts[image], starts[image + 1])
        args = (logits[layer, image], boxes[layer, image], labels[own], targets[own])
        pool = min(sizes[image], num_queries)
        assert len(set(queries)) == len(set(chosen)) == pool
        every = (
            _total_cost(*args, zip(q, t, strict=True))
            for q in itertools.permutations(range(num_queries), pool)
            for t in itertools.combinations(range(sizes[image]), pool)
        )
        assert _total_cost(*args, zip(queries, chosen, strict=True)) == pytest.approx(min(every), abs=1e-5)


def test_empty_targets_give_empty_match():
    logits, boxes = _outputs(2, 2, 4)
    match = Matcher()(logits, boxes, *_targets([0, 0]), [0, 0])
    assert match.query_index.shape == (2, 0)
    assert match.bad_image.tolist() == [False, False]


@pytest.mark.law3
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("sizes", [[2, 6, 1], [2, 0, 1]])  # the poisoned image: more targets than queries; none
def test_non_finite_image_is_marked_and_takes_the_fixed_assignment_in_all_layers(value, sizes):
    num_queries = 4
    logits, boxes = _outputs(3, 3, num_queries)
    labels, targets = _targets(sizes)
    healthy = Matcher()(logits, boxes, labels, targets, sizes)
    (boxes if sizes[1] else logits)[1, 1, 2, 0] = value  # one layer, one image, one query
    match = Matcher()(logits, boxes, labels, targets, sizes)
    assert match.bad_image.tolist() == [False, True, False]
    sick = match.query_index // num_queries == 1
    for layer in range(3):
        fixed = list(range(min(sizes[1], num_queries)))
        assert (match.query_index[layer][sick[layer]] - num_queries).tolist() == fixed
        assert (match.target_index[layer][sick[layer]] - sizes[0]).tolist() == fixed
    assert torch.equal(match.query_index[~sick], healthy.query_index[~sick])  # the neighbours are matched as ever
    assert torch.equal(match.target_index[~sick], healthy.target_index[~sick])


def test_poison_in_a_target_marks_its_image():
    logits, boxes = _outputs(1, 2, 4)
    labels, targets = _targets([1, 1])
    targets[1] = float("nan")
    assert Matcher()(logits, boxes, labels, targets, [1, 1]).bad_image.tolist() == [False, True]


def test_finite_cost_is_never_overruled():
    """The fixed assignment is for poison only: here it would be the dearest one."""
    cost = np.array([[[9.0, 1.0], [1.0, 9.0]]])  # [L=1, T=2, Q=2]
    queries, targets = assign(cost, [2], 2, np.array([False]))[:, 0]
    assert dict(zip(targets.tolist(), queries.tolist(), strict=True)) == {0: 1, 1: 0}
