import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

from detr_accel.models.backbone import Backbone
from detr_accel.models.frozen_norm import FoldedConv2d, FrozenBatchNorm2d, fold_norms, freeze_norms


def _pair(randomise, name):
    """The same frozen backbone, plain and folded, in double precision."""
    plain = randomise(Backbone(name, norm="frozen", fold=False).double())
    folded = Backbone(name, norm="frozen", fold=True).double()
    folded.load_state_dict(plain.state_dict())
    return plain, folded


def test_frozen_norm_equals_torchvisions(randomise):
    ours = randomise(FrozenBatchNorm2d(nn.BatchNorm2d(5, eps=1e-3)))
    theirs = torchvision.ops.FrozenBatchNorm2d(5, eps=1e-3)
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(ours(x), theirs(x))
    assert not list(ours.parameters())


def test_freezing_keeps_what_timm_puts_behind_the_norm():
    """EfficientNet's norms carry their activation: dropping it, or adding one to ResNet's, would be another net."""
    torch.manual_seed(0)
    for name in ("resnet18", "tf_efficientnet_lite0", "mobilenetv3_small_050"):
        live = timm.create_model(name, features_only=True, pretrained=False).eval()
        frozen = copy.deepcopy(live)
        assert freeze_norms(frozen) > 10
        x = torch.randn(1, 3, 64, 64)
        for a, b in zip(live(x), frozen(x), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])  # the second pads as TensorFlow does
def test_folding_gives_the_unfolded_outputs_and_gradients(randomise, name):
    plain, folded = _pair(randomise, name)
    assert sum(isinstance(m, FoldedConv2d) for m in folded.modules()) == sum(
        isinstance(m, FrozenBatchNorm2d) for m in folded.modules()
    )
    assert list(plain.state_dict()) == list(folded.state_dict())
    x = torch.randn(1, 3, 65, 75, dtype=torch.float64)
    outputs = [net(x)[0] for net in (plain, folded)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-10)
    for output in outputs:
        output.pow(2).mean().backward()
    for (key, a), b in zip(plain.named_parameters(), folded.parameters(), strict=True):
        assert a.grad.abs().max() > 0, key
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-12, msg=key)


def test_adamw_trains_the_unfolded_model(randomise):
    """Folding into the parameter itself would change AdamW's step; folding at each forward must not."""
    plain, folded = _pair(randomise, "resnet18")
    for net in (plain, folded):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.randn(1, 3, 32, 40, dtype=torch.float64, generator=generator))[0].pow(2).mean().backward()
            optimizer.step()
    for (key, a), b in zip(plain.named_parameters(), folded.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-9, msg=key)


def test_folding_follows_the_statistics_that_are_loaded_later(randomise):
    _, folded = _pair(randomise, "resnet18")
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    before = folded(x)[0]
    with torch.no_grad():
        folded.body.bn1.running_mean.add_(1)
    assert not torch.allclose(folded(x)[0], before)


class _Net(nn.Module):
    """Convolutions and norms in every relation that matters to folding."""

    def __init__(self):
        super().__init__()
        self.biased, self.biased_norm = nn.Conv2d(3, 8, 3, dilation=2), nn.BatchNorm2d(8)
        self.grouped, self.grouped_norm = nn.Conv2d(8, 8, 3, groups=4, stride=2, bias=False), nn.BatchNorm2d(8)
        self.forked, self.forked_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.twice, self.first_norm, self.second_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.named, self.named_norm = nn.Conv2d(8, 8, 3, padding="same"), nn.BatchNorm2d(8)
        self.joined_norm = nn.BatchNorm2d(16)

    def forward(self, x):
        x = self.biased_norm(self.biased(x)).relu()
        x = self.grouped_norm(self.grouped(x)).relu()
        y = self.forked(x)
        x = self.forked_norm(y) + y
        x = self.second_norm(self.twice(self.first_norm(self.twice(x)).relu()))
        x = self.named_norm(self.named(x))
        return self.joined_norm(torch.cat((x, y), 1))


def test_only_a_norm_fed_by_one_convolution_alone_is_folded(randomise):
    plain = _Net().double()
    freeze_norms(plain)
    folded = copy.deepcopy(randomise(plain))
    assert fold_norms(folded) == 2
    assert isinstance(folded.biased, FoldedConv2d) and isinstance(folded.grouped, FoldedConv2d)
    x = torch.randn(2, 3, 24, 24, dtype=torch.float64, requires_grad=True)
    grads = []
    for net in (plain, folded):
        out = net(x)
        grads.append((out, torch.autograd.grad(out.pow(2).sum(), [x, *net.parameters()])))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-9)


def test_folding_keeps_no_folded_weight_for_backward(randomise):
    _, folded = _pair(randomise, "resnet18")
    own = {t.data_ptr() for t in (*folded.parameters(), *folded.buffers())}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        folded(torch.randn(1, 3, 64, 64, dtype=torch.float64))
    shapes = {tuple(p.shape) for p in folded.parameters()}
    assert not [t.shape for t in kept if tuple(t.shape) in shapes and t.dim() == 4 and t.data_ptr() not in own]
