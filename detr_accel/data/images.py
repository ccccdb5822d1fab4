"""Image files without annotations as a source, for prediction."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from detr_accel.data.decode import header_size, read_rgb
from detr_accel.structures import Classes, Sample, UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")


def _files(path: Path) -> list[Path]:
    try:
        return _found(path)
    except OSError as error:
        raise UserError(f"cannot look at {path}: {error.strerror}; give files or folders that can be read") from None


def _found(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"there is no image {path}; give files or folders that are there")
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in EXTENSIONS and not p.is_dir())
    if not found:
        inside = "; folders in it are not entered" if any(p.is_dir() for p in path.iterdir()) else ""
        raise UserError(f"folder {path} holds no image ({', '.join(EXTENSIONS)}){inside}; give files or another folder")
    return found


def _passed_over(path: Path) -> Counter[str]:
    """What is in a folder beside images: how many folders, and files of each ending."""
    if not path.is_dir():
        return Counter()
    others = (p for p in path.iterdir() if p.is_dir() or p.suffix.lower() not in EXTENSIONS)
    return Counter("folders" if p.is_dir() else p.suffix.lower() or "no ending" for p in others)


class ImageFiles:
    """Files as a viewer shows them (an EXIF rotation is applied). Image ids are 1, 2, ... in the given order.

    A file whose header cannot be read keeps its id and is no part of the source: ``skipped`` has its name and why.
    ``passed_over`` counts what else was in the folders.

    Args:
        paths: files, or folders of which every image is taken, by name.
        progress: wraps the files whose headers are read, to show how far it is (a PNG is decoded for it).
    Raises:
        UserError: nothing there, no image in a folder, or no file that is an image.
    """

    classes = Classes((), ())

    def __init__(
        self, paths: Sequence[str | Path], progress: Callable[[list[Path]], Iterable[Path]] = lambda files: files
    ):
        self.paths: list[Path] = []
        self.skipped: list[tuple[str, str]] = []
        self._sizes: list[tuple[int, int]] = []
        self._ids: list[int] = []
        files = [file for path in paths for file in _files(Path(path))]
        self.passed_over = sum((_passed_over(Path(path)) for path in paths), Counter())
        for number, file in enumerate(progress(files), start=1):
            try:
                self._sizes.append(header_size(file, upright=True))
            except UserError as error:
                self.skipped.append((str(file), str(error)))
                continue
            self.paths.append(file)
            self._ids.append(number)
        if not self.paths:
            raise UserError(f"none of {len(self.skipped)} files is an image; {self.skipped[0][1]}")

    def __len__(self) -> int:
        return len(self.paths)

    def size_px(self, index: int) -> tuple[int, int]:
        return self._sizes[index]

    def image_id(self, index: int) -> int:
        return self._ids[index]

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def sample(self, index: int, at_least_px: tuple[int, int] | None = None) -> Sample:
        none = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
        return Sample(read_rgb(self.paths[index], None), self._ids[index], *none)

    def ground_truth(self) -> dict:
        rows = [(i, *self.size_px(i)) for i in range(len(self))]
        images = [{"id": self._ids[i], "file_name": self.name(i), "height": h, "width": w} for i, h, w in rows]
        return {"info": {}, "images": images, "annotations": [], "categories": []}

    def fingerprint(self) -> str:
        rows = [(str(p), s) for p, s in zip(self.paths, self._sizes, strict=True)]
        return hashlib.sha256(repr(rows).encode()).hexdigest()
