"""Counts what makes the host wait for the device: .item(), .cpu(), .tolist(), boolean indexing."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode


class CountReads(TorchFunctionMode):
    """On the CPU nothing waits, but the calls are the same. ``reads`` has the name of each.

    Args:
        moves: count ``.to("cpu")`` too; False where the training device is the CPU and every ``.to(device)`` says so.
    """

    READS = {
        "item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__", "nonzero",
        "masked_select", "unique", "equal", "allclose", "is_nonzero", "argwhere", "__contains__", "bincount",
        "repeat_interleave", "_local_scalar_dense",
    }  # fmt: skip

    def __init__(self, moves: bool = True):
        super().__init__()
        self.moves = moves
        self.reads = []
        self.on_host = {}  # results of .cpu(): reading those again costs nothing

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        result = func(*args, **(kwargs or {}))
        if self._is_read(name, args, kwargs or {}):
            self.reads.append(name)
        if name == "cpu":
            self.on_host[id(result)] = result
        return result

    def _is_read(self, name, args, kwargs):
        if args and id(args[0]) in self.on_host:
            return False
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            return any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in index)
        if name == "to":
            return self.moves and any(str(a) == "cpu" for a in (*args[1:], *kwargs.values()))
        if name == "where":
            return len(args) == 1
        return name in self.READS
