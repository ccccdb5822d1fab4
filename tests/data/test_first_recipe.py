"""``detr-accel start FOLDER``: a recipe that can be trained, whose numbers come from the data."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

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


KEYS = {  # each has a line with a reason from the data; what is not among them is a default
    "name", "data.root", "data.format", "data.eval_size", "data.eval_max_size", "data.augment.scales",
    "data.augment.max_size", "data.augment.flip", "model.init_from", "model.num_queries", "batch.size", "batch.micro",
    "optim.lr", "optim.lr_backbone", "schedule.epochs", "schedule.drop_at", "schedule.warmup_steps", "ema.enabled",
    "ema.decay", "ema.warmup_steps", "evaluate.max_detections", "early_stop.patience", "early_stop.metric",
}  # fmt: skip
NAMED = ("data:", "eval_size", "augment:", "init_from", "num_queries", "batch:", "optim:", "schedule:", "early_stop:")


def keys_of(tree: dict, start: str = "") -> set[str]:
    return set().union(*(keys_of(v, f"{start}{k}.") if isinstance(v, dict) else {start + k} for k, v in tree.items()))


@pytest.mark.parametrize("sided", [(), ("turn left",), ("the left hand of an old man in the rain",)])
@pytest.mark.parametrize("num_images, num_val", [(5, 1), (300, 70), (12_345, 1_234), (1_234_567, 123_456)])
def test_a_recipe_is_about_fifteen_aligned_lines_each_with_its_reason(num_images, num_val, sided):
    for fullest in (1, 30, 143, 12_345):
        for short, small, long in ((4032, 900.0, 1.0), (480, 60.0, 1.33), (480, 3.0, 2.7), (90, 30.0, 11.52)):
            found = replace(
                PLAIN, num_images=num_images, num_val=num_val, fullest=fullest, sided=sided, short_px=short,
                small_px=small, long_to_short=long,
            )  # fmt: skip
            for format_ in ("coco", "hub"):
                text = write(found, "mine", "/data/mine", format_)
                recipes.loads(text)
                lines = [line for line in text.splitlines() if not line.startswith("#")]
                assert len(lines) <= 18 and max(map(len, text.splitlines())) <= 120, text
                assert keys_of(yaml.safe_load(text)) <= KEYS
                reasons = [line for line in lines if "#" in line]
                assert len({line.index("#") for line in reasons}) == 1, "aligned"
                for key in NAMED:
                    assert any(line.strip().startswith(key) for line in reasons), key
                bare = {line.split(":")[0].strip() for line in lines if "#" not in line}
                assert bare == {"name", "root", "model"}


@pytest.mark.parametrize("root", ["/a b/c", 'C:\\data\\"x"', "/ü/日本", "~/x"])
def test_any_folder_name_survives(root):
    assert recipes.loads(write(PLAIN, "mine", root)).data.root == root


def test_what_is_no_data_set_is_one_sentence(tmp_path, capsys):
    assert main(["start", str(tmp_path / "gone")]) == 2
    assert main(["start", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.count("detr-accel: ") == 2
    assert "parquet files" in said and "annotations/instances_train.json" in said
