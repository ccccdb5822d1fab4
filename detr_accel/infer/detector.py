"""A trained detector, ready to be asked: ``load`` reads any checkpoint that the toolkit knows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from detr_accel import models
from detr_accel.models import convert
from detr_accel.recipe import Recipe
from detr_accel.structures import Batch, Classes, Detections, UserError


@dataclass
class Detector:
    """A model with what belongs to it. ``notes`` are the sentences that say which weights these are."""

    model: nn.Module
    classes: Classes
    recipe: Recipe
    threshold: float | None
    device: torch.device
    notes: list[str]

    @torch.inference_mode()
    def __call__(self, batch: Batch, max_detections: int = 100) -> list[Detections]:
        """Detections of each image of a batch, best first, boxes in pixels of the original file."""
        batch = batch.to(self.device)
        outputs = self.model(batch.images, batch.mask)
        sizes = torch.tensor([t.orig_size_px for t in batch.targets])
        return models.detections(outputs, [t.image_id for t in batch.targets], sizes, max_detections)


def load(path: str | Path, *, decoder_layers: int | None = None, device: str = "auto") -> Detector:
    """Read a run, a checkpoint, a model folder, an official ``.pth`` or a transformers folder.

    Args:
        decoder_layers: keep only the first so many decoder layers; the auxiliary losses trained each of them to answer.
        device: ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``.
    Raises:
        UserError: nothing there, damaged, another model's weights, no such layer, or no such device.
    """
    loaded = convert.read(path)
    model = models.build(loaded.recipe, len(loaded.classes), load_weights=False)
    models.weights.load_into(model, loaded.state_dict, path)
    notes = [_which(loaded)]
    if decoder_layers is not None:
        total = len(model.transformer.decoder.layers)
        models.keep_decoder_layers(model, decoder_layers)
        notes.append(f"decoder: {decoder_layers} of {total} layers")
    where = _device(device)
    threshold = loaded.meta.get("threshold")
    return Detector(model.eval().to(where), loaded.classes, loaded.recipe, threshold, where, notes)


def _which(loaded) -> str:
    meta = loaded.meta
    sentence = f"weights: {meta.get('weights', 'as converted')} from {loaded.folder}"
    value = (meta.get("metrics") or {}).get(meta.get("metric"))
    if value is not None:
        sentence += f", {meta['metric']} {value:.4f} on its validation set after window {meta['window']}"
    return sentence


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU here; use --device cpu, or see detr-accel doctor --env")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
