"""Ground truth and detections for the evaluation tests, and what pycocotools itself says of them.

Also a script: ``cases.py OUT`` evaluates the same detections with however many processes it was launched.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
from pathlib import Path

import numpy as np

from detr_accel.structures import Detections

COCO_FREE = Path(__file__).parents[3] / "shared/data/coco_free/annotations/instances_val.json"


def nasty(seed: int, *, area: bool = True) -> dict:
    """Crowd regions, images without boxes, one with 130 objects, categories without ground truth, gaps in the ids."""
    rng = np.random.default_rng(seed)
    categories = [{"id": c, "name": f"class {c}"} for c in (2, 3, 7, 11, 40, 90)]
    images = [{"id": int(i), "width": 640, "height": 480} for i in rng.permutation(np.arange(5, 500, 17))]
    annotations = []
    for n, image in enumerate(images):
        count = 130 if n == 3 else 0 if n % 7 == 0 else int(rng.integers(1, 9))
        for _ in range(count):
            w, h = np.exp(rng.uniform(1.5, 5.5, 2))
            x, y = rng.uniform(0, 640 - min(w, 600)), rng.uniform(0, 480 - min(h, 440))
            annotation = {
                "id": len(annotations),  # from 0: pycocotools alone would take that box for "no match"
                "image_id": image["id"],
                "category_id": int(rng.choice([2, 3, 7, 11])),
                "bbox": [round(float(v), 2) for v in (x, y, w, h)],
                "iscrowd": int(rng.random() < 0.08),
            }
            if area:
                annotation["area"] = float(w * h * rng.uniform(0.5, 1.0))
            annotations.append(annotation)
    return {"images": images, "annotations": annotations, "categories": categories}  # no "info"


def detect(truth: dict, seed: int, *, per_object: int = 2, noise: int = 4) -> list[Detections]:
    """Jittered copies of the boxes, plus noise; scores with one decimal, so that most are tied. Labels are category
    ids. Some images have no detections."""
    rng = np.random.default_rng(seed)
    ids = [c["id"] for c in truth["categories"]]
    boxes_of: dict[int, list[dict]] = {}
    for a in truth["annotations"]:
        boxes_of.setdefault(a["image_id"], []).append(a)
    found = []
    for n, image in enumerate(truth["images"]):
        boxes, labels = [], []
        for a in boxes_of.get(image["id"], []) * per_object:
            x, y, w, h = a["bbox"]
            boxes.append(np.array([x, y, x + w, y + h]) + rng.normal(0, 0.08, 4) * [w, h, w, h])
            labels.append(a["category_id"] if rng.random() < 0.9 else rng.choice(ids))
        for _ in range(noise):
            x, y, w, h = rng.uniform(5, 300, 4)
            boxes.append(np.array([x, y, x + w, y + h]))
            labels.append(rng.choice(ids))
        if n % 11 == 5:
            boxes, labels = [], []
        scores = np.round(rng.uniform(0.05, 0.95, len(boxes)), 1).astype(np.float32)
        order = np.argsort(-scores, kind="stable")
        found.append(
            Detections(
                image["id"],
                scores[order],
                np.array(labels, dtype=np.int64)[order],
                np.array(boxes, dtype=np.float32).reshape(-1, 4)[order],
            )
        )
    return found


def oracle(truth: dict, found: list[Detections], caps: tuple[int, ...] = (1, 10, 100)):
    """pycocotools on plain dicts, as its own demo does it; returns its COCOeval, summarised where it can."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = {"info": {}, **copy.deepcopy(truth)}
    for i, a in enumerate(truth["annotations"]):
        a["id"] = i + 1
        a.setdefault("area", a["bbox"][2] * a["bbox"][3])
    results = []
    for d in sorted(found, key=lambda d: d.image_id):
        for score, label, box in zip(d.scores.tolist(), d.labels.tolist(), d.boxes_xyxy_px.tolist(), strict=True):
            xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            results.append({"image_id": d.image_id, "category_id": label, "bbox": xywh, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = truth
        gt.createIndex()
        evaluation = COCOeval(gt, gt.loadRes(results), "bbox")
        evaluation.params.maxDets = list(caps)
        evaluation.evaluate()
        evaluation.accumulate()
        if caps == (1, 10, 100):
            evaluation.summarize()
    return evaluation


def main(out: Path) -> None:
    """Every process takes every n-th batch; the main process writes what came out, also of three broken runs."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, gather_object

    from detr_accel import evaluate
    from detr_accel.structures import UserError

    state = PartialState(cpu=True)
    rank, count = state.process_index, state.num_processes
    truth = json.loads(COCO_FREE.read_text()) if COCO_FREE.exists() else nasty(0)
    found = detect(truth, seed=1)
    batches = [found[i : i + 4] for i in range(0, len(found), 4)]
    identity = {c["id"]: c["id"] for c in truth["categories"]}

    def run(mine: list, predict=lambda batch: batch, **extra) -> dict | str:
        try:
            metrics = evaluate.run(
                predict, mine, ground_truth=truth, to_category=identity, gather=gather_object, **extra
            )
        except (UserError, ZeroDivisionError) as error:
            return f"{type(error).__name__}: {error}"
        return metrics.to_json() | {"kept": sorted(metrics.kept)}

    told = {"broadcast": broadcast_object_list, "is_main": state.is_main_process}
    mine = batches[rank::count]
    last = rank == count - 1
    results = {
        "processes": count,
        "whole": run(mine, keep_images=[found[0].image_id, found[7].image_id], **told),
        "scored everywhere": run(mine),
        "twice": run(mine + batches[:1] if last else mine, **told),
        "missing": run(mine[:-1] if last else mine, **told),
        "failed": run(mine, predict=(lambda batch: 1 / 0) if last else (lambda batch: batch), **told),
    }
    Path(f"{out}.{rank}").write_text(json.dumps(results))
    state.destroy_process_group()  # a process that leaves with gloo's threads running may be aborted


if __name__ == "__main__":
    main(Path(sys.argv[1]))
