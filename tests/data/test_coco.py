"""A COCO folder becomes the right targets, or a sentence that names the json and the record."""

import contextlib
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr_accel import data
from detr_accel.data import coco
from detr_accel.data.collate import _is_blank
from detr_accel.structures import UserError

DATA = Path(__file__).parents[2].parent / "shared/data"


@pytest.fixture
def folder(tmp_path, write_split):
    """train/ and val/ with annotations/; ``spoil`` changes the training json."""
    for number, split in enumerate(("train", "val")):
        write_split(tmp_path / f"annotations/instances_{split}.json", tmp_path / split, 6, first=10 * number + 1)
    path = tmp_path / "annotations/instances_train.json"

    def spoil(change):
        tree = json.loads(path.read_text())
        change(tree)
        path.write_text(json.dumps(tree))

    return tmp_path, spoil


def test_gaps_in_category_ids_become_contiguous_labels(folder, recipe_for):
    train = data.build(recipe_for(folder[0])).train
    assert train.classes.names == ("cat", "dog") and train.classes.category_ids == (2, 7)
    sample = train.sample(1)  # image id 2 has one box of each category
    assert sample.image_id == 2 and sample.labels.tolist() == [0, 1] and sample.labels.dtype == np.int64
    assert sample.boxes_xyxy_px.tolist() == [[1, 2, 10, 12], [4, 2, 13, 12]] and sample.image.shape == (20, 30, 3)
    assert sample.boxes_xyxy_px.dtype == np.float32
    empty = train.sample(2)
    assert empty.boxes_xyxy_px.shape == (0, 4) and empty.labels.shape == (0,)


def test_targets_follow_the_order_of_detr(folder, recipe_for):
    """Crowd out, corners, clip, keep what has area: a box that reaches outside is cut, one that lies outside goes."""
    root, spoil = folder
    boxes = {"cut": [-5, -5, 10, 10], "outside": [31, 2, 5, 5], "flat": [3, 3, 0, 9], "negative": [9, 9, -3, 4]}
    crowd = {"image_id": 3, "category_id": 2, "bbox": [0, 0, 30, 20], "iscrowd": 1, "id": 70}
    rows = [{"image_id": 3, "category_id": 7, "bbox": b, "id": 50 + k} for k, b in enumerate(boxes.values())]
    spoil(lambda t: t["annotations"].extend([crowd, *rows]))
    splits = data.build(recipe_for(root))
    sample = splits.train.sample(2)
    assert sample.boxes_xyxy_px.tolist() == [[0, 0, 5, 5]] and sample.labels.tolist() == [1]
    assert sample.num_cut == 2, "the one that was cut and the one outside"
    assert "1 boxes that reach out of their image (cut at its border)" in splits.found[0]
    kept = [a for a in splits.train.ground_truth()["annotations"] if a["image_id"] == 3]
    assert [a["bbox"] for a in kept] == [crowd["bbox"], *boxes.values()]
    assert [a["iscrowd"] for a in kept] == [1, 0, 0, 0, 0] and kept[1]["area"] == 100  # from the box
    assert "1 crowd regions" in splits.found[0] and "1 boxes without area" in splits.found[0]
    assert any("1 boxes with a negative width or height (left out of the targets)" in line for line in splits.found)
    assert "1 boxes outside their image (left out of the targets)" in splits.found[0]
    assert splits.train.num_targets() == sum(len(splits.train.sample(i).labels) for i in range(len(splits.train)))


