"""Where a run goes on: its newest whole checkpoint, or the one of another run that it branches off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detr_accel import recipe as recipes
from detr_accel.monitor.alarms import OUT_OF_REACH, Memory
from detr_accel.recipe import Recipe
from detr_accel.structures import UserError
from detr_accel.train import changes, checkpoint
from detr_accel.train.agree import everywhere, on_main
from detr_accel.train.checkpoint import State
from detr_accel.train.parts import Parts, measure, plateau_factor, schedule_of
from detr_accel.train.patience import Waiting
from detr_accel.train.run_folder import RunFolder


def wants_resume(run: RunFolder, resume: bool | str) -> bool:
    """Whether there is something to go on from, and it was asked for.

    Args:
        resume: False (start), True (go on), ``auto`` (whichever applies).
    Raises:
        UserError: a start would write over a run.
    """
    there = any(any(run.checkpoints.glob(p)) for p in ("window-*", ".old-window-*", "damaged-window-*"))
    if resume == "auto":
        return there
    if there and not resume:
        raise UserError(
            f"{run.path} already holds a run with checkpoints: go on with --resume, or give this one another name with "
            "name=..."
        )
    return bool(resume)


def fresh_state(parts: Parts) -> State:
    layout = {"batch_size": parts.recipe.batch.size, "processes": parts.accelerator.num_processes}
    memory = Memory(head_loaded=parts.head_loaded)
    return State(
        layout=layout, fingerprint=parts.splits.train.fingerprint(), judged_by=_judged_by(parts), alarms=memory
    )


def _judged_by(parts: Parts) -> list[Any]:
    return [parts.splits.val.fingerprint(), parts.recipe.evaluate.max_detections]


def restore(parts: Parts, checkpoints: Path, *, branch: bool = False) -> tuple[State, list[str]]:
    """Put the newest whole checkpoint into the parts, on every process.

    Args:
        checkpoints: the folder of all; of the parent when a run branches off.
    Returns:
        the state, and what to say about it.
    Raises:
        UserError: none is whole; other data; a change of the recipe that cannot be; a schedule that ended before.
    """
    folder, notes = on_main(parts.accelerator, lambda: checkpoint.load_last(checkpoints, mend=not branch))
    state, more = everywhere(parts.accelerator, lambda: _restore(parts, folder, branch))
    verb = "branched off" if branch else "resumed from"
    return state, [*notes, *more, f"{verb} {folder} after window {state.window}"]


def _restore(parts: Parts, folder: Path, branch: bool) -> tuple[State, list[str]]:
    recipe, processes = parts.recipe, parts.accelerator.num_processes
    before = recipes.loads((folder / "recipe.yaml").read_text(encoding="utf-8"), str(folder / "recipe.yaml"))
    notes = changes.check(before, recipe, branch=branch, run=str(folder.parents[1]))
    state = load_into(parts, folder)
    if state.fingerprint != parts.splits.train.fingerprint():
        raise UserError(
            f"the training data differ from those of {folder}: the sample order would not go on where it stopped; put "
            "the data back, or start a new run with model.init_from set to this one"
        )
    _check_length(recipe, state.window, parts.length.total, folder)
    old_factor = schedule_of(before, measure(before, len(parts.splits.train)))
    kept = 0 if branch or recipe.schedule.kind != "plateau" else state.plateau.drops
    notes += changes.lr_note(
        state.step, lambda step: plateau_factor(before.schedule, old_factor(step), state.plateau.drops),
        lambda step: plateau_factor(recipe.schedule, parts.factor(step), kept),
        recipe.optim.lr * state.health.lr_factor,
    )  # fmt: skip
    if (state.layout or {}).get("processes") != processes:
        notes.append(_layout_note(state, processes))
    _keep_fit(state, before, recipe, processes)
    if branch:
        state.parent, state.anchor, state.wandb_run_id = str(folder), None, None
        state.best = state.best_window = state.metrics = state.threshold = None
        state.evaluated_window = state.window  # the parent's evaluation; none is owed
        state.alarms = Memory()  # the parent's curves are no measure of a training that may differ
        state.early_stop, state.plateau = Waiting(), Waiting()
    elif state.judged_by not in (None, _judged_by(parts)):
        state.best = state.best_window = None  # checkpoints/best stays until an evaluation comes
        state.early_stop, state.plateau = Waiting(), Waiting(drops=state.plateau.drops)
        state.alarms.evaluations.clear()
        state.alarms.episodes.pop(OUT_OF_REACH, None)
        notes.append(
            "the validation data, or how many detections count, differ from those before: the best so far, and what "
            "early stopping and plateaus wait for, begin anew"
        )
    state.judged_by = _judged_by(parts)
    if before.early_stop.metric != recipe.early_stop.metric or recipe.early_stop.patience is None:
        state.early_stop = Waiting()  # a best value of another metric, or one that nobody kept up, is no measure
    state.layout = {"batch_size": recipe.batch.size, "processes": processes}
    return state, notes


def _check_length(recipe: Recipe, done: int, total: int, folder: Path) -> None:
    if done > total:
        key = length_key(recipe)
        value = getattr(recipe.schedule, key.partition(".")[2])
        raise UserError(
            f"{key}={value if isinstance(value, int) else f'{value:g}'} ends after {total} window{'s' * (total != 1)}, "
            f"and {folder} has {done} behind it: raise {key} to go on; for a shorter training start a new run, with "
            f"model.init_from={folder.parents[1]} from these weights"
        )


def length_key(recipe: Recipe) -> str:
    """What to raise for a longer run."""
    return "schedule.epochs" if recipe.schedule.steps is None else "schedule.steps"


def _keep_fit(state: State, before: Recipe, after: Recipe, processes: int) -> None:
    """What ``auto`` chose, or what running out of memory left, is kept, unless the person or the layout changed."""
    if before.batch.micro != after.batch.micro or (state.layout or {}).get("processes") != processes:
        state.micro = None
    if before.model.activation_checkpointing != after.model.activation_checkpointing:
        state.micro, state.checkpointed = None, []


def load_into(parts: Parts, folder: Path) -> State:
    """Weights, average, optimizer and scaler of one checkpoint, on every process."""
    state = checkpoint.load(folder, model=parts.bare, ema=parts.ema, optimizer=parts.optimizer)
    if parts.accelerator.scaler is not None and state.scaler:
        parts.accelerator.scaler.load_state_dict(state.scaler)
    return state


def _layout_note(state: State, processes: int) -> str:
    before = (state.layout or {}).get("processes")
    return (
        f"the checkpoint was written by {before} process(es) and goes on with {processes}: the samples come in the "
        "same order; sums are rounded differently"
    )


def rollback(parts: Parts, state: State, checkpoints: Path) -> None:
    """Weights, average, optimizer, statistics and ``step`` go back to the last checkpoint that came by counting. The
    window, the samples, and the memory of what happened since (evaluations, strikes) go on.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    if state.anchor is None:
        raise UserError(
            "there is no checkpoint to go back to yet: lower optim.lr or batch.micro and start again, or set "
            "health.on_nonfinite: rollback, which saves one before the first window"
        )
    folder = checkpoints / state.anchor
    fault = on_main(parts.accelerator, lambda: checkpoint.damage(folder))
    if fault is not None:
        raise UserError(f"the checkpoint to go back to, {folder}, is damaged: {fault}; go on with --resume")
    then = everywhere(parts.accelerator, lambda: load_into(parts, folder))
    state.step, state.returned_window = then.step, then.returned_window


