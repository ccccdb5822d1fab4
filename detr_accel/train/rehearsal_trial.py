"""The part of a rehearsal that is no run: in one start on all processes, the data are looked at, the worst window is
tried, eight images are learned by heart, and a window, an evaluation and a checkpoint are timed.

Every stage is a row in ``trial.jsonl`` of the rehearsal's folder, written when it ends; the last one holds the numbers.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate.utils import gather_object

from detr_accel import data
from detr_accel.monitor import memory
from detr_accel.monitor.jsonl import JsonLines
from detr_accel.monitor.memory import is_out_of_memory
from detr_accel.monitor.sinks import Silent
from detr_accel.recipe import Recipe
from detr_accel.structures import LoaderTime, UserError
from detr_accel.train import (
    checkpoint,
    launch,
    memory_fit,
    parts,
    rehearsal_data,
    rehearsal_overfit,
    set_loss,
    validation,
)
from detr_accel.train.agree import everywhere, on_main
from detr_accel.train.capture import Captures
from detr_accel.train.checkpoint import State
from detr_accel.train.commit import Commit
from detr_accel.train.feeder import Feeder
from detr_accel.train.optim import set_lr
from detr_accel.train.parts import Parts
from detr_accel.train.rehearsal_process import Trouble
from detr_accel.train.resuming import fresh_state
from detr_accel.train.run_folder import RunFolder
from detr_accel.train.saving import Saver
from detr_accel.train.stopping import StopSignal
from detr_accel.train.window import Requests

FILE = "trial.jsonl"
SHARES = {"data": 0.15, "overfit": 0.45, "windows": 0.08, "evaluation": 0.05}  # of the rehearsal's time, at most
GIB = 2**30


class Report:
    """One row for each stage: state ok, warn or fail, words, seconds, numbers; written on the main process."""

    def __init__(self, folder: Path, is_main: bool) -> None:
        self._file = JsonLines(folder / FILE) if is_main else None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Fill ``text`` and numbers into what it yields. An error is written as the stage's failure, and goes on."""
        row: dict[str, Any] = {"stage": name, "state": "ok", "text": "", "warnings": []}
        begun = time.perf_counter()
        try:
            yield row
        except Exception as error:
            row |= {"state": "fail", "text": _words(error), "remedy": ""}
            if isinstance(error, Trouble):
                row |= {"text": error.text, "remedy": error.remedy}
            raise
        finally:
            row["seconds"] = time.perf_counter() - begun
            if self._file is not None:
                self._file.write(row)