def test_ground_truth_gives_the_file_back(folder, recipe_for):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    root, _ = folder
    tree = json.loads((root / "annotations/instances_val.json").read_text())
    truth = data.build(recipe_for(root)).val.ground_truth()
    assert truth["annotations"] == tree["annotations"] and truth["images"] == [
        {k: i[k] for k in ("id", "file_name", "height", "width")} for i in tree["images"]
    ]
    assert sorted(truth["categories"], key=lambda c: c["id"]) == sorted(tree["categories"], key=lambda c: c["id"])
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = json.loads(json.dumps(truth))  # plain numbers, no numpy ones
        coco.createIndex()
        perfect = [{k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 1.0} for a in tree["annotations"]]
        evaluation = COCOeval(coco, coco.loadRes(perfect), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


@pytest.mark.parametrize("ids", [[0, 1, 2], [4, 4, 5], [None, 1, 2], ["a", "b", "c"]])
def test_unusable_annotation_ids_are_numbered_anew(folder, recipe_for, ids):
    """Id 0 counts as unmatched in COCO evaluation, and of two equal ids one box disappears."""
    root, spoil = folder

    def change(tree):
        for row, new in zip(tree["annotations"], ids, strict=False):
            row["id"] = new

    spoil(change)
    truth = data.build(recipe_for(root)).train.ground_truth()
    assert [a["id"] for a in truth["annotations"]] == list(range(1, len(truth["annotations"]) + 1))


def test_validation_json_may_number_the_same_classes_otherwise(folder, recipe_for, write_split):
    root, _ = folder
    other = [{"id": 2, "name": "dog"}, {"id": 7, "name": "cat"}]
    write_split(root / "annotations/instances_val.json", root / "val", 6, first=11, categories=other)
    splits = data.build(recipe_for(root))
    assert splits.val.classes.names == splits.train.classes.names == ("cat", "dog")
    assert splits.val.classes.category_ids == (7, 2)
    two = next(s for s in map(splits.val.sample, range(6)) if len(s.labels) == 2)
    assert two.labels.tolist() == [1, 0]  # ids 2 and 7 are dog and cat here


def test_validation_json_with_other_classes_is_refused(folder, recipe_for, write_split):
    root, _ = folder
    other = [{"id": 2, "name": "cat"}, {"id": 7, "name": "horse"}]
    write_split(root / "annotations/instances_val.json", root / "val", 6, first=11, categories=other)
    with pytest.raises(UserError, match="instances_val.json.*lacks 'dog' and adds 'horse'"):
        data.build(recipe_for(root))


def _set(kind, number, **values):
    return lambda tree: tree[kind][number].update(values)


def _double(kind, number, **values):
    return lambda tree: tree[kind].append(dict(tree[kind][number], **values))


@pytest.mark.law8
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("annotations", 1, category_id=3), r"annotations\[1\] \(id 20\): category_id 3 is not in .*\(2, 7\)"),
        (_set("annotations", 1, image_id=99), r"annotations\[1\] \(id 20\): no image has the id 99"),
        (_set("annotations", 1, bbox=[1, 2, float("nan"), 4]), r"annotations\[1\].*bbox \[1, 2, nan, 4\] is not four"),
        (_set("annotations", 1, bbox=[1, 2, "3", 4]), "is not four finite numbers"),
        (_set("annotations", 1, bbox=[1, 2, 3]), "is not four finite numbers"),
        (_set("annotations", 1, bbox=None), "bbox None is not four finite numbers"),
        (_set("annotations", 1, image_id="2"), "image_id '2' is not an integer"),
        (lambda t: t["annotations"].insert(0, "x"), r"annotations\[0\] is not an object"),
        (_set("images", 0, file_name="gone.png"), "1 of 6 images are not in .*train, the first is 'gone.png'"),
        (_set("images", 0, file_name=""), r"images\[0\] \(id 1\) has no file_name"),
        (_set("images", 0, height=-4), r"images\[0\] \(id 1\): height -4 is not a positive whole number"),
        (_double("images", 0, file_name="im9.png"), r"images\[6\]: id 1 is used .*'im1.png' and 'im9.png'"),
        (_double("images", 0, id=9), r"images\[0\] \('im1.png'\) and images\[6\] \('im1.png'\) are the same file"),
        (_double("categories", 0, id=9), "the name 'dog' is used twice"),
        (_double("categories", 0, name="cow"), "'dog' and 'cow' share the id 7"),
        (_set("categories", 0, name=None), r"categories\[0\] \(id 7\) has no name"),
        (_set("annotations", 1, bbox=[1, 2, 10**400, 4]), r"bbox \[1, 2, 10000+\.\.\. is not four finite numbers"),
        (_set("annotations", 1, image_id=2**70), r"image_id \d+ does not fit 64 bits"),
        (_set("images", 0, id=2**70), r"images\[0\]: id \d+ does not fit 64 bits"),
        (_set("images", 0, file_name="a\ud800.png"), r"file_name 'a\\ud800.png' holds half a character"),
        (_set("categories", 0, name="do\udcffg"), r"name 'do\\udcffg' holds half a character"),
        (lambda t: t["annotations"].clear(), "no image of the training split has a box that could be learned from"),
        (lambda t: t.pop("categories"), "has no list named categories"),
        (lambda t: t["images"].clear() or t["annotations"].clear(), "lists no images"),
    ],
)
def test_broken_records_are_named(folder, recipe_for, change, message):
    root, spoil = folder
    spoil(change)
    with pytest.raises(UserError, match=message) as caught:
        data.build(recipe_for(root, on_bad="stop"))
    assert "instances_train.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.law8
