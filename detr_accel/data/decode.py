"""Image files to uint8 RGB. Whatever cannot be read raises ``UserError`` with the reason, and never a half image."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from detr_accel.structures import UserError

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright


def header_size(path: str | Path, upright: bool = False) -> tuple[int, int]:
    """(h, w) in pixels from the file's header: of the stored rows, or ``upright`` as a viewer shows it."""
    try:
        with Image.open(path) as picture:
            w, h = picture.size
            turned = upright and picture.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except _BROKEN as error:
        raise UserError(f"image {path} cannot be read: {_reason(error)}") from None
    return (w, h) if turned else (h, w)


def read_rgb(path: str | Path, size_px: tuple[int, int] | None) -> np.ndarray:
    """Decode one file.

    Args:
        size_px: the (h, w) that the annotations speak of. Equal to the stored size: the stored pixels are used and an
            EXIF rotation is ignored, as DETR does. Equal to the size after the EXIF rotation: it is applied. None: the
            picture as a viewer shows it.
    Returns:
        uint8 [h, w, 3].
    Raises:
        UserError: not an image, truncated, or of another size.
    """
    try:
        with Image.open(path) as picture:
            stored = (picture.height, picture.width)
            if size_px is None or stored != size_px:
                picture = ImageOps.exif_transpose(picture)
            if size_px is not None and (picture.height, picture.width) != size_px:
                raise UserError(
                    f"image {path} is {stored[1]}x{stored[0]} pixels (width x height), its record says "
                    f"{size_px[1]}x{size_px[0]}: mend the record, or put the right file there"
                )
            return np.array(_to_rgb(picture))
    except UserError:
        raise
    except _BROKEN as error:
        why = _reason(error)
        raise UserError(f"image {path} cannot be decoded: {why}; replace the file or remove its record") from None


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits in Pillow's I;16 or I: scaled, where convert() would saturate at 255
        deep = np.asarray(picture).astype(np.int64)
        if picture.mode != "I" or deep.max(initial=0) > 255:
            deep = deep // 257 if deep.max(initial=0) <= 65535 else deep >> 24
        return Image.fromarray(np.clip(deep, 0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers without a known range")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
