"""Apply a plan to pixels, on the CPU: the steps one by one with Pillow, exactly as planned.

Each resize is Pillow's antialiased bilinear filter on uint8, so the rounding to 8 bits between the two resizes of the
crop branch is DETR's own.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detr_accel.data.geometry import Plan


def transform(image: np.ndarray, plan: Plan) -> np.ndarray:
    """uint8 [H, W, 3] of ``plan.orig_px`` -> uint8 [h, w, 3] of ``plan.size_px``."""
    assert image.shape[:2] == plan.orig_px, (image.shape, plan)
    picture = Image.fromarray(image)
    if plan.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if plan.first_px is not None:
        picture = _resize(picture, plan.first_px)
    if plan.crop_px is not None:
        top, left, height, width = plan.crop_px
        picture = picture.crop((left, top, left + width, top + height))
    return np.array(_resize(picture, plan.size_px))  # a writable copy


def _resize(picture: Image.Image, size_px: tuple[int, int]) -> Image.Image:
    h, w = size_px
    return picture if picture.size == (w, h) else picture.resize((w, h), Image.Resampling.BILINEAR)


def normalise_into(out: Tensor, image: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Write (image / 255 - mean) / std into a corner of a canvas, in place.

    Args:
        out: float32 [3, h, w], a view is fine.
        image: uint8 [h, w, 3].
        mean, std: three numbers each, on the 0..1 scale.
    """
    out.copy_(torch.from_numpy(image).permute(2, 0, 1))
    shape = (3, 1, 1)
    out.div_(255).sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))
