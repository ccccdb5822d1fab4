"""Watching one forward and one backward, module by module, for the first number that is not finite.

Legend: L decoder layers, B images, Q queries. A module is guilty in forward when all it was given is finite and what
it returns is not; in backward when the gradients of all its outputs are finite and that of an input, or of a parameter
of its own, is not. Inner modules finish before the module around them, so the innermost guilty one comes first; a
module around others is named only where none of them is guilty: a sum or an attention that lies between them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

ROOT = "detector"  # the name of the whole model, which has none


@dataclass
class Spot:
    """A place where numbers stop being finite."""

    module: str
    what: str  # output, gradient of the input, gradient of NAME, ...
    shape: list[int]
    num_bad: int
    low: float  # range of the finite entries; nan where there are none
    high: float
    image_bad: list[bool] | None = None  # for each of B images; None where the tensor is not cut by images
    image_peak: list[float] | None = None  # for each image the largest finite |input| of the module
    peak_input: float = math.nan  # largest finite |input|
    peak_weight: float = math.nan  # largest finite |weight| of the module itself; nan where it has none
    bad_weights: int = 0  # entries of its own weights that are not finite
    seen_first: str = ""  # the inner module that was the first to return such numbers


@dataclass
class _Call:
    """One call of one module."""

    name: str
    module: nn.Module
    inputs: list[Tensor]
    clean: bool  # all inputs finite
    out_times: list[int] = field(default_factory=list)
    out_finite: bool = True
    in_times: list[int] = field(default_factory=list)
    in_spot: tuple[int, Spot] | None = None


class Trace:
    """Watches a model as a context manager; each module's finiteness costs one read of the device.

    Inputs are replaced by views of themselves, so that a gradient belongs to one module even where a tensor goes to
    several. Module backward hooks would forbid in-place activations; hooks on tensors do not.

    Args:
        num_layers, num_images, num_queries: L, B and Q, to cut tensors by images.
    """

    def __init__(self, model: nn.Module, *, num_layers: int, num_images: int, num_queries: int) -> None:
        self.names = {module: name or ROOT for name, module in model.named_modules()}
        self.root = model
        self.shape = (num_layers, num_images, num_queries)
        self.found: Spot | None = None  # guilty in forward
        self.reached: Spot | None = None  # first output that is not finite, whatever the module was given
        self._calls: list[_Call] = []
        self._stack: list[_Call] = []
        self._clock = 0

    def __enter__(self) -> Trace:
        self._hooks = []
        for module in self.names:
            self._hooks.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._leave))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def forward(self) -> Spot | None:
        """The guilty module, or else the first that passed on what it was given."""
        return self.found or self.reached

    def backward(self) -> tuple[Spot | None, bool]:
        """After backward: the guilty module nearest the loss, and whether the loss handed over finite gradients."""
        handed = all(call.out_finite for call in self._calls if call.module is self.root)
        found = []
        for call in self._calls:
            if not call.out_times or not call.out_finite:
                continue
            if call.in_spot is not None:
                found.append(call.in_spot)
            elif (spot := self._own_gradient(call)) is not None:
                found.append((max(call.in_times or call.out_times), spot))
        return min(found, key=lambda pair: pair[0], default=(0, None))[1], handed

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        inputs = list(tensors((args, kwargs)))
        clean = self.found is None and all(is_finite(t) for t in inputs)
        call = _Call(self.names[module], module, inputs, clean)
        self._stack.append(call)
        aliases: dict[int, Tensor] = {}  # one view for one tensor: attention asks whether query is key
        return tuple(self._alias(a, call, aliases) for a in args), {
            k: self._alias(a, call, aliases) for k, a in kwargs.items()
        }

    def _alias(self, value: Any, call: _Call, aliases: dict[int, Tensor]) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad or not torch.is_grad_enabled():
            return value
        if id(value) not in aliases:
            view = aliases[id(value)] = value.view_as(value)
            view.register_hook(partial(self._grad_in, call))
        return aliases[id(value)]

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        call, outputs = self._stack.pop(), list(tensors(output))
        if self.found is None:
            bad = next((t for t in outputs if not is_finite(t)), None)
            if bad is not None:
                self._blame(call, bad)
        call.inputs = []
        self._calls.append(call)
        for t in outputs:
            if t.requires_grad:
                t.register_hook(partial(self._grad_out, call))

    def _blame(self, call: _Call, output: Tensor) -> None:
        spot = self._spot(call, "output", output)
        peaks = [self._by_image(t) for t in call.inputs]
        peaks = [_peak(p) for p in peaks if p is not None]
        if peaks:
            spot.image_peak = torch.stack(peaks).amax(0).tolist()
        spot.peak_input = max((_peak(t.detach().reshape(1, -1)).item() for t in call.inputs), default=math.nan)
        first = self.reached
        self.reached = first or spot
        if call.clean:
            spot.seen_first = first.module if first else ""
            self.found = spot

    def _grad_out(self, call: _Call, grad: Tensor) -> None:
        self._clock += 1
        call.out_times.append(self._clock)
        call.out_finite &= is_finite(grad)

    def _grad_in(self, call: _Call, grad: Tensor) -> None:
        self._clock += 1
        call.in_times.append(self._clock)
        if call.in_spot is None and not is_finite(grad):
            call.in_spot = (self._clock, self._spot(call, "gradient of its input", grad))

    def _own_gradient(self, call: _Call) -> Spot | None:
        for name, p in call.module.named_parameters(recurse=False):
            if p.grad is not None and not is_finite(p.grad):
                spot = self._spot(call, f"gradient of its {name}", p.grad)
                spot.image_bad = None
                return spot
        return None

    def _spot(self, call: _Call, what: str, value: Tensor) -> Spot:
        spot = describe(call.name, what, value)
        parts = self._by_image(value)
        spot.image_bad = None if parts is None else (~torch.isfinite(parts)).any(1).tolist()
        weights = [p.detach() for p in (*call.module.parameters(False), *call.module.buffers(False)) if p.numel()]
        weights = [w for w in weights if w.is_floating_point()]
        spot.bad_weights = sum(int((~torch.isfinite(w)).sum()) for w in weights)
        spot.peak_weight = max((_peak(w.reshape(1, -1)).item() for w in weights), default=math.nan)
        return spot

    def _by_image(self, t: Tensor) -> Tensor | None:
        """[B, ...], [L, B, Q, ...] or [B * windows, ...] -> [B, rest]; None where images cannot be told apart."""
        num_layers, num_images, num_queries = self.shape
        t = t.detach()
        if t.dim() == 4 and tuple(t.shape[:3]) == (num_layers, num_images, num_queries):
            return t.movedim(1, 0).flatten(1)
        if t.dim() < 2 or len(t) == 0 or len(t) % num_images:
            return None
        return t.reshape(num_images, -1)


def describe(module: str, what: str, value: Tensor) -> Spot:
    """A spot with its figures; ``value`` of any shape."""
    flat = value.detach().flatten()
    finite = flat[torch.isfinite(flat)]
    low, high = (finite.min().item(), finite.max().item()) if len(finite) else (math.nan, math.nan)
    return Spot(module, what, list(value.shape), len(flat) - len(finite), low, high)


def tensors(value: Any) -> Iterator[Tensor]:
    """Every floating-point tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def is_finite(t: Tensor) -> bool:
    """Every entry; one read of the device."""
    return bool(torch.isfinite(t.detach()).all())


def _peak(rows: Tensor) -> Tensor:
    """[R, n] -> [R]: the largest finite magnitude of each row; 0 where there is none."""
    if rows.shape[1] == 0:
        return torch.zeros(len(rows), dtype=torch.float64)
    return torch.where(torch.isfinite(rows), rows.abs(), 0).amax(1).to("cpu", torch.float64)
