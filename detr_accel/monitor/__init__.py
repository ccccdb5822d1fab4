"""Monitoring: what a run says about itself, and where it says it."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from detr_accel.monitor import memory, timing
from detr_accel.monitor.alarms import TITLES, About, Alarms, Memory
from detr_accel.monitor.console import Console
from detr_accel.monitor.sinks import Silent, Sinks
from detr_accel.monitor.timing import Eta
from detr_accel.monitor.wandb_sink import WandbSink, decide_mode, tracker_kwargs
from detr_accel.recipe import Recipe
from detr_accel.structures import UserError

__all__ = [
    "Alarms", "Eta", "Memory", "Silent", "Sinks", "about", "build", "build_alarms", "memory", "timing", "versions",
    "wandb_mode",
]  # fmt: skip

PACKAGES = ("torch", "torchvision", "accelerate", "timm", "wandb", "numpy", "hotcoco", "pycocotools")


def build(
    recipe: Recipe,
    run_folder: Path,
    accelerator: Any,
    *,
    total_windows: int,
    windows_per_epoch: int,
    start_window: int = 0,
    evaluation_owed: bool = False,
    fingerprint: dict[str, str],
    best: tuple[float, int] | None = None,
    wandb_run_id: str | None = None,
    parent: str | None = None,
    mode: str | None = None,
) -> Sinks | Silent:
    """The run's sinks; on every process but the main one, a silent stand-in with the same methods.

    Call it on every process: Accelerate's trackers are started everywhere and work on the main one.

    Args:
        run_folder: runs/NAME.
        accelerator: made with ``log_with="wandb"`` where log.wandb.enabled is set.
        start_window, evaluation_owed: see ``Sinks``.
        fingerprint: name of a split -> its data's fingerprint.
        best: value and window of the best evaluation so far.
        wandb_run_id: the W&B run to go on with (online only).
        parent: the checkpoint that this run branched off.
        mode: of W&B, the same on every process; None asks ``wandb_mode``.
    Raises:
        UserError: W&B must be online and has no key.
    """
    mode = mode or wandb_mode(recipe)
    wandb = _wandb(recipe, Path(run_folder), accelerator, fingerprint, wandb_run_id, parent, mode)
    if not accelerator.is_main_process:
        return Silent()
    evaluations = total_windows / max(1, round(recipe.evaluate.every_epochs * windows_per_epoch))
    checkpoints = total_windows / max(1, round(recipe.checkpoint.every_epochs * windows_per_epoch))
    eta = Eta(
        total_windows,
        windows_per_epoch,
        start_window=start_window,
        num_evaluations=max(1.0, evaluations),
        num_checkpoints=max(1.0, checkpoints),
    )
    console = Console(total_windows, windows_per_epoch, start_window)
    sinks = Sinks(
        Path(run_folder), console, eta, wandb, name=recipe.name, start_window=start_window,
        evaluation_owed=evaluation_owed, device=accelerator.device, metric=recipe.evaluate.metric,
        best=best,
    )  # fmt: skip
    if wandb is not None:
        sinks.say(wandb.note)
        sinks.wandb = wandb if wandb.run is not None else None
    return sinks


def wandb_mode(recipe: Recipe) -> str:
    """``online``, ``offline`` or ``disabled``: to be asked on one process, whose key and environment count.

    Raises:
        UserError: see ``decide_mode``.
    """
    return decide_mode(recipe.log.wandb.mode) if recipe.log.wandb.enabled else "disabled"


def about(recipe: Recipe, num_images: int, *, on_gpu: bool = False, cores: int = 1) -> About:
    """The recipe's numbers that alarms speak of.

    Args:
        num_images: in the training split.
        on_gpu: whether the training device is one.
        cores: that a process may use.
    """
    m, o = recipe.model, recipe.optim
    return About(
        lr=o.lr, clip_norm=o.clip_norm, warmup_steps=recipe.schedule.warmup_steps, batch_size=recipe.batch.size,
        num_queries=m.num_queries, from_scratch=m.init_from is None, on_gpu=on_gpu, num_images=num_images, cores=cores,
        cached=recipe.data.cache != "none", streamed=recipe.data.hub.streaming,
        detector="DETR" if m.name == "detr" else "RT-DETR",
    )  # fmt: skip


def build_alarms(
    recipe: Recipe, state: Memory, num_images: int, device: torch.device, cores: int = 1
) -> Alarms | None:
    """Who judges the run; None where the recipe wants no alarms.

    Args:
        state: what judging remembers; part of the run's state.
        num_images: in the training split.
        cores: that a process may use.
    Raises:
        UserError: a title in alarms.off that no alarm has.
    """
    unknown = [title for title in recipe.alarms.off if title not in TITLES]
    if unknown:
        raise UserError(f"alarms.off: no alarm is called {unknown[0]!r}; there are: {', '.join(TITLES)}")
    if not recipe.alarms.enabled:
        return None
    numbers = about(recipe, num_images, on_gpu=device.type == "cuda", cores=cores)
    return Alarms(numbers, state, off=recipe.alarms.off, again_after=recipe.alarms.again_after)


def versions() -> dict[str, str]:
    """What the run ran on: packages, Python, the GPU's name."""
    import detr_accel

    found = {"detr_accel": detr_accel.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"
    return found


def _wandb(
    recipe: Recipe,
    folder: Path,
    accelerator: Any,
    fingerprint: dict[str, str],
    run_id: str | None,
    parent: str | None,
    mode: str,
) -> WandbSink | None:
    wanted = recipe.log.wandb
    if mode == "disabled":
        return None
    assert "wandb" in [str(x) for x in accelerator.log_with], 'make the Accelerator with log_with="wandb"'
    config = {
        "recipe": recipe.model_dump(mode="json"),
        "versions": versions(),
        "data": {"fingerprint": fingerprint},
        "num_processes": accelerator.num_processes,
        "mixed_precision": str(accelerator.mixed_precision),
        "parent": parent,
    }
    folder.mkdir(parents=True, exist_ok=True)  # W&B looks for a git commit from there
    arguments = tracker_kwargs(
        name=recipe.name, project=wanted.project, folder=folder, mode=mode, config=config,
        entity=wanted.entity, group=wanted.group, tags=wanted.tags, run_id=run_id,
    )  # fmt: skip
    return WandbSink(accelerator, arguments)
