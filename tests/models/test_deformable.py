"""Deformable attention against a slow loop: one query, head, level and point after the other."""

import math

import pytest
import torch

from detr_accel.models import deformable
from detr_accel.models.deformable import DeformableAttention, Levels, levels_of

SIZES, HEADS, DIM, POINTS = ((4, 6), (2, 3)), 2, 8, (3, 2)
NO_MASK = torch.zeros(2, 0, 0, dtype=torch.bool)


def layer(sampling="bilinear", points=POINTS, seed=0) -> DeformableAttention:
    made = DeformableAttention(DIM, HEADS, points, sampling).double()
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=gen, dtype=torch.float64) * 0.4)
    return made


def inputs(seed=1, sizes=SIZES):
    gen = torch.Generator().manual_seed(seed)
    tokens = sum(h * w for h, w in sizes)
    query = torch.randn(2, 5, DIM, generator=gen, dtype=torch.float64)
    boxes = torch.rand(2, 5, 4, generator=gen, dtype=torch.float64)  # some of their points lie outside
    return query, boxes, torch.randn(2, tokens, DIM, generator=gen, dtype=torch.float64)


def bilinear(values: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """values [h, w, D]; x and y in cells, 0 being the centre of the first; 0 outside."""
    h, w = values.shape[:2]
    out = torch.zeros(values.shape[-1], dtype=values.dtype)
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            if 0 <= i < h and 0 <= j < w:
                out += (1 - abs(y - i)) * (1 - abs(x - j)) * values[i, j]
    return out


def nearest(values: torch.Tensor, x: float, y: float) -> torch.Tensor:
    h, w = values.shape[:2]
    return values[min(max(int(y + 1), 0), h - 1), min(max(int(x + 1), 0), w - 1)]  # y + 1/2 + 1/2


@torch.no_grad()
def slow(attention, query, boxes, memory, levels: Levels, take) -> torch.Tensor:
    value = attention.value_proj(memory)
    if levels.valid is not None:
        value = value * levels.valid[..., None]
    total = sum(attention.num_points)
    out = torch.zeros_like(query)
    for b in range(len(query)):
        for q in range(query.shape[1]):
            offsets = attention.sampling_offsets(query[b, q]).view(HEADS, total, 2)
            weights = attention.attention_weights(query[b, q]).view(HEADS, total).softmax(-1)
            heads = []
            for head in range(HEADS):
                found, k, start = 0, 0, 0
                for i, (h, w) in enumerate(levels.sizes):
                    values = value[b, start : start + h * w].view(h, w, HEADS, -1)[:, :, head]
                    start += h * w
                    for _ in range(attention.num_points[i]):
                        cx, cy, bw, bh = boxes[b, q].tolist()
                        x = cx + offsets[head, k, 0].item() / attention.num_points[i] * bw * 0.5
                        y = cy + offsets[head, k, 1].item() / attention.num_points[i] * bh * 0.5
                        if levels.ratios is not None:
                            x, y = x * levels.ratios[b, i, 0].item(), y * levels.ratios[b, i, 1].item()
                        found = found + weights[head, k] * take(values, x * w - 0.5, y * h - 0.5)
                        k += 1
                heads.append(found)
            out[b, q] = attention.output_proj(torch.cat(heads))
    return out


@pytest.mark.parametrize("sampling, take", [("bilinear", bilinear), ("discrete", nearest)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("points", [POINTS, (1, 4)])
def test_it_is_what_the_slow_loop_finds(sampling, take, padded, points):
    attention, (query, boxes, memory) = layer(sampling, points), inputs()
    levels = Levels(SIZES)
    if padded:
        mask = torch.zeros(2, 32, 48, dtype=torch.bool)
        mask[1, 16:], mask[1, :, 32:] = True, True
        levels = levels_of([torch.zeros(2, DIM, *size) for size in SIZES], mask)
        torch.testing.assert_close(levels.ratios[1], torch.tensor([[4 / 6, 1 / 2], [2 / 3, 1 / 2]]))
    with torch.no_grad():
        found = attention(query, boxes, memory, levels)
    torch.testing.assert_close(found, slow(attention, query, boxes, memory, levels, take), rtol=1e-10, atol=1e-12)


def test_what_padding_holds_is_not_seen():
    mask = torch.zeros(2, 32, 48, dtype=torch.bool)
    mask[1, :, 32:] = True
    levels = levels_of([torch.zeros(2, DIM, *size) for size in SIZES], mask)
    query, boxes, memory = inputs()
    attention, other = layer(), memory + 100 * ~levels.valid[..., None]
    assert not torch.equal(memory, other)
    torch.testing.assert_close(attention(query, boxes, memory, levels), attention(query, boxes, other, levels))


@pytest.mark.parametrize("sampling, trains", [("bilinear", True), ("discrete", False)])
def test_gradients_are_those_of_finite_differences(sampling, trains):
    attention, (query, boxes, memory) = layer(sampling), inputs()
    attention.sampling_offsets.requires_grad_(trains)
    levels = Levels(SIZES)
    one = memory[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: attention(query[:1], boxes[:1], m, levels), one)
    memory.requires_grad_()
    attention(query, boxes, memory, levels).square().sum().backward()
    assert (attention.sampling_offsets.weight.grad is not None) == trains
    assert memory.grad.abs().sum() > 0


def test_a_new_layer_looks_along_rays_that_grow_with_the_points():
    attention = DeformableAttention(DIM, 4, (4, 4))
    bias = attention.sampling_offsets.bias.view(4, 8, 2)
    assert bias[0, :4].tolist() == [[1, 0], [2, 0], [3, 0], [4, 0]] and torch.equal(bias[:, :4], bias[:, 4:])
    torch.testing.assert_close(bias[1, 0], torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)
    assert not attention.attention_weights.weight.any(), "all points weigh the same"
    assert not DeformableAttention(DIM, 4, (4,), "discrete").sampling_offsets.weight.requires_grad


def test_places_stay_in_full_precision_under_autocast():
    """bfloat16 has 8 bits: on a map of 80 cells a place would be off by a third of a cell."""
    attention, (query, boxes, memory) = layer().float(), [x.float() for x in inputs()]
    full = attention._places(attention.sampling_offsets(query), boxes, Levels(SIZES))
    seen, plain = [], attention._places

    def watch(offsets, reference_boxes, levels):
        seen.append(plain(offsets, reference_boxes, levels))
        return seen[-1]

    attention._places = watch
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(query, boxes, memory, Levels(SIZES))
    assert out.dtype == torch.bfloat16
    for place, exact in zip(seen[0], full, strict=True):
        assert place.dtype == torch.float32
        torch.testing.assert_close(place, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sizes", [(4, 6), (1, 1), (3, 2)])
def test_reads_in_a_fixed_order_find_what_grid_sample_finds(sizes):
    gen = torch.Generator().manual_seed(5)
    features = torch.randn(3, 2, *sizes, generator=gen, dtype=torch.float64, requires_grad=True)
    places = (torch.rand(3, 7, 4, 2, generator=gen, dtype=torch.float64) * 1.6 - 0.3).requires_grad_()  # some outside
    weight = torch.randn(3, 2, 7, 4, generator=gen, dtype=torch.float64)
    found = []
    for take in (deformable._bilinear, deformable._bilinear_in_order):
        out = take(features, places)
        found.append((out, *torch.autograd.grad((out * weight).sum(), (features, places))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_gradient_twice_where_that_was_asked_for():
    attention, (query, boxes, memory) = layer().float().cuda(), (x.float().cuda() for x in inputs())
    levels = levels_of([memory.new_zeros(2, DIM, h, w) for h, w in SIZES], NO_MASK.cuda())
    torch.use_deterministic_algorithms(True)
    try:
        grads = []
        for _ in range(2):
            given = memory.clone().requires_grad_()
            attention(query, boxes, given, levels).square().sum().backward()
            grads.append(given.grad)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*grads)
