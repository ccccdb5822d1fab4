"""Activation checkpointing: parts of a model that are computed again in backward instead of being kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def call(again: bool, part: nn.Module, *args: Any) -> Any:
    """``part(*args)``; with ``again``, and where there will be a backward, keeping only its arguments until then."""
    if again and torch.is_grad_enabled():
        return run_again(part, [part], *args)
    return part(*args)


def run_again(function: Callable, modules: Sequence[nn.Module], *args: Any) -> Any:
    """``function(*args)`` now and once more in backward. Generators are restored, so that dropout repeats.

    Args:
        modules: all that the function calls. A live BatchNorm among them sees the same images twice, and must not move
            its statistics a second time.
    """
    return checkpoint(function, *args, use_reentrant=False, context_fn=partial(_contexts, modules))


def _contexts(modules: Sequence[nn.Module]) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _still_statistics(modules)


@contextmanager
def _still_statistics(modules: Sequence[nn.Module]) -> Iterator[None]:
    norms = [m for part in modules for m in part.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, num_batches_tracked) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches_tracked
