"""One image file, looked at as closely as can be; many of them in worker processes."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from detr_accel.data.coco import CocoSource
from detr_accel.data.decode import read_rgb
from detr_accel.structures import UserError

_ORIENTATION = 0x0112
_MODES = {
    "CMYK": "CMYK", "P": "palette", "PA": "palette with alpha", "RGBA": "alpha", "LA": "grey with alpha", "1": "1 bit",
    "F": "floating-point pixels", "I": "32 bits", "YCbCr": "YCbCr", "LAB": "Lab", "HSV": "HSV",
}  # fmt: skip
_ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "MPO": (".jpg", ".jpeg", ".mpo"), "PNG": (".png",), "GIF": (".gif",),
    "BMP": (".bmp", ".dib"), "WEBP": (".webp",), "TIFF": (".tif", ".tiff"), "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}  # fmt: skip
_CHUNK = 16


class FileFacts(NamedTuple):
    """What a file is."""

    fault: str = ""  # the kind of dirt that keeps training from reading it as it is
    why: str = ""
    stored_px: tuple[int, int] = (0, 0)  # (h, w)
    orientation: int = 0  # EXIF; 1 is upright, 0 unknown
    mode: str = ""  # in words, where it is odd
    format: str = ""
    misnamed: bool = False
    blank: bool = False
    digest: bytes = b""  # of the pixels; empty where there are none


def look_at(path: str, size_px: tuple[int, int], data: bytes | None = None) -> FileFacts:
    """
    Args:
        size_px: (h, w) in the record.
        data: what the file holds, where it is none on disk; ``path`` then only names it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            header = _header(path, data)
        except Exception:  # the decoder below says what is wrong
            header = FileFacts()
        try:
            image, fault, why = read_rgb(path, size_px, data=data), "", ""
        except UserError as error:
            image, fault, why = None, "image.unreadable", str(error)
            if data is None and not os.path.lexists(path):
                fault = "image.missing"
            elif "its record says" in why:
                image, fault = _scaled(path, size_px, data)
                why = why if fault else ""
        except MemoryError:
            image, fault, why = None, "image.unreadable", f"image {path} does not fit into memory"
    if image is None:
        return header._replace(fault=fault, why=why)
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image).data)
    return header._replace(fault=fault, why=why, blank=bool(np.ptp(image) == 0), digest=digest.digest())


def _scaled(path: str, size_px: tuple[int, int], data: bytes | None) -> tuple[np.ndarray | None, str]:
    try:
        return read_rgb(path, size_px, data=data, scale=True), "image.scaled"
    except UserError:
        pass
    try:
        return read_rgb(path, None, data=data), "image.other_size"
    except UserError:
        return None, "image.unreadable"


def _header(path: str, data: bytes | None) -> FileFacts:
    with Image.open(path if data is None else io.BytesIO(data)) as picture:
        form = picture.format or ""
        mode = _MODES.get(picture.mode, "16 bits" if picture.mode.startswith("I;") else "")
        if picture.mode == "P" and "transparency" in picture.info:
            mode = "palette with alpha"
        ending = os.path.splitext(path)[1].lower()
        known = {e for endings in _ENDINGS.values() for e in endings}
        misnamed = form in _ENDINGS and ending in known and ending not in _ENDINGS[form]
        orientation = picture.getexif().get(_ORIENTATION, 0)
        orientation = orientation if isinstance(orientation, int) else 0
        return FileFacts("", "", (picture.height, picture.width), orientation, mode, form, misnamed)


_sources: Sequence[CocoSource] = ()  # of a worker process


def _start(sources: Sequence[CocoSource]) -> None:
    """Ctrl-C is the parent's to answer."""
    global _sources
    _sources = sources
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def look_at_all(
    sources: Sequence[CocoSource], images: Sequence[tuple[int, int]], workers: int
) -> Iterator[FileFacts]:
    """Every image, in order.

    Args:
        images: which source, and index in it.
        workers: processes; 0 works here.
    Raises:
        UserError: from ``next``: a worker was ended from outside.
    """
    if workers == 0 or len(images) <= _CHUNK:
        yield from (_facts(sources[n], i) for n, i in images)
        return
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    with ProcessPoolExecutor(workers, context, _start, (sources,)) as pool:
        try:
            yield from pool.map(_one, images, chunksize=_CHUNK)
        except BrokenProcessPool:
            raise UserError(
                "a process that reads the images was ended from outside, most often for lack of memory: check with "
                "--workers 1, or look for the largest files"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _one(image: tuple[int, int]) -> FileFacts:
    return _facts(_sources[image[0]], image[1])


def _facts(source: CocoSource, index: int) -> FileFacts:
    return look_at(source.file(index), source.size_px(index), source.held(index))
