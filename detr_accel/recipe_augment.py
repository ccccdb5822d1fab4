"""The knobs of ``data.augment``: what training does to images. What goes beyond DETR's own policy is off by default.

A part of recipe.py, in a file of its own for its length.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from detr_accel.recipe_parts import Fraction, Positive, Section

Factor = Annotated[float, Field(ge=0, le=4)]
Above = Annotated[float, Field(gt=0, le=8)]


class Scheduled(Section):
    """What every stronger augmentation has: how often, and over which part of the training."""

    probability: Fraction = 0.0
    """Share of the images that it is tried on; 0 switches it off."""
    start: Fraction = 0.0
    """Fraction of the training at which it begins."""
    stop: Fraction = 0.9
    """Fraction of the training at which it ends: the last epochs see images as they are. 1 keeps it to the end."""

    @model_validator(mode="after")
    def _ranges_fit(self) -> Scheduled:
        if self.start >= self.stop:
            raise ValueError(f"start {self.start:g} should be less than stop {self.stop:g}: it would never be on")
        for name, value in self:
            if isinstance(value, tuple) and value[0] > value[1]:
                raise ValueError(f"{name} is [least, greatest], but {value[0]:g} > {value[1]:g}")
        return self


class Photometric(Scheduled):
    """Colours (torchvision's RandomPhotometricDistort without its swap of channels). Brightness, contrast, saturation
    and hue are tried one by one, each with ``probability`` (RT-DETR: 0.5)."""

    brightness: tuple[Factor, Factor] = (0.875, 1.125)
    """Factor on all channels, least and greatest."""
    contrast: tuple[Factor, Factor] = (0.5, 1.5)
    """Factor on the distance to the image's mean grey."""
    saturation: tuple[Factor, Factor] = (0.5, 1.5)
    """Factor on the distance to each pixel's own grey."""
    hue: tuple[Annotated[float, Field(ge=-0.5, le=0.5)], Annotated[float, Field(ge=-0.5, le=0.5)]] = (-0.05, 0.05)
    """Shift around the colour circle, in turns."""


class ZoomOut(Scheduled):
    """The image at a random place of a larger canvas filled with the mean colour: small objects (SSD; RT-DETR: 0.5)."""

    side: tuple[Annotated[float, Field(ge=1, le=8)], Annotated[float, Field(ge=1, le=8)]] = (1.0, 4.0)
    """How many times as high and wide as the image the canvas is, least and greatest."""


class IouCrop(Scheduled):
    """A random crop that holds the centre of a box and overlaps it by a drawn least IoU; boxes stay whose centre it
    holds (SSD; RT-DETR: 0.8). Where 40 tries find none for a least IoU, another one is drawn."""

    min_iou: list[Fraction] = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9]
    """Least IoUs to draw from; 1 leaves the image whole (RT-DETR has it, too)."""
    least_side: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Least side of the crop, as a share of the image's; its longer side is at most twice the other."""

    @model_validator(mode="after")
    def _some_iou(self) -> IouCrop:
        if not self.min_iou:
            raise ValueError("min_iou needs at least one value, such as [0.0]")
        return self


class LargeScaleJitter(Scheduled):
    """Resize by a factor, then cut or fill to the size that the image would have had (LSJ, Ghiasi et al. 2021). Takes
    the place of zoom_out and iou_crop where it is drawn."""

    scale: tuple[Above, Above] = (0.1, 2.0)
    """Factor on the image's scale, least and greatest."""
    size: Positive | None = None
    """Side of a square to cut or fill to, in pixels; null keeps the size that the image would have had."""


class Mosaic(Scheduled):
    """Four images around a point, cut or filled at the quarters; the image itself is one of them. Takes the place of
    the geometry above where it is drawn (DEIM: 0.5, from 0.07 to 0.57 of the training; without its rotation, under
    which boxes would grow)."""

    scale: tuple[Above, Above] = (0.5, 1.5)
    """Factor on the size at which an image fits into a quarter of the canvas, drawn for each of the four; 2 at most."""
    shift: Annotated[float, Field(ge=0, le=0.4)] = 0.1
    """How far the point may lie from the middle, as a share of the side."""


class Mixup(Scheduled):
    """A second image, as large as fits, blended in; the boxes of both stay (DEIM: 0.5, as mosaic). Where mosaics are on
    it is one as often as the first."""

    weight: tuple[Annotated[float, Field(gt=0, lt=1)], Annotated[float, Field(gt=0, lt=1)]] = (0.45, 0.55)
    """Weight of the image itself, least and greatest; the second one has the rest."""


class Augment(Section):
    """Training geometry: flip, then resize, or (half of the time) resize, crop, resize; and what goes beyond DETR's
    policy. Sizes are in pixels."""

    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    scales: list[Positive] = [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
    """Lengths of the short side to draw from, or with data.square of every side; one that stands there twice is drawn
    twice as often."""
    scales_stop: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of the training from which on every image goes to data.eval_size instead (RT-DETR: the last epoch)."""
    scale_by: Literal["image", "window"] = "image"
    """Whether each image draws its own scale, as in DETR, or all images of a window (an optimizer step) share one: less
    padding, and short sides from a finite set; the canvas also depends on the shapes of the window's images."""
    canvas_step: Annotated[int, Field(ge=1, le=1333)] = 1
    """Height and width of a window's canvas are rounded up to multiples of it, in pixels: more padding, and canvases
    from a finite set, as compiled kernels and captured graphs need one. 1: as tight as can be."""
    max_size: Positive = 1333
    """Upper bound of the long side."""
    crop: Fraction = 0.5
    """Probability of the resize-crop-resize branch."""
    crop_scales: list[Positive] = [400, 500, 600]
    """Short sides before the crop; no bound on the long side."""
    crop_size: tuple[Positive, Positive] = (384, 600)
    """Least and greatest side of the crop."""
    photometric: Photometric = Photometric()
    """Colours."""
    zoom_out: ZoomOut = ZoomOut()
    """Small objects, on a larger canvas."""
    iou_crop: IouCrop = IouCrop()
    """Large objects, cropped around boxes."""
    large_scale_jitter: LargeScaleJitter = LargeScaleJitter()
    """Both, for long trainings."""
    mosaic: Mosaic = Mosaic()
    """Four images in one."""
    mixup: Mixup = Mixup()
    """Two images in one."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Augment:
        if not self.scales:
            raise ValueError("scales needs at least one size, such as [800]")
        if self.crop > 0 and not self.crop_scales:
            raise ValueError("crop_scales needs at least one size while crop is above 0")
        if self.crop_size[0] > self.crop_size[1]:
            raise ValueError(f"crop_size is [least, greatest], but {self.crop_size[0]} > {self.crop_size[1]}")
        return self
