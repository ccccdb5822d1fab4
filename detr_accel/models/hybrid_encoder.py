"""RT-DETR's hybrid encoder: attention on the coarsest map alone, convolutions between the maps.

Legend: B batch, D width, h w a map's size; maps go finest first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr_accel.models import recompute
from detr_accel.models.attention import shrink_mask, valid_keys
from detr_accel.models.autocast import no_autocast
from detr_accel.models.position import grid_positions
from detr_accel.models.transformer import Encoder, EncoderLayer


class ConvNorm(nn.Module):
    """Convolution, BatchNorm, SiLU (or nothing)."""

    def __init__(self, dim_in: int, dim_out: int, kernel: int = 1, stride: int = 1, activate: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim_out, kernel, stride, padding=(kernel - 1) // 2, bias=False)
        self.norm = nn.BatchNorm2d(dim_out)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        if len(x) == 1 and x.requires_grad and x.device.type == "cpu" and not torch.compiler.is_compiling():
            x.register_hook(_as_of_several)
        return F.silu(x, inplace=True) if self.activate else x


def _as_of_several(gradient: Tensor) -> Tensor:
    """A single image's gradient [1, C, h, w] with the strides that it would have among others.

    torch 2.14's BatchNorm on the CPU reads a gradient whose batch stride is shorter than an image in the wrong order,
    where its input is of the other memory format: silently wrong gradients, of batches of one alone.
    """
    if gradient.stride(0) >= gradient.numel():
        return gradient
    last = gradient.is_contiguous(memory_format=torch.channels_last)
    return gradient.clone(memory_format=torch.channels_last if last else torch.contiguous_format)


class RepVgg(nn.Module):
    """A 3x3 and a 1x1 convolution side by side, which inference can add into one.

    Source: Ding et al., RepVGG, CVPR 2021.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = ConvNorm(dim, dim, 3, activate=False)
        self.conv2 = ConvNorm(dim, dim, 1, activate=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.conv1(x) + self.conv2(x), inplace=True)


class CspRep(nn.Module):
    """Two branches of 1x1 convolutions, one of them through RepVGG blocks, added."""

    def __init__(self, dim_in: int, dim_out: int, expansion: float, num_blocks: int):
        super().__init__()
        hidden = int(dim_out * expansion)
        self.conv1 = ConvNorm(dim_in, hidden)
        self.conv2 = ConvNorm(dim_in, hidden)
        self.bottlenecks = nn.Sequential(*(RepVgg(hidden) for _ in range(num_blocks)))
        self.conv3 = ConvNorm(hidden, dim_out) if hidden != dim_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.bottlenecks(self.conv1(x)) + self.conv2(x))


class HybridEncoder(nn.Module):
    """Projects the backbone's maps to one width; self-attention on the coarsest; a pyramid down and up again.

    Args:
        channels: of the backbone's maps.
        dim: D.
        num_layers: self-attention layers.
        expansion: width inside the fusion blocks, as a share of D.
        num_blocks: RepVGG blocks in each fusion block.
        checkpointing: compute the parts again in backward instead of keeping them.
    Source: Zhao et al., DETRs Beat YOLOs on Real-time Object Detection, CVPR 2024.
    """

    def __init__(
        self,
        channels: Sequence[int],
        dim: int,
        num_heads: int,
        num_layers: int,
        dim_feedforward: int,
        dropout: float = 0.0,
        expansion: float = 1.0,
        num_blocks: int = 3,
        checkpointing: bool = False,
    ):
        super().__init__()
        shape = (dim, num_heads, dim_feedforward, dropout)
        self.input_proj = nn.ModuleList(ConvNorm(c, dim, activate=False) for c in channels)
        self.encoder = nn.ModuleList([Encoder([EncoderLayer(*shape, activation="gelu") for _ in range(num_layers)])])
        steps = range(len(channels) - 1)
        self.lateral_convs = nn.ModuleList(ConvNorm(dim, dim) for _ in steps)
        self.fpn_blocks = nn.ModuleList(CspRep(2 * dim, dim, expansion, num_blocks) for _ in steps)
        self.downsample_convs = nn.ModuleList(ConvNorm(dim, dim, 3, 2) for _ in steps)
        self.pan_blocks = nn.ModuleList(CspRep(2 * dim, dim, expansion, num_blocks) for _ in steps)
        self.checkpointing = checkpointing

    def forward(self, maps: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        """
        Args:
            maps: of the backbone, [B, C, h, w].
            mask: bool [B, H, W], True = padding; [B, 0, 0] where nothing is padded.
        Returns:
            as many maps [B, D, h, w].
        """
        maps = [projection(m) for projection, m in zip(self.input_proj, maps, strict=True)]
        maps[-1] = self._attend(maps[-1], mask)
        down = [maps[-1]]  # coarsest first
        for lateral, fuse, finer in zip(self.lateral_convs, self.fpn_blocks, maps[-2::-1], strict=True):
            down[-1] = lateral(down[-1])
            coarse = F.interpolate(down[-1], size=finer.shape[-2:], mode="nearest")
            down.append(recompute.call(self.checkpointing, fuse, torch.cat((coarse, finer), 1)))
        down.reverse()
        up = [down[0]]
        for shrink, fuse, coarser in zip(self.downsample_convs, self.pan_blocks, down[1:], strict=True):
            h, w = coarser.shape[-2:]  # some backbones leave out an odd map's last row and column, as this does not
            up.append(recompute.call(self.checkpointing, fuse, torch.cat((shrink(up[-1])[..., :h, :w], coarser), 1)))
        return up

    def _attend(self, features: Tensor, mask: Tensor) -> Tensor:
        """[B, D, h, w] -> the same, every cell knowing every other."""
        size = features.shape[-2:]
        tokens = features.flatten(2).transpose(1, 2)  # [B, h*w, D]
        key_valid = None
        if mask.numel():
            key_valid = valid_keys(shrink_mask(mask, size).flatten(1))
        with no_autocast(features.device):
            pos = grid_positions(*size, tokens.shape[-1], tokens.device).to(tokens.dtype)
        tokens = self.encoder[0](tokens, pos[None], key_valid)
        return tokens.transpose(1, 2).unflatten(2, size)
