"""A trained detector, ready to be asked: ``load`` reads any checkpoint that the toolkit knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detr_accel import models
from detr_accel import recipe as recipes
from detr_accel.models import convert
from detr_accel.recipe import Recipe
from detr_accel.structures import Batch, Classes, Detections, UserError

FREE = ("model.num_queries", "model.rtdetr.sampling")  # of an RT-DETR: its weights fit any
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
    path: str | Path,
    *,
    decoder_layers: int | None = None,
    device: str = "auto",
    precision: str = "float32",
    overrides: Sequence[str] = (),
) -> Detector:
    """Read a run, a checkpoint, a model folder, an official ``.pth`` or a transformers folder.

    Args:
        decoder_layers: keep only the first so many decoder layers; the auxiliary losses trained each of them to answer.
        device: ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``.
        precision: ``float32``, or ``bf16`` or ``fp16`` for autocast as in training.
        overrides: ``key=value`` for the checkpoint's recipe, of the keys in ``FREE``.
    Raises:
        UserError: nothing there, damaged, another model's weights, no such layer, no such device or precision, or
            overrides that this model's weights do not allow.
    """
    where = _device(device)
    _check_precision(precision, where)
    loaded = convert.read(path)
    recipe, said = _changed(loaded.recipe, overrides)
    model = models.build(recipe, len(loaded.classes), load_weights=False)
    models.weights.load_into(model, loaded.state_dict, path)
    notes, total = [*loaded.report, *said], model.num_decoder_layers
    if decoder_layers is not None:
        models.keep_decoder_layers(model, decoder_layers)
        notes.append(f"decoder: {decoder_layers} of {total} layers")
    cut_from = total if decoder_layers not in (None, total) else None
    belongings = loaded.classes, recipe, loaded.meta, loaded.split
    return Detector(model.eval().to(where), *belongings, cut_from, where, precision, notes)


def _changed(recipe: Recipe, overrides: Sequence[str]) -> tuple[Recipe, list[str]]:
    if not overrides:
        return recipe, []
    m, (queries, sampling) = recipe.model, FREE
    given = {text.partition("=")[0].strip(): text for text in overrides}
    if strange := [text for key, text in given.items() if key not in FREE]:
        known = f"{' and '.join(FREE)} of an RT-DETR"
        raise UserError(f"{strange[0]}: only {known} can be set, the rest belongs to the weights")
    if m.name != "rtdetr":
        why = {
            queries: f"a DETR's {m.num_queries} queries are weights",
            sampling: "a DETR samples nothing",
        }
        key, text = next(iter(given.items()))
        raise UserError(f"{text}: {why[key]}, and only an RT-DETR takes another value; leave it out")
    if m.rtdetr.learned_queries and queries in given:
        raise UserError(
            f"{given[queries]}: the {m.num_queries} queries of this RT-DETR are weights, as "
            "model.rtdetr.learned_queries is true; leave it out"
        )
    now = recipes.changed(recipe, overrides)
    before, after = (m.num_queries, m.rtdetr.sampling), (now.model.num_queries, now.model.rtdetr.sampling)
    pairs = zip(FREE, before, after, strict=True)
    return now, [f"{key}: {new}, where the checkpoint's recipe has {old}" for key, old, new in pairs if new != old]


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU here; use --device cpu, or see detr-accel doctor --env")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _check_precision(name: str, device: torch.device) -> None:
    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 does nothing on a CPU; use --precision bf16 or float32")
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("--precision bf16 is not supported by this GPU; use --precision fp16 or float32")
