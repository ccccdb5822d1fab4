"""The innermost module that turns finite numbers into others is found, and watching changes nothing."""

import pytest
import torch
from torch import Tensor, nn

from detr_accel.train.trace import ROOT, Trace


class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("nan")


class Part(nn.Module):
    """A linear layer; ``fault`` is applied to what it returns."""

    def __init__(self, fault=None):
        super().__init__()
        self.inner, self.fault = nn.Linear(4, 4), fault

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return self.fault(out) if self.fault else out


class Net(nn.Module):
    """Two parts read the same tensor; an in-place activation follows one of them."""

    def __init__(self, first=None, second=None):
        super().__init__()
        self.stem, self.act = nn.Linear(4, 4), nn.ReLU(inplace=True)
        self.first, self.second = Part(first), Part(second)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.act(self.stem(x))
        return {"out": self.act(self.first(x)) + self.second(x) + x}


def watch(net: Net, x: Tensor | None = None) -> Trace:
    torch.manual_seed(0)
    x = torch.randn(3, 4) if x is None else x
    with Trace(net, num_layers=1, num_images=3, num_queries=5) as trace:
        out = net(x)["out"]
    if trace.forward is None:
        out.sum().backward()
    return trace


def test_a_healthy_net_has_no_guilty_module():
    trace = watch(Net())
    assert trace.forward is None and trace.backward() == (None, True)


def test_what_lies_between_inner_modules_is_blamed_on_the_module_around_them():
    trace = watch(Net(second=lambda out: out * 1e38 * 1e38))
    assert trace.found.module == "second" and trace.found.what == "output"


def test_an_inner_module_is_blamed_before_the_one_around_it():
    net = Net()
    with torch.no_grad():
        net.second.inner.weight[0, 0] = float("inf")
    trace = watch(net)
    assert trace.found.module == "second.inner" and trace.found.bad_weights == 1


def test_a_module_that_was_given_bad_numbers_is_not_guilty():
    trace = watch(Net(), torch.tensor([[1.0] * 4, [float("nan")] * 4, [1.0] * 4]))
    assert trace.found is None and trace.forward.module == "stem"
    assert trace.forward.image_bad == [False, True, False]


@pytest.mark.parametrize("guilty", ["first", "second"])
def test_of_two_readers_of_one_tensor_the_one_with_the_bad_gradient_is_named(guilty):
    # the gradient is spoiled between inner and the part's own output: the part is the innermost that saw it turn
    spot, handed = watch(Net(**{guilty: BadGradient.apply})).backward()
    assert handed and spot.module == guilty and spot.what == "gradient of its input"


def test_a_bad_gradient_from_the_loss_is_not_blamed_on_a_module():
    net = Net()
    with Trace(net, num_layers=1, num_images=3, num_queries=5) as trace:
        out = net(torch.randn(3, 4))["out"]
    (out * float("nan")).sum().backward()
    assert trace.backward() == (None, False)


def test_the_root_stands_for_what_no_inner_module_did():
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1e38 * 1e38

    net = Sum()
    with Trace(net, num_layers=1, num_images=3, num_queries=5) as trace:
        net(torch.ones(3, 4))
    assert trace.found.module == ROOT


def test_watching_leaves_gradients_and_modules_as_they_are():
    torch.manual_seed(1)
    net, x = Net(), torch.randn(3, 4)
    net(x)["out"].sum().backward()
    wanted = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    watch(net, x)
    assert all(torch.allclose(p.grad, w) for p, w in zip(net.parameters(), wanted, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
