"""The training, straight down the page: set up, then one window after another.

Two counters: ``window`` only ever grows (sample order, seeds, the log's axis); ``step`` counts accepted updates
(schedule, average). Sample order, augmentation and dropout are functions of (seed, epoch, position), so the place in
the run is all that a resume needs to know about randomness.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from detr_accel import data, models, monitor
from detr_accel import recipe as recipes
from detr_accel.recipe import Recipe
from detr_accel.structures import StepStats, UserError
from detr_accel.train import checkpoint, launch, validation
from detr_accel.train.ema import Ema
from detr_accel.train.optim import build_optimizer, lr_schedule, set_lr
from detr_accel.train.reduce import broadcast_weights
from detr_accel.train.run_folder import RunFolder
from detr_accel.train.window import WindowResult, WindowRunner


@dataclass(frozen=True)
class Length:
    """How long the run is, in windows."""

    per_epoch: int
    total: int

    def due(self, window: int, every_epochs: float) -> bool:
        """Is something that happens every so many epochs due after ``window`` windows?"""
        every = max(1, round(every_epochs * self.per_epoch))
        return window % every == 0 or window == self.total


def train(recipe: Recipe, *, runs: Path = Path("runs"), resume: bool = False) -> Path:
    """Train what the recipe says; returns the run folder.

    Args:
        runs: the folder that holds all runs.
        resume: go on from the last whole checkpoint of runs/NAME.
    Raises:
        UserError: anything the person can mend, in one sentence.
    """
    accelerator = launch.make_accelerator(
        recipe.precision, recipe.device, recipe.dist.overlap, recipe.dist.timeout_minutes,
        log_with_wandb=recipe.log.wandb.enabled, project_dir=runs / recipe.name,
    )  # fmt: skip
    run = RunFolder(runs / recipe.name)
    main = accelerator.is_main_process
    _agree(accelerator, lambda: _claim(run, resume))
    try:
        _seed_everything(recipe.seed, recipe.deterministic)
        finished = _train(recipe, accelerator, run, resume)
        if main:
            run.status("done" if finished else "resume")
    except BaseException as error:
        if main:
            interrupted = isinstance(error, KeyboardInterrupt)
            run.status("resume" if interrupted else "failed", reason=str(error) or type(error).__name__)
        raise
    finally:
        if main:
            run.release()
    return run.path


def _train(recipe: Recipe, accelerator: Accelerator, run: RunFolder, resume: bool) -> bool:
    """Returns whether the end was reached (False: asked to stop, state saved)."""
    # -- data and model
    main, device = accelerator.is_main_process, accelerator.device
    saved_split = run.path / "split.json"
    splits = data.build(recipe, json.loads(saved_split.read_text()) if resume and saved_split.exists() else None)
    length = _length(recipe, len(splits.train))
    arithmetic = batch_arithmetic(recipe, accelerator.num_processes, len(splits.train))
    with accelerator.local_main_process_first():  # the first process downloads weights, the others find them
        bare = models.build(recipe, len(splits.train.classes))
        loaded = []
        if recipe.model.init_from is not None and not resume:
            loaded = models.init_from(bare, splits.train.classes, recipe.model.init_from, recipe.model.init_head)
    bare.to(device)
    broadcast_weights([*bare.parameters(), *bare.buffers()])
    criterion = models.build_criterion(recipe, len(splits.train.classes)).to(device)
    groups = models.param_groups(bare)
    optimizer = build_optimizer(
        groups, lr=recipe.optim.lr, lr_backbone=recipe.optim.lr_backbone, weight_decay=recipe.optim.weight_decay,
        betas=recipe.optim.betas, eps=recipe.optim.eps, fused=accelerator.scaler is None,
    )  # fmt: skip
    s = recipe.schedule
    factor = lr_schedule(
        s.kind, length.total, warmup_steps=s.warmup_steps, drop_at=s.drop_at, gamma=s.gamma, min_factor=s.min_factor
    )
    ema = Ema(bare, recipe.ema.decay, recipe.ema.warmup_steps) if recipe.ema.enabled else None
    model = accelerator.prepare_model(bare, evaluation_mode=not recipe.dist.overlap)
    prepared = accelerator.prepare_optimizer(optimizer)
    runner = WindowRunner(
        accelerator, model, criterion, groups, loss_names=criterion.loss_names(recipe.model.num_decoder_layers),
        seed=recipe.seed, overlap=recipe.dist.overlap,
    )  # fmt: skip

    # -- where the last run stopped
    state, notes = (
        checkpoint.State(layout={"batch_size": recipe.batch.size, "processes": accelerator.num_processes}),
        [],
    )
    state.fingerprint = splits.train.fingerprint()
    if resume:
        state, notes = _restore(recipe, run, state, accelerator, bare, ema, optimizer)

    # -- who watches
    if main:
        (run.path / "recipe.yaml").write_text(recipes.dumps(recipe), encoding="utf-8")
        if splits.split_json is not None:
            (run.path / "split.json").write_text(json.dumps(splits.split_json), encoding="utf-8")
        run.status("running", window=state.window)
    fingerprints = {"train": state.fingerprint, "val": splits.val.fingerprint()}
    sinks = monitor.build(
        recipe, run.path, accelerator, total_windows=length.total, windows_per_epoch=length.per_epoch,
        start_window=state.window, fingerprint=fingerprints, wandb_run_id=state.wandb_run_id,
    )  # fmt: skip
    for line in [*splits.found, *loaded, *notes, launch.describe(accelerator), arithmetic]:
        sinks.say(line)
    validate = validation.Validation(recipe, splits, accelerator, bare if ema is None else ema.module, sinks)
    save = _saver(recipe, accelerator, run, splits.train.classes, bare, ema, optimizer, sinks, main)
    stop = _StopSignal()

    # -- the windows
    ok = False
    try:
        windows = data.train_windows(
            recipe, splits.train, rank=accelerator.process_index, num_ranks=accelerator.num_processes,
            start_window=state.window, end_window=length.total, mean=bare.mean, std=bare.std,
        )  # fmt: skip
        for micro_batches, wait_seconds in _timed(windows):
            begun = time.perf_counter()
            lr = set_lr(optimizer, factor(state.step))
            optimizer.zero_grad(set_to_none=True)
            all_share = _all_share(recipe, accelerator.num_processes, state.window, len(splits.train), length)
            result = runner.run(micro_batches, all_share=all_share, stop_requested=stop.requested)
            _refuse_poison(result, accelerator, sinks, splits.train, state.window)
            runner.clip(result, recipe.optim.clip_norm, recipe.optim.clip_value)
            prepared.step()
            accepted = not prepared.step_was_skipped  # only fp16's search for a scale skips
            state.window += 1
            state.step += accepted
            if ema is not None and accepted:
                ema.update(bare)
            stats = _stats(result, state, length, lr, accepted, time.perf_counter() - begun, wait_seconds)
            sinks.tick(stats)
            if state.window % recipe.log.every == 0 or state.window == length.total:
                sinks.log(stats)
            is_best = False
            if length.due(state.window, recipe.evaluate.every_epochs):
                with sinks.timed("evaluation"):
                    is_best = validate(state, length)
            if result.stop_requested or is_best or length.due(state.window, recipe.checkpoint.every_epochs):
                with sinks.timed("checkpoint"):
                    save(state, is_best)
            if result.stop_requested:
                sinks.say(f"stopped as asked after window {state.window}; go on with --resume")
                return False
        ok = True
        return True
    finally:
        stop.restore()
        sinks.close(ok)


def _claim(run: RunFolder, resume: bool) -> None:
    run.acquire()
    if not resume and any(run.checkpoints.glob("window-*")):
        run.release()
        raise UserError(
            f"{run.path} already holds a run with checkpoints: go on with --resume, or give this one another name with "
            "name=..."
        )


def _agree(accelerator: Accelerator, action) -> None:
    """Do something on the main process; if it refuses, every process refuses in the same words."""
    said: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            action()
        except UserError as error:
            said = [str(error)]
    broadcast_object_list(said)
    if said[0] is not None:
        raise UserError(said[0])


def _seed_everything(seed: int, deterministic: bool) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def _length(recipe: Recipe, num_images: int) -> Length:
    per_epoch = data.windows_per_epoch(num_images, recipe.batch.size)
    total = recipe.schedule.steps or max(1, round(recipe.schedule.epochs * per_epoch))
    return Length(per_epoch, total)


def shares(size: int, num_ranks: int) -> list[int]:
    """Images of a window by process: contiguous and as equal as can be (8 over 3 -> 3, 3, 2)."""
    return [size // num_ranks + (rank < size % num_ranks) for rank in range(num_ranks)]


def batch_arithmetic(recipe: Recipe, num_ranks: int, num_images: int) -> str:
    """The line that says how a window is cut.

    Raises:
        UserError: fewer images in a window than processes.
    """
    size, micro = recipe.batch.size, recipe.batch.micro
    if size < num_ranks:
        raise UserError(
            f"batch.size is {size} but there are {num_ranks} processes, so some would never have an image: raise "
            f"batch.size to at least {num_ranks} or launch with --num_processes {size}"
        )
    parts = shares(size, num_ranks)
    processes = f"{num_ranks} process{'es' * (num_ranks > 1)}"
    if len(set(parts)) == 1 and parts[0] % micro == 0:
        times = parts[0] // micro
        cut = f"{processes} x {times} micro-batch{'es' * (times > 1)} x {micro} image{'s' * (micro > 1)}"
    else:
        cut = f"{processes} with {', '.join(map(str, parts))}, in micro-batches of at most {micro}"
    windows = data.windows_per_epoch(num_images, size)
    last = num_images - (windows - 1) * size
    tail = f", the last with {last} image{'s' * (last > 1)}" if last != size else ""
    return f"batch: {size} images per step = {cut}; {num_images} images = {windows} steps per epoch{tail}"


def _all_share(recipe: Recipe, num_ranks: int, window: int, num_images: int, length: Length) -> bool:
    within = window % length.per_epoch
    size = min(recipe.batch.size, num_images - within * recipe.batch.size)
    return size >= num_ranks


def _restore(
    recipe: Recipe, run: RunFolder, fresh: checkpoint.State, accelerator: Accelerator, bare: nn.Module,
    ema: Ema | None, optimizer: torch.optim.Optimizer,
) -> tuple[checkpoint.State, list[str]]:  # fmt: skip
    folder, notes = checkpoint.load_last(run.checkpoints)
    state = checkpoint.load(folder, model=bare, ema=ema, optimizer=optimizer)
    if state.fingerprint != fresh.fingerprint:
        raise UserError(
            f"the training data differ from those of {folder}: the sample order would not go on where it stopped; put "
            "the data back, or start a new run with model.init_from set to this one"
        )
    if state.layout["batch_size"] != recipe.batch.size:
        raise UserError(
            f"batch.size is {recipe.batch.size} but {folder} was trained with {state.layout['batch_size']}: the place "
            "in the epoch would move; keep it, or start a new run with model.init_from set to this one"
        )
    if accelerator.scaler is not None and state.scaler:
        accelerator.scaler.load_state_dict(state.scaler)
    return state, [*notes, f"resumed from {folder} after window {state.window}"]


def _timed(windows: Iterator) -> Iterator[tuple[list, float]]:
    """Each window with the seconds spent waiting for it."""
    while True:
        begun = time.perf_counter()
        try:
            micro_batches = next(windows)
        except StopIteration:
            return
        yield micro_batches, time.perf_counter() - begun


def _refuse_poison(result: WindowResult, accelerator: Accelerator, sinks, source, window: int) -> None:
    """Stop before the optimizer moves when loss or gradient is not finite; every process sees the same result."""
    overflow_search = accelerator.scaler is not None and not result.bad_images and np.isfinite(result.losses["loss"])
    if result.finite or overflow_search:
        return
    what = "loss" if not np.isfinite(result.losses["loss"]) else "gradient norm"
    if result.bad_images:
        names = [source.name(i) for i in range(len(source)) if source.image_id(i) in set(result.bad_images)]
        what = f"matching cost of image {', '.join(names)}"
    text = (
        f"window {window}: the {what} is not finite (loss {result.losses['loss']:.4g}, gradient norm "
        f"{result.grad_norm:.4g}); nothing was updated. Lower optim.lr (DETR trains at 1e-4), or try precision: no; "
        "the last checkpoint is whole, go on from it with --resume"
    )
    sinks.alarm("Non-finite window", text, level="ERROR", window=window)
    raise UserError(text)


def _stats(
    result: WindowResult, state: checkpoint.State, length: Length, lr: dict[str, float], accepted: bool,
    seconds: float, wait_seconds: float,
) -> StepStats:  # fmt: skip
    losses = {k: v for k, v in result.losses.items() if k != "loss"}
    return StepStats(
        window=state.window, step=state.step, epoch=state.window / length.per_epoch, loss=result.losses["loss"],
        losses=losses, grad_norm=result.grad_norm, grad_norms=result.grad_norms, lr=lr, num_images=result.num_images,
        num_boxes=result.num_boxes, seconds=seconds + wait_seconds, wait_seconds=wait_seconds, accepted=accepted,
    )  # fmt: skip


def _saver(recipe, accelerator, run, classes, bare, ema, optimizer, sinks, main):
    """A function that saves the state on the main process while the others wait for it."""

    def save(state: checkpoint.State, is_best: bool) -> None:
        def write() -> None:
            state.wandb_run_id = sinks.wandb_run_id
            state.scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            meta = {
                "weights": "raw" if ema is None else "ema", "metric": recipe.evaluate.metric, "metrics": state.metrics,
                "window": state.window, "step": state.step, "threshold": state.threshold,
            }  # fmt: skip
            files = {
                "recipe.yaml": recipes.dumps(recipe),
                "classes.json": json.dumps(classes.to_json(), indent=1),
                "meta.json": json.dumps(meta, indent=1),
            }
            path = checkpoint.save(
                run.checkpoints, state=state, model=bare, ema=ema, optimizer=optimizer, files=files, is_best=is_best
            )
            if is_best and recipe.log.wandb.upload_weights:
                sinks.artifact(path)

        _agree(accelerator, write)

    return save


class _StopSignal:
    """SIGTERM and SIGINT ask for a stop after the window in hand; a second one interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before = {s: signal.signal(s, self._on) for s in (signal.SIGTERM, signal.SIGINT)}

    def _on(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
