"""Folders as the usual programs leave them are found without being told; what was found is said."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from detr_accel import data
from detr_accel.structures import UserError


def coco2017(root, write):
    write(root / "annotations/instances_train2017.json", root / "train2017", 6)
    write(root / "annotations/instances_val2017.json", root / "val2017", 3, first=11)
    write(root / "annotations/person_keypoints_train2017.json", root / "train2017", 6)
    (root / "annotations/captions_val2017.json").write_text("{}")


def two_years(root, write):
    coco2017(root, write)
    write(root / "annotations/instances_train2014.json", root / "old", 4)


def short_names(root, write):
    write(root / "annotations/instances_train.json", root / "train", 6)
    write(root / "annotations/instances_val.json", root / "val", 3, first=11)


def images_folder(root, write):
    write(root / "annotations/train.json", root / "images/train", 6)
    write(root / "annotations/val.json", root / "images/val", 3, first=1)  # the same names as in train


def roboflow(root, write):
    write(root / "train/_annotations.coco.json", root / "train", 6)
    write(root / "valid/_annotations.coco.json", root / "valid", 3, first=1)
    write(root / "test/_annotations.coco.json", root / "test", 2, first=1)


def cvat_subsets(root, write):
    write(root / "annotations/instances_Train.json", root / "images/Train", 6)
    write(root / "annotations/instances_Validation.json", root / "images/Validation", 3, first=11)


@pytest.mark.parametrize("make", [coco2017, two_years, short_names, images_folder, roboflow, cvat_subsets])
def test_layouts_with_two_splits(tmp_path, write_split, recipe_for, make):
    make(tmp_path, write_split)
    splits = data.build(recipe_for(tmp_path))
    assert (len(splits.train), len(splits.val)) == (6, 3) and splits.split_json is None
    for source, word in ((splits.train, "train"), (splits.val, "val")):
        assert word in source.folder.lower()
        for i in range(len(source)):
            expected = np.asarray(Image.open(f"{source.folder}/im{source.image_id(i)}.png"))
            assert np.array_equal(source.sample(i).image, expected)
    assert any("train: 6 images" in line and str(tmp_path) in line for line in splits.found)


def flat(root, write):
    write(root / "annotations.json", root, 10)
    (root / "settings.json").write_text('{"zoom": 2}')


def label_studio(root, write):
    write(root / "result.json", root / "images", 10, prefix="images/")


def label_studio_upload(root, write):
    write(root / "result.json", root / "images", 10, prefix="../../label-studio/data/media/upload/3/")


def label_studio_windows(root, write):
    write(root / "result.json", root / "images", 10, prefix="images\\")


def label_studio_local(root, write):
    write(root / "result.json", root / "images", 10, prefix="/data/local-files/?d=shelf%20one/")


def windows_drive(root, write):
    write(root / "labels.json", root / "images", 10, prefix="C:\\Users\\me\\pictures\\")


def cvat(root, write):
    write(root / "annotations/instances_default.json", root / "images", 10)


def cvat_default(root, write):
    write(root / "annotations/instances_default.json", root / "images/default", 10)


def deep(root, write):
    write(root / "annotations/instances_default.json", root / "images/monday", 10)


SINGLE = [
    flat, label_studio, label_studio_upload, label_studio_windows, label_studio_local, windows_drive,
    cvat, cvat_default, deep,
]  # fmt: skip


@pytest.mark.parametrize("make", SINGLE)
def test_layouts_with_one_json_are_cut(tmp_path, write_split, recipe_for, make):
    make(tmp_path, write_split)
    splits = data.build(recipe_for(tmp_path, val_fraction=0.3))
    ids = [[s.image_id(i) for i in range(len(s))] for s in (splits.train, splits.val)]
    assert (len(ids[0]), len(ids[1])) == (7, 3) and sorted(ids[0] + ids[1]) == list(range(1, 11))
    assert splits.split_json["train"] == ids[0] and splits.split_json["val"] == ids[1]
    assert all(splits.train.sample(i).image.shape == (20, 30, 3) for i in range(7))
    assert {a["image_id"] for a in splits.val.ground_truth()["annotations"]} <= set(ids[1])
    assert "cut by seed 5" in splits.found[0]


@pytest.mark.law2
def test_a_cut_is_a_function_of_the_seed_and_can_be_kept(tmp_path, write_split, recipe_for):
    cvat(tmp_path, write_split)
    recipe = recipe_for(tmp_path, val_fraction=0.3)
    first = data.build(recipe).split_json
    path = tmp_path / "annotations/instances_default.json"
    tree = json.loads(path.read_text())
    tree["images"].reverse()
    path.write_text(json.dumps(tree))
    assert data.build(recipe).split_json == first  # the order in the file says nothing
    other = recipe.model_copy(update={"seed": 6})
    assert data.build(other).split_json["val"] != first["val"]
    kept = data.build(other, split_json=json.loads(json.dumps(first)))
    assert kept.split_json == first
    assert sorted(kept.val.image_id(i) for i in range(3)) == first["val"]
    tree["images"] = [i for i in tree["images"] if i["id"] != first["val"][0]]
    tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] != first["val"][0]]
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=f"no longer has image {first['val'][0]} of the saved split"):
        data.build(recipe, split_json=first)


def test_explicit_paths_win(tmp_path, write_split, recipe_for):
    write_split(tmp_path / "a/one.json", tmp_path / "pictures", 4)
    write_split(tmp_path / "a/two.json", tmp_path / "more", 3, first=11)
    with pytest.raises(UserError, match=r"several jsons .*one.json.*two.json.*data.train_annotations"):
        data.build(recipe_for(tmp_path))
    paths = {"train_annotations": "a/one.json", "train_images": "pictures", "val_annotations": "a/two.json"}
    splits = data.build(recipe_for(tmp_path, **paths, val_images=str(tmp_path / "more")))
    assert (len(splits.train), len(splits.val)) == (4, 3)
    with pytest.raises(UserError, match="a/three.json does not exist"):
        data.build(recipe_for(tmp_path, **(paths | {"val_annotations": "a/three.json"})))


def test_names_that_fit_two_files_are_refused(tmp_path, write_split, recipe_for):
    write_split(tmp_path / "labels.json", tmp_path / "images/a", 4)
    write_split(tmp_path / "labels.json", tmp_path / "images/b", 4)
    with pytest.raises(UserError, match="'im1.png' may be a/im1.png or b/im1.png"):
        data.build(recipe_for(tmp_path))


def test_images_in_both_splits_are_said(tmp_path, write_split, recipe_for):
    write_split(tmp_path / "annotations/train.json", tmp_path / "images", 6)
    write_split(tmp_path / "annotations/val.json", tmp_path / "images", 3, first=5)
    assert any("2 images are in both splits" in line for line in data.build(recipe_for(tmp_path)).found)


def test_a_validation_json_without_its_pictures_does_not_take_the_training_ones_in_silence(
    tmp_path, write_split, recipe_for
):
    """Each split numbers its files from 1, and val's were not downloaded."""
    write_split(tmp_path / "annotations/instances_train.json", tmp_path / "images/train", 6)
    write_split(tmp_path / "annotations/instances_val.json", tmp_path / "elsewhere", 3)
    shutil.rmtree(tmp_path / "elsewhere")
    assert any("3 images are in both splits" in line for line in data.build(recipe_for(tmp_path)).found)


