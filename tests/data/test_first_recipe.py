"""``detr-accel start FOLDER``: a recipe that can be trained, whose numbers come from the data."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from detr_accel import data
from detr_accel import recipe as recipes
from detr_accel.cli import main
from detr_accel.data.first_recipe import Facts, facts, write

SHARED = Path(__file__).parents[3] / "shared/data"
PLAIN = Facts(300, 70, 3, 30, 13.0, 480, 1.33, 60.0, ())


def written(**changes) -> tuple[recipes.Recipe, str]:
    text = write(replace(PLAIN, **changes), "mine", "/data/mine")
    return recipes.loads(text), text


@pytest.mark.parametrize("name", ["bccd", "cards", "coco_free"])
def test_real_folders_get_a_recipe_that_loads(name, tmp_path, monkeypatch, capsys):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is absent")
    monkeypatch.chdir(tmp_path)
    assert main(["start", str(SHARED / name)]) == 0
    recipe = recipes.load(tmp_path / f"{name}.yaml")
    assert recipe.name == name and recipe.data.root == str(SHARED / name)
    assert "images to train on" in capsys.readouterr().out
    splits = data.build(recipe)
    assert recipe.model.num_queries >= splits.train.most_boxes()
    windows = data.train_windows(
        recipe,
        splits.train,
        rank=0,
        num_ranks=1,
        start_window=0,
        end_window=1,
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        micro=2,
    )
    assert sum(len(b) for b in next(windows)) == 8
    windows.close()
    assert main(["start", str(SHARED / name)]) == 2, "it does not write over one"


def test_facts_are_read_off_the_annotations(tmp_path):
    (tmp_path / "annotations").mkdir()
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(4)]
    boxes = [(0, [0, 0, 10, 10]), (0, [5, 5, 100, 100]), (0, [5, 5, 0, 9]), (1, [0, 0, 50, 50])]
    rows = [
        {"id": n, "image_id": i, "category_id": 1, "bbox": b, "iscrowd": 0} for n, (i, b) in enumerate(boxes, start=1)
    ]
    tree = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "left hand"}]}
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for i in range(4):
            (tmp_path / split / f"{i}.jpg").write_bytes(b"")
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(tree))
    splits = data.build(recipes.Recipe.model_validate({"data": {"root": str(tmp_path)}}))
    found = facts(splits.train, splits.val)
    assert (found.num_images, found.num_val, found.fullest, found.short_px) == (4, 4, 2, 480)
    assert found.boxes_per_image == 0.75 and found.sided == ("left hand",)


def test_crowds_get_more_queries_and_detections():
    recipe, text = written(fullest=143)
    assert recipe.model.num_queries == recipe.evaluate.max_detections == 200
    assert "your fullest image has 143 objects" in text
    assert written(fullest=90)[0].model.num_queries == 100


def test_small_boxes_get_larger_images_within_what_detr_knows():
    assert written()[0].data.eval_size == 480
    assert 480 < written(small_px=16)[0].data.eval_size <= 800
    assert max(written(small_px=2)[0].data.augment.scales) == 800
    assert written(short_px=3024, small_px=200)[0].data.eval_size == 800
    assert written(short_px=120, small_px=40)[0].data.eval_size == 320


def test_mirrored_classes_are_not_flipped():
    recipe, text = written(sided=("turn left",))
    assert recipe.data.augment.flip == 0 and "'turn left'" in text


def test_length_and_patience_follow_the_number_of_images():
    assert written(num_val=20)[0].early_stop.metric == "loss" and written()[0].early_stop.metric == "AP"
    few, many = written(num_images=100)[0], written(num_images=60_000)[0]
    assert few.schedule.epochs == 200 and few.batch.size == 8
    assert many.schedule.epochs == 12 and many.batch.size == 16 and many.optim.lr == 1e-4


@pytest.mark.parametrize("root", ["/a b/c", 'C:\\data\\"x"', "/ü/日本", "~/x"])
def test_any_folder_name_survives(root):
    assert recipes.loads(write(PLAIN, "mine", root)).data.root == root


def test_what_is_no_data_set_is_one_sentence(tmp_path, capsys):
    assert main(["start", str(tmp_path / "gone")]) == 2
    assert main(["start", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.count("detr-accel: ") == 2
    assert "parquet files" in said and "annotations/instances_train.json" in said
