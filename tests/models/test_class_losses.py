"""Class losses against their formulas, one query and class after the other."""

import math

import pytest
import torch

from detr_accel.models.class_losses import CrossEntropy, Matchability, Varifocal
from detr_accel.models.matcher import focal_cost


def case(num_classes=3):
    """Two layers, five queries, two pairs in each: query 4 is class 2 with overlap 0.7, query 1 class 0 with 0."""
    gen = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 5, num_classes, generator=gen, dtype=torch.float64, requires_grad=True)
    query = torch.tensor([[4, 1], [0, 3]])
    labels = torch.tensor([[2, 0], [1, 1]])
    overlap = torch.tensor([[0.7, 0.0], [0.25, 1.0]], dtype=torch.float64)
    return logits, query, labels, overlap


def bce(p: float, target: float) -> float:
    return -target * math.log(p) - (1 - target) * math.log(1 - p)


def by_hand(logits, query, labels, overlap, positive, negative) -> list[float]:
    """Sum over queries and classes of ``positive(p, q)`` where matched and ``negative(p)`` elsewhere."""
    sums = []
    for layer in range(len(logits)):
        rows = zip(query[layer].tolist(), labels[layer].tolist(), overlap[layer].tolist(), strict=True)
        pairs = {(i, c): q for i, c, q in rows}
        total = 0.0
        for i, row in enumerate(logits[layer].detach().sigmoid().tolist()):
            for c, p in enumerate(row):
                total += positive(p, pairs[i, c]) if (i, c) in pairs else negative(p)
        sums.append(total)
    return sums


def test_varifocal_is_the_papers():
    """q (q log p + (1 - q) log(1 - p)) where matched, alpha p^gamma log(1 - p) elsewhere."""
    loss = Varifocal(alpha=0.6, gamma=1.7)(*case())
    expected = by_hand(*case(), lambda p, q: q * bce(p, q), lambda p: 0.6 * p**1.7 * bce(p, 0))
    torch.testing.assert_close(loss.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_matchability_is_the_papers():
    """Targets q^gamma, weighing 1, where matched; p^gamma log(1 - p) elsewhere."""
    loss = Matchability(gamma=1.3)(*case())
    expected = by_hand(*case(), lambda p, q: bce(p, q**1.3), lambda p: p**1.3 * bce(p, 0))
    torch.testing.assert_close(loss.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_matched_query_whose_box_misses_teaches_nothing_under_varifocal_and_much_under_matchability():
    logits, query, labels, overlap = case()
    (grad,) = torch.autograd.grad(Varifocal()(logits, query, labels, overlap).sum(), logits)
    assert grad[0, 1, 0] == 0, "overlap 0: weight 0"
    (grad,) = torch.autograd.grad(Matchability()(logits, query, labels, overlap).sum(), logits)
    assert grad[0, 1, 0] > 0.1, "weight 1"


def test_weights_are_constants_for_the_gradient():
    logits, query, labels, overlap = case()
    (grad,) = torch.autograd.grad(Varifocal(0.75, 2.0)(logits, query, labels, overlap).sum(), logits)
    p = logits.detach()[0, 2, 1].sigmoid()
    assert grad[0, 2, 1].item() == pytest.approx((0.75 * p**2 * p).item())
    p = logits.detach()[0, 4, 2].sigmoid()
    assert grad[0, 4, 2].item() == pytest.approx((0.7 * (p - 0.7)).item())


@pytest.mark.parametrize("loss", [CrossEntropy(0.1), Varifocal(), Matchability()], ids=lambda x: x.name)
def test_without_pairs_every_query_is_told_nothing_and_the_graph_is_whole(loss):
    logits, *_ = case(4)
    none = torch.zeros(2, 0, dtype=torch.int64)
    found = loss(logits, none, none, torch.zeros(2, 0, dtype=torch.float64))
    assert (found > 0).all()
    (grad,) = torch.autograd.grad(found.sum(), logits)
    assert (grad[..., :3] > 0).all(), "less of each class"


@pytest.mark.parametrize("loss", [Varifocal(), Matchability()], ids=lambda x: x.name)
def test_extreme_logits_stay_finite(loss):
    logits = torch.tensor([[[80.0, -80.0], [-80.0, 80.0]]], requires_grad=True)
    found = loss(logits, torch.tensor([[0]]), torch.tensor([[1]]), torch.tensor([[0.9]]))
    (grad,) = torch.autograd.grad(found.sum(), logits)
    assert found.isfinite().all() and grad.isfinite().all()


def test_the_matching_cost_is_what_the_focal_loss_would_change():
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    image, labels = torch.tensor([0, 2, 2]), torch.tensor([4, 0, 3])
    cost = focal_cost(logits, image, labels)
    assert cost.shape == (2, 3, 4)
    for layer in range(2):
        for t in range(3):
            for q in range(4):
                p = logits[layer, image[t], q, labels[t]].sigmoid().item()
                found = 0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p**2 * -math.log(1 - p)
                assert cost[layer, t, q].item() == pytest.approx(found, abs=1e-6)
