"""Image files to uint8 RGB. Whatever cannot be read raises ``UserError`` with the reason, and never a half image.

JPEGs are decoded by simplejpeg (libjpeg-turbo without a detour): the same pixels as Pillow in about half the time, and
half of the size or less in less still. Everything else, and every JPEG out of the ordinary
(CMYK, a rotation to apply, damage), is Pillow's.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from detr_accel.structures import UserError

_LEAST = 16  # px: a picture with a shorter side has nearly any shape "to a pixel"
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
_ON_ITS_SIDE = (5, 6, 7, 8)
_WIDTH, _LENGTH = 256, 257  # TIFF tags


def header_size(path: str | Path, upright: bool = False) -> tuple[int, int]:
    """(h, w) in pixels from the file's header: of the stored rows, or ``upright`` as a viewer shows it."""
    try:
        with Image.open(path) as picture:
            (h, w), orientation = _stored(picture, look=upright)
            turned = upright and orientation in _ON_ITS_SIDE
    except Exception as error:  # whatever a decoder trips over, the file is at fault
        raise UserError(f"image {path} cannot be read: {_reason(error)}") from None
    if min(h, w) < 1:
        raise UserError(f"image {path} cannot be read: it is {w}x{h} pixels")
    return (w, h) if turned else (h, w)


def header(path: str | Path, data: bytes | None = None) -> tuple[tuple[int, int], bool]:
    """(h, w) in pixels as a viewer shows it, and whether it is stored otherwise (turned or mirrored).

    Args:
        data: what the file holds, where it is none on disk; ``path`` then only names it.
    """
    try:
        with Image.open(path if data is None else io.BytesIO(data)) as picture:
            # Pillow would decode a PNG to look for it
            (h, w), orientation = _stored(picture, look=picture.format != "PNG" or "exif" in picture.info)
    except Exception as error:  # as above
        raise UserError(f"image {path} cannot be read: {_reason(error)}") from None
    if min(h, w) < 1:
        raise UserError(f"image {path} cannot be read: it is {w}x{h} pixels")
    return ((w, h) if orientation in _ON_ITS_SIDE else (h, w)), orientation in range(2, 9)


def _stored(picture: Image.Image, look: bool = True) -> tuple[tuple[int, int], int]:
    """(h, w) of the pixels as Pillow gives them, and the EXIF orientation that they then still have.

    Args:
        look: for an orientation; without, it is taken for upright.
    """
    size = picture.height, picture.width
    orientation = picture.getexif().get(_ORIENTATION, 1) if look or picture.format == "TIFF" else 1
    if picture.format != "TIFF":
        return size, orientation
    # it turns a TIFF itself while decoding; its header has the size after that or, of older Pillows, before it
    turns = orientation in _ON_ITS_SIDE and size == (picture.tag_v2.get(_LENGTH), picture.tag_v2.get(_WIDTH))
    return (size[::-1] if turns else size), 1


def read_rgb(
    path: str | Path,
    size_px: tuple[int, int] | None,
    at_least_px: tuple[int, int] | None = None,
    data: bytes | None = None,
    *,
    scale: bool = False,
) -> np.ndarray:
    """Decode one file.

    Args:
        size_px: the (h, w) that the annotations speak of. Equal to the stored size: the stored pixels are used and an
            EXIF rotation is ignored, as DETR does. Equal to the size after the EXIF rotation: it is applied. None: the
            picture as a viewer shows it.
        at_least_px: the (h, w) that it will be resized to. A picture at least twice as large in both directions comes
            in half of its size or less, never below this (``decoded_px``).
        data: what the file holds, where it is none on disk; ``path`` then only names it.
        scale: a picture of another size than ``size_px`` that has its shape, to a pixel, is taken for the same in
            another size: boxes are where the record says, whatever the number of pixels.
    Returns:
        uint8 [h, w, 3], of ``size_px`` or of a fraction of it; or, where it was scaled and ``at_least_px`` is given and
        another, of the size that the file has, or of a fraction of that.
    Raises:
        UserError: not an image, truncated, or of another size.
    """
    try:
        if data is None:
            with reading():
                data = read_bytes(path)
        fast = None if size_px is None else _read_jpeg(data, size_px, at_least_px)
        if fast is not None:
            return fast
        with Image.open(io.BytesIO(data)) as picture:
            upright = _turned(path, picture, size_px, scale)
            pixels = _to_rgb(upright)
            if at_least_px not in (None, size_px):  # what is cut at the record's own size must have it
                wanted = decoded_px((pixels.height, pixels.width), at_least_px)
                return np.array(pixels if wanted == (pixels.height, pixels.width) else _smaller(pixels, wanted))
            if size_px is not None and (pixels.height, pixels.width) != size_px:
                _check_pixels(size_px)
                pixels = pixels.resize(size_px[::-1], Image.Resampling.BILINEAR)
            return np.array(pixels)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # whatever a decoder trips over, the file is at fault
        why = _reason(error)
        raise UserError(f"image {path} cannot be decoded: {why}; replace the file or remove its record") from None


