"""COCO metrics of a set of detections: twelve numbers, AP per class, best-F1 threshold.

Legend: D detections, T IoU thresholds, R recall points, K categories, A area ranges, M detection caps.
The matching is a backend's (``hotcoco``, or its oracle ``pycocotools``: equal digits); what is made of the matches is
written once, here, so that two backends cannot differ in it.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata

import numpy as np

from detr_accel.evaluate import best_f1
from detr_accel.structures import Detections, UserError

AREAS = ("all", "small", "medium", "large")  # the order in which both backends keep them
IOU_50, IOU_75 = 0, 5  # places in 0.50, 0.55, ..., 0.95
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass
class Metrics:
    """One evaluation. A number that nothing defines (no ground truth of that kind) is nan, never -1."""

    values: dict[str, float]  # keyed by NAMES, 0..1; AR100 and AP are taken at max_detections
    per_class: dict[str, float]  # category name -> AP; nan where the category has no ground truth
    num_objects: dict[str, int]  # category name -> boxes to find, crowd regions aside
    threshold: float | None  # score with the best F1 at IoU 0.5; None where no detection is right
    f1: float | None  # the F1 reached there
    num_images: int
    num_detections: int
    num_not_finite: int  # detections left out because score or box was nan or infinite
    max_detections: int
    backend: str  # name and version
    kept: dict[int, Detections] = field(default_factory=dict)  # image id -> detections that the caller asked to keep
    out_of_reach: int = 0  # boxes to find beyond max_detections of their class, or num_queries, in their image
    num_queries: int | None = None  # most detections of an image that the model can make; None: not known
    lost: dict[int, str] = field(default_factory=dict)  # image id -> why it could not be read; these count nowhere

    def to_json(self) -> dict:
        """Plain values for a json file: nan becomes null; ``kept`` is left out."""
        return {
            **{name: _or_none(value) for name, value in self.values.items()},
            "per_class": {name: _or_none(value) for name, value in self.per_class.items()},
            "threshold": self.threshold,
            "f1": self.f1,
            "num_images": self.num_images,
            "num_detections": self.num_detections,
            "num_not_finite": self.num_not_finite,
            "max_detections": self.max_detections,
            "out_of_reach": self.out_of_reach,
            "backend": self.backend,
        }

    def table(self, num_classes: int = 5) -> str:
        """The evaluation as plain text, in percent; ``num_classes`` best and worst classes are named."""
        cell = {name: _percent(value) for name, value in self.values.items()}
        rows = [
            "      all   IoU50  IoU75  small medium  large",
            "AP " + "".join(f"{cell[n]:>7}" for n in ("AP", "AP50", "AP75", "APs", "APm", "APl")),
            "AR " + f"{cell['AR100']:>7}" + " " * 14 + "".join(f"{cell[n]:>7}" for n in ("ARs", "ARm", "ARl")),
            f"AR with 1, {min(10, self.max_detections)}, {self.max_detections} detections an image: "
            f"{cell['AR1']}, {cell['AR10']}, {cell['AR100']}",
        ]
        rows += self._class_rows(num_classes)
        if self.threshold is not None:
            rows.append(f"best F1 {_percent(self.f1)} at score {self.threshold:.3f} (IoU 0.5)")
        if self.out_of_reach:
            rows.append(
                f"{self.out_of_reach} of {sum(self.num_objects.values())} objects cannot be found: their images hold "
                f"more of their class than evaluate.max_detections, which is {self.max_detections} (COCO: 100)"
                + ("" if self.num_queries is None else f", or more than there are queries, {self.num_queries}")
            )
        if self.num_not_finite:
            rows.append(f"{self.num_not_finite} detections were not finite and are left out")
        rows.append(f"{self.num_detections} detections in {self.num_images} images, scored by {self.backend}")
        return "\n".join(rows)

    def _class_rows(self, num_classes: int) -> list[str]:
        known = sorted(((v, n) for n, v in self.per_class.items() if not math.isnan(v)), key=lambda p: (-p[0], p[1]))

        def words(pairs: list[tuple[float, str]]) -> str:
            return ", ".join(f"{name} {_percent(value)}" for value, name in pairs)

        if len(known) <= 2 * num_classes:
            return [f"per class: {words(known)}"] if known else []
        return [f"best classes: {words(known[:num_classes])}", f"worst classes: {words(known[-num_classes:])}"]


def score(
    ground_truth: dict,
    detections: Sequence[Detections],
    to_category: dict[int, int],
    *,
    max_detections: int = 100,
    num_queries: int | None = None,
    backend: str = "hotcoco",
) -> Metrics:
    """Score detections as COCO does.

    Ties in score count in the order (image id, rank within the image), whatever the order of ``detections``: the
    metric moves by hundredths when tied detections change places.

    Args:
        ground_truth: COCO json with ``images``, ``annotations``, ``categories``; ``info`` and ``area`` may be missing.
        detections: at most one entry per image; an image without an entry has no detections.
        to_category: the model's label -> the data set's category id; detections with other labels are dropped.
        max_detections: most detections per image and category that count (as pycocotools cuts), for AP and for AR100.
        num_queries: most detections of an image that there can be; for ``out_of_reach``.
        backend: a key of BACKENDS.
    Raises:
        UserError: an unknown image, an image twice, an unknown backend.
    """
    if backend not in BACKENDS:
        raise UserError(f"evaluate.backend {backend!r} is not known; use one of {', '.join(BACKENDS)}")
    truth = _plain_truth(ground_truth)
    index = {image["id"]: i for i, image in enumerate(_images_by_id(ground_truth), start=1)}
    categories = sorted(truth["categories"], key=lambda c: c["id"])
    strangers = sorted(set(to_category.values()) - {c["id"] for c in categories})
    if strangers:
        raise UserError(f"category ids {strangers} in to_category are not in the ground truth's categories")
    rows = _detection_rows(detections, index, to_category)
    finite = np.isfinite(rows).all(axis=1)
    num_not_finite, rows = int((~finite).sum()), rows[finite]
    caps = sorted({min(1, max_detections), min(10, max_detections), max_detections})
    precision, recall = BACKENDS[backend](truth, rows, caps)
    threshold, f1 = best_f1.threshold(truth["annotations"], rows, max_detections)
    num_objects = dict.fromkeys((c["id"] for c in categories), 0)
    for a in truth["annotations"]:
        num_objects[a["category_id"]] += not a["iscrowd"]
    names = _unique_names(categories)
    return Metrics(
        values=_twelve(precision, recall, caps, max_detections),
        per_class={names[c["id"]]: _mean(precision[:, :, k, 0, -1]) for k, c in enumerate(categories)},
        num_objects={names[c]: n for c, n in num_objects.items()},
        threshold=threshold,
        f1=f1,
        num_images=len(truth["images"]),
        num_detections=len(rows),
        num_not_finite=num_not_finite,
        max_detections=max_detections,
        out_of_reach=out_of_reach(truth["annotations"], max_detections, num_queries),
        num_queries=num_queries,
        backend=f"{backend} {metadata.version(backend)}",
    )


def out_of_reach(annotations: list[dict], max_detections: int, num_queries: int | None = None) -> int:
    """How many boxes no list of so many detections of an image and category, and so many of an image, can hold."""
    sizes = Counter((a["image_id"], a["category_id"]) for a in annotations if not a["iscrowd"])
    held: Counter[int] = Counter()  # image id -> boxes that can be found
    for (image_id, _), size in sizes.items():
        held[image_id] += min(size, max_detections)
    return sizes.total() - sum(held.values() if num_queries is None else (min(n, num_queries) for n in held.values()))


def beyond_limits(annotations: list[dict], max_detections: int, num_queries: int) -> list[tuple[str, str]]:
    """What of a split no detector can be credited with, however good it is: in words, each with its remedy."""
    found = []
    if lost := out_of_reach(annotations, max_detections):
        limit = f"evaluate.max_detections ({max_detections})"
        text = f"{lost} validation boxes are beyond {limit} of a class in their image"
        found.append((text, "raise evaluate.max_detections (COCO's own figures are at 100)"))
    if lost := out_of_reach(annotations, len(annotations), num_queries):
        text = f"{lost} validation boxes are beyond model.num_queries ({num_queries}) in their image"
        found.append((text, "raise model.num_queries where the weights allow it"))
    return found


def _images_by_id(ground_truth: dict) -> list[dict]:
    """The images in the order in which ties are counted: by id."""
    return sorted(ground_truth["images"], key=lambda image: image["id"])


def _plain_truth(ground_truth: dict) -> dict:
    """Only what scoring needs, in one form: images and annotations numbered from 1 (pycocotools takes an annotation
    with id 0 for "no match", and equal ids for one box), area and iscrowd filled in."""
    images = _images_by_id(ground_truth)
    number = {image["id"]: i for i, image in enumerate(images, start=1)}
    assert len(number) == len(images), "two images share an id"
    categories = [{"id": c["id"], "name": str(c["name"])} for c in ground_truth["categories"]]
    known = {c["id"] for c in categories}
    annotations = []
    for a in ground_truth.get("annotations", ()):
        if a["image_id"] not in number or a["category_id"] not in known:
            continue
        box = [float(v) for v in a["bbox"]]
        area = a.get("area")
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": number[a["image_id"]],
                "category_id": a["category_id"],
                "bbox": box,
                "area": box[2] * box[3] if area is None else float(area),
                "iscrowd": int(bool(a.get("iscrowd", 0))),
            }
        )
    plain = [{"id": number[i["id"]], "width": i.get("width", 0), "height": i.get("height", 0)} for i in images]
    return {"info": {}, "images": plain, "categories": categories, "annotations": annotations}


def _detection_rows(
    detections: Sequence[Detections], index: dict[int, int], to_category: dict[int, int]
) -> np.ndarray:
    """float64 [D, 7]: image number, x, y, w, h (px), score, category id; sorted by image, then by score, stable."""
    parts = []
    seen: set[int] = set()
    labels = np.array(sorted(to_category), dtype=np.int64)
    categories = np.array([to_category[label] for label in labels.tolist()], dtype=np.float64)
    for d in sorted(detections, key=lambda d: d.image_id):
        if d.image_id not in index:
            raise UserError(f"detections for image {d.image_id}, which the ground truth does not have")
        if d.image_id in seen:
            raise UserError(f"image {d.image_id} was detected twice; each image counts once")
        seen.add(d.image_id)
        known = np.isin(d.labels, labels)
        order = np.argsort(-d.scores[known].astype(np.float64), kind="stable")
        boxes = d.boxes_xyxy_px[known][order].astype(np.float64).reshape(-1, 4)
        part = np.empty((len(order), 7))
        part[:, 0] = index[d.image_id]
        part[:, 1:3] = boxes[:, :2]
        part[:, 3:5] = boxes[:, 2:] - boxes[:, :2]
        part[:, 5] = d.scores[known][order]
        part[:, 6] = categories[np.searchsorted(labels, d.labels[known][order])]
        parts.append(part)
    return np.concatenate(parts) if parts else np.zeros((0, 7))


def _hotcoco(truth: dict, rows: np.ndarray, caps: list[int]) -> tuple[np.ndarray, np.ndarray]:
    import hotcoco

    gt = hotcoco.COCO(truth)
    evaluation = hotcoco.COCOeval(gt, gt.load_res(rows), "bbox")
    params = evaluation.params
    params.max_dets = caps  # attribute reads are copies: assign whole, then give the whole back
    evaluation.params = params
    evaluation.evaluate()
    evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"])


def _pycocotools(truth: dict, rows: np.ndarray, caps: list[int]) -> tuple[np.ndarray, np.ndarray]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it reports each stage on stdout
        gt = COCO()
        gt.dataset = truth
        gt.createIndex()
        dt = gt.loadRes(rows) if len(rows) else COCO()  # loadRes fails on an empty list
        evaluation = COCOeval(gt, dt, "bbox")
        evaluation.params.maxDets = caps
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


BACKENDS = {"hotcoco": _hotcoco, "pycocotools": _pycocotools}


def _twelve(precision: np.ndarray, recall: np.ndarray, caps: list[int], max_detections: int) -> dict[str, float]:
    """precision [T, R, K, A, M], recall [T, K, A, M] -> NAMES. pycocotools' own summary asks for 100 by name and
    gives -1 at another cap; here AP and AR100 are taken at the cap in force."""
    small, medium, large = 1, 2, 3
    one, ten = caps.index(min(1, max_detections)), caps.index(min(10, max_detections))
    values = (
        precision[..., 0, -1],
        precision[IOU_50, ..., 0, -1],
        precision[IOU_75, ..., 0, -1],
        precision[..., small, -1],
        precision[..., medium, -1],
        precision[..., large, -1],
        recall[..., 0, one],
        recall[..., 0, ten],
        recall[..., 0, -1],
        recall[..., small, -1],
        recall[..., medium, -1],
        recall[..., large, -1],
    )
    return {name: _mean(v) for name, v in zip(NAMES, values, strict=True)}


def _mean(values: np.ndarray) -> float:
    """Mean of what is defined; both backends write -1 where nothing is."""
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else math.nan


def _unique_names(categories: list[dict]) -> dict[int, str]:
    """Category id -> name; a name that two categories share gets its id appended, so that neither row is lost."""
    counts: dict[str, int] = {}
    for c in categories:
        counts[c["name"]] = counts.get(c["name"], 0) + 1
    return {c["id"]: c["name"] if counts[c["name"]] == 1 else f"{c['name']} ({c['id']})" for c in categories}


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"
