"""AdamW with DETR's parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable

import torch
from torch.nn import Parameter

from detr_accel.structures import UserError


def build_optimizer(
    groups: dict[str, list[tuple[str, Parameter]]],
    *,
    lr: float,
    lr_backbone: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    fused: bool = False,
    no_decay: Collection[str] = (),
    lr_backbone_norms: float | None = None,
) -> torch.optim.AdamW:
    """AdamW over named groups; decay on everything, as DETR does, unless told otherwise.

    Args:
        groups: group name -> named trainable parameters; the group ``backbone`` learns at lr_backbone, and
            ``backbone_norms`` at lr_backbone_norms.
        no_decay: names of parameters that do not decay.
        fused: one kernel for the whole step, on CPU and GPU: the same update, rounded differently. Not with fp16: the
            fused step skips an overflow inside the kernel, unseen by Accelerate, which then reports a step taken.
    Returns:
        the optimizer; each of its groups carries ``name`` and ``base_lr``. A group of which some parameters do not
        decay becomes two of the same name.
    Raises:
        UserError: there is nothing to train.
    """
    rows, rates = [], {"backbone": lr_backbone, "backbone_norms": lr_backbone_norms}
    for name, parameters in groups.items():
        base_lr = rates.get(name, lr)
        for kept, decay in ((False, weight_decay), (True, 0.0)):
            params = [p for n, p in parameters if (n in no_decay) == kept]
            if params:
                rows.append(
                    {"params": params, "lr": base_lr, "base_lr": base_lr, "name": name, "weight_decay": decay}
                )
    if not rows:
        raise UserError(
            "no weight of the model trains: set optim.lr_backbone above 0, or let another part require a gradient"
        )
    return torch.optim.AdamW(rows, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


def lr_schedule(
    kind: str,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    drop_at: Iterable[float] = (),
    gamma: float = 0.1,
    min_factor: float = 0.0,
    fall: tuple[float, float] = (0.5, 1.0),
    warmup: str = "linear",
) -> Callable[[int], float]:
    """Factor on every group's learning rate.

    Args:
        kind: ``step``, ``cosine``, ``flat_cosine``, ``constant``, or ``plateau``, whose drops follow from evaluations
            and come on top.
        total_steps: length of the training in optimizer steps.
        warmup_steps: the factor rises; the first step already learns, at 1 / warmup_steps or its square.
        drop_at: fractions of total_steps at which ``step`` multiplies by gamma.
        fall: fractions of total_steps between which ``flat_cosine`` falls from 1 to min_factor.
        warmup: ``linear``, or ``quadratic``: the factor is the square of the linear one.
    Returns:
        a function from the number of steps already taken to the factor of the next one; without state, so that a
        resumed or a rolled-back run only needs its step.
    """
    drops = sorted(round(fraction * total_steps) for fraction in drop_at)

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
        warm = warm**2 if warmup == "quadratic" else warm
        if kind == "step":
            return warm * gamma ** sum(step >= drop for drop in drops)
        if kind == "cosine":
            return warm * _cosine(step, warmup_steps, total_steps, min_factor)
        if kind == "flat_cosine":
            return warm * _cosine(step, round(fall[0] * total_steps), round(fall[1] * total_steps), min_factor)
        assert kind in ("constant", "plateau"), kind
        return warm

    return factor


def _cosine(step: int, start: int, end: int, floor: float) -> float:
    """1 up to ``start``, ``floor`` from ``end`` on, half a cosine between."""
    progress = min(1.0, max(0, step - start) / max(1, end - start))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Set every group's rate to base_lr * factor; returns the rates by group name."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


@torch.no_grad()
def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer's moments now, so that the first window does not run out of memory in the middle of a step.
    A step with gradients and rate of zero moves nothing; its count is taken back."""
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for p in parameters:
        p.grad = None
        optimizer.state[p]["step"].zero_()
