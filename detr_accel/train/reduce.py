"""Summing gradients and counts over processes, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter


def all_reduce_sum(tensor: Tensor, device: torch.device) -> Tensor:
    """The sum of ``tensor`` over all processes, on ``device`` (the one whose backend communicates). No host sync."""
    tensor = tensor.to(device, non_blocking=True)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: Tensor, device: torch.device) -> Tensor:
    """As ``all_reduce_sum``, each element's largest."""
    tensor = tensor.to(device, non_blocking=True)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


class GradientReducer:
    """Sums ``.grad`` over processes after the window's last backward, in flat buckets of a fixed order.

    Backward itself stays silent, so a process that fails in the middle of it meets no collective. A gradient that is
    missing here (a process without images in a short last window) counts as zero; on one process it becomes zero too,
    so that every layout hands the optimizer the same set of parameters.

    Args:
        parameters: the trainable parameters, in the same order on every process.
        bucket_bytes: size of one flat buffer; the buffers are the only extra memory.
    """

    def __init__(self, parameters: Iterable[Parameter], bucket_bytes: int = 32 * 2**20) -> None:
        self.buckets: list[list[Parameter]] = [[]]
        filled = 0
        for p in parameters:
            size = p.numel() * p.element_size()
            if self.buckets[-1] and (filled + size > bucket_bytes or self.buckets[-1][0].dtype != p.dtype):
                self.buckets.append([])
                filled = 0
            self.buckets[-1].append(p)
            filled += size

    def __call__(self) -> None:
        many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        for bucket in self.buckets:
            for p in bucket:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            if many:
                self._reduce(bucket)

    @staticmethod
    def _reduce(bucket: Sequence[Parameter]) -> None:
        # logical order, not memory order: a channels-last gradient here may be contiguous on another process
        flat = torch.cat([p.grad.reshape(-1) for p in bucket])
        dist.all_reduce(flat)
        parts = flat.split([p.numel() for p in bucket])
        torch._foreach_copy_(
            [p.grad for p in bucket], [part.view(p.shape) for part, p in zip(parts, bucket, strict=True)]
        )


def broadcast_weights(tensors: Iterable[Tensor]) -> None:
    """Copy the first process's tensors to all others, once, before the first window."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, src=0)
