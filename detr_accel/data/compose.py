"""Colours and canvases: what a plan asks for beyond flip, resize and crop. One code for workers and device.

Pixels are levels 0..255 in float32, [3, h, w]. Source of the colour functions: torchvision's adjust_brightness,
adjust_contrast, adjust_saturation and adjust_hue, with which the results agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detr_accel.data.geometry import Jitter, Plan

_GREY = (0.2989, 0.587, 0.114)  # of red, green, blue, as torchvision has it


def mean_levels(mean: Sequence[float]) -> Tensor:
    """The colour that fills a canvas: float32 [3, 1, 1], whole levels, near 0 after normalisation.

    Args:
        mean: of the model's backbone, on the 0..1 scale.
    """
    return torch.tensor(mean, dtype=torch.float32).mul_(255).round_().view(3, 1, 1)


def compose(pieces: Sequence[Tensor], plan: Plan, fill: Tensor) -> Tensor:
    """Put a plan's images on its canvas.

    Args:
        pieces: one for each of ``plan.images()``, flipped, cropped and resized: uint8 or float32 [3, h, w].
        fill: [3, 1, 1], what shows where no image is.
    Returns:
        [3, h, w] of ``plan.size_px``; float32, or the only piece as it is where nothing is to be done.
    """
    if plan.place_px is None and not plan.layers:
        return colours(pieces[0], plan.jitter)
    out = fill.expand(3, *plan.size_px).clone()
    for piece, (_, one, weight) in zip(pieces, plan.images(0), strict=True):
        top, left, height, width = one.place_px or (0, 0, *plan.size_px)
        where = out[:, top : top + height, left : left + width]
        piece = colours(piece, one.jitter)
        where.copy_(piece) if weight == 1 else where.lerp_(piece.float(), weight)
    return out


def colours(image: Tensor, jitter: Jitter | None) -> Tensor:
    """Brightness, contrast, saturation, hue, or with contrast as the last.

    Returns:
        float32; the image as it is where nothing is to be done.
    """
    if jitter is None:
        return image
    image = image.float()
    if jitter.brightness is not None:
        image = (image * jitter.brightness).clamp_(0, 255)
    if jitter.contrast is not None and jitter.contrast_first:
        image = _away_from(_mean_grey(image), image, jitter.contrast)
    if jitter.saturation is not None:
        image = _away_from(_grey(image), image, jitter.saturation)
    if jitter.hue is not None:
        image = _turn(image, jitter.hue)
    if jitter.contrast is not None and not jitter.contrast_first:
        image = _away_from(_mean_grey(image), image, jitter.contrast)
    return image


def _grey(image: Tensor) -> Tensor:
    red, green, blue = image
    return red * _GREY[0] + green * _GREY[1] + blue * _GREY[2]


def _mean_grey(image: Tensor) -> Tensor:
    """Row by row: one sum over all would be split among threads, and its last digits would depend on their number."""
    return _grey(image).mean(-1).mean()


def _away_from(grey: Tensor, image: Tensor, factor: float) -> Tensor:
    return (image * factor).add_(grey * (1 - factor)).clamp_(0, 255)


def _turn(image: Tensor, turns: float) -> Tensor:
    """Shift the hue, by way of hue (in sixths of a turn), chroma and value."""
    red, green, blue = image
    value = image.amax(0)
    chroma = value - image.amin(0)
    safe = chroma.clamp(min=1e-3)  # grey has no hue: whichever it gets is multiplied by a chroma of 0
    sixths = torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4)
    sixths = torch.where(value == red, (green - blue) / safe, sixths) + 6 * turns
    return torch.stack([value - chroma * _slope((sixths + n) % 6) for n in (5, 3, 1)])


def _slope(at: Tensor) -> Tensor:
    """How much of the chroma a channel lacks, around the circle: 0 up to 1 and down to 0, then 0."""
    return torch.minimum(at, 4 - at).clamp_(0, 1)
