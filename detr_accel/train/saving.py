"""When and what a run saves."""

from __future__ import annotations

import json
import time

import torch

from detr_accel import recipe as recipes
from detr_accel.structures import UserError
from detr_accel.train import checkpoint
from detr_accel.train.agree import on_main
from detr_accel.train.checkpoint import State
from detr_accel.train.parts import Parts
from detr_accel.train.run_folder import RunFolder


class Saver:
    """Saves the state on the main process while the others wait for it."""

    def __init__(self, parts: Parts, run: RunFolder, sinks) -> None:
        self.parts, self.run, self.sinks = parts, run, sinks
        self._last = time.monotonic()

    def due_by_clock(self) -> bool:
        """Whether ``checkpoint.every_minutes`` have passed. Processes may disagree; the window asks them all."""
        minutes = self.parts.recipe.checkpoint.every_minutes
        return minutes is not None and time.monotonic() - self._last >= 60 * minutes

    def check_space(self) -> None:
        """Before the first window.

        Raises:
            UserError: not even one checkpoint fits.
        """
        on_main(self.parts.accelerator, self._check_space)

    def _check_space(self) -> None:
        folder, one = self.run.path, checkpoint.num_bytes(self.parts.bare, self.parts.ema)
        checkpoint.check_space(folder, one)
        there = len(list(self.run.checkpoints.glob("window-*")))
        most = self.parts.recipe.checkpoint.keep + 3  # the best, a rollback's target, and the one being written
        try:
            checkpoint.check_space(folder, one * max(1, most - there))
        except UserError as error:
            self.sinks.say(f"warning: the disk may fill up: with {most} checkpoints in place, {error}")

    def __call__(self, state: State, *, is_best: bool = False, counted: bool = False, must: bool = False) -> None:
        """Write a checkpoint.

        Args:
            counted: it came by counting windows, not by the clock or a signal, so a rollback may go back to it: it is
                the same one whenever the run is repeated.
            must: the run ends with it; where it cannot be written, an error. Otherwise an alarm: the run goes on, and
                the next one may find room.
        """
        known = on_main(self.parts.accelerator, lambda: self.sinks.wandb_run_id)
        state.wandb_run_id = known or state.wandb_run_id  # what was offline leaves the run that was online
        scaler = self.parts.accelerator.scaler
        state.scaler = scaler.state_dict() if scaler is not None else None
        before = state.anchor
        if counted:
            state.anchor = checkpoint.folder_name(state.window)
        trouble = on_main(self.parts.accelerator, lambda: self._try(state, is_best))
        self._last = time.monotonic()
        if trouble is None:
            return
        state.anchor = before
        if is_best:  # what is not there cannot be the best: that is still the one before
            state.best, state.best_window = on_main(
                self.parts.accelerator, lambda: checkpoint.best_there(self.run.checkpoints)
            )
        if must:
            raise UserError(trouble)
        self.sinks.alarm(
            "Checkpoint not written", f"window {state.window}: {trouble}", level="ERROR", window=state.window
        )

    def _try(self, state: State, is_best: bool) -> str | None:
        parts = self.parts
        broken = [name for name, t in parts.evaluated.state_dict().items() if not torch.isfinite(t).all()]
        broken += [name for name, p in parts.bare.named_parameters() if not torch.isfinite(p).all()]
        if broken:  # every later window is refused; the checkpoints from before must not make room for this
            return (
                f"{len(broken)} weights are not finite, the first {broken[0]}; the checkpoint before it stays the last"
            )
        try:
            path = checkpoint.save(
                self.run.checkpoints, state=state, model=parts.bare, ema=parts.ema, optimizer=parts.optimizer,
                files=self._files(state), is_best=is_best, keep=parts.recipe.checkpoint.keep,
            )  # fmt: skip
        except UserError as error:
            return str(error)
        if is_best and parts.recipe.log.wandb.upload_weights:
            self.sinks.artifact(path)
        return None

    def _files(self, state: State) -> dict[str, str]:
        recipe = self.parts.recipe
        meta = {
            "weights": "raw" if self.parts.ema is None else "ema", "metric": recipe.evaluate.metric,
            "metrics": state.metrics, "metrics_window": state.evaluated_window, "threshold": state.threshold,
            "window": state.window, "step": state.step, "parent": state.parent,
            "precision": self.parts.accelerator.mixed_precision,
        }  # fmt: skip
        files = {
            "recipe.yaml": recipes.dumps(recipe),
            "classes.json": json.dumps(self.parts.classes.to_json(), indent=1),
            "meta.json": json.dumps(meta, indent=1),
        }
        split = self.parts.splits.split_json
        return files if split is None else files | {"split.json": json.dumps(split)}
