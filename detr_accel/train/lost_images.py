"""Images that could not be read in the middle of a run: their places stay empty, they are counted and named once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from accelerate.utils import gather_object

from detr_accel.data.dirt import printable
from detr_accel.structures import Lost, UserError
from detr_accel.train import parts
from detr_accel.train.checkpoint import State
from detr_accel.train.parts import Parts
from detr_accel.train.window import WindowResult

_SHOWN = 3


class LostImages:
    """Called after each window, on every process: how many are missing follows from the global count, so that the
    processes exchange words only where there are any."""

    def __init__(self, built: Parts, state: State, sinks) -> None:
        self.built, self.state, self.sinks = built, state, sinks
        self.named: set[int] = set()

    def __call__(self, lost: Sequence[Lost], result: WindowResult) -> None:
        """
        Args:
            lost: of this process's part of the window in hand.
            result: of the window, trained.
        Raises:
            UserError: many windows in a row had no image at all.
        """
        state = self.state
        number = parts.window_size(self.built, state.window) - result.num_images
        state.blank_windows = 0 if result.num_images else state.blank_windows + 1
        if number == 0:
            return
        state.dropped += number
        lost = gather_object(list(lost))
        told = words(lost, self.named)
        if told:
            policy = self.built.recipe.data.on_bad
            text = f"window {state.window + 1}: {told}; left out, their places in the window stay empty "
            text += f"(data.on_bad: {policy}; {state.dropped} so far)"
            self.sinks.alarm("Unreadable images", text, window=state.window + 1)
        limit = self.built.recipe.health.give_up_after
        if state.blank_windows >= limit:
            why = f", the last: {lost[-1][1]}" if lost else ""
            raise UserError(
                f"not one image of {limit} windows in a row could be read{why}: is the disk or share with the images "
                "still there? Mend it, then go on with --resume"
            )


def words(lost: Iterable[Lost], named: set[int]) -> str:
    """Which images, and why; those in ``named`` were told before. Empty where there is nothing new."""
    new = sorted({image_id: why for image_id, why in lost if image_id not in named}.items())
    named.update(image_id for image_id, _ in new)
    shown = "; ".join(why for _, why in new[:_SHOWN])
    return printable(shown) + (f"; and {len(new) - _SHOWN} more" if len(new) > _SHOWN else "")
