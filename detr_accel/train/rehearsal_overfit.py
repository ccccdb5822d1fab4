"""Eight images learned by heart: the test that finds what no check of files can, such as a head that does not learn.

What is the recipe's own: model, weights, loss, optimizer, learning rate of each group, clipping, precision, processes.
What is not: dropout is off, there is no augmentation (images as at evaluation), and the rate is constant, without
warm-up. A box is found when a detection has its class (compared by the json's own category id), IoU >= 0.5 with it in
pixels of the file, and a score of 0.5 or more. Legend: N boxes of an image, K detections.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn

from detr_accel import data, models
from detr_accel.data import look
from detr_accel.data.sampler import permutation
from detr_accel.monitor.sinks import Silent
from detr_accel.structures import Batch, Detections, UserError
from detr_accel.train import health
from detr_accel.train.agree import on_main
from detr_accel.train.capture import Captures, names_of
from detr_accel.train.checkpoint import State
from detr_accel.train.commit import Commit
from detr_accel.train.optim import set_lr
from detr_accel.train.parts import Parts
from detr_accel.train.rehearsal_process import Trouble
from detr_accel.train.run_folder import RunFolder
from detr_accel.train.window import Requests, WindowResult

NUM_IMAGES = 8
LOOKED_AT = 64  # the first images of epoch 0, of which those with the fewest boxes are taken
FOUND = 0.9  # share of the boxes: then it is enough
CHECK_EVERY = 20
SCORE, IOU = 0.5, 0.5
FELL = 0.1  # share by which each loss term must fall where the time does not suffice to find the boxes
LOW = {"loss_bbox": 0.1, "loss_giou": 0.3}  # as good as learned: nothing left to fall
# the loss of independent classes asks for more the better boxes fit, and may rise; there the wrong ones are counted
LOW_OF_CLASSES = {True: {"loss_ce": 0.3}, False: {"class_error": 20.0}}
SOME_STEPS, ENOUGH_STEPS = 30, 100  # fewer say nothing about the whole loss, and about each of its terms
PROBED = 3  # steps after which every part must have moved


def overfit(built: Parts, state: State, seconds: float) -> dict[str, Any]:
    """Train on eight images until their boxes are found or the time is over; on every process.

    Args:
        state: its micro is in force; nothing of it changes.
        seconds: at most; three steps are always made.
    Returns:
        text, and the warnings where it was too little time.
    Raises:
        Trouble, UserError: it does not learn.
    """
    accelerator = built.accelerator
    train = data.in_any_order(built.recipe, built.splits.train, 8 * LOOKED_AT)
    indices = on_main(accelerator, lambda: choose(train, built.recipe.seed))
    cuts = data.still_window(
        built.recipe, train, indices, rank=accelerator.process_index,
        num_ranks=accelerator.num_processes, micro=state.micro, mean=built.bare.mean, std=built.bare.std,
    )  # fmt: skip
    _dropout_off(built.bare)
    run = _Run(built, train, indices, cuts)
    begun, found = time.perf_counter(), 0.0
    while True:
        over = time.perf_counter() - begun > seconds and run.steps >= PROBED
        before = run.steps
        stop = run.step(stop=over and accelerator.is_main_process)
        if run.steps == before and not stop:  # fp16 looks for its scale
            continue
        if run.steps == PROBED > before:
            run.check_moved()
        if run.steps % CHECK_EVERY == 0 or stop:
            found = run.found()
            if found >= FOUND or stop:
                break
    return run.verdict(found)


def refuse_nonfinite(built: Parts, result: WindowResult, where: str) -> None:
    """
    Raises:
        Trouble: the window is not finite, and that is not fp16's search for a scale (which has an end of its own).
    """
    forward_is_fine = not result.bad_images and math.isfinite(result.losses["loss"])
    if result.finite or (built.accelerator.scaler is not None and forward_is_fine):
        return
    names = list(names_of(built.splits.train, result.bad_images).values())
    precision, rate = built.accelerator.mixed_precision, built.recipe.optim.lr
    other = "" if precision == "no" else f", or try another precision (it is {precision}) with precision=no"
    raise Trouble(
        where.partition(",")[0], f"{where}: {health.describe(result, names)}",
        f"lower optim.lr (it is {rate:g}; DETR trains at 1e-4){other}",
    )  # fmt: skip


def choose(train: data.Source, seed: int) -> list[int]:
    """The images with the fewest boxes among the first of epoch 0 that have any."""
    order = permutation(seed, 0, len(train))
    counts: list[tuple[int, int]] = []
    for tried, index in enumerate(order.tolist()):
        number = len(look.truth(train, index)[1])
        if number:
            counts.append((number, index))
        if len(counts) >= LOOKED_AT or tried >= 50 * LOOKED_AT:
            break
    if not counts:
        raise UserError("no training image with a box was found: add annotations, or set data.train_annotations")
    return [index for _, index in sorted(counts)[:NUM_IMAGES]]


def _dropout_off(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0


_WHOLES = ("transformer", "encoder", "decoder")


class _Run:
    def __init__(self, built: Parts, source: data.Source, indices: list[int], cuts: list[Batch]) -> None:
        self.built, self.source, self.indices, self.cuts = built, source, indices, cuts
        self.commit = Commit(built, RunFolder(Path()), Silent(), Captures(built, Path()))
        self.state = State(micro=1)
        self.losses: list[dict[str, float]] = []
        self.before = {name: p.detach().clone() for name, p in built.bare.named_parameters()}
        self.norms: dict[str, float] = {}
        self.low = LOW_OF_CLASSES[built.criterion.class_loss.background] | LOW
        self.all_share = len(indices) >= built.accelerator.num_processes

    @property
    def steps(self) -> int:
        return len(self.losses)

    def step(self, stop: bool) -> bool:
        """One window; returns whether the time is over."""
        built = self.built
        built.optimizer.zero_grad(set_to_none=True)
        result = built.runner.run(self.cuts, all_share=self.all_share, requests=Requests(stop=stop))
        if not result.trained:
            raise UserError(result.failure or "out of memory: lower batch.micro, or set it to auto")
        refuse_nonfinite(built, result, f"overfit, step {self.steps + 1}")
        self._note_norms(result)
        set_lr(built.optimizer, 1.0)
        self.state.window += 1
        self.commit(self.state, result, self.cuts)
        if result.finite:  # else fp16 looks for its scale, which is no step
            self.losses.append(result.losses)
        return result.stop_requested

    def _note_norms(self, result: WindowResult) -> None:
        if result.finite and self.steps < PROBED:
            for part, parameters in self._parts().items():
                norm = sum(float(p.grad.norm()) for _, p in parameters if p.grad is not None)
                self.norms[part] = max(self.norms.get(part, 0.0), norm)

    def _parts(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """class_embed, bbox_embed, query_embed, input_proj, transformer.encoder, transformer.decoder, or the modules
        right inside RT-DETR's encoder and decoder; the backbone where it is meant to train."""
        found: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, p in self.built.bare.named_parameters():
            top, _, rest = name.partition(".")
            part = f"{top}.{rest.partition('.')[0]}" if top in _WHOLES else top
            if part != "backbone" or p.requires_grad:
                found.setdefault(part, []).append((name, p))
        return found

    def check_moved(self) -> None:
        """
        Raises:
            Trouble: a part that should learn gets no gradient, or does not move.
        """
        rates = {g["name"]: g["lr"] for g in self.built.optimizer.param_groups}
        still = [name for name, rate in rates.items() if rate == 0]
        if still:
            remedy = "set it: the papers have optim.lr 1e-4, and optim.lr_backbone 1e-5 (RT-DETR-R101: 1e-6)"
            raise Trouble("overfit", f"the learning rate of {' and '.join(still)} is 0, so nothing is learned", remedy)
        group_of = {n: group for group, rows in self.built.groups.items() for n, _ in rows}
        kind = self.built.criterion.class_loss.name
        for part, parameters in self._parts().items():
            moved = any(not torch.equal(p.detach(), self.before[n]) for n, p in parameters)
            group = next((group_of[n] for n, _ in parameters if n in group_of), None)
            if group is None:
                text, remedy = "none of its weights is trained (requires_grad)", "no recipe key does it: mend the code"
            elif self.norms.get(part, 0.0) == 0:
                text, remedy = "its gradient is 0", f"look at loss.{kind}, loss.bbox and loss.giou, then at the code"
            elif not moved:
                text, remedy = f"its weights did not move in {PROBED} steps at {rates[group]:.3g}", "raise optim.lr"
            else:
                continue
            raise Trouble("overfit", f"{part} is dead: {text}", remedy)
        self.before = {}

    @torch.no_grad()
    def found(self) -> float:
        """Share of the boxes found, over all processes."""
        bare, accelerator, mine = self.built.bare, self.built.accelerator, []
        bare.eval()
        for batch in self.cuts:
            batch = batch.to(accelerator.device)
            with accelerator.autocast():
                outputs = bare(batch.images, batch.mask)
            mine += models.detections_of(bare, outputs, batch.targets)
        bare.train()
        mine_of = {d.image_id: d for d in mine}
        source = self.source
        counts = []
        for index in self.indices:
            if source.image_id(index) in mine_of:
                boxes_px, ids = look.truth(source, index)
                hits = count_found(mine_of[source.image_id(index)], boxes_px, ids, source.classes.category_ids)
                counts.append((hits, len(ids)))
        counts = gather_object(counts)
        self.hits, self.boxes = (sum(c[i] for c in counts) for i in (0, 1))
        return self.hits / max(1, self.boxes)

    def verdict(self, found: float) -> dict[str, Any]:
        """
        Raises:
            Trouble: a term of the loss does not fall.
        """
        falls = {}
        for name in self.low:
            first = self.losses[0][name]
            last = median(row[name] for row in self.losses[-5:])
            falls[name] = (first, last)
        told = ", ".join(f"{name} {first:.3g} -> {last:.3g}" for name, (first, last) in falls.items())
        text = (
            f"{self.hits} of {self.boxes} boxes of {len(self.indices)} images found after {self.steps} steps ({told})"
        )
        row: dict[str, Any] = {"text": text, "warnings": [], "found": found, "steps": self.steps}
        if found >= FOUND:
            return row
        stuck = self._stuck(falls)
        if stuck:
            rate = self.built.recipe.optim.lr
            raise Trouble(
                "overfit", f"eight images are not learned: {stuck} ({text})",
                f"look at the boxes and classes of these images (ids {self._ids()}) and at optim.lr ({rate:g}; DETR "
                "trains at 1e-4); with more --rehearse-minutes it may be seen to learn",
            )  # fmt: skip
        row["warnings"] = [
            f"{self.steps} steps on eight images say little: give --rehearse-minutes more"
            if self.steps < ENOUGH_STEPS
            else "the boxes were not all found in the time, but every part learns and what was looked at falls; a "
            "detector from scratch is slow, so give --rehearse-minutes more to see them found"
        ]
        return row

    def _stuck(self, falls: dict[str, tuple[float, float]]) -> str | None:
        """What does not learn, in words. A healthy DETR's GIoU may stand still for fifty steps: few steps can only show
        that the whole gets worse."""
        totals = [row["loss"] for row in self.losses]
        if self.steps >= SOME_STEPS and not median(totals[-5:]) < totals[0]:
            return f"the loss went from {totals[0]:.4g} to {median(totals[-5:]):.4g}"
        criterion = self.built.criterion
        weights = criterion.weights | {"class_error": criterion.weights[criterion.class_loss.name]}
        named = [
            name for name, (first, last) in falls.items()
            if weights[name.removeprefix("loss_")] > 0 and last > (1 - FELL) * first and last > self.low[name]
        ]  # fmt: skip
        return f"{', '.join(named)} did not fall by {FELL:.0%}" if named and self.steps >= ENOUGH_STEPS else None

    def _ids(self) -> str:
        return ", ".join(str(self.source.image_id(i)) for i in self.indices)


def count_found(
    found: Detections, boxes_xyxy_px: np.ndarray, category_ids: np.ndarray, ids: tuple[int | None, ...]
) -> int:
    """How many boxes of an image are found, each detection used once, best score first.

    Args:
        boxes_xyxy_px: [N, 4]; category_ids: [N], as the json has them.
        ids: category id of each of the model's labels.
    """
    free, hits = np.ones(len(boxes_xyxy_px), bool), 0
    for score, label, box in zip(found.scores, found.labels, found.boxes_xyxy_px, strict=True):
        if score < SCORE or not free.any():
            break
        right = free & (category_ids == ids[label])
        overlap = np.where(right, _iou(box, boxes_xyxy_px), 0.0)
        best = int(overlap.argmax())
        if overlap[best] >= IOU:
            free[best], hits = False, hits + 1
    return hits


def _iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """One xyxy box with N others."""
    left_top, right_bottom = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    inner = (right_bottom - left_top).clip(0).prod(1)
    area = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1)
    return inner / np.maximum(area - inner, 1e-9)
