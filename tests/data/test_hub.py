"""Hugging Face data sets, in either layout, from parquet, folders or Arrow, are what the same COCO folder is."""

import json
import os
import pickle
import re
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from shared import load_module

from detr_accel import cli, data
from detr_accel import recipe as recipes
from detr_accel.structures import LoaderTime, UserError

hub_sets = load_module(Path(__file__).with_name("hub_sets.py"))


@pytest.fixture
def coco(hub_coco):
    """A COCO folder; train has 11 images, val 6."""
    return hub_coco(11, 6)


NAMES = {"class_names": ["cat", "dog"]}
KINDS = {"parquet": (hub_sets.parquet, {}), "saved": (hub_sets.saved, {}), "imagefolder": (hub_sets.imagefolder, NAMES)}


def windows_of(recipe, source, **place):
    given = {"rank": 0, "num_ranks": 1, "start_window": 0, "end_window": 4, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    return list(data.train_windows(recipe, source, **given | place))


def assert_same_windows(found, wanted):
    assert len(found) == len(wanted) > 0
    for mine, theirs in zip(found, wanted, strict=True):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert a.images.equal(b.images) and a.mask.equal(b.mask) and a.positions == b.positions
            for s, t in zip(a.targets, b.targets, strict=True):
                assert s.image_id == t.image_id and s.size_px == t.size_px and s.orig_size_px == t.orig_size_px
                assert s.labels.equal(t.labels) and s.boxes_cxcywh.equal(t.boxes_cxcywh)


@pytest.mark.parametrize("layout", ["lists", "structs"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_set_is_the_same_coco_folder(tmp_path, coco, recipe_for, kind, layout):
    write, hub = KINDS[kind]
    write(coco, tmp_path / "set", layout)
    mine = data.build(recipe_for(tmp_path / "set", format="hub", hub=hub))
    theirs = data.build(recipe_for(coco))
    assert mine.train.classes == theirs.train.classes and mine.val.classes == theirs.val.classes
    for a, b in ((mine.train, theirs.train), (mine.val, theirs.val)):
        truth, wanted = a.ground_truth(), b.ground_truth()
        for row in (*truth["images"], *wanted["images"]):
            del row["file_name"]
        assert truth == wanted
    wanted = windows_of(recipe_for(coco), theirs.train)
    assert_same_windows(windows_of(recipe_for(coco), mine.train), wanted)
    workers = recipe_for(coco, workers=2)
    assert_same_windows(windows_of(workers, mine.train, start_window=1, end_window=3), wanted[1:3])


def test_the_start_lines_say_what_was_found(tmp_path, coco, recipe_for):
    hub_sets.parquet(coco, tmp_path / "set")
    found = data.build(recipe_for(tmp_path / "set", format="hub")).found
    assert "data: train: 11 images, 12 boxes, 2 classes, 3 images without boxes, 1 crowd regions" in found[0]
    assert found[0].endswith(f"{tmp_path / 'set'}, split train") and "data: val: 6 images" in found[1]


def test_sizes_come_from_the_headers_as_a_viewer_shows_the_picture(tmp_path, coco, recipe_for):
    """The library turns pictures by their EXIF tag, and who drew boxes on them saw them turned."""
    for number, orientation in ((1, 6), (2, 3)):
        path = coco / f"train/im{number}.jpg"
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.open(path).save(path, exif=exif, quality=95)
    hub_sets.parquet(coco, tmp_path / "set", sizes={})
    train = data.build(recipe_for(tmp_path / "set", format="hub")).train
    assert [train.size_px(i) for i in range(3)] == [(30, 20), (20, 30), (20, 30)]
    for i in range(3):
        shown = hub_sets.arrow(coco, "train", sizes={})[i]["image"].convert("RGB")
        assert np.array_equal(train.sample(i).image, np.array(shown)), i


@pytest.mark.parametrize("corner", ["xywh", "xyxy", "cxcywh"])
@pytest.mark.parametrize("unit", ["px", "rel"])
def test_boxes_come_in_the_format_that_is_said(tmp_path, coco, recipe_for, corner, unit):
    def change(row):
        boxes = np.array(row["objects"]["bbox"], np.float64).reshape(-1, 4)
        if corner == "xyxy":
            boxes[:, 2:] += boxes[:, :2]
        elif corner == "cxcywh":
            boxes[:, :2] += boxes[:, 2:] / 2
        row["objects"]["bbox"] = (boxes / (30, 20, 30, 20) if unit == "rel" else boxes).tolist()
        return row

    (tmp_path / "set").mkdir()
    for split in ("train", "val"):
        hub_sets.arrow(coco, split).map(change).to_parquet(tmp_path / f"set/{split}.parquet")
    hub = {"box_format": f"{corner}_{unit}"}
    train = data.build(recipe_for(tmp_path / "set", format="hub", hub=hub)).train
    theirs = data.build(recipe_for(coco)).train
    for i in range(len(train)):
        assert np.allclose(train.sample(i).boxes_xyxy_px, theirs.sample(i).boxes_xyxy_px, atol=1e-4)
    if unit == "rel":
        with pytest.raises(UserError, match="lies within 0..1.*set data.hub.box_format to"):
            data.build(recipe_for(tmp_path / "set", format="hub"))
    else:
        with pytest.raises(UserError, match=f"asks for fractions.*set it to {corner}_px"):
            data.build(recipe_for(tmp_path / "set", format="hub", hub={"box_format": f"{corner}_rel"}))


def test_corners_taken_for_sizes_are_warned_of(tmp_path, coco, recipe_for):
    def change(row):
        row["objects"]["bbox"] = [[10, 8, 28, 18] for _ in row["objects"]["bbox"]]
        return row

    (tmp_path / "set").mkdir()
    for split in ("train", "val"):
        hub_sets.arrow(coco, split).map(change).to_parquet(tmp_path / f"set/{split}.parquet")
    found = data.build(recipe_for(tmp_path / "set", format="hub")).found
    assert any("12 of 12 boxes" in line and "data.hub.box_format=xyxy_px" in line for line in found)


def test_one_split_is_cut_by_seed_and_the_cut_is_kept(tmp_path, coco, recipe_for):
    hub_sets.write_rows(
        tmp_path / "set",
        hub_sets.records(coco, "train", "lists"),
        hub_sets.IMAGES | hub_sets.SIZES | {"objects": hub_sets.lists_of()},
        "all",
    )
    recipe = recipe_for(tmp_path / "set", format="hub")
    splits = data.build(recipe)
    assert len(splits.train) == 10 and len(splits.val) == 1
    ids = sorted(splits.split_json["train"] + splits.split_json["val"])
    assert ids == list(range(1, 12)) and "one split, cut by seed 5" in splits.found[0]
    again = data.build(recipe, {**splits.split_json, "val": splits.split_json["val"][::-1]})
    assert again.train.fingerprint() == splits.train.fingerprint() != again.val.fingerprint()


def test_names_as_strings_and_columns_without_objects(tmp_path, coco, recipe_for):
    rows = []
    for row in hub_sets.records(coco, "train", "lists"):
        names = [("cat", "dog")[c] for c in row["objects"]["category"]]
        rows.append({"image": row["image"], "boxes": row["objects"]["bbox"], "labels": names})
    kinds = {
        "image": datasets.Image(),
        "boxes": datasets.List(hub_sets.BOX),
        "labels": datasets.List(datasets.Value("string")),
    }
    hub_sets.write_rows(tmp_path / "set", rows, kinds)
    hub_sets.write_rows(tmp_path / "set", rows[:5], kinds, "dev")
    splits = data.build(recipe_for(tmp_path / "set", format="hub", hub={"objects": None}))
    assert splits.train.classes.names == splits.val.classes.names == ("cat", "dog")
    theirs = data.build(recipe_for(coco)).train
    for i in (0, 1, 2, 3):
        assert splits.train.sample(i).boxes_xyxy_px.tolist() == theirs.sample(i).boxes_xyxy_px.tolist()
        assert splits.train.sample(i).labels.tolist() == theirs.sample(i).labels.tolist()
    named = recipe_for(tmp_path / "set", format="hub", hub={"objects": None, "class_names": ["dog", "bird", "cat"]})
    assert data.build(named).train.sample(1).labels.tolist() == [2, 0]


@pytest.mark.parametrize("kind", ["binary", "string"])
def test_images_may_be_bytes_or_paths(tmp_path, coco, recipe_for, kind):
    rows = hub_sets.records(coco, "train", "structs")
    for row in rows:
        picture = row["image"]
        row["image"] = picture["bytes"] if kind == "binary" else str(coco / "train" / picture["path"])
    kinds = {"image": datasets.Value(kind), "objects": hub_sets.structs_of()}
    hub_sets.write_rows(tmp_path / "set", rows, kinds)
    hub_sets.write_rows(tmp_path / "set", rows[:4], kinds, "validation")
    theirs = data_of(coco, recipe_for)
    for streaming in (False, True):
        splits = data.build(recipe_for(tmp_path / "set", format="hub", hub={"streaming": streaming}))
        train = splits.val if streaming else splits.train
        for i in range(4):
            assert np.array_equal(train.sample(i).image, theirs.sample(i).image)
    some = next(splits.train.rows(1, 0, 0, 0))
    assert splits.train.sample(some).image.shape == (20, 30, 3)


def data_of(coco, recipe_for):
    return data.build(recipe_for(coco)).train


NUMBERS = {"objects": hub_sets.lists_of(datasets.Value("int64"))}


@pytest.mark.parametrize(
    ("hub", "told"),
    [
        ({}, "'category' holds numbers without names: .*data.hub.class_names="),
        ({"class_names": ["cat"]}, r"split train, row 1: category 1 is none of the 1 classes"),
        ({"objects": "things"}, "no column 'things' .image, image_id, objects.: set data.hub.objects"),
        ({"image": "picture"}, "no column 'picture' .*set data.hub.image"),
        ({"box": "corners"}, "no 'corners' .bbox, category, .*set data.hub.box"),
        ({"train_split": "test", "val_split": "hidden"}, "no split 'hidden' .train.: set data.hub.val_split"),
    ],
)
def test_what_is_not_there_is_told(tmp_path, coco, recipe_for, hub, told):
    hub_sets.write_rows(tmp_path / "set", hub_sets.records(coco, "train", "lists"), hub_sets.IMAGES | NUMBERS)
    with pytest.raises(UserError, match=told):
        data.build(recipe_for(tmp_path / "set", format="hub", hub=hub))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda o: o["bbox"][0].__setitem__(2, float("nan")), r"row 1: bbox \[1.0, 2.0, nan, .* four finite"),
        (lambda o: o["bbox"].pop(), "row 1: its objects' fields differ in length .1 bbox, 2 category"),
        (lambda o: o["category"].__setitem__(1, None), "row 1: category None is none of the 2 classes"),
        (lambda o: o["bbox"].__setitem__(0, None), "row 1: bbox None is not four finite numbers"),
    ],
)
def test_a_broken_row_is_named(tmp_path, coco, recipe_for, change, told):
    rows = hub_sets.records(coco, "train", "lists")
    change(rows[1]["objects"])
    kinds = hub_sets.IMAGES | {"objects": hub_sets.lists_of()}
    hub_sets.write_rows(tmp_path / "set", rows, kinds)
    hub_sets.write_rows(tmp_path / "set", rows[:4], kinds, "validation")
    with pytest.raises(UserError, match=told):
        data.build(recipe_for(tmp_path / "set", format="hub", on_bad="stop"))
    theirs, whole_row_gone = data.build(recipe_for(coco)).train, "differ" in told
    for policy in ("mend", "drop"):
        splits = data.build(recipe_for(tmp_path / "set", format="hub", on_bad=policy))
        assert any(re.search(f"train: 1 .*left out.*the first: .*{told}", line) for line in splits.found), splits.found
        assert any(line.startswith("data: val: 1 ") for line in splits.found)
        assert len(splits.train) == 11 - whole_row_gone
        assert len(splits.train.ground_truth()["annotations"]) == 12 - (2 if whole_row_gone else 1)
        place = {splits.train.image_id(i): i for i in range(len(splits.train))}
        for i in range(11):  # the others are what and where they were
            if (mine := place.get(theirs.image_id(i))) is not None:
                assert np.array_equal(splits.train.sample(mine).image, theirs.sample(i).image)
                assert i == 1 or splits.train.boxes_xyxy_px(mine).tolist() == theirs.boxes_xyxy_px(i).tolist()
                assert splits.train.name(mine) == f"row {i}"


