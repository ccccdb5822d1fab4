"""What a training is made of, built from its recipe; the loop holds it together."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from detr_accel import data, models
from detr_accel.recipe import Recipe
from detr_accel.structures import UserError
from detr_accel.train.ema import Ema
from detr_accel.train.health import Health
from detr_accel.train.optim import allocate_state, build_optimizer, lr_schedule
from detr_accel.train.reduce import broadcast_weights
from detr_accel.train.window import WindowRunner


@dataclass(frozen=True)
class Length:
    """How long the run is, in windows."""

    per_epoch: int
    total: int

    def due(self, window: int, every_epochs: float, every_steps: int | None = None) -> bool:
        """Is something that happens every so many epochs (or windows) due after ``window`` windows?"""
        every = max(1, round(every_epochs * self.per_epoch))
        counted = every_steps is not None and window % every_steps == 0
        return counted or window % every == 0 or window == self.total


@dataclass
class Parts:
    """Everything but the state."""

    recipe: Recipe
    accelerator: Accelerator
    splits: data.Splits
    length: Length
    bare: nn.Module  # the model without wrappers
    criterion: nn.Module
    groups: dict[str, list[tuple[str, nn.Parameter]]]
    optimizer: torch.optim.Optimizer
    prepared: torch.optim.Optimizer  # the same, as Accelerate steps it
    ema: Ema | None
    runner: WindowRunner
    factor: Callable[[int], float]  # of the learning rate, by step
    health: Health
    loaded: list[str]  # what to say about the weights
    loading: data.Loading | None = None  # loader processes and their queues, once they are settled
    room: data.workers.Room | None = None  # for them; what all processes agreed on
    head_loaded: float = 0.0  # share of the class head's rows that model.init_from brought

    @property
    def classes(self):
        return self.splits.train.classes

    @property
    def evaluated(self) -> nn.Module:
        """The weights that evaluation and the world outside use."""
        return self.bare if self.ema is None else self.ema.module


def build(recipe: Recipe, accelerator: Accelerator, splits: data.Splits, *, resume: bool) -> Parts:
    """Model, optimizer and runner, on their device, the same on every process.

    Args:
        resume: weights come from a checkpoint afterwards: none are looked for, on disk or elsewhere.
    Raises:
        UserError: weights that cannot be had or do not fit; more queries than cells.
    """
    num_classes = len(splits.train.classes)
    bare = models.build(recipe, num_classes, load_weights=not resume)
    models.check_cells(recipe, bare)
    loaded, head_loaded = [], 0.0
    if recipe.model.init_from is not None and not resume:
        fresh = bare.class_rows.detach().clone()  # [C, D]
        loaded = models.init_from(bare, splits.train.classes, recipe.model)
        head_loaded = (bare.class_rows != fresh).any(1).double().mean().item()
    bare.to(accelerator.device)
    criterion = models.build_criterion(recipe, num_classes).to(accelerator.device)
    groups = models.param_groups(bare, norms_apart=recipe.optim.lr_backbone_norms is not None)
    length = measure(recipe, len(splits.train))
    o, h = recipe.optim, recipe.health
    optimizer = build_optimizer(
        groups, lr=o.lr, lr_backbone=o.lr_backbone, weight_decay=o.weight_decay, betas=o.betas, eps=o.eps,
        fused=accelerator.scaler is None, no_decay=models.not_decayed(bare, o.no_decay),
        lr_backbone_norms=o.lr_backbone_norms,
    )  # fmt: skip
    allocate_state(optimizer)
    ema = Ema(bare, recipe.ema.decay, recipe.ema.warmup_steps) if recipe.ema.enabled else None
    health = Health(
        h.on_nonfinite, strikes=h.strikes, within=h.within, lr_factor=h.lr_factor, give_up_after=h.give_up_after,
        overflow_patience=h.overflow_patience,
    )  # fmt: skip
    runner = WindowRunner(
        accelerator, bare, criterion, groups, loss_names=criterion.loss_names(bare.num_decoder_layers),
        seed=recipe.seed, overlap=recipe.dist.overlap,
        own_canvas=data.reads_its_own(splits.train, accelerator.num_processes),
    )  # fmt: skip
    return Parts(
        recipe, accelerator, splits, length, bare, criterion, groups, optimizer, optimizer, ema, runner,
        schedule_of(recipe, length), health, loaded, head_loaded=head_loaded,
    )  # fmt: skip


def prepare(parts: Parts) -> None:
    """Hand model and optimizer to Accelerate, and the first process's weights to all; every process takes part."""
    accelerator, bare = parts.accelerator, parts.bare
    broadcast_weights([*bare.parameters(), *bare.buffers()])
    if parts.ema is not None:
        broadcast_weights([*parts.ema.module.parameters(), *parts.ema.module.buffers()])
    parts.runner.model = accelerator.prepare_model(bare, evaluation_mode=not parts.recipe.dist.overlap)
    parts.prepared = accelerator.prepare_optimizer(parts.optimizer)
    if accelerator.scaler is not None:  # it makes its scale on first use, and a process may have no image in a window
        accelerator.scaler.scale(torch.zeros(1, device=accelerator.device))


