"""Exponential moving average of the weights, for evaluation and for the model that is handed over."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn


class Ema:
    """Keeps ``module``, an averaged copy of a model.

    The decay in force after t updates is ``decay * (1 - exp(-t / warmup_steps))``: the first average is the model,
    and random initial weights are forgotten quickly. Floating-point parameters are averaged; buffers (running
    statistics, frozen norms) are copied.

    Source: the warm-up is RT-DETR's (arXiv 2304.08069, released code's settings); it averages running statistics too.
    """

    def __init__(self, model: nn.Module, decay: float, warmup_steps: int) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        self.warmup_steps = warmup_steps
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One accepted optimizer step later."""
        self.updates += 1
        decay = self.decay * (1 - math.exp(-self.updates / self.warmup_steps))
        mine, theirs = list(self.module.parameters()), list(model.parameters())
        torch._foreach_lerp_(mine, theirs, 1 - decay)
        for own, new in zip(self.module.buffers(), model.buffers(), strict=True):
            own.copy_(new)
