"""A trained detector, ready to be asked: ``load`` reads any checkpoint that the toolkit knows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detr_accel import models
from detr_accel.models import convert
from detr_accel.recipe import Recipe
from detr_accel.structures import Batch, Classes, Detections, UserError

PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Detector:
    """A model with what belongs to it. ``notes`` are the sentences that say which weights these are."""

    model: nn.Module
    classes: Classes
    recipe: Recipe
    meta: dict[str, Any]  # of the checkpoint, see models.weights
    split: dict[str, Any] | None  # the run's saved cut of a single json
    cut_from: int | None  # decoder layers of the whole model, where some are left out
    device: torch.device
    precision: str  # float32, or the type of autocast
    notes: list[str]

    @torch.inference_mode()
    def __call__(self, batch: Batch, max_detections: int = 100) -> list[Detections]:
        """Detections of each image of a batch, best first, boxes in pixels of the original file."""
        batch = batch.to(self.device)
        dtype = PRECISIONS[self.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            outputs = self.model(batch.images, batch.mask)
        return models.detections_of(self.model, outputs, batch.targets, max_detections)


def load(
    path: str | Path, *, decoder_layers: int | None = None, device: str = "auto", precision: str = "float32"
) -> Detector:
    """Read a run, a checkpoint, a model folder, an official ``.pth`` or a transformers folder.

    Args:
        decoder_layers: keep only the first so many decoder layers; the auxiliary losses trained each of them to answer.
        device: ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``.
        precision: ``float32``, or ``bf16`` or ``fp16`` for autocast as in training.
    Raises:
        UserError: nothing there, damaged, another model's weights, no such layer, or no such device or precision.
    """
    where = _device(device)
    _check_precision(precision, where)
    loaded = convert.read(path)
    model = models.build(loaded.recipe, len(loaded.classes), load_weights=False)
    models.weights.load_into(model, loaded.state_dict, path)
    notes, total = list(loaded.report), model.num_decoder_layers
    if decoder_layers is not None:
        models.keep_decoder_layers(model, decoder_layers)
        notes.append(f"decoder: {decoder_layers} of {total} layers")
    cut_from = total if decoder_layers not in (None, total) else None
    belongings = loaded.classes, loaded.recipe, loaded.meta, loaded.split
    return Detector(model.eval().to(where), *belongings, cut_from, where, precision, notes)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU here; use --device cpu, or see detr-accel doctor --env")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _check_precision(name: str, device: torch.device) -> None:
    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 does nothing on a CPU; use --precision bf16 or float32")
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("--precision bf16 is not supported by this GPU; use --precision fp16 or float32")