def return_to_best(parts: Parts, state: State, checkpoints: Path) -> str:
    """Weights, average and optimizer become those of the best evaluation so far. The schedule, the samples and fp16's
    scale go on, and so they do where there is no such checkpoint: nothing is lost by that.

    Returns:
        what to say.
    """
    state.returned_window = state.window
    if state.best_window is None:
        return "schedule.return_to_best: no evaluation has come yet, so there is nothing to go back to"
    if not state.best:
        return f"schedule.return_to_best: no {parts.recipe.evaluate.metric} above 0 has come yet, so the weights stay"
    if state.best_window == state.window:
        return "schedule.return_to_best: the last evaluation is the best so far, so the weights stay"
    folder = checkpoints / checkpoint.folder_name(state.best_window)
    fault = on_main(parts.accelerator, lambda: checkpoint.damage(folder))
    if fault is not None:
        return f"warning: schedule.return_to_best: the weights stay as they are, since {folder} is damaged: {fault}"
    everywhere(
        parts.accelerator,
        lambda: checkpoint.load(folder, model=parts.bare, ema=parts.ema, optimizer=parts.optimizer),
    )
    if parts.ema is not None:
        parts.ema.updates = state.step
    state.alarms.begin_anew()
    return (
        f"schedule.return_to_best: the weights are those after window {state.best_window} again "
        f"({parts.recipe.evaluate.metric} {100 * state.best:.1f}), the best so far; schedule and samples go on"
    )


def start_or_resume(parts: Parts, run: RunFolder, *, resume: bool, branch: Path | None) -> tuple[State, list[str]]:
    """The state to begin with."""
    if resume:
        return restore(parts, run.checkpoints)
    if branch is not None:
        return restore(parts, branch / "checkpoints", branch=True)
    return fresh_state(parts), []


def check_branch(branch: Path | None, recipe: Recipe, runs: Path) -> None:
    """
    Raises:
        UserError: no run there, or the branch would write into its parent.
    """
    if branch is None:
        return
    if not (branch / "checkpoints").is_dir():
        raise UserError(f"--branch {branch}: there is no run with checkpoints; give a folder such as runs/NAME")
    if branch.resolve() == (runs / recipe.name).resolve():
        raise UserError(f"--branch {branch}: the new run needs a name of its own: add name=NEW")