@pytest.mark.law8
def test_an_image_without_a_size_in_the_set_or_in_its_header_is_left_out_and_named(tmp_path, coco, recipe_for):
    rows = hub_sets.records(coco, "train", "lists")
    rows[2]["image"], rows[5]["image"]["bytes"] = None, b"no image"
    kinds = hub_sets.IMAGES | {"objects": hub_sets.lists_of()}
    hub_sets.write_rows(tmp_path / "set", rows, kinds)
    hub_sets.write_rows(tmp_path / "set", rows[6:9], kinds, "validation")
    splits = data.build(recipe_for(tmp_path / "set", format="hub"))
    assert [splits.train.image_id(i) for i in range(9)] == [1, 2, 4, 5, 7, 8, 9, 10, 11]
    assert any("train: 2 images without a size" in line and "row 2 has no image" in line for line in splits.found)
    theirs = data.build(recipe_for(coco)).train
    assert np.array_equal(splits.train.sample(2).image, theirs.sample(3).image)


@pytest.mark.law8
def test_odd_boxes_of_a_set_are_treated_as_those_of_a_json(tmp_path, coco, recipe_for):
    """A box twice, one without area, one with a negative side, one outside: the same targets and the same lines."""
    path = coco / "annotations/instances_train.json"
    tree = json.loads(path.read_text())
    first = tree["annotations"][0]
    for n, box in enumerate([first["bbox"], [3, 3, 0, 5], [9, 9, -4, 5], [500, 3, 4, 4]]):
        tree["annotations"].append({**first, "id": 900 + n, "bbox": box, "area": 1})
    path.write_text(json.dumps(tree))
    hub_sets.parquet(coco, tmp_path / "set")
    mine, theirs = data.build(recipe_for(tmp_path / "set", format="hub")), data.build(recipe_for(coco))
    for i in range(11):
        assert mine.train.boxes_xyxy_px(i).tolist() == theirs.train.boxes_xyxy_px(i).tolist()
    told, wanted = (
        [line.split(", the first")[0] for line in splits.found if re.search(r"train: \d+ boxes", line)]
        for splits in (mine, theirs)
    )
    assert told == wanted and len(told) == 2, told
    streamed = data.build(recipe_for(tmp_path / "set", format="hub", hub={"streaming": True})).train
    place = {theirs.train.image_id(i): i for i in range(11)}
    for lane in range(streamed.lanes):
        for row in streamed.rows(5, 0, lane, 0):
            wanted = theirs.train.sample(place[row.image_id])
            assert row.boxes_xyxy_px.tolist() == wanted.boxes_xyxy_px.tolist() and row.num_cut == wanted.num_cut
    with pytest.raises(UserError, match="split train: annotation .* of 'row .*: mend or remove it"):
        data.build(recipe_for(tmp_path / "set", format="hub", on_bad="stop"))


