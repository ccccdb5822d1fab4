"""``detr-accel replay``: run a captured window again and say what made it fail.

How the blame falls, in this order.

*Place.* The first of: pixels, boxes or labels that are not finite; the innermost module whose inputs are finite and
whose output is not, in the order of execution; a term of the loss; the module nearest the loss whose outputs have
finite gradients and one of whose inputs or own parameters has not; the norm of gradients that are each finite; the
running statistics.

*Image.* The one whose input is not finite. Else the one whose slice of the first bad tensor is not finite, or whose own
terms of the loss are not. Where all slices are bad: the one that brought numbers a hundred times as large as any
other's. None where that tells no two apart, where every micro-batch of several fails in the same place, and where
weights are the cause: then no image alone is to blame.

*Box.* The one that is not finite. Else, in the blamed image, the target whose matched pair costs most (L1 and GIoU, in
the decoder layer where it costs most), one that is not finite first. An image whose cost is not finite takes the
matcher's fixed assignment, query i to target i.

*Cause.* ``data``: an input is not finite, or the blamed image is far out of range, or the blamed box has no area or
reaches out of the image and the loss fails on it. ``weights``: a parameter or buffer is not finite, or one is enormous
and the window fails in float32 too. ``precision``: float32 without autocast is finite. ``arithmetic``: none of these.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from detr_accel import models
from detr_accel.monitor.memory import is_out_of_memory
from detr_accel.structures import Batch, UserError
from detr_accel.train import suspects
from detr_accel.train.capture import CAPTURE, read_batch
from detr_accel.train.replay_report import Report
from detr_accel.train.suspects import Image
from detr_accel.train.trace import Spot, Trace, describe, is_finite
from detr_accel.train.window import forward, seed_dropout

AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Case:
    """A captured window with the model that met it, ready to run."""

    folder: Path
    about: dict[str, Any]  # capture.json
    batches: list[Batch]
    images: list[list[Image]]  # of each micro-batch
    left_out: int  # micro-batches that the capture had no room for
    model: nn.Module
    criterion: nn.Module
    device: torch.device

    @property
    def precision(self) -> str:
        return self.about["precision"]


@dataclass
class Outcome:
    """What a micro-batch came to; ``stage`` is None where everything was finite."""

    micro_batch: int = 0
    stage: str | None = None  # forward, loss, backward, norm, statistics
    spot: Spot | None = None
    terms: list[str] = field(default_factory=list)  # of the loss, that are not finite
    images: list[Image] = field(default_factory=list)  # to blame; empty: none alone
    box: int | None = None
    box_loss: float = math.nan

    @property
    def place(self) -> tuple[str | None, str | None]:
        return self.stage, self.spot and self.spot.module


@dataclass
class Run:
    """All micro-batches in one precision."""

    outcomes: list[Outcome]

    @property
    def failed(self) -> list[Outcome]:
        return [o for o in self.outcomes if o.stage is not None]


def replay(path: str | Path, device: str = "auto", quiet: bool = False) -> Report:
    """Run a capture again.

    Args:
        path: captures/window-XXXXXXXX, its capture.json, or a run with one capture.
        device: ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``.
        quiet: no progress bar.
    Raises:
        UserError: no capture there, several, or a damaged one; no such device; no memory.
    """
    return diagnose(load(path, device), quiet)


def load(path: str | Path, device: str = "auto") -> Case:
    """A capture from disk; see ``replay``."""
    where = _device(device)
    folder = find(Path(path))
    about = _about(folder)
    rows = about["micro_batches"]
    kept = [row for row in rows if row["file"]]
    if not kept:
        raise UserError(
            f"{folder} kept no micro-batch for lack of room, so there is nothing to run: raise health.capture_gib and "
            "free the disk"
        )
    loaded = models.weights.load(folder)
    # computing blocks again in backward changes no number, but would call every module twice
    kept_whole = loaded.recipe.model.model_copy(update={"activation_checkpointing": []})
    recipe = loaded.recipe.model_copy(update={"model": kept_whole})
    model = models.build(recipe, len(loaded.classes), load_weights=False)
    models.weights.load_into(model, loaded.state_dict, folder)
    criterion = models.build_criterion(recipe, len(loaded.classes))
    images = [suspects.images_of(row, number) for number, row in enumerate(kept)]
    batches = [_read(folder, row) for row in kept]
    return Case(
        folder, about, batches, images, len(rows) - len(kept), model.to(where), criterion.to(where), where
    )  # fmt: skip


def find(path: Path) -> Path:
    """The capture folder that ``path`` means; see ``replay``."""
    if path.name == CAPTURE:
        path = path.parent
    if (path / CAPTURE).is_file():
        return path
    for folder in (path / "captures", path):
        found = sorted(c.parent for c in folder.glob(f"window-*/{CAPTURE}"))
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{path} has {len(found)} captures: name one of {', '.join(map(str, found))}")
    raise UserError(f"no capture at {path}: give a folder runs/NAME/captures/window-XXXXXXXX, as the alarm names it")


def _about(folder: Path) -> dict[str, Any]:
    about = models.weights.read_json(folder / CAPTURE)
    needed = ("window", "seed", "precision", "device", "num_images", "num_boxes", "micro_batches")
    missing = [key for key in needed if not isinstance(about, dict) or key not in about]
    if missing or about["precision"] not in AUTOCAST or not isinstance(about["micro_batches"], list):
        lacks = f"lacks {', '.join(missing)}" if missing else "has an unknown precision or no list of micro-batches"
        raise UserError(f"{folder / CAPTURE} {lacks}: copy the capture again")
    for row in about["micro_batches"]:
        if not {"file", "image_ids", "positions", "epoch"} <= row.keys():
            raise UserError(f"{folder / CAPTURE} has an incomplete micro-batch: copy the capture again")
    return about


def _read(folder: Path, row: dict[str, Any]) -> Batch:
    try:
        return read_batch(folder, row)
    except UserError:
        raise
    except (KeyError, ValueError, IndexError, RuntimeError):
        raise UserError(f"{folder / row['file']} does not fit {CAPTURE}: copy the capture again") from None


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU here; use --device cpu, or see detr-accel doctor --env")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def diagnose(case: Case, quiet: bool = False) -> Report:
    """Run a case in its own precision, then in a higher one, and draw the conclusion."""
    num_classes = case.criterion.num_classes
    pairs = zip(case.batches, case.images, strict=True)
    faults = [fault for pair in pairs for fault in suspects.check_batch(*pair, num_classes)]
    tensors = suspects.check_tensors(case.model)
    report = Report.begin(case, faults, tensors)
    if any(fault.kind == "label" for fault in faults):  # indexing with it would end the process on a GPU
        report.conclude(Outcome(stage="input"), None, [])
        return report
    first = _run(case, case.precision, torch.float32, quiet)
    if first.failed:
        plain = case.precision == "no"
        second = _run(case, "no", torch.float64 if plain else torch.float32, quiet)
        report.conclude(_first_of(first), bool(second.failed), first.failed)
    return report


def _first_of(run: Run) -> Outcome:
    """The first micro-batch that failed; without an image to blame where all micro-batches fail in one place."""
    first = run.failed[0]
    if len(run.outcomes) > 1 and all(o.place == first.place for o in run.outcomes):
        first.images, first.box, first.box_loss = [], None, math.nan
    return first


def _run(case: Case, precision: str, dtype: torch.dtype, quiet: bool) -> Run:
    """All micro-batches, as the window was trained; the case is left as it was.

    Args:
        precision: of autocast.
        dtype: of weights and pixels.
    """
    # a copy: forward writes running statistics, and float64 cannot be undone
    case = replace(case, model=copy.deepcopy(case.model).to(dtype).train(), criterion=case.criterion.train())
    counts = _counts(case)
    name = precision if precision != "no" else str(dtype).removeprefix("torch.")
    pairs: Iterable = tqdm(
        list(zip(case.batches, case.images, strict=True)), desc=f"replay in {name}", delay=2, unit="micro-batch",
        disable=quiet or None, leave=False,
    )  # fmt: skip
    try:
        outcomes = [_micro_batch(case, *pair, counts, precision, dtype) for pair in pairs]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory on {case.device}: replay with --device cpu") from None
    if not any(o.stage for o in outcomes):
        outcomes[-1] = _norm(case.model) or _statistics(case.model) or outcomes[-1]
    return Run(outcomes)


def _counts(case: Case) -> dict[str, Tensor]:
    """What the losses are divided by: as in the whole window, the micro-batches that were not kept included."""
    count = torch.stack([case.criterion.count(b.targets) for b in case.batches]).sum(0)
    boxes = max(0, case.about["num_boxes"] - int(count[0]))
    images = max(0, case.about["num_images"] - int(count[2]))
    count = count + torch.tensor([boxes, boxes, images])  # nearly: as if every one of their boxes were matched
    return {k: v.to(case.device) for k, v in case.criterion.normalisers(count).items()}


def _micro_batch(
    case: Case, batch: Batch, images: list[Image], counts: dict, precision: str, dtype: torch.dtype
) -> Outcome:
    """Forward, loss and backward; gradients stay, as they add up over the window."""
    seed_dropout(case.about["seed"], batch)
    criterion, outcome = case.criterion, Outcome(images[0].micro_batch)
    denoising = criterion.disturb(batch, case.about.get("most_boxes", 0), case.about["seed"])
    batch = suspects.with_place(batch, dtype, case.device)
    watched = Trace(
        case.model, num_layers=case.model.num_decoder_layers, num_images=len(images), num_queries=criterion.num_queries
    )
    kind = AUTOCAST[precision]
    with watched, torch.autocast(case.device.type, kind) if kind else nullcontext():
        outputs, denoising = forward(case.model, batch, denoising)
    if watched.forward is not None:
        return _forward_failed(case, outcome, watched.forward, images)
    result = criterion(outputs, batch.targets, counts, denoising)
    if result.bad_image.any() or not is_finite(result.total):
        terms = suspects.terms_by_image(criterion, outputs, batch.targets, counts, denoising)
        return _loss_failed(case, outcome, outputs, batch, terms, images)
    result.total.backward()
    spot, handed = watched.backward()
    grads = [(n, p.grad) for n, p in case.model.named_parameters() if p.grad is not None]
    if spot is None and all(is_finite(g) for _, g in grads):
        return outcome
    return _backward_failed(case, outcome, spot if handed else None, outputs, batch, images)


def _forward_failed(case: Case, outcome: Outcome, spot: Spot, images: list[Image]) -> Outcome:
    outcome.stage, outcome.spot = "forward", spot
    bad = spot.image_bad
    if bad is None or spot.bad_weights:
        return outcome
    if all(bad) and len(bad) > 1:
        outcome.images = suspects.blame_by_peak(images, spot.image_peak)
    else:
        outcome.images = [image for image, is_bad in zip(images, bad, strict=True) if is_bad]
    return outcome


def _loss_failed(
    case: Case, outcome: Outcome, outputs: dict, batch: Batch, terms: list[list[str]], images: list[Image]
) -> Outcome:
    """terms: of each image, those that are not finite for it alone."""
    outcome.stage = "loss"
    outcome.terms = list(dict.fromkeys(name for names in terms for name in names))
    bad = [image for image, names in zip(images, terms, strict=True) if names]
    if not bad:  # every image alone is fine: the weights of the terms, or what they are divided by
        faulty = [f"loss_{name}" for name, w in case.criterion.weights.items() if not math.isfinite(w)]
        outcome.terms = faulty or ["loss"]
    elif len(bad) < len(images) or len(images) == 1:
        outcome.images = bad
        _blame_box(case, outcome, outputs, batch)
    return outcome


def _backward_failed(
    case: Case, outcome: Outcome, spot: Spot | None, outputs: dict, batch: Batch, images: list[Image]
) -> Outcome:
    """spot: None where the loss itself handed over gradients that are not finite, or none is guilty alone."""
    outcome.stage, outcome.spot = "backward", spot
    bad = spot.image_bad if spot else None
    if bad is not None and (not all(bad) or len(bad) == 1):
        outcome.images = [image for image, is_bad in zip(images, bad, strict=True) if is_bad]
        _blame_box(case, outcome, outputs, batch)
    case.model.zero_grad(set_to_none=True)
    return outcome


def _blame_box(case: Case, outcome: Outcome, outputs: dict, batch: Batch) -> None:
    worst = suspects.worst_pair(case.criterion, outputs, batch.targets, outcome.images[0].index)
    if worst is not None:
        outcome.box, outcome.box_loss = worst


def _norm(model: nn.Module) -> Outcome | None:
    """Gradients that are each finite, but whose squares do not add up to a finite number."""
    for rows in models.param_groups(model).values():
        grads = [(name, p.grad) for name, p in rows if p.grad is not None]
        if grads and not is_finite(torch.nn.utils.get_total_norm([g for _, g in grads])):
            name, grad = max(grads, key=lambda pair: pair[1].abs().max().item())
            module, _, own = name.rpartition(".")
            return Outcome(stage="norm", spot=describe(module, f"gradient of its {own}", grad))
    return None


def _statistics(model: nn.Module) -> Outcome | None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            for own in ("running_mean", "running_var"):
                if not is_finite(getattr(module, own)):
                    return Outcome(stage="statistics", spot=describe(name, own, getattr(module, own)))
    return None
