"""One window: the micro-batches of one optimizer step, from counting to summed gradients.

Nothing here changes weights: the loop looks at the result and decides.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import Parameter

from detr_accel.data.loader import largest_canvas
from detr_accel.models.denoising import DenoisingQueries
from detr_accel.models.losses import image_spread
from detr_accel.monitor import memory
from detr_accel.monitor.stopwatch import Stopwatch
from detr_accel.structures import Batch, Targets, UserError
from detr_accel.train.forward_state import ForwardState
from detr_accel.train.reduce import GradientReducer, all_reduce_max, all_reduce_sum

# what alarms want to know of a window's targets: counts over all its images, from the host and for no further reduction
FACTS = ("blank_images", "empty_images", "cut_boxes", "tiny_boxes")
PIXELS = 2  # counted beside them: pixels of the images, and of the canvases that hold them
TINY_PX = 2.0  # a box with a side below it, in the image that reaches the model, can hardly be learned


@dataclass
class WindowResult:
    """What a window came to, on every process alike. Either it was trained through, or one of the reasons why it was
    not is set, and then there are no numbers."""

    losses: dict[str, float] = field(default_factory=dict)  # divided by global counts; the weighted total as "loss"
    grad_norms: dict[str, float] = field(default_factory=dict)  # per group, before clipping
    grad_norm: float = 0.0  # over all groups, before clipping
    num_images: int = 0
    num_boxes: int = 0
    most_boxes: int = 0  # of one image, where the model asks for it
    facts: dict[str, float] = field(default_factory=dict)  # of the targets: see FACTS; and the share of padding
    wait_seconds: float = 0.0  # for images, of the process that waited longest: all others waited for it
    statistics_finite: bool = True  # the running statistics that forward wrote
    bad_images: list[int] = field(default_factory=list)  # image ids whose matching cost was not finite
    canvas_px: tuple[int, int] | None = None  # (h, w) that every micro-batch was padded to; None: each has its own
    totals: list[Tensor] = field(default_factory=list)  # this process's alone: each micro-batch's loss, unread
    stop_requested: bool = False  # of any process
    save_requested: bool = False
    out_of_memory: bool = False  # why there are no numbers: memory,
    abandoned: bool = False  # a stop that could not wait for the window's end,
    broken: bool = False  # a process whose last optimizer step was left half done,
    failure: str | None = None  # or an error, in words

    @property
    def trained(self) -> bool:
        return not (self.out_of_memory or self.abandoned or self.broken or self.failure)

    @property
    def finite(self) -> bool:
        numbers = np.isfinite(self.grad_norm) and np.isfinite(self.losses["loss"])
        return bool(numbers and self.statistics_finite and not self.bad_images)


class Lonely(UserError):
    """An error of one process that the others do not learn of: the command line prints it on this one, too."""

    lonely = True


@dataclass
class Requests:
    """What this process brings to a window beside its images."""

    stop: bool = False
    save: bool = False
    broken: bool = False  # its last optimizer step ran out of memory half-way
    failure: str | None = None  # loading its images failed, in words
    overdue: Callable[[], bool] = lambda: False  # asked between micro-batches: the window can wait no longer
    canvas_px: tuple[int, int] = (0, 0)  # (h, w) planned for its part of the window, images that are lost included
    wait_seconds: float = 0.0  # that it waited for its images


class WindowRunner:
    """Runs windows on one model.

    Args:
        model: prepared by Accelerate; ``accelerator.unwrap_model`` of it is the bare detector.
        groups: group name -> named trainable parameters, for the norms.
        loss_names: of the criterion's terms, for a process that has no image to take them from.
        overlap: the model is wrapped for reduction during backward (DistributedDataParallel).
        own_canvas: processes may bring different canvases, as each reads its own part of a stream; all pad to the
            largest.
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
        own_canvas: bool = False,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.criterion = criterion
        self.groups = {name: [p for _, p in rows] for name, rows in groups.items() if rows}
        self.reducer = GradientReducer(p for rows in self.groups.values() for p in rows)
        self.forward_state = ForwardState(model)
        self.loss_names = [*loss_names, "loss"]
        self.seed = seed
        self.overlap = overlap and accelerator.num_processes > 1
        self.own_canvas = own_canvas and accelerator.num_processes > 1
        self.phases = memory.Phases(accelerator.device, on=False)  # the loop brings one that reports
        self.clock = Stopwatch(accelerator.device, wait=False, rest="other")
        self._time_matching()

    def run(
        self,
        micro_batches: Sequence[Batch],
        *,
        all_share: bool = True,
        planned: int | None = None,
        requests: Requests | None = None,
    ) -> WindowResult:
        """Forward and backward over this process's share; gradients are summed over processes and lie in ``.grad``.

        A process that fails, runs out of memory or may not wait meets no collective half-way: it stops computing, and
        all learn of it together. Then there are no gradients, and the running statistics are those from before.

        Args:
            micro_batches: this process's cuts of the window; may be empty.
            all_share: every process has at least one micro-batch (needed to reduce during backward),
            planned: unless fewer images than these are there over all processes.
            requests: what this process asks of all.
        """
        requests = requests or Requests()
        self.criterion.train()
        self.model.train()
        self.forward_state.remember()
        canvas_px, most_boxes = self._largest(micro_batches, requests.canvas_px)
        total, failure = self._count(micro_batches, requests, canvas_px)
        if self.overlap and (failure or requests.broken):  # the others enter backward's reductions and cannot be told
            raise Lonely(failure or "memory ran out inside the optimizer's step; go on with --resume")
        overlap = self.overlap and all_share
        if overlap and planned is not None:  # a device read, of this mode only
            overlap = int(total[2]) == planned
        share = _Share(failure=failure, canvas_px=canvas_px, most_boxes=most_boxes)
        if failure is None and not requests.broken:
            self._compute(micro_batches, self.criterion.normalisers(total[:3]), overlap, share, requests)
        with self.clock.section("reduce"):
            result = self._agree(share, requests)
        if not result.trained:
            self.discard()
            return result
        with self.clock.section("reduce"):
            if overlap:
                self._fill_missing()
            else:
                self.reducer()
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients()
        images = sum(len(b) for b in micro_batches)
        self.forward_state.combine(images, total[2], self.accelerator.num_processes, self.accelerator.device)
        result.totals, result.most_boxes, result.canvas_px = share.totals, share.most_boxes, canvas_px
        return self._read(share, total, result)

    def _time_matching(self) -> None:
        """Matching is called from within the criterion, which knows no clock."""
        plain = self.criterion.matcher

        def timed(*args, **kwargs):
            with self.clock.section("matcher" if self.clock.inside == "loss" else self.clock.inside or "matcher"):
                return plain(*args, **kwargs)

        object.__setattr__(self.criterion, "matcher", timed)

    def discard(self) -> None:
        """As if the window had not been: gradients gone, running statistics as before it."""
        self.forward_state.restore()
        for rows in self.groups.values():
            for p in rows:
                p.grad = None

    def _largest(
        self, micro_batches: Sequence[Batch], planned_px: tuple[int, int]
    ) -> tuple[tuple[int, int] | None, int]:  # fmt: skip
        """What all processes must have alike: a reduction and a device read more where there are several, before there
        is anything to wait for.

        Args:
            planned_px: the canvas of this process's images, also where all of them are lost.
        Returns:
            The (h, w) to pad to where processes may bring different ones, None: it is the window's already; and, where
            there are denoising queries, the most boxes of an image, which they all have their size from, else 0.
        """
        sides = [max(pair) for pair in zip(planned_px, largest_canvas(micro_batches), strict=True)]
        most = max((len(t.labels) for b in micro_batches for t in b.targets), default=0)
        denoised = self.criterion.noise is not None
        if self.own_canvas or (denoised and self.accelerator.num_processes > 1):
            *sides, most = all_reduce_max(torch.tensor([*sides, most]), self.accelerator.device).tolist()
        return (sides[0], sides[1]) if self.own_canvas else None, most if denoised else 0

    def _count(
        self, micro_batches: Sequence[Batch], requests: Requests, canvas_px: tuple[int, int] | None
    ) -> tuple[Tensor, str | None]:
        """The window's counts over all processes, then each one's wait; and why this process cannot take part."""
        failure, waits = requests.failure, torch.zeros(self.accelerator.num_processes, dtype=torch.float64)
        waits[self.accelerator.process_index] = requests.wait_seconds
        count = torch.cat([self.criterion.count([]), torch.zeros(len(FACTS) + PIXELS, dtype=torch.float64)])
        if failure is None:
            try:
                rows = [
                    torch.cat([self.criterion.count(b.targets), count_facts(b.targets), count_pixels(b, canvas_px)])
                    for b in micro_batches
                ]
                count = torch.stack([count, *rows]).sum(0)
            except UserError as error:
                failure = str(error)
        return all_reduce_sum(torch.cat([count, waits]), self.accelerator.device), failure

    def _compute(
        self,
        micro_batches: Sequence[Batch],
        counts: dict[str, Tensor],
        overlap: bool,
        share: _Share,
        requests: Requests,
    ) -> None:
        for i, batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            silent = self.overlap and not (overlap and last)
            if not self.overlap and requests.overdue():
                share.abandoned = True
                return
            try:
                with self.accelerator.no_sync(self.model) if silent else contextlib.nullcontext():
                    self._micro_batch(batch, counts, share, scale=self.accelerator.num_processes if overlap else 1)
            except Exception as error:
                if self.overlap:  # the others are inside backward's reductions: only a restart helps
                    raise _overlap_error(error) from error
                if not memory.is_out_of_memory(error):
                    share.failure = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                    if not isinstance(error, UserError):
                        traceback.print_exc(file=sys.stderr)  # a mistake of ours: whoever reports it needs the place
                share.out_of_memory = memory.is_out_of_memory(error)
                return

    def _micro_batch(self, batch: Batch, counts: dict[str, Tensor], share: _Share, scale: int) -> None:
        """Forward, match, loss, backward; adds the detached terms and the ids of unmatched images to ``share``."""
        seed_dropout(self.seed, batch)
        section = self.clock.section
        denoising = self.criterion.disturb(batch, share.most_boxes, self.seed)
        with section("copy"):
            batch = batch.to(self.accelerator.device, non_blocking=True)
            if share.canvas_px is not None:
                batch = batch.padded(share.canvas_px)
        self.phases.begin("forward")
        with section("forward"):
            outputs, denoising = forward(self.model, batch, denoising)
        with section("loss"):
            result = self.criterion(outputs, batch.targets, counts, denoising)
        self.phases.begin("backward")
        with section("backward"):
            # under overlap DistributedDataParallel averages over processes; ours is a sum
            self.accelerator.backward(result.total * scale)
        share.totals.append(result.total.detach())
        share.box_sums = result.box_sums if share.box_sums is None else share.box_sums + result.box_sums
        for name, value in {**result.losses, "loss": share.totals[-1]}.items():
            share.sums[name] = share.sums[name] + value if name in share.sums else value
        share.bad += [t.image_id for t, is_bad in zip(batch.targets, result.bad_image, strict=True) if is_bad]

    def _agree(self, share: _Share, requests: Requests) -> WindowResult:
        """One small reduction of flags; words and ids are exchanged only where there are any."""
        flags = [
            len(share.bad), requests.stop, requests.save, requests.broken, share.out_of_memory, share.abandoned,
            share.failure is not None,
        ]  # fmt: skip
        flags = [float(x) for x in flags]
        if self.accelerator.num_processes > 1:
            summed = all_reduce_sum(torch.tensor(flags, dtype=torch.float32), self.accelerator.device)
            flags = summed.tolist()  # device read, first of two a window
        bad, stop, save, broken, out_of_memory, abandoned, failed = flags
        failures = gather_object([share.failure]) if failed else []
        return WindowResult(
            bad_images=sorted(set(gather_object(share.bad))) if bad else [],
            stop_requested=stop > 0,
            save_requested=save > 0,
            failure=next((text for text in failures if text), None),
            broken=broken > 0,
            abandoned=abandoned > 0,
            out_of_memory=out_of_memory > 0 and not abandoned,
        )

    def _fill_missing(self) -> None:
        for rows in self.groups.values():
            for p in rows:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)

    def _read(self, share: _Share, total: Tensor, result: WindowResult) -> WindowResult:
        """Losses, counts and norms come to the host together: the second of two device reads a window."""
        device = self.accelerator.device
        names = [*self.loss_names, "image_spread"]
        zero = torch.zeros((), device=device)
        values = torch.stack([share.sums.get(name, zero).to(torch.float64) for name in self.loss_names])
        boxes = share.box_sums
        if boxes is None:  # no image of this window is this process's
            boxes = torch.zeros(2, self.criterion.num_queries, 4, dtype=torch.float64, device=device)
        values, boxes = all_reduce_sum(torch.cat([values, boxes.flatten()]), device).split([len(values), boxes.numel()])
        values = torch.cat([values, image_spread(boxes.view(2, -1, 4), total[2])[None]])
        norms = [
            torch.nn.utils.get_total_norm([p.grad for p in rows]).to(torch.float64) for rows in self.groups.values()
        ]
        health = self.forward_state.health(device)[None]
        read = torch.cat([values, torch.stack(norms), health, total.to(torch.float64)]).tolist()
        result.losses = dict(zip(names, read, strict=False))
        result.grad_norms = dict(zip(self.groups, read[len(names) :], strict=False))
        result.grad_norm = float(np.sqrt(np.sum(np.square(list(result.grad_norms.values())))))
        health, num_boxes, matched, num_images, *more = read[len(names) + len(norms) :]
        facts, (used_px, canvas_px, *waits) = more[: len(FACTS)], more[len(FACTS) :]
        result.wait_seconds = max(waits)
        result.facts = dict(zip(FACTS, map(int, facts), strict=True)) | {"unmatched_boxes": int(num_boxes - matched)}
        result.facts["padding"] = 1 - used_px / max(canvas_px, 1)
        result.statistics_finite = bool(np.isfinite(health))
        result.num_images, result.num_boxes = int(num_images), int(num_boxes)
        return result

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