def _words(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return "out of memory: lower batch.micro and evaluate.batch"
    dead = data.worker_death(error) if isinstance(error, RuntimeError) else None
    return str(dead) if dead is not None else f"{type(error).__name__}: {error}"


def run(recipe: Recipe, folder: Path, minutes: float) -> None:
    """All stages; on every process.

    Args:
        folder: the rehearsal's own.
        minutes: of the whole rehearsal.
    Raises:
        UserError, Trouble: the first stage that fails; its row is written already.
    """
    # a window that is not finite ends the trial, with the sentence that names it
    captures = recipe.health.captures
    health = recipe.health.model_copy(update={"on_nonfinite": "stop", "captures": 0})
    recipe = recipe.model_copy(update={"health": health})
    report, seconds = Report(folder, int(os.environ.get("RANK") or 0) == 0), minutes * 60
    with report.stage("devices") as row:
        accelerator = launch.make_accelerator(
            recipe.precision, recipe.device, recipe.dist.overlap, recipe.dist.timeout_minutes
        )
        row["text"] = launch.describe(accelerator)
        row["device"] = accelerator.device.type
    parts.seed_everything(recipe.seed, recipe.deterministic)
    with report.stage("data") as row:
        splits = everywhere(accelerator, lambda: data.build(recipe))
        limit = SHARES["data"] * seconds
        row["text"], row["warnings"] = everywhere(
            accelerator, lambda: rehearsal_data.check(recipe, splits, accelerator, limit)
        )
    with report.stage("model") as row:
        built = everywhere(accelerator, lambda: parts.build(recipe, accelerator, splits, resume=False))
        state = fresh_state(built)
        trained = sum(p.numel() for rows in built.groups.values() for _, p in rows)
        row["text"] = "; ".join([f"{trained / 1e6:.2f} M parameters train", *built.loaded])
    with report.stage("disk") as row:
        row |= on_main(accelerator, lambda: _disk(built, folder, captures))
    with report.stage("memory") as row:
        row["text"] = _memory(built, state)
    with report.stage("overfit") as row:
        row |= rehearsal_overfit.overfit(built, state, SHARES["overfit"] * seconds)
    with report.stage("windows") as row:
        row |= _windows(built, state, SHARES["windows"] * seconds)
    with report.stage("evaluation") as row:
        row |= _evaluation(built, state, SHARES["evaluation"] * seconds)
    with report.stage("checkpoint") as row:
        row |= _checkpoint(built, state, folder)
    with report.stage("numbers") as row:
        row |= _numbers(built, state, accelerator)


def _numbers(built: Parts, state: State, accelerator) -> dict[str, Any]:
    evaluate, length = built.recipe.evaluate, built.length
    between = max(1, round(evaluate.every_epochs * length.per_epoch)) * built.recipe.batch.size
    return {
        "train_images": 0 if isinstance(built.splits.train, data.StreamSource) else
        set_loss.num_images(evaluate.train_images, between, len(built.splits.train)),
        "micro": state.micro, "checkpointed": state.checkpointed, "total": built.length.total,
        "per_epoch": built.length.per_epoch, "processes": accelerator.num_processes,
        "val_images": len(built.splits.val),
    }  # fmt: skip


# --- disk and memory


def _disk(built: Parts, folder: Path, num_captures: int) -> dict[str, Any]:
    """Room for all that is to come. Checkpoints are pruned, so their number is bounded."""
    recipe, one = built.recipe, checkpoint.num_bytes(built.bare, built.ema)
    number = min(recipe.checkpoint.keep + 3, _count_checkpoints(built) + 1)  # the best, a rollback's, the one in hand
    weights = sum(t.numel() * t.element_size() for t in built.bare.state_dict().values())
    captures = min(recipe.health.capture_gib * GIB, 2 * weights * num_captures)
    needed, free = number * one + captures, shutil.disk_usage(folder).free
    text = f"{number} checkpoints of {_size(one)} at a time"
    if captures:
        text += f", captures of bad windows up to {_size(captures)}"
    if free < needed:
        raise Trouble(
            "disk", f"{text} need {_size(needed)}, and {folder.parents[1]} has {_size(free)} free",
            "free space there, lower checkpoint.keep, or choose another disk with --runs",
        )  # fmt: skip
    return {"text": f"{text}: {_size(needed)} of {_size(free)} free", "needed_bytes": needed, "one_bytes": one}


def _count_checkpoints(built: Parts) -> int:
    c, length = built.recipe.checkpoint, built.length
    every = [max(1, round(e * length.per_epoch)) for e in (c.every_epochs, built.recipe.evaluate.every_epochs)]
    every += [c.every_steps] if c.every_steps else []
    return 10**9 if c.every_minutes else 1 + sum(length.total // e for e in every)


def _size(num_bytes: float) -> str:
    mib = num_bytes / 2**20
    return f"{mib:,.0f} MiB" if mib < 1024 else f"{mib / 1024:,.1f} GiB"


def _memory(built: Parts, state: State) -> str:
    """The worst window that the data can bring: tried, and then trained through with an optimizer's step that moves
    nothing."""
    recipe, accelerator = built.recipe, built.accelerator
    micro, checkpointed = recipe.batch.micro, recipe.model.activation_checkpointing
    try:
        state.micro, state.checkpointed, words = memory_fit.fit(built, micro, checkpointed)
    except UserError as error:
        raise UserError(f"{str(error).removeprefix('memory: ')}{_would_fit(built, micro)}") from None
    share = len(data.share(recipe.batch.size, 0, accelerator.num_processes))
    state.micro = min(state.micro, share)
    parts.batch_arithmetic(recipe.batch.size, state.micro, accelerator.num_processes, len(built.splits.train))
    parts.prepare(built)
    canvas, most = data.worst_window(built.recipe, built.splits.train)
    most = built.criterion.noise.most_demanding(most) if built.criterion.noise else most
    window = [memory_fit.worst_batch(canvas, most, state.micro) for _ in range(min(2, -(-share // state.micro)))]
    before = None if accelerator.scaler is None else accelerator.scaler.state_dict()
    memory.start_peak(accelerator.device)
    result = built.runner.run(window)
    set_lr(built.optimizer, 0.0)
    said = "the worst window ran out of memory in training" if result.out_of_memory else result.failure
    if said is None:
        try:
            built.prepared.step()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = "memory ran out inside the optimizer's step"
    said = next((s for s in gather_object([said]) if s), None)
    if said is not None:
        raise UserError(f"{said}: lower batch.micro (it is {state.micro}), or set batch.micro: auto")
    peak = memory.peak_bytes(accelerator.device) / GIB
    _forget_step(built, before)
    return f"{words.removeprefix('memory: ')}; trained through with an optimizer's step, peak {peak:.2f} GiB"


def _would_fit(built: Parts, micro: int | str) -> str:
    if micro == "auto":
        return ""
    try:
        fits, step, _ = memory_fit.fit(built, "auto", "auto")
    except UserError:
        return "; not even one image fits with activation checkpointing on everything"
    also = f" with model.activation_checkpointing=[{','.join(step)}]" if step else ""
    return f"; batch.micro={fits}{also} fits, and batch.size stays"


def _forget_step(built: Parts, scaler: dict | None) -> None:
    built.runner.discard()
    with torch.no_grad():
        for rows in built.optimizer.state.values():
            for value in rows.values():
                value.zero_()
    if scaler is not None:
        built.accelerator.scaler.load_state_dict(scaler)
    memory_fit.release(built.accelerator.device)


# --- what things take


def _windows(built: Parts, state: State, seconds: float) -> dict[str, Any]:
    """Real windows through the real loader. (The rest of the run is trained from the start again by a child.)"""
    accelerator = built.accelerator
    state = copy.deepcopy(state)
    commit = Commit(built, RunFolder(Path()), Silent(), Captures(built, Path()))
    parts.agree_on_room(built)
    stream = Feeder(built, 0, state.micro, skipped=1, measured=4)
    times: list[float] = []
    told = ""
    begun = last = time.perf_counter()
    with contextlib.closing(stream):
        for micro_batches in stream:
            window_begun = time.perf_counter()
            over = len(times) >= 2 and time.perf_counter() - begun > seconds
            spent = LoaderTime.of(micro_batches)
            micro_batches, _ = data.without_lost(micro_batches)
            requests = Requests(stop=over and accelerator.is_main_process)
            planned = parts.window_size(built, state.window)
            all_share = data.all_share(built.splits.train, planned, accelerator.num_processes)
            built.optimizer.zero_grad(set_to_none=True)
            result = built.runner.run(micro_batches, all_share=all_share, planned=planned, requests=requests)
            if not result.trained:
                raise UserError(result.failure or "out of memory: lower batch.micro, or set it to auto")
            rehearsal_overfit.refuse_nonfinite(built, result, f"windows, window {state.window + 1}")
            set_lr(built.optimizer, parts.lr_factor(built, state))
            state.window += 1
            commit(state, result, micro_batches)
            now = time.perf_counter()
            times, last = [*times, now - last], now
            if not result.stop_requested:
                told = stream.seen(spent, now - window_begun) or told
            if result.stop_requested or len(times) >= 40:
                break
    typical = median(times[1:] or times)
    loader = f"; {told.removeprefix('loader: ')}" if told else ""
    return {"text": f"{len(times)} real windows trained, {typical:.3g} s each{loader}", "seconds_per_window": typical}


def _evaluation(built: Parts, state: State, seconds: float) -> dict[str, Any]:
    """The real evaluation on a few images, then on more if there is time."""
    accelerator, val, evaluate = built.accelerator, built.splits.val, built.recipe.evaluate
    # the loss of training images is left to the short run: here a validation image is timed
    recipe = built.recipe.model_copy(update={"evaluate": evaluate.model_copy(update={"train_images": 0})})
    fewest = min(len(val), 2 * evaluate.batch * accelerator.num_processes)
    number, spent = fewest, 0.0
    stop = StopSignal()
    try:
        while True:
            part = replace(built, recipe=recipe, splits=replace(built.splits, val=val.head(number)))
            begun = time.perf_counter()
            validation.Validation(part, Silent())(copy.deepcopy(state), stop)
            spent = on_main(accelerator, lambda begun=begun: time.perf_counter() - begun)
            more = min(len(val), int(number * seconds / max(spent, 1e-3)))
            if spent > seconds / 4 or more < 2 * number:
                break
            number = more
    finally:
        stop.restore()
    text = f"{number} of {len(val)} validation images in {spent:.1f} s"
    return {"text": text, "images": number, "seconds_per_image": spent / max(1, number)}


def _checkpoint(built: Parts, state: State, folder: Path) -> dict[str, Any]:
    """The real thing, in the rehearsal's folder, and read back."""
    place = RunFolder(folder / "checkpoint")
    begun = time.perf_counter()
    Saver(built, place, Silent())(state, must=True)
    seconds = on_main(built.accelerator, lambda: time.perf_counter() - begun)

    def check() -> int:
        (path,) = place.checkpoints.glob("window-*")
        fault = checkpoint.damage(path)
        if fault is not None:
            raise UserError(f"a checkpoint is damaged as soon as it is written: {fault}: look at the disk")
        size = sum(f.stat().st_size for f in path.iterdir())
        shutil.rmtree(place.path)
        return size

    size = on_main(built.accelerator, check)
    return {"text": f"{_size(size)} written in {seconds:.1f} s and read back whole", "save_seconds": seconds}