@pytest.mark.law8
def test_corners_taken_for_sizes_are_refused_where_there_are_enough_to_know(tmp_path, coco, recipe_for):
    rows = hub_sets.records(coco, "train", "lists")
    for row in rows:
        row["objects"] |= {"bbox": [[10, 8, 28, 18]] * 3, "category": [0] * 3, "id": [0] * 3, "area": [1.0] * 3}
        row["objects"]["iscrowd"] = [False] * 3
    kinds = hub_sets.IMAGES | {"objects": hub_sets.lists_of()}
    hub_sets.write_rows(tmp_path / "set", rows, kinds)
    hub_sets.write_rows(tmp_path / "set", rows[:4], kinds, "validation")
    with pytest.raises(UserError, match="look like .x1, y1, x2, y2.*: set data.hub.box_format=xyxy_px$"):
        data.build(recipe_for(tmp_path / "set", format="hub"))
    found = data.build(recipe_for(tmp_path / "set", format="hub", hub={"box_format": "xyxy_px"}))
    assert found.train.boxes_xyxy_px(0).tolist() == [[10, 8, 28, 18]]


@pytest.mark.parametrize("workers", [0, 2])
def test_check_data_looks_at_a_set_as_at_a_folder(tmp_path, hub_coco, recipe_for, workers):
    coco = hub_coco(20, 6)
    (coco / "val/im102.jpg").write_bytes((coco / "train/im2.jpg").read_bytes())
    (coco / "train/im3.jpg").write_bytes(b"no image")
    hub_sets.parquet(coco, tmp_path / "set")
    mine = data.check(recipe_for(tmp_path / "set", format="hub"), workers=workers)
    theirs = data.check(recipe_for(coco), workers=workers)
    kinds = [[(f.kind, f.split, f.count) for f in report.findings] for report in (mine, theirs)]
    assert kinds[0] == kinds[1] and {"image.leak", "image.unreadable"} <= {kind for kind, *_ in kinds[0]}
    assert mine.classes == theirs.classes
    data.check_report.write(mine, tmp_path / "out", "set")
    assert (tmp_path / "out/report.html").read_text().count("<img") >= 2


