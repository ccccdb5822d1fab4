"""``detr-accel start FOLDER``: a recipe that can be trained, whose numbers come from the data."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from detr_accel import data
from detr_accel import recipe as recipes
from detr_accel.cli import main
from detr_accel.data.first_recipe import Facts, facts, write
from detr_accel.train.optim import lr_schedule

SHARED = Path(__file__).parents[3] / "shared/data"
PLAIN = Facts(300, 70, 3, 30, 13.0, 480, 1.33, 60.0, ())


def written(detector: str = "auto", **changes) -> tuple[recipes.Recipe, str]:
    text = write(replace(PLAIN, **changes), "mine", "/data/mine", "coco", detector)
    return recipes.loads(text), text


@pytest.mark.parametrize("name", ["bccd", "cards", "coco_free"])
def test_real_folders_get_a_recipe_that_loads(name, tmp_path, monkeypatch, capsys):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is absent")
    monkeypatch.chdir(tmp_path)
    assert main(["start", str(SHARED / name)]) == 0
    recipe = recipes.load(tmp_path / f"{name}.yaml")
    assert recipe.name == name and recipe.data.root == str(SHARED / name)
    said = capsys.readouterr().out
    assert "images to train on" in said and ("No GPU is seen here" in said) is not torch.cuda.is_available()
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
    recipe, text = written("detr", fullest=143)
    assert recipe.model.num_queries == recipe.evaluate.max_detections == 200
    assert "your fullest image has 143 objects" in text
    assert written("detr", fullest=90)[0].model.num_queries == 100
    assert written("rtdetr", fullest=143)[0].model.num_queries == 300
    crowd = written("rtdetr", fullest=400)[0]
    assert crowd.model.num_queries == crowd.evaluate.max_detections == 600
    assert written("rtdetr", fullest=90)[0].evaluate.max_detections == 100


def test_small_boxes_get_larger_images_within_what_detr_knows():
    sizes = {small: written("detr", small_px=small)[0].data for small in (60, 16, 2)}
    assert sizes[60].eval_size == 480 and 480 < sizes[16].eval_size <= 800
    assert max(sizes[2].augment.scales) == 800
    assert written("detr", short_px=3024, small_px=200)[0].data.eval_size == 800
    assert written("detr", short_px=120, small_px=40)[0].data.eval_size == 320


@pytest.mark.parametrize(
    "changes, chosen, why",
    [
        ({"num_images": 20_000}, "detr", "nothing small"),
        ({"num_images": 20_000, "small_px": 30.0}, "rtdetr", "boxes below 30 px"),
        ({"num_images": 20_000, "small_px": 60.0, "short_px": 2000}, "rtdetr", "below 60 px"),
        ({"num_images": 20_000, "fullest": 120}, "rtdetr", "your fullest image has 120 objects"),
        ({}, "rtdetr", "of 300 images it learns"),
    ],
)
def test_the_data_choose_the_detector_and_say_why(changes, chosen, why):
    recipe, text = written(**changes)
    (line,) = [row for row in text.splitlines() if row.startswith("  name: ")]
    assert recipe.model.name == chosen and why in line
    assert recipe.data.square == (chosen == "rtdetr")
    start = "PekingU/rtdetr_v2_r101vd" if chosen == "rtdetr" else "facebook/detr-resnet-101"
    assert recipe.model.init_from == start


def test_a_first_recipe_of_rtdetr_is_the_model_of_its_weights():
    ours = written("rtdetr")[0]
    shipped = recipes.load(recipes.folder() / "rtdetr_finetune.yaml", ["data.root=/data"])
    assert ours.model == shipped.model
    assert ours.optim.no_decay == shipped.optim.no_decay
    assert ours.data.eval_size == 640 and set(ours.data.augment.scales) <= set(shipped.data.augment.scales)
    assert written("rtdetr", small_px=16, short_px=1080)[0].data.eval_size == 800


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
    "ema.decay", "ema.warmup_steps", "model.name", "data.square", "data.augment.scale_by", "data.augment.scales_stop",
    "data.augment.crop", "data.augment.photometric.probability", "data.augment.iou_crop.probability",
    "model.backbone.name", "model.backbone.pixels", "model.rtdetr.encoder_dim", "model.rtdetr.encoder_feedforward",
    "optim.no_decay", "schedule.kind", "evaluate.max_detections", "early_stop.patience", "early_stop.metric",
    "model.activation_checkpointing",
}  # fmt: skip
NAMED = (
    "data:", "eval_size", "augment:", "name:", "init_from", "num_queries", "batch:", "optim:", "schedule:",
    "early_stop:",
)  # fmt: skip


def keys_of(tree: dict, start: str = "") -> set[str]:
    return set().union(*(keys_of(v, f"{start}{k}.") if isinstance(v, dict) else {start + k} for k, v in tree.items()))


@pytest.mark.parametrize("sided", [(), ("turn left",), ("the left hand of an old man in the rain",)])
@pytest.mark.parametrize("num_images, num_val", [(5, 1), (300, 70), (12_345, 1_234), (1_234_567, 123_456)])
@pytest.mark.parametrize("detector, most", [("detr", 19), ("rtdetr", 24)])
def test_a_recipe_is_fifteen_to_twenty_lines_with_reasons(num_images, num_val, sided, detector, most):
    for fullest in (1, 30, 143, 12_345):
        for short, small, long in ((4032, 900.0, 1.0), (480, 60.0, 1.33), (480, 3.0, 2.7), (90, 30.0, 11.52)):
            found = replace(
                PLAIN, num_images=num_images, num_val=num_val, fullest=fullest, sided=sided, short_px=short,
                small_px=small, long_to_short=long,
            )  # fmt: skip
            for format_ in ("coco", "hub"):
                text = write(found, "mine", "/data/mine", format_, detector)
                recipes.loads(text)
                lines = [line for line in text.splitlines() if not line.startswith("#")]
                assert len(lines) <= most and max(map(len, text.splitlines())) <= 120, text
                assert keys_of(yaml.safe_load(text)) <= KEYS
                reasons = [line for line in lines if "#" in line]
                assert len({line.index("#") for line in reasons}) == 1, "aligned"
                for key in NAMED:
                    assert any(line.strip().startswith(key) for line in reasons), key
                bare = {line.split(":")[0].strip() for line in lines if "#" not in line}
                assert bare == {"name", "root", "model"}


@pytest.mark.parametrize("root", [
    "/a b/c", 'C:\\data\\"x"', "/ü/日本", "~/x", "20240501", "2024_05_01", "1e5", "true", "Null", "~", "2024-05-01",
    ".5", "-", "../x", "./20240501",
])  # fmt: skip
def test_any_folder_name_survives(root):
    name = root if root.isalnum() else "mine"
    recipe = recipes.loads(write(PLAIN, name, root))
    assert (recipe.data.root, recipe.name) == (root, name)


def test_what_is_no_data_set_is_one_sentence(tmp_path, capsys):
    assert main(["start", str(tmp_path / "gone")]) == 2
    assert main(["start", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.count("detr-accel: ") == 2
    assert "parquet files" in said and "annotations/instances_train.json" in said


@pytest.mark.parametrize("detector", ["detr", "rtdetr"])
def test_it_learns_to_its_last_step(detector):
    recipe = written(detector)[0]
    s = recipe.schedule
    factor = lr_schedule(s.kind, 1000, warmup_steps=0, drop_at=s.drop_at, min_factor=s.min_factor, fall=s.fall)
    assert all(factor(step) > 0 for step in range(1000))


def test_the_command_names_the_file_whatever_it_is_called():
    text = write(PLAIN, "mine", "/data/mine", file="recipes/my set.yaml")
    assert "train.py --recipe 'recipes/my set.yaml'" in text
    assert "train.py --recipe mine.yaml" in write(PLAIN, "mine", "/data/mine")
