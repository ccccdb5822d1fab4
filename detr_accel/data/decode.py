"""Image files to uint8 RGB. Whatever cannot be read raises ``UserError`` with the reason, and never a half image.

JPEGs are decoded by simplejpeg (libjpeg-turbo without a detour): the same pixels as Pillow in about half the time, and
a half, a quarter or an eighth of the size in less still. Everything else, and every JPEG out of the ordinary
(CMYK, a rotation to apply, damage), is Pillow's.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import simplejpeg
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


def header(path: str | Path, data: bytes | None = None) -> tuple[tuple[int, int], bool]:
    """(h, w) in pixels as a viewer shows it, and whether it is stored otherwise (turned or mirrored).

    Args:
        data: what the file holds, where it is none on disk; ``path`` then only names it.
    """
    try:
        with Image.open(path if data is None else io.BytesIO(data)) as picture:
            h, w = picture.height, picture.width
            told = picture.format != "PNG" or "exif" in picture.info  # Pillow would decode a PNG to look for it
            orientation = picture.getexif().get(_ORIENTATION, 1) if told else 1
    except _BROKEN as error:
        raise UserError(f"image {path} cannot be read: {_reason(error)}") from None
    return ((w, h) if orientation in (5, 6, 7, 8) else (h, w)), orientation in range(2, 9)


def read_rgb(
    path: str | Path,
    size_px: tuple[int, int] | None,
    at_least_px: tuple[int, int] | None = None,
    data: bytes | None = None,
) -> np.ndarray:
    """Decode one file.

    Args:
        size_px: the (h, w) that the annotations speak of. Equal to the stored size: the stored pixels are used and an
            EXIF rotation is ignored, as DETR does. Equal to the size after the EXIF rotation: it is applied. None: the
            picture as a viewer shows it.
        at_least_px: the (h, w) that it will be resized to. A JPEG at least twice as large in both directions is decoded
            at half of its size or less, never below this.
        data: what the file holds, where it is none on disk; ``path`` then only names it.
    Returns:
        uint8 [h, w, 3], of ``size_px`` or of a fraction of it.
    Raises:
        UserError: not an image, truncated, or of another size.
    """
    fast = None if size_px is None else _read_jpeg(path, size_px, at_least_px, data)
    if fast is not None:
        return fast
    try:
        with Image.open(path if data is None else io.BytesIO(data)) as picture:
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


def read_bytes(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _read_jpeg(
    path: str | Path, size_px: tuple[int, int], at_least_px: tuple[int, int] | None, data: bytes | None = None
) -> np.ndarray | None:
    """None where Pillow should look: no ordinary JPEG of this size, or something is wrong with it."""
    try:
        data = read_bytes(path) if data is None else data
        if data[:3] != b"\xff\xd8\xff":
            return None
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if (height, width) != size_px or colours not in ("YCbCr", "Gray", "RGB"):
            return None
        h, w = at_least_px or size_px
        if 2 * h > height or 2 * w > width:
            return simplejpeg.decode_jpeg(data)
        return simplejpeg.decode_jpeg(data, min_height=h, min_width=w)
    except (OSError, ValueError):  # Pillow says what is wrong, or is content with it
        return None


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