def agree_on_room(parts: Parts) -> None:
    """What the loader of each process may use; every process takes part, as some may be pinned to few cores."""
    machines = gather_object([data.workers.machine()])
    parts.room = data.workers.room(machines, parts.recipe.data.queue_gib)


def measure(recipe: Recipe, num_images: int) -> Length:
    """How many windows a recipe asks for."""
    per_epoch = data.windows_per_epoch(num_images, recipe.batch.size)
    return Length(per_epoch, data.total_windows(recipe, num_images))


def too_short(recipe: Recipe, length: Length) -> list[str]:
    """Words for a run that ends before its warm-up does."""
    warmup = recipe.schedule.warmup_steps
    if warmup < length.total:
        return []
    return [
        f"beware: schedule.warmup_steps is {warmup} and the run ends after {length.total}: the learning rate rises to "
        "the end and never comes to optim.lr; lower it, or train longer"
    ]


def window_size(parts: Parts, window: int) -> int:
    """Images of a window over all processes, as planned."""
    within, size = window % parts.length.per_epoch, parts.recipe.batch.size
    return min(size, len(parts.splits.train) - within * size)


def schedule_of(recipe: Recipe, length: Length) -> Callable[[int], float]:
    s = recipe.schedule
    return lr_schedule(
        s.kind, length.total, warmup_steps=s.warmup_steps, drop_at=s.drop_at, gamma=s.gamma, min_factor=s.min_factor,
        fall=s.fall, warmup=s.warmup,
    )  # fmt: skip


def lr_factor(parts: Parts, state) -> float:
    """What every group's learning rate is multiplied by in the next step: the schedule, and what happened since."""
    factor = plateau_factor(parts.recipe.schedule, parts.factor(state.step), state.plateau.drops)
    return factor * state.health.lr_factor


def plateau_factor(schedule, factor: float, drops: int) -> float:
    """A schedule's factor with the drops that evaluations have caused.

    Args:
        schedule: the recipe's section.
    """
    return factor * max(schedule.min_factor, schedule.gamma**drops) if schedule.kind == "plateau" else factor


def seed_everything(seed: int, deterministic: bool) -> None:
    """Initial weights; everything later is seeded by its place in the run."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def batch_arithmetic(size: int, micro: int, num_ranks: int, num_images: int | None) -> str:
    """The line that says how a window is cut.

    Args:
        num_images: in the training split; None where that is not known.
    Raises:
        UserError: fewer images in a window than processes.
    """
    if size < num_ranks:
        raise UserError(
            f"batch.size is {size} but there are {num_ranks} processes, so some would never have an image: raise "
            f"batch.size to at least {num_ranks} or launch with --num_processes {size}"
        )
    shares = [len(data.share(size, rank, num_ranks)) for rank in range(num_ranks)]
    processes = f"{num_ranks} process{'es' * (num_ranks > 1)}"
    if len(set(shares)) == 1 and shares[0] % micro == 0:
        times = shares[0] // micro
        cut = f"{processes} x {times} micro-batch{'es' * (times > 1)} x {micro} image{'s' * (micro > 1)}"
    else:
        cut = f"{processes} with {', '.join(map(str, shares))}, in micro-batches of at most {micro}"
    if num_images is None:
        return f"batch: {size} images per step = {cut}"
    windows = data.windows_per_epoch(num_images, size)
    last = num_images - (windows - 1) * size
    tail = f", the last with {last} image{'s' * (last > 1)}" if last != size else ""
    return f"batch: {size} images per step = {cut}; {num_images} images = {windows} steps per epoch{tail}"
