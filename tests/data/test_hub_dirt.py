"""Odd cells, files and rows of a Hugging Face data set, whole and streamed: counted and left out, never a wrong box."""

import math
import random
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from shared import load_module

from detr_accel import data
from detr_accel.data import hub, hub_columns, stream
from detr_accel.data.dirt import Dirt
from detr_accel.structures import UserError

hub_sets = load_module(Path(__file__).with_name("hub_sets.py"))

NUM = 11
KINDS = hub_sets.IMAGES | hub_sets.SIZES | {"objects": hub_sets.lists_of()}
pytestmark = pytest.mark.law8


@pytest.fixture
def coco(hub_coco):
    """A COCO folder; train has 11 images with 12 boxes, val 6."""
    return hub_coco(NUM, 6)


@pytest.fixture
def opened(tmp_path, coco, recipe_for):
    """Write the training rows after a change, and open them; streamed or not."""

    def build(change, streaming: bool, kinds: dict | None = None, on_bad: str = "mend", both: bool = False, **more):
        folder = tmp_path / "set"
        if not folder.exists():
            for split, name in (("train", "train"), ("val", "validation")):
                rows = hub_sets.records(coco, split, "lists")
                if split == "train" or both:
                    change(rows)
                hub_sets.write_rows(folder, rows, kinds or KINDS, name)
        hub = {"streaming": streaming, "block": 4} | more
        recipe = recipe_for(folder, format="hub", on_bad=on_bad, hub=hub)
        return recipe, data.build(recipe)

    return build


def windows(recipe, source):
    return list(
        data.train_windows(
            recipe, source, rank=0, num_ranks=1, start_window=0, end_window=2, mean=(0.5,) * 3, std=(0.2,) * 3
        )
    )  # fmt: skip


def summary(recipe, source) -> tuple[list[int], int, list[tuple[int, str]]]:
    """Ids of the images of an epoch that were trained on, how many boxes the files gave, and what was lost."""
    found = [b for w in windows(recipe, source) for b in w]
    lost = [one for b in found for one in b.lost]
    if isinstance(source, data.StreamSource):
        boxes = sum(len(row.labels) for lane in range(source.lanes) for row in source.rows(5, 0, lane, 0))
    else:
        boxes = sum(len(source.labels(i)) if hasattr(source, "labels") else len(source.boxes_xyxy_px(i))
                    for i in range(len(source)))  # fmt: skip
    return sorted(t.image_id for b in found for t in b.targets), boxes, lost


def of_objects(name: str, kind) -> dict:
    return KINDS | {"objects": hub_sets.lists_of() | {name: datasets.List(kind)}}


def text_boxes(rows):
    for row in rows:
        row["objects"]["bbox"] = [[str(v) for v in box] for box in row["objects"]["bbox"]]
    rows[1]["objects"]["bbox"][0][2] = "abc"


def text_areas(rows):
    for row in rows:
        row["objects"]["area"] = ["n/a" for _ in row["objects"]["area"]]