def as_versions(root, tree: dict, picture_of) -> None:
    """Rename the first twelve images of ``labels.json`` as Roboflow names versions of ``picture_of(number)``."""
    for i, record in enumerate(tree["images"][:12]):
        name = f"{picture_of(i)}_jpg.rf.{i:032x}.png"
        (root / "images" / record["file_name"]).rename(root / "images" / name)
        record["file_name"] = name
    (root / "labels.json").write_text(json.dumps(tree))


def test_versions_of_one_picture_stay_in_one_part(tmp_path, write_split, recipe_for):
    """Roboflow's augmentation, cut here: else nearly each validation image has a sibling to be learned by heart."""
    as_versions(tmp_path, write_split(tmp_path / "labels.json", tmp_path / "images", 12), lambda i: f"p{i // 3}")
    for seed in range(4):
        splits = data.build(recipe_for(tmp_path, val_fraction=0.3).model_copy(update={"seed": seed}))
        pictures = [{s.name(i).split("_")[0] for i in range(len(s))} for s in (splits.train, splits.val)]
        assert not pictures[0] & pictures[1] and (len(splits.train), len(splits.val)) == (9, 3)
    assert "12 images are versions of others" in splits.found[0]
    old = {"seed": 5, "val_fraction": 0.3, "train": [*range(2, 13)], "val": [1]}
    assert "beware: 1 images of val are versions of images of train" in data.build(recipe_for(tmp_path), old).found[0]


