"""Apply a plan to pixels, on the CPU: the steps one by one, as planned.

Each resize is an antialiased bilinear filter on uint8, so the rounding to 8 bits between the two resizes of the crop
branch is DETR's own. Evaluation resizes with Pillow, bit for bit as DETR does; training with torch's kernel for uint8,
three times as fast, whose weights have fewer bits: a value differs from Pillow's by one of 255 steps at the most.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from detr_accel.data.geometry import Plan


def transform(image: np.ndarray, plan: Plan) -> Tensor:
    """
    Args:
        image: uint8 [H, W, 3] of ``plan.orig_px``, or a smaller decoding of it that no step makes larger again.
    Returns:
        uint8 [3, h, w] of ``plan.size_px``.
    """
    resize = _pillow if plan.exact else _fast
    pixels = torch.from_numpy(image).permute(2, 0, 1)  # [3, H, W], a view whose channels lie together
    if plan.first_px is not None:
        pixels = resize(pixels, plan.first_px)
    if plan.crop_px is not None:
        top, left, height, width = plan.crop_px
        if plan.flip:  # the flip comes last: the filters are symmetric, so that changes no pixel
            left = pixels.shape[-1] - left - width
        pixels = pixels[:, top : top + height, left : left + width]
    pixels = resize(pixels, plan.size_px)
    return pixels.flip(-1) if plan.flip else pixels


def resized(image: np.ndarray, size_px: tuple[int, int], exact: bool) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [h, w, 3]."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    return (_pillow if exact else _fast)(pixels, size_px).permute(1, 2, 0).numpy()


def _fast(pixels: Tensor, size_px: tuple[int, int]) -> Tensor:
    if tuple(pixels.shape[-2:]) == size_px:
        return pixels
    return F.interpolate(pixels[None], size=size_px, mode="bilinear", antialias=True)[0]


def _pillow(pixels: Tensor, size_px: tuple[int, int]) -> Tensor:
    if tuple(pixels.shape[-2:]) == size_px:
        return pixels
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    resized = picture.resize(size_px[::-1], Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def normalise_into(out: Tensor, image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Write (image / 255 - mean) / std into a corner of a canvas, in place.

    Args:
        out: float32 [3, h, w], a view is fine.
        image: uint8 [3, h, w].
        mean, std: three numbers each, on the 0..1 scale.
    """
    out.copy_(image)
    shape = (3, 1, 1)
    out.div_(255).sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))