@dataclass
class _Share:
    """One process's part of a window, before all agree."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    box_sums: Tensor | None = None
    most_boxes: int = 0  # of an image of the whole window
    bad: list[int] = field(default_factory=list)
    totals: list[Tensor] = field(default_factory=list)
    out_of_memory: bool = False
    abandoned: bool = False
    failure: str | None = None
    canvas_px: tuple[int, int] | None = None  # to pad to


def forward(
    model: nn.Module, batch: Batch, denoising: DenoisingQueries | None
) -> tuple[dict, DenoisingQueries | None]:
    """The outputs for a batch that is on the device, and the denoising queries, moved there."""
    if denoising is None:
        return model(batch.images, batch.mask), None
    denoising = denoising.to(batch.images.device, non_blocking=True)
    return model(batch.images, batch.mask, denoising), denoising


def count_facts(targets: Sequence[Targets]) -> Tensor:
    """``FACTS`` of one micro-batch, float64 on the host.

    Args:
        targets: still on the host, so that looking at them waits for nothing.
    """
    tiny = 0
    for t in targets:
        h, w = t.size_px
        tiny += int((np.from_dlpack(t.boxes_cxcywh)[:, 2:] * (w, h) < TINY_PX).any(1).sum())
    counts = sum(t.is_blank for t in targets), sum(len(t.labels) == 0 for t in targets), sum(t.num_cut for t in targets)
    return torch.tensor([*counts, tiny], dtype=torch.float64)


def count_pixels(batch: Batch, canvas_px: tuple[int, int] | None = None) -> Tensor:
    """Pixels of a micro-batch's images, and of the canvases that hold them: float64 [2] on the host. Each micro-batch
    counts with its own canvas, however the window was cut, or with ``canvas_px``."""
    height, width = canvas_px or batch.canvas_px
    used = sum(h * w for h, w in (t.size_px for t in batch.targets))
    return torch.tensor([used, len(batch) * height * width], dtype=torch.float64)


def seed_dropout(seed: int, batch: Batch) -> None:
    """Dropout depends on where the micro-batch stands in the run, not on what was drawn before it."""
    entropy = (seed, batch.epoch, batch.positions[0])
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))


def _overlap_error(error: Exception) -> Exception:
    if not memory.is_out_of_memory(error):
        return error
    return Lonely(
        "out of memory while gradients were being reduced (dist.overlap), where the other processes cannot be told: "
        "lower batch.micro, then go on from the last checkpoint with --resume; without dist.overlap the window would "
        "have been repeated in smaller parts by itself"
    )
