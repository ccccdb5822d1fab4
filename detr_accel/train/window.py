"""One window: the micro-batches of one optimizer step, from counting to clipped gradients.

Nothing here changes weights: the loop looks at the result and decides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import Parameter

from detr_accel.structures import Batch
from detr_accel.train.reduce import GradientReducer, all_reduce_sum


@dataclass
class WindowResult:
    """What a window came to, on every process alike."""

    losses: dict[str, float]  # each already divided by its global count; the weighted total under "loss"
    grad_norms: dict[str, float]  # per group, before clipping
    grad_norm: float  # over all groups, before clipping
    num_images: int
    num_boxes: int
    stop_requested: bool
    bad_images: list[int] = field(default_factory=list)  # image ids whose matching cost was not finite

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.grad_norm) and np.isfinite(self.losses["loss"]) and not self.bad_images)


class WindowRunner:
    """Runs windows on one model.

    Args:
        model: prepared by Accelerate; ``accelerator.unwrap_model`` of it is the bare detector.
        groups: group name -> named trainable parameters, for the norms.
        loss_names: of the criterion's terms, for a process that has no image to take them from.
        overlap: the model is wrapped for reduction during backward (DistributedDataParallel).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        criterion: nn.Module,
        groups: dict[str, list[tuple[str, Parameter]]],
        *,
        loss_names: list[str],
        seed: int,
        overlap: bool = False,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.criterion = criterion
        self.groups = {name: [p for _, p in rows] for name, rows in groups.items() if rows}
        self.reducer = GradientReducer(p for rows in self.groups.values() for p in rows)
        self.loss_names = [*loss_names, "loss"]
        self.seed = seed
        self.overlap = overlap and accelerator.num_processes > 1

    def run(
        self, micro_batches: Sequence[Batch], *, all_share: bool = True, stop_requested: bool = False
    ) -> WindowResult:
        """Forward and backward over this process's share; gradients are summed over processes and lie in ``.grad``.

        Args:
            micro_batches: this process's cuts of the window; may be empty.
            all_share: every process has at least one micro-batch (needed to reduce during backward).
            stop_requested: this process was asked to stop; the answer says whether any was.
        """
        device = self.accelerator.device
        self.criterion.train()
        self.model.train()
        local = [self.criterion.count(batch.targets) for batch in micro_batches]
        count = torch.stack(local).sum(0) if local else self.criterion.count([])
        total = all_reduce_sum(count, device)
        counts = self.criterion.normalisers(total)

        overlap = self.overlap and all_share
        sums: dict[str, Tensor] = {}
        bad: list[int] = []
        for i, batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            silent = self.overlap and not (overlap and last)
            with self.accelerator.no_sync(self.model) if silent else contextlib.nullcontext():
                bad += self._micro_batch(batch, counts, sums, scale=self.accelerator.num_processes if overlap else 1)

        flags = self._agree(len(bad), stop_requested)
        if flags[0]:
            bad = sorted(set(self._gather_ids(bad)))
        if overlap:
            self._fill_missing()
        else:
            self.reducer()
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients()
        return self._read(sums, total, bad, bool(flags[1]))

    def _micro_batch(self, batch: Batch, counts: dict[str, Tensor], sums: dict[str, Tensor], scale: int) -> list[int]:
        """Forward, match, loss, backward; adds the detached terms to ``sums``; returns ids of unmatched images."""
        # dropout depends on where the micro-batch stands in the run, not on what was drawn before it
        entropy = (self.seed, batch.epoch, batch.positions[0])
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))
        batch = batch.to(self.accelerator.device, non_blocking=True)
        outputs = self.model(batch.images, batch.mask)
        result = self.criterion(outputs, batch.targets, counts)
        # under overlap DistributedDataParallel averages over processes; ours is a sum
        self.accelerator.backward(result.total * scale)
        for name, value in {**result.losses, "loss": result.total.detach()}.items():
            sums[name] = sums[name] + value if name in sums else value
        return [t.image_id for t, is_bad in zip(batch.targets, result.bad_image, strict=True) if is_bad]

    def _agree(self, num_bad: int, stop: bool) -> tuple[float, float]:
        if self.accelerator.num_processes == 1:
            return float(num_bad), float(stop)
        flags = all_reduce_sum(torch.tensor([num_bad, stop], dtype=torch.float32), self.accelerator.device)
        num_bad, stop = flags.tolist()  # device read, first of two a window
        return num_bad, stop

    @staticmethod
    def _gather_ids(mine: list[int]) -> list[int]:
        from accelerate.utils import gather_object

        return gather_object(mine)

    def _fill_missing(self) -> None:
        for rows in self.groups.values():
            for p in rows:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)

    def _read(self, sums: dict[str, Tensor], total: Tensor, bad: list[int], stop: bool) -> WindowResult:
        """Losses, counts and norms come to the host together: the second of two device reads a window."""
        device = self.accelerator.device
        names = self.loss_names
        zero = torch.zeros((), device=device)
        values = torch.stack([sums.get(name, zero).to(torch.float64) for name in names])
        values = all_reduce_sum(values, device)
        norms = [
            torch.nn.utils.get_total_norm([p.grad for p in rows]).to(torch.float64) for rows in self.groups.values()
        ]
        read = torch.cat([values, torch.stack(norms), total.to(torch.float64)]).tolist()
        losses = dict(zip(names, read, strict=False))
        grad_norms = dict(zip(self.groups, read[len(names) :], strict=False))
        num_boxes, _, num_images = read[len(names) + len(norms) :]
        return WindowResult(
            losses=losses,
            grad_norms=grad_norms,
            grad_norm=float(np.sqrt(np.sum(np.square(list(grad_norms.values()))))),
            num_images=int(num_images),
            num_boxes=int(num_boxes),
            stop_requested=stop,
            bad_images=bad,
        )

    @torch.no_grad()
    def clip(self, result: WindowResult, clip_norm: float | None, clip_value: float | None) -> None:
        """Scale gradients down to a total L2 norm of clip_norm, or bound each component by clip_value."""
        grads = [p.grad for rows in self.groups.values() for p in rows]
        if clip_norm is not None:
            coefficient = clip_norm / (result.grad_norm + 1e-6)
            if coefficient < 1:
                torch._foreach_mul_(grads, coefficient)
        if clip_value is not None:
            torch._foreach_clamp_min_(grads, -clip_value)
            torch._foreach_clamp_max_(grads, clip_value)
