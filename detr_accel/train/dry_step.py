"""A training step and an evaluation of a recipe's detector on tensors without contents: what they would keep in memory.

Legend: a *moment* is a part of a step (forward, losses, backward, reduce, optimizer) or the evaluation; the peak of a
run is the highest of them.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)

from detr_accel import data, models
from detr_accel.models.deformable import reads_in_order
from detr_accel.models.denoising import DenoisingQueries, DenoisingSize, Noise
from detr_accel.models.matcher import Matcher, Matching
from detr_accel.recipe import Recipe
from detr_accel.structures import Batch, Targets, UserError
from detr_accel.train.live_bytes import LiveBytes, as_on_gpu
from detr_accel.train.optim import allocate_state, build_optimizer
from detr_accel.train.reduce import GradientReducer
from detr_accel.train.window import forward

MOMENTS = ("forward", "losses", "backward", "reduce", "optimizer", "evaluation")
COMPONENTS = (
    "weights", "gradients", "optimizer", "ema", "batch", "activations/backbone", "activations/encoder",
    "activations/decoder", "activations/heads_and_losses", "backward", "workspace",
)  # fmt: skip
_VALUES_WANTED = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


@dataclass(frozen=True)
class Layout:
    """Where a step runs.

    num_devices: processes, each with a device of its own on GPUs; precision: "no", "bf16" or "fp16".
    """

    num_devices: int
    on_gpu: bool
    precision: str


@dataclass(frozen=True)
class Peaks:
    """The most that is held in each moment, in bytes, and what it is made of."""

    moments: dict[str, int]
    components: dict[str, Counter[str]]  # moment -> component -> bytes

    @property
    def moment(self) -> str:
        """The one in which most is held."""
        return max(self.moments, key=self.moments.__getitem__)

    @property
    def bytes(self) -> int:
        return self.moments[self.moment]


def run(recipe: Recipe, demands: data.Demands, micro: int, layout: Layout) -> Peaks:
    """What the most demanding step and evaluation of a recipe hold on one device.

    Args:
        demands: the largest shapes that the data can bring.
        micro: images in a forward pass.
    Raises:
        UserError: the model cannot be built, or has more queries than cells.
    """
    live = LiveBytes(granule=512 if layout.on_gpu else 64)
    with torch.random.fork_rng(devices=[]):
        model = models.build(recipe, demands.num_classes, device="meta", load_weights=False)
    models.check_cells(recipe, model)
    kernels = as_on_gpu() if layout.on_gpu else nullcontext()
    in_order = reads_in_order(layout.on_gpu and recipe.deterministic)
    with kernels, in_order, FakeTensorMode(allow_non_fake_inputs=True), live:
        try:
            _DryStep(recipe, demands, layout, live, model).run(micro)
        except _VALUES_WANTED as error:
            raise UserError(
                f"{recipe.model.backbone.name} cannot be planned: a step of it depends on values, not on shapes alone "
                f"({error}); batch.micro=auto tries it for real"
            ) from None
    return Peaks({m: live.peaks[m][0] for m in MOMENTS}, {m: live.peaks[m][1] for m in MOMENTS})


class _DryStep:
    def __init__(self, recipe: Recipe, demands: data.Demands, layout: Layout, live: LiveBytes, model: nn.Module):
        self.recipe, self.demands, self.layout, self.live, self.model = recipe, demands, layout, live, model
        self.criterion = models.build_criterion(recipe, demands.num_classes)
        self.criterion.matcher = _FirstCome()
        self.share = len(data.share(recipe.batch.size, 0, layout.num_devices))

    def run(self, micro: int) -> None:
        """One micro-batch stands for all: where there are several, its gradients are added to those of the others."""
        live, model = self.live, self.model
        with live.new("weights"):
            _fill(model)
        with live.new("ema"):
            averaged = [torch.empty_like(t) for t in _state(model)] if self.recipe.ema.enabled else []
        parameters = [p for rows in models.param_groups(model).values() for _, p in rows]
        optimizer = self._optimizer()
        for p in parameters:
            p.register_post_accumulate_grad_hook(lambda p: live.belongs([p.grad], "gradients"))
        with live.new("gradients"):
            if self.share > micro or self.recipe.dist.overlap:
                for p in parameters:
                    p.grad = torch.empty_like(p)
        held = self._forward_backward(micro)
        live.begin("reduce")
        with live.new("workspace"):
            if self.layout.num_devices > 1 and not self.recipe.dist.overlap:
                for bucket in GradientReducer(parameters).buckets:
                    torch.cat([p.grad.reshape(-1) for p in bucket])
            live.begin("optimizer")
            torch.nn.utils.get_total_norm([p.grad for p in parameters])
            optimizer.step()
        self._evaluate()
        del averaged, held

    def _optimizer(self) -> torch.optim.Optimizer:
        o, live = self.recipe.optim, self.live
        optimizer = build_optimizer(
            models.param_groups(self.model), lr=o.lr, lr_backbone=o.lr_backbone, weight_decay=o.weight_decay,
            betas=o.betas, eps=o.eps, fused=self.layout.precision != "fp16",
            no_decay=models.not_decayed(self.model, o.no_decay),
        )  # fmt: skip
        if self.layout.on_gpu and self.layout.precision == "fp16":
            for group in optimizer.param_groups:
                group["foreach"] = True  # what AdamW chooses there
        with live.new("optimizer"):
            allocate_state(optimizer)
        return optimizer

    def _forward_backward(self, micro: int) -> list[Tensor]:
        """Returns what outlives it: on a CPU all micro-batches of the window lie in the same memory until the next
        window comes; a GPU gets one after the other."""
        live, model, demands = self.live, self.model, self.demands
        for component, part in model.parts.items():
            live.watch(part, f"activations/{component}")
        live.begin("forward")
        with live.new("batch"):
            others = [] if self.layout.on_gpu else _images(self.share - micro, demands.canvas_px)
            images, mask = _images(micro, demands.canvas_px)
            targets = _targets(micro, demands)
        with live.new("activations/heads_and_losses"):
            batch = Batch(images, mask, targets, tuple(range(micro)))
            denoising = _denoising(self.criterion.noise, micro, demands.most_boxes)
            with self._autocast():
                outputs, denoising = forward(model.train(), batch, denoising)
            if self.layout.precision != "no":
                outputs = _to_float32(outputs)
            live.begin("losses")
            boxes = micro * demands.most_boxes
            counts = torch.tensor([boxes, boxes, micro], dtype=torch.float64)
            counts = self.criterion.normalisers(counts)
            total = self.criterion.train()(outputs, targets, counts, denoising).total
        live.begin("backward")
        with live.new("backward"):
            total.backward()
        return [] if self.layout.on_gpu else [*others, images, mask]

    def _evaluate(self) -> None:
        live = self.live
        live.begin("evaluation")
        with torch.no_grad(), self._autocast():
            with live.new("batch"):
                images, mask = _images(self.recipe.evaluate.batch, self.demands.eval_canvas_px)
            with live.new("activations/heads_and_losses"):
                self.model.eval()(images, mask)

    def _autocast(self) -> torch.autocast:
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.layout.precision)
        return torch.autocast("cpu", half, enabled=half is not None)


class _FirstCome(Matcher):
    """Costs have shapes and no values here: query i takes target i."""

    def __call__(
        self, logits: Tensor, boxes: Tensor, labels: Tensor, boxes_cxcywh: Tensor, sizes: list[int]
    ) -> Matching:
        num_layers, num_images, num_queries = logits.shape[:3]
        image_index = torch.zeros(sum(sizes), dtype=torch.int64)
        self._cost(logits, boxes, labels, boxes_cxcywh, image_index)
        num_matched = sum(min(size, num_queries) for size in sizes)
        query, target = torch.zeros(2, num_layers, num_matched, dtype=torch.int64)
        return Matching(query, target, np.zeros(num_images, dtype=bool))


def _fill(model: nn.Module) -> None:
    """A model on the meta device -> the same with fake tensors in main memory, tied weights included."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype)
                    is_parameter = isinstance(old, nn.Parameter)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if is_parameter else new
                table[name] = made[id(old)]


def _state(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _images(count: int, canvas_px: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return torch.empty(count, 3, *canvas_px), torch.zeros(count, *canvas_px, dtype=torch.bool)


def _targets(count: int, demands: data.Demands) -> list[Targets]:
    size, most = demands.canvas_px, demands.most_boxes
    return [
        Targets(i, torch.zeros(most, dtype=torch.int64), torch.zeros(most, 4), size, size) for i in range(count)
    ]  # fmt: skip


def _denoising(noise: Noise | None, count: int, most: int) -> DenoisingQueries | None:
    """Of the right size: making real ones would look at values that are not there."""
    size = None if noise is None else DenoisingSize.of(noise.most_demanding(most), noise.num_denoising)
    if size is None:
        return None
    labels = torch.zeros(count, size.num_queries, dtype=torch.int64)
    return DenoisingQueries(labels, torch.zeros(count, size.num_queries, 4), size)


def _to_float32(outputs):
    """What Accelerate does with the outputs of a model in mixed precision."""
    if isinstance(outputs, Tensor):
        return outputs.float()
    if isinstance(outputs, dict):
        return {name: _to_float32(value) for name, value in outputs.items()}
    return [_to_float32(value) for value in outputs]