FLOAT, TEXT = datasets.Value("float64"), datasets.Value("string")
NAMES = {"class_names": ["cat", "dog"]}
ODD_CELLS = {
    "category_nan": (lambda r: r[1]["objects"]["category"].__setitem__(0, math.nan), of_objects("category", FLOAT), 1),
    "category_half": (lambda r: r[1]["objects"]["category"].__setitem__(0, 0.5), of_objects("category", FLOAT), 1),
    "box_text": (text_boxes, of_objects("bbox", datasets.List(TEXT)), 1),
    "area_text": (text_areas, of_objects("area", TEXT), 0),
    "crowd_nan": (lambda r: r[1]["objects"]["iscrowd"].__setitem__(0, math.nan), of_objects("iscrowd", FLOAT), 0),
    "width_nan": (lambda r: r[1].update(width=math.nan), KINDS | {"width": FLOAT}, 0),
    "width_half": (lambda r: r[1].update(width=30.5), KINDS | {"width": FLOAT}, 0),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", ODD_CELLS)
def test_an_odd_cell_costs_one_box_at_most(opened, case, streaming):
    change, kinds, gone = ODD_CELLS[case]
    hub = NAMES if case.startswith("category") else {}
    recipe, splits = opened(change, streaming, kinds, **hub)
    ids, boxes, lost = summary(recipe, splits.train)
    assert ids[: 8 + 3] == list(range(1, NUM + 1)) and not lost
    crowd = 1  # of image 5
    assert boxes == 12 - crowd - gone
    told = [line for line in splits.found if "train" in line and "left out" in line and "first" in line]
    assert len(told) == gone


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_a_row_without_objects_is_left_out_and_one_with_empty_lists_is_an_empty_image(opened, streaming):
    def change(rows):
        assert rows[2]["objects"]["bbox"] == []
        rows[1]["objects"] = None

    recipe, splits = opened(change, streaming)
    ids, boxes, _ = summary(recipe, splits.train)
    assert ids == [i for i in range(1, NUM + 1) if i != 2] and boxes == 12 - 1 - 2
    assert any("1 images without objects" in line and "are null" in line for line in splits.found), splits.found
    with pytest.raises(UserError, match="row 1: its objects are null"):
        opened(change, streaming, on_bad="stop")


def odd_boxes(rows):
    rows[1]["objects"]["bbox"][0] = [1, 2, 3, float("nan")]
    rows[4]["objects"]["bbox"][0][2] = -9
    rows[6]["objects"]["bbox"][0][0] = 300


def test_a_policy_holds_in_a_stream_as_in_the_whole_set(opened):
    """The box goes, not the image; the kinds are counted at the start and at the end of an epoch."""
    for on_bad in ("mend", "drop"):
        found = [opened(odd_boxes, streaming, on_bad=on_bad) for streaming in (False, True)]
        whole, streamed = (summary(recipe, splits.train) for recipe, splits in found)
        assert whole == streamed and whole[0] == list(range(1, NUM + 1)) and whole[1] == 12 - 1 - 3
    splits = found[1][1]
    start = [line for line in splits.found if line.startswith(f"data: train, the first {NUM} images: 1 ")]
    epoch = data.odd_rows(splits.train, 0, 2, "train, epoch 1")
    for lines in (start, epoch):
        assert [line.split(" (")[0].split(": 1 ")[1] for line in lines] == [
            "boxes that are not four finite numbers", "boxes with a negative width or height",
            "boxes outside their image",
        ]  # fmt: skip
    assert data.odd_rows(splits.train, 0, 2, "again") == []
    for streaming in (False, True):
        with pytest.raises(UserError, match="row 1: bbox .*four finite numbers"):
            opened(odd_boxes, streaming, on_bad="stop")


def test_a_stream_that_stops_names_the_row_also_behind_those_looked_at(opened, monkeypatch):
    from detr_accel.data import stream as streams

    monkeypatch.setattr(streams, "LOOKED_AT", 1)
    recipe, splits = opened(odd_boxes, True, on_bad="stop")
    with pytest.raises(UserError, match=r"shard 0, row (1: bbox|4: \(30x20\) box|6: \(30x20\) box)"):
        windows(recipe, splits.train)


def test_a_shrunk_copy_is_read_in_the_size_of_its_record(opened):
    """Boxes are where the record says; under drop the place stays empty."""

    def twice(rows):
        for row in rows:
            row["width"], row["height"] = 2 * row["width"], 2 * row["height"]
            row["objects"]["bbox"] = [[2 * v for v in box] for box in row["objects"]["bbox"]]

    for streaming in (False, True):
        recipe, splits = opened(twice, streaming)
        ids, _, lost = summary(recipe, splits.train)
        assert ids == list(range(1, NUM + 1)) and not lost
        assert any(line.startswith("data: train") and f"{NUM} images of the shape" in line for line in splits.found)
        recipe, splits = opened(twice, streaming, on_bad="drop")
        assert len(summary(recipe, splits.train)[2]) == NUM


def test_corners_taken_for_sizes_are_refused_in_a_stream_too(opened, monkeypatch):
    def corners(rows):
        for row in rows:
            row["objects"] |= {"bbox": [[10, 8, 28, 18]] * 9, "category": [0] * 9, "id": [0] * 9, "area": [1.0] * 9}
            row["objects"]["iscrowd"] = [False] * 9

    told = "look like .x1, y1, x2, y2.*: set data.hub.box_format=xyxy_px$"
    with pytest.raises(UserError, match=told):
        opened(corners, True)
    from detr_accel.data import stream as streams

    monkeypatch.setattr(streams, "LOOKED_AT", 1)
    recipe, splits = opened(corners, True)
    with pytest.raises(UserError, match=told):
        windows(recipe, splits.train)
    assert opened(corners, True, box_format="xyxy_px")[1].train.length == NUM


def test_too_few_class_names_are_refused_in_a_stream_too(opened):
    kinds = of_objects("category", datasets.Value("int64"))
    for streaming in (False, True):
        with pytest.raises(UserError, match="category 1 is none of the 1 classes: mend it, or complete"):
            opened(lambda rows: None, streaming, kinds, class_names=["cat"])


def test_relative_paths_start_from_the_folder_of_the_set(tmp_path, opened, monkeypatch):
    def relative(rows):
        (tmp_path / "set/pictures").mkdir(parents=True, exist_ok=True)
        for row in rows:
            name = f"pictures/{row['image_id']}.jpg"
            (tmp_path / "set" / name).write_bytes(row["image"]["bytes"])
            row["image"] = name

    (tmp_path / "elsewhere").mkdir()
    for cwd in (tmp_path, tmp_path / "elsewhere"):
        monkeypatch.chdir(cwd)
        for streaming in (False, True):
            shutil.rmtree(tmp_path / "set", ignore_errors=True)
            recipe, splits = opened(relative, streaming, KINDS | {"image": datasets.Value("string")}, both=True)
            assert summary(recipe, splits.train)[0] == list(range(1, NUM + 1))
    (tmp_path / "set/pictures/1.jpg").unlink()
    for streaming in (False, True):
        recipe, splits = opened(relative, streaming)
        assert [image_id for image_id, _ in summary(recipe, splits.train)[2]] == [1]
        told = [line for line in splits.found if "1 images whose file is not there" in line]
        assert [line[:11] for line in told] == ["data: train"]
    shutil.rmtree(tmp_path / "set/pictures")
    for streaming in (False, True):
        with pytest.raises(UserError, match=f"{NUM} of {NUM} image files looked at are not there.*/set/pictures/1.jpg"):
            opened(relative, streaming)


# --- fuzz: deterministic, bounded

FLOATS = (math.nan, math.inf, -math.inf, 1e300, -5.0, 0.0, None, 1.5, 1e9, 2.0)
TEXTS = ("abc", "", "nan", "3", "1e999", None, "-7", " 4")
INTS = (None, -1, 2**40, 7, 0, 1)
POOLS = {"float64": FLOATS, "string": TEXTS, "int64": INTS}


def _as(kind: str, value):
    return {"float64": float, "string": str, "int64": int}[kind](value)


def _case(rng: random.Random, whole: list[dict], layout: str) -> tuple[list[dict], datasets.Features]:
    """A few damaged rows of random types."""
    box, category, side = rng.choice(("float64", "string")), rng.choice(("float64", "int64")), rng.choice((*POOLS,))
    rows = []
    for row in whole:
        boxes = [[_as(box, v) for v in b] for b in row["objects"]["bbox"]]
        labels = [_as(category, c) for c in row["objects"]["category"]]
        rows.append(row | {"width": _as(side, 30), "height": _as(side, 20), "boxes": boxes, "labels": labels})
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        row, what = rng.choice(rows), rng.random()
        if what < 0.45 and row["boxes"]:
            at = rng.randrange(len(row["boxes"]))
            if rng.random() < 0.6 and row["boxes"][at]:
                row["boxes"][at][rng.randrange(len(row["boxes"][at]))] = rng.choice(POOLS[box])
            else:
                row["boxes"][at] = rng.choice((None, [], (row["boxes"][at] or [])[:3], (row["boxes"][at] or []) * 2))
        elif what < 0.65 and row["labels"]:
            row["labels"][rng.randrange(len(row["labels"]))] = rng.choice(POOLS[category])
        elif what < 0.75:
            row[rng.choice(("width", "height"))] = rng.choice(POOLS[side])
        elif what < 0.83:
            row["image"] = rng.choice((None, {"bytes": b"junk", "path": None}, {"bytes": None, "path": "/nowhere"}))
        elif what < 0.9 and layout == "lists" and row["labels"]:
            row["labels"].pop()
        elif what < 0.95:
            row["null"] = True
    for row in rows:
        if layout == "lists":
            row["objects"] = {"bbox": row["boxes"], "category": row["labels"]}
        else:
            row["objects"] = [{"bbox": b, "category": c} for b, c in zip(row["boxes"], row["labels"], strict=True)]
        row["objects"] = None if row.get("null") else row["objects"]
    inner = {"bbox": datasets.List(datasets.Value(box)), "category": datasets.Value(category)}
    objects = {k: datasets.List(v) for k, v in inner.items()} if layout == "lists" else datasets.List(inner)
    sides = {"width": datasets.Value(side), "height": datasets.Value(side)}
    features = datasets.Features(hub_sets.IMAGES | sides | {"objects": objects})
    return [{k: row[k] for k in features} | {"truth": row} for row in rows], features


def _number(value) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _assert_written(boxes, labels, row: dict, size_px) -> int:
    """Every target is a box of this row, cut at the border, with its own class."""
    (h, w), fitting = size_px, []
    for box, label in zip(row["boxes"], row["labels"], strict=False):
        numbers = [_number(v) for v in box or ()]
        if len(numbers) == 4 and np.isfinite(numbers).all():
            x, y, bw, bh = numbers
            fitting.append((_number(label), np.clip([x, y, x + bw, y + bh], 0, (w, h, w, h))))
    for box, label in zip(boxes, labels.tolist(), strict=True):
        assert (box[2:] > box[:2]).all() and (box >= 0).all() and (box <= (w, h, w, h)).all()
        assert any(n == label and np.allclose(box, b, rtol=1e-4, atol=1e-3) for n, b in fitting), (box, label, fitting)
    assert not row.get("null") or not len(labels)
    return len(labels)


def test_fuzzed_rows_never_crash_nor_make_a_wrong_box(coco):
    rng, refused, checked = random.Random(8), 0, 0
    whole = hub_sets.records(coco, "train", "lists")[:7]
    asked = hub_columns.Columns(class_names=("cat", "dog"))
    for case in range(300):
        rows, features = _case(rng, whole, ("lists", "structs")[case % 2])
        truth = [row.pop("truth") for row in rows]
        for row in rows:  # a source must not give the ids away
            row["image_id"] += 100
        dataset = datasets.Dataset.from_list(rows, features=features)
        try:
            source = hub.open_split(dataset, asked, "set", Dirt(("mend", "drop")[case // 2 % 2]))
            for i in range(len(source)):
                row = truth[source.image_id(i) - 101]
                boxes, labels, _ = source._targets(source._rows[i], source.size_px(i))
                checked += _assert_written(boxes, labels, row, source.size_px(i))
            read = stream.open_stream(dataset.to_iterable_dataset(), asked, [len(rows)], None, 4, 1, "set")
            for row in read.rows(1, 0, 0, 0):
                checked += _assert_written(row.boxes_xyxy_px, row.labels, truth[row.image_id - 101], row.size_px)
                try:
                    assert read.sample(row).image.shape == (*row.size_px, 3)
                except UserError as error:
                    assert "\n" not in str(error)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
            refused += 1
    assert refused < 60 and checked > 2000, (refused, checked)