def test_a_row_without_boxes_is_an_empty_image_and_one_without_image_is_named(tmp_path, coco, recipe_for):
    rows = hub_sets.records(coco, "train", "lists")
    rows[1]["objects"], rows[2]["image"] = {k: [] for k in rows[1]["objects"]}, None
    hub_sets.write_rows(tmp_path / "set", rows, hub_sets.IMAGES | hub_sets.SIZES | {"objects": hub_sets.lists_of()})
    splits = data.build(recipe_for(tmp_path / "set", format="hub"), {"seed": 5, "train": [*range(1, 11)], "val": [11]})
    assert splits.train.sample(1).labels.tolist() == [] and splits.train.sample(3).labels.tolist() == [0]
    with pytest.raises(UserError, match="split train, row 2 has no image"):
        splits.train.sample(2)


def test_a_name_that_cannot_be_reached_is_one_sentence(tmp_path, recipe_for):
    with pytest.raises(UserError, match="the data set nobody/nothing cannot be opened: .*set data.root") as told:
        data.build(recipe_for(None, format="hub", shapes={}, hub={"name": "nobody/nothing"}))
    assert "\n" not in str(told.value)
    (tmp_path / "empty").mkdir()
    for path, why in (("empty", "cannot be opened"), ("absent", "cannot be opened"), ("a.txt", "is no .parquet")):
        (tmp_path / "a.txt").write_text("no")
        with pytest.raises(UserError, match=why):
            data.build(recipe_for(tmp_path / path, format="hub"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_of_the_set_gives_the_same_and_notices_a_change(tmp_path, coco, recipe_for, kind):
    write, hub = KINDS[kind]
    write(coco, tmp_path / "set")
    recipe = recipe_for(tmp_path / "set", format="hub", hub=hub, cache="disk", cache_folder=str(tmp_path / "decoded"))
    splits = data.build(recipe)
    kept = data.with_cache(recipe, splits, quiet=True)
    assert "built in" in kept.found[-1] and "found" in data.with_cache(recipe, splits, quiet=True).found[-1]
    for a, b in zip(windows_of(recipe, kept.train), windows_of(recipe, splits.train), strict=True):
        assert [t.image_id for m in a for t in m.targets] == [t.image_id for m in b for t in m.targets]
        assert all(x.images.shape == y.images.shape for x, y in zip(a, b, strict=True))
    stamp = splits.train.stamp()
    name, encoded = splits.train.images[0]
    changed = name if encoded is None else splits.train.images.dataset.cache_files[0]["filename"]
    os.utime(changed, ns=(1, 1))
    assert splits.train.stamp() != stamp
    assert splits.train.encoded(0) == (encoded or Path(name).read_bytes())


def test_fetching_a_row_counts_as_reading(tmp_path, coco, recipe_for, monkeypatch):
    """The Arrow file may lie on a slow disk as well as any other."""
    recipe = recipe_for(hub_sets.parquet(coco, tmp_path / "set"), format="hub")
    train, plain = data.build(recipe).train, datasets.Dataset.__getitem__

    def slow(self, key):
        time.sleep(0.02)
        return plain(self, key)

    monkeypatch.setattr(datasets.Dataset, "__getitem__", slow)
    spent = sum((b.spent for window in windows_of(recipe, train) for b in window), LoaderTime())
    assert 0.02 <= spent.read / spent.images < 0.04 and spent.decode / spent.images < 0.02


def test_a_source_crosses_to_a_worker_and_back(tmp_path, coco, recipe_for):
    hub_sets.parquet(coco, tmp_path / "set")
    train = data.build(recipe_for(tmp_path / "set", format="hub")).train
    copy = pickle.loads(pickle.dumps(train))
    assert copy.fingerprint() == train.fingerprint() and np.array_equal(copy.sample(4).image, train.sample(4).image)


def test_the_test_split_is_evaluated_on_request(tmp_path, coco, recipe_for):
    hub_sets.parquet(coco, tmp_path / "set")
    hub_sets.arrow(coco, "val").select(range(2)).to_parquet(tmp_path / "set/test.parquet")
    recipe = recipe_for(tmp_path / "set", format="hub")
    sizes = [len(data.eval_source(recipe, split=split)) for split in (None, "train", "val", "test")]
    assert sizes == [6, 11, 6, 2]
    (tmp_path / "set/test.parquet").unlink()
    with pytest.raises(UserError, match="no split 'test' .train, validation.*--split"):
        data.eval_source(recipe, split="test")


def test_a_folder_that_is_a_set_gets_a_first_recipe_and_is_checked(tmp_path, coco, capsys):
    root = hub_sets.parquet(coco, tmp_path / "set")
    text, found = data.first_recipe_for(root, "first")
    recipe = recipes.loads(text)
    assert recipe.data.format == "hub" and recipe.data.root == str(root) and "11 images" in found[0]
    assert data.format_of(coco) == "coco" and data.format_of(tmp_path / "absent") == "coco"
    assert cli.main(["check-data", str(root), "--json", "--workers", "1"]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["images"] == 11
    with pytest.raises(UserError, match="holds a Hugging Face data set and no COCO json.*data.format=hub"):
        data.build(recipes.Recipe.model_validate({"data": {"root": str(root)}}))


def test_a_set_that_is_not_there_can_be_planned_for(tmp_path, coco, recipe_for):
    assert not data.is_there(recipe_for(tmp_path / "absent", format="hub"))
    hub_sets.parquet(coco, tmp_path / "set")
    assert data.is_there(recipe_for(tmp_path / "set", format="hub"))
    for streaming in (False, True):
        recipe = recipe_for(tmp_path / "set", format="hub", hub={"streaming": streaming})
        found = data.demands(recipe, data.build(recipe))
        assert found.num_images == 11 and found.num_classes == 2 and not found.assumed
        assert found.most_boxes == (recipe.model.num_queries if streaming else 2)
