"""A COCO json and its image folder as a source."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detr_accel.data import decode
from detr_accel.data.coco_json import Strings, Table
from detr_accel.data.decode import read_rgb
from detr_accel.structures import Classes, Sample, UserError


class CocoSource:
    """Some or all images of one json.

    Args:
        table: the json.
        folder: the image folder.
        paths: each image's file, relative to the folder, in the table's order.
        classes: labels and category ids; every category of the table is in it.
        rows: which images, as positions in the table; None takes all.
        scale: a picture of the right shape in another size than the record's is read in the record's.
    """

    def __init__(
        self,
        table: Table,
        folder: Path,
        paths: Strings,
        classes: Classes,
        rows: np.ndarray | None = None,
        scale: bool = False,
    ):
        self.table, self.folder, self.classes, self._paths, self.scale = table, str(folder), classes, paths, scale
        self._rows = np.arange(len(table)) if rows is None else np.asarray(rows, np.int64)
        ids = np.array(list(table.categories), np.int64)
        label_of = np.array([classes.label_of[c] for c in table.categories], np.int64)
        self._labels = label_of[np.searchsorted(ids, table.category_ids)]

    def __len__(self) -> int:
        return len(self._rows)

    def size_px(self, index: int) -> tuple[int, int]:
        h, w = self.table.sizes_px[self._rows[index]]
        return int(h), int(w)

    def image_id(self, index: int) -> int:
        return int(self.table.image_ids[self._rows[index]])

    def name(self, index: int) -> str:
        return self.table.file_names[self._rows[index]]

    def file(self, index: int) -> str:
        """The file; where none was found, the place where it should be."""
        return self._file(self._rows[index])

    def _file(self, row: int) -> str:
        return f"{self.folder}/{self._paths[row] or self.table.file_names[row]}"

    def held(self, index: int) -> bytes | None:
        """What ``file`` holds, where it is a name only and there is none on disk."""
        return None

    def encoded(self, index: int) -> bytes:
        """The image as it is kept, for those who measure or compare it."""
        return decode.read_bytes(self.file(index))

    def most_boxes(self) -> int:
        counts = np.diff(self.table.offsets)[self._rows]
        return int(counts.max(initial=0))

    def boxes_xyxy_px(self, index: int) -> np.ndarray:
        return self._targets(self._rows[index], self.size_px(index))[0]

    def sample(self, index: int, at_least_px: tuple[int, int] | None = None) -> Sample:
        size_px = self.size_px(index)
        try:
            image = self._read(self._rows[index], size_px, at_least_px)
        except UserError as error:
            raise UserError(f"{self.table.path}: image id {self.image_id(index)}: {error}") from None
        boxes, labels, num_cut = self._targets(self._rows[index], size_px)
        return Sample(image, self.image_id(index), boxes, labels, num_cut)

    def _read(self, row: int, size_px: tuple[int, int], at_least_px: tuple[int, int] | None) -> np.ndarray:
        return read_rgb(self._file(row), size_px, at_least_px, scale=self.scale)

    def _targets(self, row: int, size_px: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, int]:
        """DETR's order: crowd out, corners, clip to the image, keep what has width and height; how many ran out. A box
        twice is one."""
        of_image = np.arange(self.table.offsets[row], self.table.offsets[row + 1])
        of_image = of_image[~self.table.crowd[of_image] & ~self.table.again[of_image]]
        boxes, keep = clip(self.table.boxes_xywh_px[of_image], np.array(size_px))
        num_cut = int(reach_out(self.table.boxes_xywh_px[of_image], np.array(size_px)).sum())
        return boxes[keep], self._labels[of_image[keep]], num_cut

    def ground_truth(self) -> dict:
        t = self.table
        images, annotations = [], []
        for i, row in enumerate(self._rows.tolist()):
            h, w = self.size_px(i)
            images.append({"id": self.image_id(i), "file_name": self.name(i), "height": h, "width": w})
            for a in range(t.offsets[row], t.offsets[row + 1]):
                annotations.append(
                    {
                        "id": int(t.annotation_ids[a]),
                        "image_id": self.image_id(i),
                        "category_id": int(t.category_ids[a]),
                        "bbox": t.boxes_xywh_px[a].tolist(),
                        "area": float(t.areas_px[a]),
                        "iscrowd": int(t.crowd[a]),
                    }
                )
        categories = [{"id": c, "name": n} for c, n in t.categories.items()]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}

    def fingerprint(self) -> str:
        """Of names, sizes, categories and annotations of these images; the pixels are not read."""
        t, digest = self.table, hashlib.sha256()
        digest.update(repr((self.classes.names, self.classes.category_ids)).encode())
        counts = np.diff(t.offsets)[self._rows]
        pick = np.repeat(t.offsets[:-1][self._rows], counts) + _ramps(counts)
        for array in (
            t.image_ids[self._rows], self.table.sizes_px[self._rows], counts, self._labels[pick], t.boxes_xywh_px[pick],
            t.areas_px[pick], t.crowd[pick],
        ):  # fmt: skip
            digest.update(np.ascontiguousarray(array).tobytes())
        for i in range(len(self)):
            digest.update(self.name(i).encode("utf-8", "surrogateescape") + b"\0")
        return digest.hexdigest()

    def head(self, num_images: int) -> CocoSource:
        """The first images of the split as a split of their own."""
        return self.subset(self._rows[:num_images])

    def written(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Every annotation that is no crowd region, as the json has it: boxes xywh px [A, 4], the (h, w) of its image
        [A, 2], its category id [A], and the index of its image [A]."""
        t = self.table
        pick, counts, _ = self._kept()
        of_image = np.repeat(np.arange(len(self)), counts)
        plain = ~t.crowd[pick]
        pick, of_image = pick[plain], of_image[plain]
        return t.boxes_xywh_px[pick], t.sizes_px[self._rows[of_image]], t.category_ids[pick], of_image

    def stamp(self) -> str:
        """sha256 over size and time of change of every file: another one where pixels may have changed."""
        digest = hashlib.sha256()
        for i in range(len(self)):
            try:
                found = os.stat(self.file(i))
                digest.update(f"{found.st_size} {found.st_mtime_ns}\n".encode())
            except OSError:
                digest.update(b"gone\n")
        return digest.hexdigest()

    def subset(self, rows: Sequence[int] | np.ndarray) -> CocoSource:
        """Other images of the same json; the arrays are shared."""
        other = copy.copy(self)
        other._rows = np.asarray(rows, np.int64)
        return other

    def describe(self) -> str:
        """One line for the console: counts, and what is left out of the targets."""
        t = self.table
        pick, counts, keep = self._kept()
        left_out = ~keep & ~t.crowd[pick]
        reaching = reach_out(t.boxes_xywh_px[pick], np.repeat(t.sizes_px[self._rows], counts, axis=0))
        reaching &= keep & ~t.crowd[pick]
        inverted = (t.boxes_xywh_px[pick, 2:] < 0).any(1)  # told when the json is read
        flat = left_out & ~inverted & (t.boxes_xywh_px[pick, 2:] == 0).any(1)
        parts = [f"{len(self)} images", f"{len(pick)} boxes", f"{len(self.classes)} classes"]
        notes = {
            "images without boxes": int((counts == 0).sum()),
            "crowd regions (kept for evaluation only)": int(t.crowd[pick].sum()),
            "boxes without area (left out of the targets)": int(flat.sum()),
            "boxes outside their image (left out of the targets)": int((left_out & ~flat & ~inverted).sum()),
            "boxes that reach out of their image (cut at its border)": int(reaching.sum()),
        }
        parts += [f"{value} {what}" for what, value in notes.items() if value]
        return ", ".join(parts)

    def num_targets(self) -> int:
        """Boxes that can be learned from, without decoding."""
        return len(self._learned())

    def target_categories(self) -> np.ndarray:
        """The category ids that have a box to learn from, int64."""
        return np.unique(self.table.category_ids[self._learned()])

    def _learned(self) -> np.ndarray:
        pick, _, keep = self._kept()
        return pick[keep & ~self.table.crowd[pick] & ~self.table.again[pick]]

    def _kept(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Annotations of these images [A], how many each has, and which of them have an area after clipping [A]."""
        counts = np.diff(self.table.offsets)[self._rows]
        pick = np.repeat(self.table.offsets[:-1][self._rows], counts) + _ramps(counts)
        return (
            pick,
            counts,
            clip(self.table.boxes_xywh_px[pick], np.repeat(self.table.sizes_px[self._rows], counts, axis=0))[1],
        )


def clip(boxes_xywh_px: np.ndarray, sizes_px: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [N, 4] and their images' (h, w), [2] or [N, 2] -> float32 xyxy in the images, and which have an area."""
    with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold ends at a border or is left out
        boxes = boxes_xywh_px.astype(np.float32)
        boxes[:, 2:] += boxes[:, :2]
        w, h = sizes_px[..., 1], sizes_px[..., 0]
        boxes = np.clip(boxes, 0, np.stack((w, h, w, h), -1).astype(np.float32))
        return boxes, (boxes[:, 2:] > boxes[:, :2]).all(1)


def reach_out(boxes_xywh_px: np.ndarray, sizes_px: np.ndarray) -> np.ndarray:
    """Which boxes [N, 4] end outside their image by more than a hundredth of it, which is not rounding: bool [N].

    Args:
        sizes_px: (h, w), [2] or [N, 2].
    """
    (x, y, width, height), h, w = boxes_xywh_px.T, sizes_px[..., 0], sizes_px[..., 1]
    with np.errstate(over="ignore", invalid="ignore"):
        return (x < -0.01 * w) | (y < -0.01 * h) | (x + width > 1.01 * w) | (y + height > 1.01 * h)


def _ramps(counts: np.ndarray) -> np.ndarray:
    """(2, 0, 3) -> (0, 1, 0, 1, 2)."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def classes_of(table: Table) -> Classes:
    """Contiguous labels in the order of the category ids."""
    return Classes(tuple(table.categories.values()), tuple(table.categories))


def classes_like(train: Classes, table: Table) -> Classes:
    """The labels of ``train`` with this json's category ids, which may differ; the names may not.

    Raises:
        UserError: the two jsons do not name the same categories.
    """
    id_of = {name: category_id for category_id, name in table.categories.items()}
    missing = [n for n in train.names if n not in id_of]
    extra = [n for n in id_of if n not in train.names]
    if missing or extra:
        named = {"lacks": missing, "adds": extra}
        parts = " and ".join(f"{what} {', '.join(map(repr, names[:5]))}" for what, names in named.items() if names)
        raise UserError(
            f"{table.path} has other categories than the training json: it {parts}; both must list the same names"
        )
    return Classes(train.names, tuple(id_of[n] for n in train.names))
