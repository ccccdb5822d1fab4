"""Image files without annotations as a source, for prediction."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detr_accel.data.decode import header_size, read_rgb
from detr_accel.structures import Classes, Sample, UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not found:
        raise UserError(f"folder {path} holds no image ({', '.join(EXTENSIONS)}); give files, or another folder")
    return found


class ImageFiles:
    """Files as a viewer shows them (an EXIF rotation is applied). Image ids are 1, 2, ... in the given order.

    Args:
        paths: files, or folders of which every image is taken, by name.
    Raises:
        UserError: nothing there, no image in a folder, or a file that is no image.
    """

    classes = Classes((), ())

    def __init__(self, paths: Sequence[str | Path]):
        self.paths = [file for path in paths for file in _files(Path(path))]
        self._sizes = [header_size(p, upright=True) for p in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def size_px(self, index: int) -> tuple[int, int]:
        return self._sizes[index]

    def image_id(self, index: int) -> int:
        return index + 1

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def sample(self, index: int) -> Sample:
        none = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
        return Sample(read_rgb(self.paths[index], None), index + 1, *none)

    def ground_truth(self) -> dict:
        rows = [(i, *self.size_px(i)) for i in range(len(self))]
        images = [{"id": i + 1, "file_name": self.name(i), "height": h, "width": w} for i, h, w in rows]
        return {"info": {}, "images": images, "annotations": [], "categories": []}

    def fingerprint(self) -> str:
        rows = [(str(p), s) for p, s in zip(self.paths, self._sizes, strict=True)]
        return hashlib.sha256(repr(rows).encode()).hexdigest()
