"""What to do with a window whose loss or gradient is not finite. It decides in words; the loop acts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from detr_accel.structures import UserError
from detr_accel.train.window import WindowResult


@dataclass
class HealthState:
    """What the decisions remember; saved with every checkpoint."""

    nonfinite: int = 0  # windows refused so far
    rollbacks: int = 0
    out_of_memory: int = 0  # times that memory ran out
    lr_factor: float = 1.0  # what rollbacks have left of the learning rate
    strikes: list[int] = field(default_factory=list)  # windows refused since the last rollback
    refused_in_a_row: int = 0
    overflows_in_a_row: int = 0  # of fp16's search for a scale


@dataclass(frozen=True)
class Verdict:
    """``action``: commit, skip, rollback or stop; the alarm's title and words, where there is one."""

    action: str
    title: str = ""
    text: str = ""
    capture: bool = False


class Health:
    """The policy ``health.on_nonfinite`` of a recipe.

    Args:
        policy: skip, rollback or stop.
        strikes: refused windows within the last ``within`` windows that cause a rollback.
        lr_factor: what a rollback multiplies the learning rate by.
        give_up_after: refused windows in a row after which the run stops, whatever the policy.
        overflow_patience: fp16 overflows in a row that are taken as the ordinary search for a scale.
    """

    def __init__(
        self, policy: str, *, strikes: int, within: int, lr_factor: float, give_up_after: int, overflow_patience: int
    ) -> None:
        assert policy in ("skip", "rollback", "stop"), policy
        self.policy, self.strikes, self.within, self.lr_factor = policy, strikes, within, lr_factor
        self.give_up_after, self.overflow_patience = give_up_after, overflow_patience

    def judge(
        self, state: HealthState, result: WindowResult, window: int, *, scaler: bool, precision: str, images: list[str]
    ) -> Verdict:
        """The same on every process: all see the same result.

        Args:
            state: is brought up to date.
            window: number of this window, from 1.
            scaler: whether fp16's scaler is in use, whose search makes gradients overflow.
            precision: for the advice.
            images: names of those whose matching cost was not finite.
        """
        if result.finite:
            state.refused_in_a_row = state.overflows_in_a_row = 0
            return Verdict("commit")
        forward_is_fine = not result.bad_images and np.isfinite(result.losses["loss"]) and result.statistics_finite
        if scaler and forward_is_fine and state.overflows_in_a_row < self.overflow_patience:
            return self._overflow(state, window)
        state.nonfinite += 1
        state.refused_in_a_row += 1
        state.strikes = [w for w in (*state.strikes, window) if w > window - self.within]
        found = describe(result, images)
        action = self._action(state)
        done, advice = self._words(action, state), _advice(result, precision)
        return Verdict(action, "Non-finite window", f"window {window}: {found}; {done}. {advice}", capture=True)

    def _overflow(self, state: HealthState, window: int) -> Verdict:
        state.overflows_in_a_row += 1
        if state.overflows_in_a_row < self.overflow_patience:
            return Verdict("commit")  # the scaler skips the step and lowers its scale
        text = (
            f"window {window}: {state.overflows_in_a_row} windows in a row overflowed in fp16, more than the search "
            "for a scale needs, so nothing has been learned since; use precision=bf16 (or no), or lower optim.lr"
        )
        return Verdict("commit", "fp16 overflows", text)

    def _action(self, state: HealthState) -> str:
        if self.policy == "stop" or state.refused_in_a_row >= self.give_up_after:
            return "stop"
        if self.policy == "rollback" and len(state.strikes) >= self.strikes:
            return "rollback"
        return "skip"

    def _words(self, action: str, state: HealthState) -> str:
        if action == "rollback":
            return (
                f"it is number {len(state.strikes)} within {self.within} windows, so weights, averages and optimizer "
                f"go back to the last checkpoint and the learning rate is multiplied by {self.lr_factor:g}"
            )
        if action == "stop":
            in_a_row = state.refused_in_a_row
            why = (
                f" after {in_a_row} such windows in a row" if self.policy != "stop" else " (health.on_nonfinite: stop)"
            )
            return f"nothing was updated, and the run stops{why}"
        return f"nothing was updated and the run goes on ({state.nonfinite} such windows so far)"


def with_capture(verdict: Verdict, folder: object) -> Verdict:
    """Say where the window was kept."""
    if folder is None:
        return verdict
    return replace(verdict, text=f"{verdict.text}. Kept for `detr-accel replay {folder}`")


def rolled_back(state: HealthState, factor: float) -> None:
    """Note a rollback; earlier strikes are paid for."""
    state.rollbacks += 1
    state.lr_factor *= factor
    state.strikes = []


def describe(result: WindowResult, images: list[str]) -> str:
    """What is not finite, in words."""
    if result.bad_images:
        named = ", ".join(images[:3]) + (", ..." if len(images) > 3 else "")
        return f"the predictions for image {named} are not finite"
    bad = [name for name, value in result.losses.items() if name != "loss" and not np.isfinite(value)]
    if not np.isfinite(result.losses["loss"]):
        return "the loss is not finite" + (f" ({', '.join(bad[:3])})" if bad else "")
    groups = [name for name, value in result.grad_norms.items() if not np.isfinite(value)]
    if groups:
        return f"the gradient of {', '.join(groups)} is not finite, with a loss of {result.losses['loss']:.4g}"
    return "the running statistics of a norm are not finite"


def _advice(result: WindowResult, precision: str) -> str:
    if precision != "no":
        return (
            f"Most often the precision ({precision}) or the learning rate: `detr-accel replay` of the capture says "
            "whether it fails in float32 too"
        )
    if result.bad_images:
        return "Most often that image or a diverged learning rate: `detr-accel replay` of the capture tells which"
    return "Most often the learning rate (DETR trains at 1e-4): `detr-accel replay` of the capture names the layer"


def stop_error(verdict: Verdict) -> UserError:
    """The error that ends a run whose verdict is to stop."""
    return UserError(
        f"{verdict.text}. Going on with --resume meets the same window again: mend the cause first, or pass over it "
        "with health.on_nonfinite=skip"
    )
