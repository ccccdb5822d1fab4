"""The hybrid encoder: shapes, padding, recomputation, and gradients of a single image."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detr_accel.models.hybrid_encoder import ConvNorm, CspRep, HybridEncoder, RepVgg
from detr_accel.models.position import grid_positions

CHANNELS, SIZES = (3, 5, 7), ((8, 12), (4, 6), (2, 3))
REACH = {1: (3, 3, 3), 3: (9, 8, 7)}  # blocks a fusion -> columns of each map that what lies beside it can change


@pytest.fixture
def make_encoder(randomise):
    def make(num_blocks=1, checkpointing=False, train=False):
        made = HybridEncoder(CHANNELS, 8, 2, 1, 16, expansion=0.5, num_blocks=num_blocks, checkpointing=checkpointing)
        return randomise(made).double().train(train)

    return make


def maps(batch=2, scale=1, seed=0):
    gen = torch.Generator().manual_seed(seed)
    pairs = zip(CHANNELS, SIZES, strict=True)
    return [torch.randn(batch, c, scale * h, scale * w, generator=gen, dtype=torch.float64) for c, (h, w) in pairs]


def nothing(batch=2):
    return torch.zeros(batch, 0, 0, dtype=torch.bool)


@pytest.mark.parametrize(
    "sizes",
    [SIZES, ((7, 11), (4, 6), (2, 3)), ((5, 5), (3, 3), (2, 2)), ((7, 11), (3, 5), (1, 2)), ((9, 4), (4, 2), (2, 1))],
)
def test_every_level_keeps_its_size_also_where_a_backbone_rounds_odd_sides_up_or_down(make_encoder, sizes):
    odd = [torch.randn(2, c, h, w, dtype=torch.float64) for c, (h, w) in zip(CHANNELS, sizes, strict=True)]
    assert [m.shape for m in make_encoder()(odd, nothing())] == [(2, 8, *size) for size in sizes]


def test_a_repvgg_block_is_one_convolution(randomise):
    """Its 1x1 kernel lies in the middle of its 3x3 one, once norms are folded in."""
    block = randomise(RepVgg(4)).double().eval()
    weight, bias = 0, 0
    for part in (block.conv1, block.conv2):
        norm = part.norm
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        kernel = part.conv.weight * factor[:, None, None, None]
        weight = weight + (kernel if kernel.shape[-1] == 3 else F.pad(kernel, (1, 1, 1, 1)))
        bias = bias + norm.bias - norm.running_mean * factor
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(block(x), F.silu(F.conv2d(x, weight, bias, padding=1)))


@pytest.mark.parametrize("expansion, widens", [(0.5, True), (1.0, False)])
def test_a_fusion_block_widens_again_only_where_it_has_narrowed(expansion, widens):
    block = CspRep(8, 4, expansion, 2)
    assert isinstance(block.conv3, ConvNorm) == widens and len(block.bottlenecks) == 2
    assert block(torch.randn(1, 8, 3, 3)).shape == (1, 4, 3, 3)


def test_positions_tell_rows_from_columns():
    code = grid_positions(3, 5, 8, torch.device("cpu")).view(3, 5, 8)
    assert torch.equal(code[0, :, :4], code[0, :1, :4].expand(5, 4)), "the first half is the row's"
    assert torch.equal(code[:, 0, 4:], code[:1, 0, 4:].expand(3, 4)), "the second the column's"
    assert len({tuple(c.tolist()) for c in code.flatten(0, 1)}) == 15


@pytest.mark.parametrize("num_blocks", REACH)
def test_what_padding_holds_reaches_no_farther_than_the_convolutions(make_encoder, num_blocks):
    """Attention knows the padding; a convolution at the image's border sees what lies beyond it. That is zeros where
    the canvas ends, and whatever the backbone has made of zeros where it is padded."""
    encoder = make_encoder(num_blocks)
    first, mask = maps(scale=8), torch.zeros(2, 512, 768, dtype=torch.bool)
    mask[:, :, 384:] = True
    other = [m.clone() for m in first]
    for m in other:
        m[..., m.shape[-1] // 2 :] += 3
    with torch.no_grad():
        one, two = encoder(first, mask), encoder(other, mask)
    for a, b, reach in zip(one, two, REACH[num_blocks], strict=True):
        changed = ((a - b).abs().amax((0, 1, 2)) > 1e-12)[: a.shape[-1] // 2]  # columns of the image
        assert changed.sum() == reach and changed[-reach:].all(), int(changed.sum())
    mask[:] = False
    with torch.no_grad():
        far = [(a - b).abs()[..., 0].max() for a, b in zip(encoder(first, mask), encoder(other, mask), strict=True)]
    assert min(far) > 1e-6, "and without the mask it is seen from everywhere"


@pytest.mark.law4
@pytest.mark.parametrize("train", [False, True])
def test_checkpointing_changes_no_number(make_encoder, train):
    """Nor the statistics of live norms, which see every image once."""
    found = []
    for on in (False, True):
        encoder, given = make_encoder(checkpointing=on, train=train), [m.requires_grad_() for m in maps()]
        sum((m * (i + 1)).square().sum() for i, m in enumerate(encoder(given, nothing()))).backward()
        grads = [m.grad for m in given] + [p.grad for p in encoder.parameters()]
        found.append(grads + [b.clone() for b in encoder.buffers()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.law1
@pytest.mark.parametrize("train", [False, True])
def test_a_single_images_gradient_survives_its_ambiguous_strides(randomise, train):
    """With one image, a gradient that comes as tokens looks channels-last whatever its batch stride, and torch's
    BatchNorm on the CPU then reads it in the wrong order."""
    layer = randomise(ConvNorm(3, 4, activate=False)).double().train(train)
    x, weight = torch.randn(1, 3, 4, 6, dtype=torch.float64), torch.randn(1, 40, 4, dtype=torch.float64)

    def gradient(apply):
        layer.zero_grad()
        (apply(x).flatten(2).transpose(1, 2) * weight[:, :24]).sum().backward()
        return layer.conv.weight.grad.clone(), layer.norm.bias.grad.clone()

    def plain(x):  # the same norm by hand
        y, norm = layer.conv(x), layer.norm
        mean, var = norm.running_mean, norm.running_var
        if train:
            mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
        y = (y - mean[:, None, None]) / (var[:, None, None] + norm.eps).sqrt()
        return y * norm.weight[:, None, None] + norm.bias[:, None, None]

    def joined(x):  # as the decoder joins its levels
        tokens = layer(x).flatten(2).transpose(1, 2)
        return torch.cat((tokens, tokens.new_zeros(1, 16, 4)), 1)[:, :24].transpose(1, 2).unflatten(2, (4, 6))

    expected = gradient(plain)
    for apply in (layer, joined):
        for a, b in zip(gradient(apply), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_live_norms_are_live_and_eval_keeps_them(make_encoder):
    encoder = make_encoder(train=True)
    before = [m.running_mean.clone() for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    encoder(maps(), nothing())
    after = [m.running_mean for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    kept = [m.clone() for m in after]
    encoder.eval()(maps(), nothing())
    assert all(torch.equal(a, b) for a, b in zip(kept, after, strict=True))
