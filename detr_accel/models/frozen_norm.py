"""Frozen BatchNorm, and convolutions that carry it.

A frozen BatchNorm is y = s * conv(x, W) + t with constants s = weight / sqrt(running_var + eps) and
t = bias - running_mean * s. ``fold_norms`` computes y = conv(x, W * s, t) instead: no pass over the activations for the
norm, and nothing kept for it. The parameter stays the unfolded W, so that AdamW (whose step does not depend on the
scale of a gradient) trains the very same model as without folding.

Legend: B batch, C channels, O output channels, H W feature size.
"""

from __future__ import annotations

import torch
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from detr_accel.models.autocast import as_autocast_would


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm whose statistics and affine are buffers: weight, bias, running_mean, running_var, each [C].

    As torchvision's (no num_batches_tracked, eps of the norm it replaces). timm's norms may carry dropout and an
    activation (BatchNormAct2d); they are kept behind it.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm):
        super().__init__()
        for name, default in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            value = getattr(norm, name)
            like = next(t for t in (norm.running_mean, norm.weight) if t is not None)
            self.register_buffer(name, torch.full_like(like, default) if value is None else value.detach().clone())
        self.eps = norm.eps
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())
        self.folded = False  # True: a FoldedConv2d applies scale and shift

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """s [C] and t [C]."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        if not self.folded:
            scale, shift = (v.to(x.dtype).view(1, -1, 1, 1) for v in self.scale_and_shift())
            x = x * scale + shift
        return self.act(self.drop(x))

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}, folded={self.folded}"


def _folded_weight(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    # channels-last is what the activations are: writing W * s in that layout spares a reorder inside the convolution
    return (weight * scale.view(-1, 1, 1, 1)).to(dtype).contiguous(memory_format=torch.channels_last)


class _FoldedConv(torch.autograd.Function):
    """conv(x, W * s, t) that keeps x and W for backward and folds again there.

    Autograd alone would keep W * s too: 170 MB for ResNet-101, in exchange for a multiplication.
    """

    @staticmethod
    def forward(ctx, x, weight, scale, shift, stride, padding, dilation, groups):
        ctx.save_for_backward(x, weight, scale)
        ctx.conv = (stride, padding, dilation, False, (0, 0), groups)
        return F.conv2d(x, _folded_weight(weight, scale, x.dtype), shift.to(x.dtype), stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]  # the shift, where the convolution has a bias
        folded = _folded_weight(weight, scale, x.dtype)
        results = torch.ops.aten.convolution_backward(grad, x, folded, [len(scale)], *ctx.conv, wanted)
        grad_x, grad_w, grad_shift = results
        if grad_w is not None:
            # written in the parameter's own layout, so that it becomes .grad without another copy
            out = torch.empty_like(weight)
            grad_w = torch.mul(grad_w.to(weight.dtype), scale.view(-1, 1, 1, 1), out=out)
        return grad_x, grad_w, None, grad_shift, None, None, None, None


class FoldedConv2d(nn.Module):
    """A convolution and the frozen norm behind it, in one.

    Owns ``weight`` [O, C, kh, kw], unfolded, under the convolution's name; the norm keeps its buffers under its own
    name, so that state dicts are those of the unfolded pair.
    """

    def __init__(self, conv: nn.Conv2d, norm: FrozenBatchNorm2d):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.in_channels, self.out_channels, self.kernel_size = conv.in_channels, conv.out_channels, conv.kernel_size
        self.same = isinstance(conv, Conv2dSame)  # TensorFlow's padding, which depends on the input size
        self._norm = (norm,)  # in a tuple: a reference, not a submodule
        norm.folded = True

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self._norm[0].scale_and_shift()
        if self.bias is not None:
            shift = shift + self.bias * scale
        x = as_autocast_would(x)
        padding = self.padding
        if self.same:
            x, padding = pad_same(x, self.kernel_size, self.stride, self.dilation), (0, 0)
        return _FoldedConv.apply(x, self.weight, scale, shift, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"


def freeze_norms(module: nn.Module) -> int:
    """Replace every BatchNorm inside ``module`` by a frozen one, in place; returns how many. Other norms (LayerNorm,
    GroupNorm) have no running statistics and stay as they are."""
    count = 0
    for name, child in list(module.named_children()):
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, FrozenBatchNorm2d(child))
            count += 1
        else:
            count += freeze_norms(child)
    return count


def fold_norms(body: nn.Module, input_size: int = 64) -> int:
    """Fold each frozen norm into the convolution that alone feeds it, in place; returns how many.

    Which convolution feeds which norm is observed in one small forward, not guessed from names: the pair is folded only
    when the convolution ran once, its output went into that norm and nowhere else.
    """
    parents = {child: (parent, name) for parent in body.modules() for name, child in parent.named_children()}
    pairs = _observe_pairs(body, input_size)
    for conv, norm in pairs:
        parent, name = parents[conv]
        setattr(parent, name, FoldedConv2d(conv, norm))
    return len(pairs)


class _CountUses(TorchFunctionMode):
    """How many torch functions read each tensor."""

    def __init__(self):
        super().__init__()
        self.uses: dict[int, int] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        is_getter = getattr(func, "__name__", "") == "__get__"  # .shape, .device: looks, does not read
        flat = [] if is_getter else [*args, *(kwargs or {}).values()]
        for value in flat:
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, Tensor):
                    self.uses[id(tensor)] = self.uses.get(id(tensor), 0) + 1
        return func(*args, **(kwargs or {}))


def _observe_pairs(body: nn.Module, input_size: int) -> list[tuple[nn.Conv2d, FrozenBatchNorm2d]]:
    outputs: dict[int, tuple] = {}  # id of an output -> its convolution, and the output itself: ids are reused
    runs: dict[nn.Module, int] = {}
    fed: list[tuple[int, nn.Conv2d, FrozenBatchNorm2d]] = []
    mode = _CountUses()

    def after_conv(conv, _, output):
        runs[conv] = runs.get(conv, 0) + 1
        outputs[id(output)] = (conv, output)
        mode.uses[id(output)] = 0  # an earlier tensor, freed by now, may have had this id

    def before_norm(norm, inputs):
        runs[norm] = runs.get(norm, 0) + 1
        if id(inputs[0]) in outputs:
            fed.append((id(inputs[0]), outputs[id(inputs[0])][0], norm))

    handles = [m.register_forward_hook(after_conv) for m in body.modules() if _foldable(m)]
    handles += [m.register_forward_pre_hook(before_norm) for m in body.modules() if isinstance(m, FrozenBatchNorm2d)]
    like = next(body.parameters())
    was_training = body.training
    body.eval()
    try:
        with torch.no_grad(), mode:
            body(torch.zeros(1, 3, input_size, input_size, dtype=like.dtype, device=like.device))
    finally:
        body.train(was_training)
        for handle in handles:
            handle.remove()
    return [(conv, norm) for tensor, conv, norm in fed if runs[norm] == runs[conv] == mode.uses[tensor] == 1]


def _foldable(module: nn.Module) -> bool:
    plain = type(module) in (nn.Conv2d, Conv2dSame)
    return plain and module.padding_mode == "zeros" and not isinstance(module.padding, str)
