"""Counting what a step keeps in memory, without computing it.

Under ``FakeTensorMode`` tensors have shapes, strides and storages, and no contents: the operations of a training step
run through autograd as they would, in milliseconds, and every storage lives exactly as long as it would. What is
counted is what operations return; what a kernel takes and gives back while it runs is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that live, by component, and the most of them in each moment of a step.

    Args:
        granule: allocations are rounded up to a multiple of so many bytes.
    """

    def __init__(self, granule: int = 64) -> None:
        super().__init__()
        self.granule = granule
        self.component = "other"  # whose the next new storage is
        self.held: Counter[str] = Counter()
        self.peaks: dict[str, tuple[int, Counter[str]]] = {}  # moment -> (bytes, by component) where it was highest
        self._moment = "start"
        self._known: dict[int, list] = {}  # address of a storage -> [component, bytes]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._see(value)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        num_bytes = -(-storage.nbytes() // self.granule) * self.granule
        self._known[key] = [self.component, num_bytes]
        weakref.finalize(storage, self._forget, key).atexit = False
        self.held[self.component] += num_bytes
        self._note()

    def _forget(self, key: int) -> None:
        component, num_bytes = self._known.pop(key)
        self.held[component] -= num_bytes

    def _note(self) -> None:
        total = sum(self.held.values())
        if total > self.peaks.get(self._moment, (-1, None))[0]:
            self.peaks[self._moment] = (total, Counter(self.held))

    def begin(self, moment: str) -> None:
        """From here on peaks are this moment's."""
        self._moment = moment
        self._note()

    def belongs(self, tensors: Iterable[Tensor], component: str) -> None:
        """Say whose some storages are."""
        for tensor in tensors:
            row = self._known.get(tensor.untyped_storage()._cdata)
            if row is not None:
                self.held[row[0]] -= row[1]
                self.held[component] += row[1]
                row[0] = component

    @contextmanager
    def new(self, component: str) -> Iterator[None]:
        """What is made inside is this component's."""
        before, self.component = self.component, component
        try:
            yield
        finally:
            self.component = before

    def watch(self, module: nn.Module, component: str) -> None:
        """What a module's forward makes is this component's."""
        before: list[str] = []

        def enter(*_) -> None:
            before.append(self.component)
            self.component = component

        def leave(*_) -> None:
            self.component = before.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Let fake CPU tensors take the way that they would take on a GPU, where it keeps something else for backward.

    Attention in one kernel keeps no weights (a CPU with dropout keeps them); dropout keeps a mask of one byte for each
    element; LayerNorm under autocast computes in float32. (Not as a torch function mode: none is on inside backward,
    where checkpointed parts run again.)
    """
    own = {name: getattr(F, name) for name in _ON_GPU}
    try:
        for name, there in _ON_GPU.items():
            setattr(F, name, there)
        yield
    finally:
        for name, here in own.items():
            setattr(F, name, here)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    bias = None
    if attn_mask is not None:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype)
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


def _dropout(x, p=0.5, training=True, inplace=False):
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def _layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    if torch.is_autocast_enabled("cpu"):
        x = x.float()
    return torch.layer_norm(x, normalized_shape, weight, bias, eps)


_ON_GPU = {"scaled_dot_product_attention": _attention, "dropout": _dropout, "layer_norm": _layer_norm}
