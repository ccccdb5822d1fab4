"""Law 5: our numbers are pycocotools' numbers, to the last digit, with either backend."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shared import load_module

from detr_accel import evaluate
from detr_accel.evaluate import best_f1
from detr_accel.evaluate.coco import BACKENDS, NAMES
from detr_accel.structures import Detections, UserError

cases = load_module(Path(__file__).with_name("cases.py"))

backends = pytest.mark.parametrize("backend", BACKENDS)


def identity(truth: dict) -> dict[int, int]:
    return {c["id"]: c["id"] for c in truth["categories"]}


def equal(ours: float, theirs: float) -> bool:
    """Equal digits, where pycocotools writes -1 for what we call nan."""
    return math.isnan(ours) if theirs == -1 else ours == theirs


def per_class(evaluation) -> list[float]:
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    defined = [precision[:, :, k][precision[:, :, k] > -1] for k in range(precision.shape[2])]
    return [float(np.mean(p)) if p.size else -1 for p in defined]


def assert_equals_oracle(truth: dict, found: list[Detections], backend: str) -> evaluate.Metrics:
    ours, theirs = evaluate.score(truth, found, identity(truth), backend=backend), cases.oracle(truth, found)
    for name, value in zip(NAMES, theirs.stats, strict=True):
        assert equal(ours.values[name], value), f"{name}: {ours.values[name]} against {value}"
    for (name, ap), value in zip(ours.per_class.items(), per_class(theirs), strict=True):
        assert equal(ap, value), f"{name}: {ap} against {value}"
    return ours


@pytest.mark.law5
@backends
@pytest.mark.parametrize("seed", range(3))
def test_digits_equal_pycocotools_on_nasty_sets(backend, seed):
    truth = cases.nasty(seed)
    ours = assert_equals_oracle(truth, cases.detect(truth, seed + 100), backend)
    assert 0.2 < ours.values["AP50"] < 1.0  # neither a perfect nor an empty case, which could hide an error
    assert math.isnan(ours.per_class["class 40"]), "a category without ground truth has no AP"


@pytest.mark.law5
@backends
def test_digits_equal_pycocotools_on_coco_free(backend):
    if not cases.COCO_FREE.exists():
        pytest.skip(f"no data at {cases.COCO_FREE}")
    truth = json.loads(cases.COCO_FREE.read_text())
    assert any(a["iscrowd"] for a in truth["annotations"])
    assert_equals_oracle(truth, cases.detect(truth, 5), backend)


@pytest.mark.law5
@backends
def test_digits_equal_pycocotools_without_area_and_info(backend):
    truth = cases.nasty(4, area=False)
    assert_equals_oracle(truth, cases.detect(truth, 6), backend)


@pytest.mark.law5
@backends
@pytest.mark.parametrize("cap", [5, 300])
def test_another_cap_counts_for_average_precision_too(backend, cap):
    truth = cases.nasty(1)
    for a in truth["annotations"]:
        a["category_id"] = 2  # more than 100 detections of one category in an image
    found = cases.detect(truth, 8, noise=0)
    ours = evaluate.score(truth, found, identity(truth), backend=backend, max_detections=cap)
    theirs = cases.oracle(truth, found, caps=(1, cap) if cap < 10 else (1, 10, cap))
    precision, recall = theirs.eval["precision"][..., 0, -1], theirs.eval["recall"][..., 0, -1]
    assert ours.values["AP"] == np.mean(precision[precision > -1])
    assert ours.values["AR100"] == np.mean(recall[recall > -1])
    at_100 = evaluate.score(truth, found, identity(truth), backend=backend)
    assert ours.values["AR100"] != at_100.values["AR100"], "the cap must make a difference here"


@pytest.mark.law5
@backends
def test_order_of_arrival_does_not_move_tied_detections(backend):
    truth = cases.nasty(2)
    found = cases.detect(truth, 9)
    shuffled = [found[i] for i in np.random.default_rng(0).permutation(len(found))]
    a, b = (evaluate.score(truth, f, identity(truth), backend=backend) for f in (found, shuffled))
    assert a.to_json() == b.to_json()


@backends
def test_no_detections_give_zero_and_no_threshold(backend):
    truth = cases.nasty(0)
    metrics = evaluate.score(truth, [], identity(truth), backend=backend)
    assert metrics.values["AP"] == metrics.values["AR100"] == 0.0
    assert metrics.threshold is None and metrics.f1 is None and metrics.num_images == len(truth["images"])


@backends
def test_no_ground_truth_gives_nan_never_minus_one(backend):
    truth = cases.nasty(0)
    found = cases.detect(truth, 1)
    metrics = evaluate.score(truth | {"annotations": []}, found, identity(truth), backend=backend)
    assert all(math.isnan(v) for v in [*metrics.values.values(), *metrics.per_class.values()])
    assert metrics.to_json()["AP"] is None and "-1" not in metrics.table() and "-100" not in metrics.table()


@pytest.mark.parametrize("seed", range(3))
def test_threshold_is_the_best_of_all_by_pycocotools_matches(seed):
    truth = cases.nasty(seed)
    found = cases.detect(truth, seed + 50, per_object=1)
    ours = evaluate.score(truth, found, identity(truth))
    right, scores = [], []
    evaluation = cases.oracle(truth, found)
    for e in evaluation.evalImgs:
        if e is not None and e["aRng"] == evaluation.params.areaRng[0]:
            counted = ~e["dtIgnore"][0].astype(bool)
            right += (e["dtMatches"][0][counted] > 0).tolist()
            scores += np.array(e["dtScores"])[counted].tolist()
    right, scores = np.array(right), np.array(scores)
    num_objects = sum(not a["iscrowd"] for a in truth["annotations"])
    by_threshold = {t: 2 * right[scores >= t].sum() / ((scores >= t).sum() + num_objects) for t in set(scores)}
    best = max(by_threshold.values())
    assert ours.f1 == pytest.approx(best, rel=1e-12)
    assert ours.threshold == max(t for t, f1 in by_threshold.items() if f1 == best)


def test_threshold_keeps_whole_ties_together():
    annotations = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "iscrowd": 0}]
    rows = np.array([[1, 0, 0, 10, 10, 0.5, 1], [1, 50, 50, 10, 10, 0.5, 1.0]])
    # cutting between the two equal scores would look perfect, and cannot be done
    assert best_f1.threshold(annotations, rows, 100) == (0.5, pytest.approx(2 / 3))


def test_equal_boxes_go_to_separate_objects_and_crowds_are_ignored():
    truth = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [0, 0, 100, 100], "iscrowd": 1},
    ]
    rows = np.array([[1, 0, 0, 10, 10, 0.9, 1], [1, 0, 0, 10, 10, 0.8, 1], [1, 90, 90, 40, 40, 0.7, 1]])
    verdict, _ = best_f1.match(truth, rows, 100)
    assert verdict.tolist() == [best_f1.RIGHT, best_f1.IGNORED, best_f1.WRONG]


def test_detections_with_unmapped_labels_are_dropped():
    truth = cases.nasty(0)
    found = cases.detect(truth, 1)
    part = {c: c for c in (2, 3)}
    metrics = evaluate.score(truth, found, part)
    assert metrics.num_detections == sum(int(np.isin(d.labels, (2, 3)).sum()) for d in found)
    assert metrics.per_class["class 7"] == 0.0, "never found, so 0: the data set has such objects"


def test_detections_that_are_not_finite_are_left_out_and_counted():
    truth = cases.nasty(0)
    found = cases.detect(truth, 1)
    clean = evaluate.score(truth, found, identity(truth))
    d = found[1]
    broken = Detections(
        d.image_id,
        np.append(np.float32(np.nan), d.scores),
        np.append(2, d.labels),
        np.concatenate([np.full((1, 4), 3, np.float32), d.boxes_xyxy_px]),
    )
    metrics = evaluate.score(truth, [found[0], broken, *found[2:]], identity(truth))
    assert metrics.num_not_finite == 1 and "1 detections were not finite" in metrics.table()
    assert metrics.values == clean.values


def test_unknown_and_double_images_are_refused():
    truth = cases.nasty(0)
    found = cases.detect(truth, 1)
    with pytest.raises(UserError, match="detected twice"):
        evaluate.score(truth, [*found, found[0]], identity(truth))
    with pytest.raises(UserError, match="ground truth does not have"):
        evaluate.score(truth, [replace(found[0], image_id=10**6)], identity(truth))


def test_categories_that_share_a_name_keep_a_row_each():
    truth = cases.nasty(0)
    for c in truth["categories"]:
        c["name"] = "thing"
    metrics = evaluate.score(truth, cases.detect(truth, 1), identity(truth))
    assert len(metrics.per_class) == len(truth["categories"]) and "thing (2)" in metrics.per_class


def test_table_names_best_and_worst_classes_and_the_threshold():
    truth = cases.nasty(0)
    metrics = evaluate.score(truth, cases.detect(truth, 1), identity(truth))
    text = metrics.table(num_classes=1)
    assert f"{100 * metrics.values['AP']:.1f}" in text and "best classes: class" in text and "worst classes" in text
    assert f"score {metrics.threshold:.3f}" in text and "hotcoco 1" in text and text.isascii()


# --- crowded images


def crowd(num: int) -> tuple[dict, list[Detections]]:
    """One image full of small squares, and detections that are all right; the best of them says so in its score."""
    side = int(np.ceil(np.sqrt(num)))
    boxes = [[10.0 * (i % side), 10.0 * (i // side), 8.0, 8.0] for i in range(num)]
    truth = {
        "images": [{"id": 1, "width": 10 * side, "height": 10 * side}], "categories": [{"id": 1, "name": "seed"}],
        "annotations": [
            {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": b, "area": 64.0, "iscrowd": 0}
            for i, b in enumerate(boxes)
        ],
    }  # fmt: skip
    xyxy = np.array([[x, y, x + w, y + h] for x, y, w, h in boxes], np.float32)
    scores = np.linspace(0.9, 0.5, num).astype(np.float32)
    return truth, [Detections(1, scores, np.ones(num, np.int64), xyxy)]


@pytest.mark.law5
@backends
def test_an_image_of_400_objects_is_found_whole_where_so_many_may_be_told(backend):
    truth, found = crowd(400)
    whole = evaluate.score(truth, found, identity(truth), max_detections=400, backend=backend)
    assert whole.values["AP"] == whole.values["AR100"] == 1.0 and whole.out_of_reach == 0
    assert "cannot be found" not in whole.table()
    cut = evaluate.score(truth, found, identity(truth), backend=backend)
    assert cut.values["AR100"] == 0.25 and cut.values["AP"] == pytest.approx(0.25, abs=0.01), "a quarter at COCO's 100"
    assert cut.out_of_reach == cut.to_json()["out_of_reach"] == 300
    for words in ("300 of 400 objects cannot be found", "evaluate.max_detections, which is 100"):
        assert words in cut.table()
    few = evaluate.score(truth, found, identity(truth), max_detections=400, num_queries=300, backend=backend)
    assert few.out_of_reach == 100 and "or more than there are queries, 300" in few.table()
