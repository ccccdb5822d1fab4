"""The loss over a whole set of images, computed as a training window's is, to compare one set with another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from detr_accel.monitor.memory import is_out_of_memory
from detr_accel.structures import Batch, UserError

MOST_IMAGES = 512
SHARE = 0.02


def num_images(wanted: int | str, trained_between: float, available: int) -> int:
    """How many training images are looked at in each evaluation. A function of the recipe and never of the clock, so
    that a repeated run logs the same.

    Args:
        wanted: ``evaluate.train_images``.
        trained_between: images trained on between two evaluations.
        available: in the training split.
    """
    if wanted == "auto":  # a forward pass costs about a third of a training step
        wanted = min(MOST_IMAGES, math.ceil(SHARE * trained_between))
    return min(int(wanted), available)


class SetLoss:
    """Adds up a set's loss, batch by batch; divided once by the counts of the whole set over all processes, the same to
    the last digit for any number of them.

    Args:
        criterion: the training's own.
    """

    def __init__(self, criterion: nn.Module) -> None:
        self.criterion = criterion
        self.rows: list[tuple[int, list[float], list[float]]] = []  # position, sums, counts
        self.names: list[str] = []
        self.failure: str | None = None
        self.stopped = False  # on any process, once ``result`` was asked for

    @torch.no_grad()
    def add(self, outputs: dict, batch: Batch) -> None:
        """
        Args:
            outputs: of a detector that does not train (no dropout).
            batch: still on the host.
        """
        if self.failure is not None:
            return
        try:
            count = self.criterion.count(batch.targets)
        except UserError as error:  # a label that the model has no class for; told when all are together
            self.failure = str(error)
            return
        device = outputs["pred_logits"].device
        one = {name: torch.ones((), device=device) for name in self.criterion.normalisers(count)}
        result = self.criterion(outputs, [t.to(device) for t in batch.targets], one)
        self.names = list(result.losses)
        values = torch.stack([v.to(torch.float64) for v in result.losses.values()]).tolist()  # device read
        self.rows.append((batch.positions[0], values, count.tolist()))

    def result(self) -> dict[str, float]:
        """The set's loss and its terms, the same on every process; call it on all of them. Empty without a batch.

        Raises:
            UserError: on every process, where a batch of any could not be used.
        """
        shares = gather_object([(self.rows, self.names, self.failure, self.stopped)])
        self.stopped = any(stopped for *_, stopped in shares)
        failure = next((told for _, _, told, _ in shares if told), None)
        if failure is not None:
            raise UserError(failure)
        rows = sorted(row for share, *_ in shares for row in share)
        names = next((names for _, names, *_ in shares if names), [])
        if not rows:
            return {}
        sums = [math.fsum(values) for values in zip(*(row[1] for row in rows), strict=True)]
        total = torch.tensor([math.fsum(v) for v in zip(*(row[2] for row in rows), strict=True)], dtype=torch.float64)
        return self.criterion.average(dict(zip(names, sums, strict=True)), total)


def over(
    batches: Iterable[Batch | UserError],
    model: nn.Module,
    criterion: nn.Module,
    accelerator: Accelerator,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """The loss of a model over this process's batches and everybody else's.

    Args:
        batches: an error stands for a batch that could not be read, which is left out.
        stop: asked before each batch.
    Returns:
        None, on every process, where any was to stop.
    Raises:
        UserError: on every process alike.
    """
    found = SetLoss(criterion)
    try:
        with torch.inference_mode(), accelerator.autocast():
            for batch in batches:
                if stop():
                    found.stopped = True
                    break
                if isinstance(batch, Batch) and len(batch):
                    moved = batch.to(accelerator.device, non_blocking=True)
                    found.add(model(moved.images, moved.mask), batch)
    except Exception as error:  # the others wait in result: reach it first
        why = "memory ran out" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
        found.failure = (
            f"the loss of training images could not be computed ({why}): lower evaluate.batch or data.eval_size, or "
            "set evaluate.train_images=0, then go on with --resume"
        )
    result = found.result()
    return None if found.stopped else result