def test_broken_json_and_missing_folder_are_named(folder, recipe_for, tmp_path):
    (folder[0] / "annotations/instances_train.json").write_text('{"images": [')
    with pytest.raises(UserError, match="instances_train.json is not valid json"):
        data.build(recipe_for(folder[0]))
    nested = "[" * 200_000 + "]" * 200_000
    (folder[0] / "annotations/instances_train.json").write_text(f'{{"images": {nested}}}')
    with pytest.raises(UserError, match="instances_train.json is no COCO detection json: .* nested without end"):
        data.build(recipe_for(folder[0]))
    with pytest.raises(UserError, match="nowhere does not exist"):
        data.build(recipe_for(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no COCO json in .*empty"):
        data.build(recipe_for(tmp_path / "empty"))


@pytest.mark.law8
def test_a_validation_split_without_boxes_is_said_at_the_start(folder, recipe_for):
    root, _ = folder
    path = root / "annotations/instances_val.json"
    assert not any("no boxes" in line for line in data.build(recipe_for(root)).found)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    assert any("validation split has no boxes" in line for line in data.build(recipe_for(root)).found)


@pytest.mark.law8
def test_a_box_beyond_every_float32_is_cut_at_the_border(folder, recipe_for):
    root, spoil = folder
    spoil(lambda t: t["annotations"].append({"image_id": 3, "category_id": 7, "bbox": [3, 4, 10**300, 10**300]}))
    assert data.build(recipe_for(root)).train.sample(2).boxes_xyxy_px.tolist() == [[3, 4, 30, 20]]


@pytest.mark.law8
def test_files_that_cannot_be_decoded_are_named(folder, recipe_for):
    root, _ = folder
    train = data.build(recipe_for(root, on_bad="stop")).train
    image = root / "train/im1.png"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="instances_train.json: image id 1: .*im1.png cannot be decoded: .*truncated"):
        train.sample(0)
    image.write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="image id 1: .*cannot be decoded"):
        train.sample(0)
    Image.new("RGB", (31, 20)).save(image)
    with pytest.raises(UserError, match="is 31x20 pixels .* its record says 30x20"):
        train.sample(0)


def test_missing_sizes_are_read_from_the_files(folder, recipe_for):
    root, spoil = folder
    spoil(lambda t: [i.pop("width") for i in t["images"]] and t["images"][0].pop("height"))
    train = data.build(recipe_for(root)).train
    assert {train.size_px(i) for i in range(6)} == {(20, 30)}
    assert train.ground_truth()["images"][0]["width"] == 30


def test_rotated_photographs_follow_the_size_of_their_record(folder, recipe_for):
    root, spoil = folder
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it by 90 degrees clockwise
    Image.fromarray(pixels).save(root / "train/im1.png", exif=exif)
    stored = data.build(recipe_for(root)).train
    assert np.array_equal(stored.sample(0).image, pixels)
    spoil(_set("images", 0, height=30, width=20))
    shown = data.build(recipe_for(root)).train
    assert shown.size_px(0) == (30, 20) and np.array_equal(shown.sample(0).image, np.rot90(pixels, -1))
    spoil(_set("images", 0, height=40, width=20))
    with pytest.raises(UserError, match="is 30x20 pixels .* its record says 20x40"):
        data.build(recipe_for(root)).train.sample(0)


