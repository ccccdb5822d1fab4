"""Making a window count, or not: the optimizer's step, the average, and what a refused window leaves (nothing)."""

from __future__ import annotations

import torch

from detr_accel.monitor.memory import is_out_of_memory
from detr_accel.structures import Batch, UserError
from detr_accel.train import health, resuming
from detr_accel.train.capture import Captures, names_of
from detr_accel.train.checkpoint import State
from detr_accel.train.memory_fit import release
from detr_accel.train.parts import Parts
from detr_accel.train.reduce import all_reduce_sum
from detr_accel.train.run_folder import RunFolder
from detr_accel.train.window import WindowResult


class Commit:
    """Decides on each window, the same on every process, and acts.

    Args:
        sinks: where alarms go.
        captures: where windows that are not finite are kept.
    """

    def __init__(self, parts: Parts, run: RunFolder, sinks, captures: Captures) -> None:
        self.parts, self.checkpoints, self.sinks, self.captures = parts, run.checkpoints, sinks, captures
        self.broken = False  # this process's last step ran out of memory half-way

    def __call__(self, state: State, result: WindowResult, micro_batches: list[Batch]) -> bool:
        """Step, or refuse.

        Args:
            state: with ``window`` counting this one already; ``step`` is brought up to date.
            micro_batches: as they were trained, to be kept where something is wrong.
        Returns:
            whether the weights moved.
        Raises:
            UserError: the verdict is to stop.
        """
        accelerator = self.parts.accelerator
        if result.num_images == 0:  # nothing was seen: weight decay and momentum would move the weights all the same
            self._refuse()
            return False
        images = list(names_of(self.parts.splits.train, result.bad_images).values())
        verdict = self.parts.health.judge(
            state.health, result, state.window, scaler=accelerator.scaler is not None,
            precision=accelerator.mixed_precision, images=images,
        )  # fmt: skip
        if verdict.capture:
            self.parts.runner.forward_state.restore()
            kept = self.captures.save(state, result, micro_batches)
            verdict = health.with_capture(verdict, kept)
        if verdict.text:
            level = "ERROR" if verdict.action in ("stop", "rollback") else "WARN"
            self.sinks.alarm(verdict.title, verdict.text, level=level, window=state.window)
        if verdict.action == "commit":
            return self._step(state, result)
        self._refuse()
        if verdict.action == "stop":
            raise health.stop_error(verdict)
        if verdict.action == "rollback":
            health.rolled_back(state.health, self.parts.health.lr_factor)
            self.roll_back(state)
        return False

    def _step(self, state: State, result: WindowResult) -> bool:
        parts = self.parts
        o = parts.recipe.optim
        if not result.finite:  # fp16's search for a scale: the scaler lowers it, and without gradients no weight moves
            parts.runner.discard()
            parts.prepared.step()
            return False
        parts.runner.clip(result, o.clip_norm, o.clip_value)
        try:
            parts.prepared.step()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._end_half_step()
            self.broken = True  # the others learn of it before anything is kept
            return False
        state.step += 1
        if parts.ema is not None:
            parts.ema.update(parts.bare)
        return True

    def _end_half_step(self) -> None:
        """Leave Accelerate's wrapper and the scaler as after a whole step; the rollback brings back the scale."""
        scaler, prepared = self.parts.accelerator.scaler, self.parts.prepared
        if scaler is not None:
            scaler.update()
            prepared.optimizer.step = prepared._optimizer_original_step_method
            prepared._accelerate_step_called = False

    def _refuse(self) -> None:
        """Nothing of the window stays, fp16's scale included: gradients were unscaled, so the scaler wants its update
        before the next window, and is then given back the scale from before."""
        scaler = self.parts.accelerator.scaler
        self.parts.runner.discard()
        if scaler is not None:
            before = scaler.state_dict()
            self.parts.prepared.step()  # no gradient is left, so no weight moves
            scaler.load_state_dict(before)

    def settle(self, state: State) -> None:
        """Before weights are evaluated or kept: has every process made its last step whole? If not, all go back."""
        if all_reduce_sum(torch.tensor([float(self.broken)]), self.parts.accelerator.device).item() > 0:
            self.mend(state)

    def mend(self, state: State) -> None:
        """Every process goes back to the last checkpoint, because a step of some was left half done."""
        self.broken = False
        release(self.parts.accelerator.device)
        state.health.out_of_memory += 1
        try:
            self.roll_back(state)
        except UserError as error:
            raise UserError(
                f"memory ran out inside the optimizer's step, which left weights half updated; {error}"
            ) from None
        text = (
            f"window {state.window}: memory ran out inside the optimizer's step, so weights and optimizer went back to "
            f"{state.anchor}; lower batch.micro, or leave more memory to the run"
        )
        self.sinks.alarm("Out of memory", text, level="ERROR", window=state.window)

    def back_to_best(self, state: State) -> None:
        """Before a window: where the schedule says so, the best weights so far take the place of the last ones. Once,
        and again only where a longer schedule brings the place again."""
        fraction = self.parts.recipe.schedule.return_to_best
        if fraction is None:
            return
        done, total = state.returned_window, self.parts.length.total
        if state.window / total < fraction or (done is not None and done / total >= fraction):
            return
        self.settle(state)
        self.sinks.say(resuming.return_to_best(self.parts, state, self.checkpoints))

    def roll_back(self, state: State) -> None:
        resuming.rollback(self.parts, state, self.checkpoints)
        self.sinks.say(
            f"rolled back to {state.anchor} (step {state.step}); the samples go on after window {state.window}"
        )