def test_a_large_group_of_versions_does_not_take_the_place_of_training(tmp_path, write_split, recipe_for):
    as_versions(tmp_path, write_split(tmp_path / "labels.json", tmp_path / "images", 20), lambda i: "image")
    for seed in range(5):
        splits = data.build(recipe_for(tmp_path, val_fraction=0.3).model_copy(update={"seed": seed}))
        assert (len(splits.train), len(splits.val)) == (14, 6)


def test_a_class_that_a_cut_leaves_without_a_box_is_named(tmp_path, write_split, recipe_for):
    tree = write_split(tmp_path / "labels.json", tmp_path / "images", 10)
    val = data.build(recipe_for(tmp_path, val_fraction=0.3)).split_json["val"]
    for row in tree["annotations"]:
        row["category_id"] = 7 if row["image_id"] in val else 2
    (tmp_path / "labels.json").write_text(json.dumps(tree))
    found = data.build(recipe_for(tmp_path, val_fraction=0.3)).found
    assert any("1 classes have no box in the training split: dog" in line for line in found)


def test_evaluation_finds_the_split_of_another_folder(tmp_path, write_split, recipe_for):
    roboflow(tmp_path / "rf", write_split)
    cvat(tmp_path / "single", write_split)
    recipe = recipe_for()
    assert len(data.eval_source(recipe, tmp_path / "rf", "test")) == 2
    assert len(data.eval_source(recipe, tmp_path / "rf", "val")) == 3
    assert len(data.eval_source(recipe, tmp_path / "single")) == 10  # one json without a split: all of it
    with pytest.raises(UserError, match="no json for the split 'test', it has: train, val"):
        short_names(tmp_path / "two", write_split)
        data.eval_source(recipe, tmp_path / "two", "test")
    write_split(tmp_path / "only" / "test" / "_annotations.coco.json", tmp_path / "only" / "test", 4)
    assert len(data.eval_source(recipe, tmp_path / "only")) == 4, "the only json there is"
    with pytest.raises(UserError, match="no json for the split 'val', it has: test; choose with --split"):
        data.eval_source(recipe, tmp_path / "only", "val")
    assert len(data.eval_source(recipe_for(tmp_path / "rf"), None, "val")) == 3
    assert data.eval_source(recipe, None, "val").name(0) == "shapes/val/0"


def test_plain_files_are_a_source_too(tmp_path, recipe_for):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20), (255, 0, 0)).save(tmp_path / "turned.png", exif=exif)
    Image.new("L", (40, 20)).save(tmp_path / "grey.png")
    source = data.ImageFiles([tmp_path / "turned.png", tmp_path / "grey.png"])
    assert [source.size_px(i) for i in range(2)] == [(30, 20), (20, 40)]
    recipe = recipe_for()
    batches = list(data.eval_batches(recipe, source, rank=0, num_ranks=1, mean=(0.5,) * 3, std=(0.5,) * 3))
    assert [t.orig_size_px for b in batches for t in b.targets] == [(30, 20), (20, 40)]
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match="text.png cannot be read"):
        data.ImageFiles([tmp_path / "text.png"])