def test_every_pixel_format_becomes_rgb(folder, recipe_for):
    root, _ = folder
    train, path = data.build(recipe_for(root)).train, root / "train/im1.png"
    ramp = np.arange(600).reshape(20, 30)
    grey = (ramp * 255 // 599).astype(np.uint8)
    rgb = np.repeat(grey[..., None], 3, 2)
    palette = Image.fromarray(grey).convert("P")
    see_through = palette.copy()
    pictures = {
        "L": Image.fromarray(grey),
        "LA": Image.fromarray(grey).convert("LA"),
        "RGBA": Image.fromarray(np.dstack((rgb, grey))),
        "P": palette,
        "P with transparency": see_through,
        "16 bit": Image.fromarray(grey.astype(np.uint16) * 257),
    }
    for name, picture in pictures.items():
        options = {"transparency": bytes(range(256))} if name == "P with transparency" else {}
        picture.save(path, **options)
        image = train.sample(0).image
        assert image.dtype == np.uint8 and np.array_equal(image, rgb), name
    Image.fromarray(grey > 100).save(path)
    assert np.array_equal(train.sample(0).image, np.where(rgb > 100, 255, 0))
    Image.fromarray(rgb).convert("CMYK").save(path, format="JPEG", quality=100)
    assert np.abs(train.sample(0).image.astype(int) - rgb).max() < 12


def test_fingerprint_sees_every_change_of_the_annotations(folder, recipe_for):
    root, spoil = folder
    first = data.build(recipe_for(root))
    assert first.train.fingerprint() == data.build(recipe_for(root)).train.fingerprint() != first.val.fingerprint()
    seen = {first.train.fingerprint()}
    for change in (
        _set("annotations", 0, bbox=[1, 2, 9, 9.5]), _set("annotations", 0, category_id=7),
        _set("annotations", 0, iscrowd=1), _set("images", 0, height=21), _set("categories", 0, name="horse"),
        lambda t: t["annotations"].pop(), lambda t: t["images"].reverse(),
    ):  # fmt: skip
        spoil(change)
        tree, val = (json.loads((root / f"annotations/instances_{s}.json").read_text()) for s in ("train", "val"))
        (root / "annotations/instances_val.json").write_text(json.dumps(val | {"categories": tree["categories"]}))
        seen.add(data.build(recipe_for(root)).train.fingerprint())
    assert len(seen) == 8


def test_source_holds_no_python_object_per_record(folder, recipe_for, write_split):
    """Forked workers copy the pages of every object they count a reference of."""
    import gc

    def num_objects(source):
        todo, seen = [source], {}
        while todo:
            item = todo.pop()
            if id(item) not in seen and not isinstance(item, type) and type(item).__name__ != "module":
                seen[id(item)] = item
                todo += gc.get_referents(item)
        return len(seen)

    root, _ = folder
    small = num_objects(data.build(recipe_for(root)).train)
    write_split(root / "annotations/instances_train.json", root / "train", 60)
    assert abs(num_objects(data.build(recipe_for(root)).train) - small) < 10
    source = pickle.loads(pickle.dumps(data.build(recipe_for(root)).train))  # start method spawn
    assert source.sample(1).image_id == 2


@pytest.mark.parametrize(("name", "num"), [("coco_free", (85, 91)), ("bccd", (292, 72)), ("cards", (296, 67))])
def test_real_folders_are_read(recipe_for, name, num):
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is absent")
    splits = data.build(recipe_for(DATA / name))
    assert (len(splits.train), len(splits.val)) == num
    for source, split in ((splits.train, "train"), (splits.val, "val")):
        tree = json.loads((DATA / name / f"annotations/instances_{split}.json").read_text())
        truth = source.ground_truth()
        by_id = {a["id"]: a for a in tree["annotations"]}
        assert len(by_id) == len(truth["annotations"])
        for row in truth["annotations"]:
            assert all(row[k] == by_id[row["id"]][k] for k in ("image_id", "category_id", "bbox", "area", "iscrowd"))
        for i in range(0, len(source), 17):
            sample = source.sample(i)
            assert sample.image.shape[:2] == source.size_px(i)
            h, w = source.size_px(i)
            assert (sample.boxes_xyxy_px >= 0).all() and (sample.boxes_xyxy_px <= (w, h, w, h)).all()


def test_boxes_that_reach_out_of_their_image_are_counted_and_rounding_is_not(tmp_path):
    boxes = [[10, 10, 30, 20], [10, 10, 91, 20], [-5, 0, 20, 20], [60, 40, 40.5, 40.3], [50, 30, 80, 70]]
    sizes = np.array([80, 100])  # h, w
    found = coco.reach_out(np.array(boxes, np.float64), sizes)
    assert found.tolist() == [False, False, True, False, True]


def test_an_image_of_one_colour_is_blank_and_one_other_pixel_is_enough():
    image = np.full((50, 40, 3), (7, 0, 200), np.uint8)
    assert _is_blank(image)
    image[49, 31, 1] = 1
    assert not _is_blank(image)
