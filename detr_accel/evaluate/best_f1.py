"""The score threshold with the best F1: where a person who wants pictures, not curves, should cut.

Matching is COCO's at IoU 0.5, all areas, with crowd regions ignored: within an image and a category, detections in
falling order of score each take the free box they overlap most. F1 is micro-averaged: every detection and every box of
every class counts the same, as in the pictures that a threshold is for.

Legend: D detections, G ground-truth boxes, P pairs that overlap enough.
"""

from __future__ import annotations

import numpy as np

IOU = 0.5
RIGHT, WRONG, IGNORED = 1, 0, -1


def threshold(annotations: list[dict], rows: np.ndarray, max_detections: int) -> tuple[float | None, float | None]:
    """The best threshold and its F1; keep detections with ``score >= threshold``.

    Args:
        annotations: ground truth with id, image_id, category_id, bbox (xywh px) and iscrowd.
        rows: float64 [D, 7]: image, x, y, w, h, score, category; within an image in falling order of score.
        max_detections: most detections per image and category that count.
    Returns:
        (None, None) when no detection is right: then every threshold is as good as any other. Among equal F1 the
        highest threshold.
    """
    verdict, scores = match(annotations, rows, max_detections)
    counted = verdict != IGNORED
    verdict, scores = verdict[counted], scores[counted]
    if not (verdict == RIGHT).any():
        return None, None
    num_objects = sum(not a["iscrowd"] for a in annotations)
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], np.cumsum(verdict[order] == RIGHT)
    last_of_tie = np.append(scores[1:] != scores[:-1], True)  # a threshold cannot part equal scores
    f1 = 2 * right / (np.arange(1, len(right) + 1) + num_objects)
    best = int(np.argmax(np.where(last_of_tie, f1, -1.0)))
    return float(scores[best]), float(f1[best])


def match(annotations: list[dict], rows: np.ndarray, max_detections: int) -> tuple[np.ndarray, np.ndarray]:
    """What COCO's matching says of each detection at IoU 0.5: int [D] RIGHT, WRONG or IGNORED, and its score [D]."""
    rows = rows[_rank_in_group(rows) < max_detections]
    verdict = np.full(len(rows), WRONG)
    truth = np.array([[a["image_id"], *a["bbox"], a["iscrowd"], a["category_id"]] for a in annotations]).reshape(-1, 7)
    detection, box, iou = _overlapping_pairs(rows, truth)
    crowd, taken = (truth[:, 5] > 0).tolist(), [False] * len(truth)
    current, chosen, chosen_iou = -1, -1, 0.0
    # plain lists: a large split has a million pairs, and an array operation for each would take ten seconds
    for d, g, overlap in zip([*detection.tolist(), -1], [*box.tolist(), -1], [*iou.tolist(), 0.0], strict=True):
        if d != current:
            if chosen >= 0:
                verdict[current], taken[chosen] = RIGHT, True
            current, chosen, chosen_iou = d, -1, 0.0
        if g >= 0 and crowd[g]:
            verdict[d] = IGNORED  # unless a free box turns up: that one is preferred
        elif g >= 0 and not taken[g] and overlap >= chosen_iou:  # the last of equals, as in COCO's loop
            chosen, chosen_iou = g, overlap
    return verdict, rows[:, 5]


def _rank_in_group(rows: np.ndarray) -> np.ndarray:
    """Place of each detection within its image and category, from 0."""
    rank = np.zeros(len(rows), dtype=np.int64)
    seen: dict[tuple[float, float], int] = {}
    for i, key in enumerate(zip(rows[:, 0].tolist(), rows[:, 6].tolist(), strict=True)):
        rank[i] = seen[key] = seen.get(key, -1) + 1
    return rank


def _overlapping_pairs(rows: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs (detection [P], box [P]) of one image and category with IoU >= 0.5 [P], sorted by detection, then by box.

    The IoU with a crowd region is divided by the detection's area alone. Arithmetic as in COCO's C code, in float64.
    """
    parts = [(np.zeros(0, int), np.zeros(0, int), np.zeros(0))]
    boxes_of: dict[float, list[int]] = {}
    for i, image in enumerate(truth[:, 0].tolist()):
        boxes_of.setdefault(image, []).append(i)
    images, starts = np.unique(rows[:, 0], return_index=True)
    ends = np.append(starts, len(rows))[1:]
    for image, start, end in zip(images.tolist(), starts, ends, strict=True):
        boxes = np.array(boxes_of.get(image, []), dtype=int)
        d, g = rows[start:end, None], truth[None, boxes]  # [d, 1, 7], [1, g, 7]
        wide = np.minimum(d[..., 1] + d[..., 3], g[..., 1] + g[..., 3]) - np.maximum(d[..., 1], g[..., 1])
        high = np.minimum(d[..., 2] + d[..., 4], g[..., 2] + g[..., 4]) - np.maximum(d[..., 2], g[..., 2])
        inner = np.where((wide > 0) & (high > 0), wide * high, 0.0)
        area_d, area_g = d[..., 3] * d[..., 4], g[..., 3] * g[..., 4]
        union = np.where(g[..., 5] > 0, area_d + 0 * area_g, area_d + area_g - inner)
        iou = np.divide(inner, union, out=np.zeros_like(inner), where=inner > 0)
        i, j = np.nonzero((iou >= IOU) & (d[..., 6] == g[..., 6]))
        parts.append((start + i, boxes[j], iou[i, j]))
    detection, box, iou = (np.concatenate(p) for p in zip(*parts, strict=True))
    return detection, box, iou