def decoded_px(size_px: tuple[int, int], at_least_px: tuple[int, int]) -> tuple[int, int]:
    """The (h, w) in pixels that a picture is decoded to, less than twice what is needed in one direction at least.

    As it is; or, where it is twice as large, in as few eighths as will do (a JPEG decoder's steps), or in half of one,
    a quarter of one, and so on.
    """
    (h, w), (a, b) = size_px, at_least_px
    if 2 * a > h or 2 * b > w:
        return size_px
    found, eighths = size_px, 4.0
    while True:
        less = math.ceil(h * eighths / 8), math.ceil(w * eighths / 8)
        if less[0] < a or less[1] < b or less == found:
            return found
        found, eighths = less, eighths - 1 if eighths > 1 else eighths / 2


def _smaller(picture: Image.Image, size_px: tuple[int, int]) -> Image.Image:
    """Means over areas, as a JPEG decoder gives them."""
    return picture.resize(size_px[::-1], Image.Resampling.BOX)


def _turned(path: str | Path, picture: Image.Image, size_px: tuple[int, int] | None, scale: bool) -> Image.Image:
    """The picture as stored or with its EXIF rotation, whichever the record speaks of.

    Raises:
        UserError: neither.
    """
    stored, _ = _stored(picture, look=False)
    if stored == size_px:
        return picture
    if size_px is None:
        return ImageOps.exif_transpose(picture)
    stored, orientation = _stored(picture)
    turn, scaled = _reading(stored, orientation, size_px)
    if turn is None or (scaled and not scale):
        raise UserError(other_size(path, stored, size_px))
    return ImageOps.exif_transpose(picture) if turn else picture


def _reading(stored_px: tuple[int, int], orientation: int, size_px: tuple[int, int]) -> tuple[bool | None, bool]:
    """Whether the record's size is the picture's after its EXIF rotation (None: nobody can tell), and whether in
    another size."""
    turned = stored_px[::-1] if orientation in _ON_ITS_SIDE else stored_px
    for turn, size in ((False, stored_px), (True, turned)):
        if size == size_px:
            return turn, False
    fits = [same_shape(size, size_px) for size in (stored_px, turned)]
    if not any(fits) or (all(fits) and orientation not in (0, 1)):
        return None, False
    return not fits[0], True


def size_fault(path: str | Path, size_px: tuple[int, int], data: bytes | None = None) -> tuple[str, str]:
    """From the header alone: the kind of dirt, where a file has another size than its record says, and the sentence.
    Empty where it has not, or where decoding will say what is wrong. ``data``: as in ``read_rgb``."""
    try:
        with Image.open(path if data is None else io.BytesIO(data)) as picture:
            stored, orientation = _stored(picture)
    except Exception:  # a file that is no image
        return "", ""
    turn, scaled = _reading(stored, orientation, size_px)
    kind = "image.other_size" if turn is None else "image.scaled" if scaled else ""
    return kind, other_size(path, stored, size_px) if kind else ""


def other_size(path: str | Path, stored_px: tuple[int, int], size_px: tuple[int, int]) -> str:
    return (
        f"image {path} is {stored_px[1]}x{stored_px[0]} pixels (width x height), its record says "
        f"{size_px[1]}x{size_px[0]}: mend the record, or put the right file there"
    )


def same_shape(one_px: tuple[int, int], other_px: tuple[int, int]) -> bool:
    """Whether one picture is the other in another size: (h, w) in proportion, to a pixel of the smaller."""
    (h, w), (big_h, big_w) = sorted((one_px, other_px), key=lambda size: size[0] * size[1])
    if min(h, w) < _LEAST:
        return False
    return abs(big_h * w / big_w - h) <= 1 or abs(big_w * h / big_h - w) <= 1


def _check_pixels(size_px: tuple[int, int]) -> None:
    if size_px[0] * size_px[1] > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"its record says {size_px[1]}x{size_px[0]} pixels, which is too much")


_read_seconds = 0.0


def seconds_reading() -> float:
    """What this process has spent on reading so far: files, and the cells of Hugging Face sets."""
    return _read_seconds


@contextmanager
def reading() -> Iterator[None]:
    """What happens inside is reading (``seconds_reading``); not to be nested."""
    global _read_seconds
    begun = time.perf_counter()
    try:
        yield
    finally:
        _read_seconds += time.perf_counter() - begun


def read_bytes(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _read_jpeg(data: bytes, size_px: tuple[int, int], at_least_px: tuple[int, int] | None) -> np.ndarray | None:
    """None where Pillow should look: no ordinary JPEG of this size, or something is wrong with it."""
    try:
        if data[:3] != b"\xff\xd8\xff":
            return None
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if (height, width) != size_px or colours not in ("YCbCr", "Gray", "RGB"):
            return None
        wanted = size_px if at_least_px is None else decoded_px(size_px, at_least_px)
        if wanted == size_px:
            return simplejpeg.decode_jpeg(data)
        pixels = simplejpeg.decode_jpeg(data, min_height=wanted[0], min_width=wanted[1])
        if pixels.shape[:2] == wanted:
            return pixels
        return np.array(_smaller(Image.fromarray(pixels), wanted))  # an eighth is the least a JPEG decoder can do
    except (ValueError, OverflowError):  # Pillow says what is wrong, or is content with it
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
    if isinstance(error, UnidentifiedImageError):  # its words are the path again
        return "it is no image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
