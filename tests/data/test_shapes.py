"""The procedural data set is a function of (seed, split, index), and its boxes are where the pixels are."""

import hashlib

import numpy as np
import pytest

from detr_accel.data.shapes import CLASSES, ShapesSource, draw
from detr_accel.data.source import SHAPES_TRAIN, generator


def digest(source, index):
    sample = source.sample(index)
    return hashlib.sha256(sample.image.tobytes() + sample.boxes_xyxy_px.tobytes() + sample.labels.tobytes()).hexdigest()


@pytest.mark.law2
def test_images_depend_on_seed_split_and_index_alone():
    train, val = ShapesSource(3, "train", 40, 96), ShapesSource(3, "val", 40, 96)
    hashes = {digest(s, i) for s in (train, val, ShapesSource(4, "train", 40, 96)) for i in range(40)}
    assert len(hashes) == 120  # none twice, in particular none in both splits
    longer = ShapesSource(3, "train", 90, 96)
    assert [digest(longer, i) for i in (17, 3)] == [digest(train, 17), digest(train, 3)]


def test_sizes_are_known_without_drawing():
    source = ShapesSource(3, "train", 60, 96)
    for i in range(60):
        h, w = source.size_px(i)
        assert source.sample(i).image.shape == (h, w, 3) and max(h, w) == 96 and 72 <= min(h, w)
    assert {source.size_px(i)[0] == 96 for i in range(60)} == {True, False}  # upright and lying


def test_boxes_are_tight_on_what_is_seen():
    """The same background with and without its one object: they differ inside the box, up to its edges."""
    exact, off = 0, []
    for i in range(200):
        with_object, boxes, _ = draw(generator(1, SHAPES_TRAIN, i), (120, 160), 1, 0.0)
        bare, none, _ = draw(generator(1, SHAPES_TRAIN, i), (120, 160), 1, 1.0)
        assert len(none) == 0 and len(boxes) == 1
        changed = np.abs(with_object.astype(int) - bare).max(2) > 20  # the noise of the two differs by 20 at most
        x0, y0, x1, y1 = boxes[0].astype(int)
        outside = changed.copy()
        outside[y0:y1, x0:x1] = False
        assert not outside.any()
        ys, xs = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        off.append(np.abs(np.subtract((x0, y0, x1, y1), (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1))).max())
        exact += off[-1] == 0
    # where a texture happens to have the background's colour at the edge, the difference does not show it
    assert exact > 150 and np.quantile(off, 0.9) <= 2


def test_the_mixture_is_rich():
    source = ShapesSource(0, "train", 400, 192)
    samples = [source.sample(i) for i in range(400)]
    boxes = np.concatenate([s.boxes_xyxy_px for s in samples])
    labels = np.concatenate([s.labels for s in samples])
    counts = np.array([len(s.labels) for s in samples])
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert 0.01 < (counts == 0).mean() < 0.1 and counts.max() == 6 and 2 < counts.mean() < 4
    shares = np.bincount(labels, minlength=len(CLASSES)) / len(labels)
    assert shares.min() > 0.6 / len(CLASSES)
    assert (area < 32**2).mean() > 0.2 and (area > 96**2).mean() > 0.1
    assert ((area >= 32**2) & (area <= 96**2)).mean() > 0.3 and area.min() > 30
    for s in samples:
        h, w = s.image.shape[:2]
        assert (s.boxes_xyxy_px >= 0).all() and (s.boxes_xyxy_px <= (w, h, w, h)).all()
        assert (s.boxes_xyxy_px[:, 2:] > s.boxes_xyxy_px[:, :2]).all()


def test_ground_truth_is_what_training_sees():
    source = ShapesSource(3, "val", 12, 96)
    truth = source.ground_truth()
    assert [i["id"] for i in truth["images"]] == list(range(1, 13))
    assert [a["id"] for a in truth["annotations"]] == list(range(1, len(truth["annotations"]) + 1))
    for i in range(12):
        rows = [a for a in truth["annotations"] if a["image_id"] == source.image_id(i)]
        sample = source.sample(i)
        boxes = np.array([a["bbox"] for a in rows], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        assert np.array_equal(boxes, sample.boxes_xyxy_px)
        assert [CLASSES.label_of[a["category_id"]] for a in rows] == sample.labels.tolist()


def test_fingerprint_names_every_setting():
    base = {"seed": 1, "split": "train", "num_images": 9, "image_size": 96, "max_objects": 4, "empty_fraction": 0.1}
    base["colour_cue"] = 0.3
    changes = {"seed": 2, "split": "val", "num_images": 8, "image_size": 64, "max_objects": 5, "empty_fraction": 0.2}
    changes["colour_cue"] = 0.4
    seen = {ShapesSource(**(base | {key: value})).fingerprint() for key, value in changes.items()}
    assert len(seen | {ShapesSource(**base).fingerprint()}) == 8


def test_the_colour_cue_tells_the_class_and_nothing_else_changes():
    plain, cued = ShapesSource(3, "train", 60, 96), ShapesSource(3, "train", 60, 96, colour_cue=1.0)
    by_class = {}
    for i in range(60):
        sample = cued.sample(i)
        for (x0, y0, x1, y1), label in zip(sample.boxes_xyxy_px.astype(int), sample.labels, strict=True):
            middle = sample.image[(y0 + y1) // 2, (x0 + x1) // 2].astype(int)
            by_class.setdefault(int(label), []).append(middle)
    hues = {label: np.median(colours, axis=0) for label, colours in by_class.items()}
    apart = [np.abs(hues[a] - hues[b]).sum() for a in hues for b in hues if a < b]
    assert len(hues) == 6 and min(apart) > 80
    assert plain.size_px(5) == cued.size_px(5) and plain.fingerprint() != cued.fingerprint()
