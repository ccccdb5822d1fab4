"""Hugging Face sets with something wrong in the whole: names in another order, empty splits, no image to read."""

import json
import re
from pathlib import Path

import datasets
import pytest
from shared import load_module

from detr_accel import cli, data
from detr_accel import recipe as recipes
from detr_accel.structures import UserError

hub_sets = load_module(Path(__file__).with_name("hub_sets.py"))

CLASSES = ["cat", "dog", "emu"]


@pytest.fixture
def coco(hub_coco):
    """A COCO folder; train has 11 images, val 6."""
    return hub_coco(11, 6)


def rows_of(coco, split: str, change=lambda row: None) -> list[dict]:
    rows = hub_sets.records(coco, split, "lists")
    for row in rows:
        change(row)
    return rows


def kinds(names=CLASSES, **more) -> dict:
    category = datasets.ClassLabel(names=names) if names else datasets.Value("string")
    return hub_sets.IMAGES | {"objects": hub_sets.lists_of(category)} | more


def named(*names: str):
    """Categories as these strings."""
    return lambda row: row["objects"].update(category=[names[i % len(names)] for i in row["objects"]["category"]])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("other", ["validation", "train-1"])
def test_files_that_number_the_classes_in_another_order_are_refused(tmp_path, coco, recipe_for, other, streaming):
    root = tmp_path / "set"
    hub_sets.write_rows(root, rows_of(coco, "train"), kinds(), "train-0")
    for name in ("train-1", "validation"):
        names = CLASSES[::-1] if name == other else CLASSES
        hub_sets.write_rows(root, rows_of(coco, "val"), kinds(names), name)
    recipe = recipe_for(root, format="hub", hub={"streaming": streaming})
    told = rf"{other}.parquet lists the classes as .emu, dog, cat. and .*train-0.parquet as .cat, dog, emu."
    with pytest.raises(UserError, match=told):
        data.build(recipe)
    if not streaming:
        with pytest.raises(UserError, match=told):
            data.check(recipe)


def test_files_that_name_the_first_classes_only_are_taken(tmp_path, coco, recipe_for):
    hub_sets.write_rows(tmp_path / "set", rows_of(coco, "train"), kinds())
    hub_sets.write_rows(tmp_path / "set", rows_of(coco, "val"), kinds(CLASSES[:2]), "validation")
    assert data.build(recipe_for(tmp_path / "set", format="hub")).val.classes.names == tuple(CLASSES)


def test_a_set_with_an_empty_image_cell_has_a_cache_too(tmp_path, coco, recipe_for, monkeypatch):
    def emptied(row):
        if row["image_id"] == 3:
            row["image"] = None

    hub_sets.write_rows(tmp_path / "set", rows_of(coco, "train", emptied), kinds(**hub_sets.SIZES))
    hub_sets.write_rows(tmp_path / "set", rows_of(coco, "val"), kinds(**hub_sets.SIZES), "validation")
    recipe = recipe_for(tmp_path / "set", format="hub", cache="disk", cache_folder=str(tmp_path / "decoded"))
    splits = data.build(recipe)
    kept = data.with_cache(recipe, splits, quiet=True)
    assert len(kept.train) == 11 and kept.train.sample(0).labels.tolist() == splits.train.sample(0).labels.tolist()
    with pytest.raises(UserError, match="row 2 has no image"):
        kept.train.sample(2)
    monkeypatch.setattr(type(splits.train.images), "__getitem__", None)  # the stamp reads no image
    assert len(splits.train.stamp()) == 64


def test_a_saved_set_is_no_coco_folder(tmp_path, coco, capsys):
    root = hub_sets.saved(coco, tmp_path / "set")
    assert data.format_of(root) == "hub"
    assert cli.main(["check-data", str(root), "--json", "--workers", "1"]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["splits"]["val"]["images"] == 6
    (root / "notes.json").write_text("{}")
    assert data.format_of(root) == "hub"
    (coco / "beside.parquet").write_bytes(b"")
    assert data.format_of(coco) == "coco"


def test_a_validation_class_that_training_has_not_is_refused(tmp_path, coco, recipe_for):
    hub_sets.write_rows(tmp_path / "set", rows_of(coco, "train", named("cat", "dog")), kinds(None))
    hub_sets.write_rows(tmp_path / "set", rows_of(coco, "val", named("cat", "emu")), kinds(None), "validation")
    with pytest.raises(UserError, match="split validation has categories .*not: 'emu'; .*data.hub.class_names"):
        data.build(recipe_for(tmp_path / "set", format="hub"))
    recipe = recipe_for(tmp_path / "set", format="hub", hub={"class_names": CLASSES})
    truth = data.build(recipe).val.ground_truth()
    assert len(truth["annotations"]) == 6


@pytest.mark.parametrize("how", ["whole", "streamed", "saved", "strings"])
@pytest.mark.parametrize("empty", ["train", "validation"])
def test_an_empty_split_is_told_in_one_sentence(tmp_path, coco, recipe_for, how, empty):
    root, features = tmp_path / "set", datasets.Features(kinds(None if how == "strings" else CLASSES))
    change = named("cat", "dog") if how == "strings" else lambda row: None
    splits = {}
    for name, split in (("train", "train"), ("validation", "val")):
        rows = [{k: row[k] for k in features} for row in rows_of(coco, split, change)]
        columns = {k: [row[k] for row in rows] if name != empty else [] for k in features}
        splits[name] = datasets.Dataset.from_dict(columns, features=features)
    root.mkdir()
    if how == "saved":
        datasets.DatasetDict(splits).save_to_disk(root)
    else:
        for name, one in splits.items():
            one.to_parquet(root / f"{name}.parquet")
    with pytest.raises(UserError, match=f"{re.escape(str(root))}, split {empty} has no rows: fill it"):
        data.build(recipe_for(root, format="hub", hub={"streaming": how == "streamed"}))


def test_start_refuses_a_set_without_one_readable_image(tmp_path, coco, capsys):
    def broken(row):
        row["image"] = {"bytes": b"no image", "path": None}

    root, features = tmp_path / "set", kinds(**hub_sets.SIZES)
    hub_sets.write_rows(root, rows_of(coco, "train", broken), features)
    hub_sets.write_rows(root, rows_of(coco, "val"), features, "validation")
    assert cli.main(["start", str(root), "--out", str(tmp_path / "a.yaml")]) == 2
    assert "not one of the 11 images of the training split can be read" in capsys.readouterr().err
    assert not (tmp_path / "a.yaml").exists()


def test_a_lone_file_is_started_and_checked(tmp_path, coco, capsys):
    path = hub_sets.write_rows(tmp_path / "set", rows_of(coco, "train"), kinds(), "single") / "single.parquet"
    assert cli.main(["start", str(path), "--out", str(tmp_path / "a.yaml")]) == 0
    assert recipes.load(tmp_path / "a.yaml").data.root == str(path)
    capsys.readouterr()
    assert cli.main(["check-data", str(path), "--json", "--workers", "1"]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["images"] == 11


@pytest.mark.parametrize("how", ["whole", "streamed", "checked", "evaluated", "lone"])
def test_the_hub_is_asked_once_what_a_set_has(tmp_path, coco, recipe_for, monkeypatch, how):
    """A question is a round trip over the network, or several."""
    plain, asked = datasets.load_dataset_builder, []

    def counted(*given, **more):
        asked.append(given)
        return plain(*given, **more)

    monkeypatch.setattr(datasets, "load_dataset_builder", counted)
    monkeypatch.setattr(datasets.load, "load_dataset_builder", counted)  # within the library
    root = hub_sets.parquet(coco, tmp_path / "set")
    streaming = how in ("streamed", "evaluated")
    recipe = recipe_for(root, format="hub", hub={"streaming": streaming})
    if how == "checked":
        data.check(recipe)
    elif how == "evaluated":
        assert len(data.eval_source(recipe, split="val")) == 6
    elif how == "lone":
        data.build(recipe_for(root / "train-00000-of-00002.parquet", format="hub"))
    else:
        assert len(data.build(recipe).val) == 6
    assert len(asked) == 1, asked


CARD = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: data/train-*}
  - {split: validation, path: data/validation-*}
- config_name: other
  data_files: nothing/*.parquet
dataset_info:
- config_name: small
  splits:
  - {name: train, num_bytes: 1, num_examples: 11}
  - {name: validation, num_bytes: 1, num_examples: 6}
---
"""


@pytest.mark.parametrize("streaming", [False, True])
def test_a_configuration_that_a_card_names_is_opened(tmp_path, coco, recipe_for, streaming):
    (tmp_path / "set").mkdir()
    hub_sets.parquet(coco, tmp_path / "set/data")
    (tmp_path / "set/README.md").write_text(CARD)
    recipe = recipe_for(tmp_path / "set", format="hub", hub={"streaming": streaming, "config": "small"})
    splits = data.build(recipe)
    assert (len(splits.train), len(splits.val), splits.val.num_targets()) == (11, 6, 6)
    assert len(data.eval_source(recipe, split="val")) == 6


def test_check_data_names_the_class_that_one_split_lacks_and_the_remedy(tmp_path, coco, capsys):
    def found() -> dict:
        cli.main(["check-data", str(tmp_path / "set"), "--json", "--workers", "1"])
        rows = json.loads(capsys.readouterr().out)["findings"]
        return {row["kind"]: row for row in rows if row["kind"] in ("category.names", "category.absent")}

    hub_sets.write_rows(tmp_path / "set", rows_of(coco, "train", named("cat", "dog")), kinds(None))
    hub_sets.write_rows(tmp_path / "set", rows_of(coco, "val", named("cat", "cat")), kinds(None), "validation")
    (row,) = found().values()
    assert row["split"] == "val" and not row["harm"] and row["training"] == "no figure tells of them"
    assert row["examples"] == [
        "dog: 3 in train, none here: move some of its images over from there, where there are more"
    ]
    hub_sets.write_rows(tmp_path / "set", rows_of(coco, "val", named("cat", "emu")), kinds(None), "validation")
    rows = found()
    assert rows["category.absent"]["count"] == 1
    row = rows["category.names"]
    assert row["harm"] and row["training"] == "training does not start"
    assert row["examples"] == ["only here: emu: mend it, or list every class in data.hub.class_names"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("other", ["train-1", "validation"])
def test_files_with_names_and_with_numbers_are_refused(tmp_path, coco, recipe_for, other, streaming):
    hub_sets.write_rows(tmp_path / "set", rows_of(coco, "train", named("cat", "dog")), kinds(None), "train-0")
    for name in ("train-1", "validation"):
        category = datasets.Value("int64" if name == other else "string")
        change = (lambda row: None) if name == other else named("cat", "dog")
        features = hub_sets.IMAGES | {"objects": hub_sets.lists_of(category)}
        hub_sets.write_rows(tmp_path / "set", rows_of(coco, "val", change), features, name)
    recipe = recipe_for(tmp_path / "set", format="hub", hub={"streaming": streaming, "class_names": ["cat", "dog"]})
    with pytest.raises(
        UserError, match=f"{other}.parquet holds the categories as int64 and .*train-0.* as string: write"
    ):
        data.build(recipe)


def test_files_whose_columns_cannot_be_one_are_refused_with_what_differs(tmp_path, coco, recipe_for):
    hub_sets.write_rows(tmp_path / "set", rows_of(coco, "train"), kinds(), "train-0")
    text = hub_sets.IMAGES | {"objects": datasets.Value("string")}
    rows = rows_of(coco, "train", lambda row: row.update(objects="none"))
    hub_sets.write_rows(tmp_path / "set", rows, text, "train-1")
    hub_sets.write_rows(tmp_path / "set", rows_of(coco, "val"), kinds(), "validation")
    told = "Couldn't cast .*string.*differ in the types of their columns: write them"
    with pytest.raises(UserError, match=told):
        data.build(recipe_for(tmp_path / "set", format="hub"))
    train = data.build(recipe_for(tmp_path / "set", format="hub", hub={"streaming": True})).train
    with pytest.raises(UserError, match=f"shard 1 cannot be read on: {told}"):
        list(train.rows(1, 0, 1, 0))


def test_numbers_where_another_file_has_names_are_refused_with_what_differs(tmp_path, coco, recipe_for):
    numbers = hub_sets.IMAGES | {"objects": hub_sets.lists_of(datasets.Value("int64"))}
    texts = hub_sets.IMAGES | {"objects": hub_sets.lists_of(datasets.Value("string"))}
    hub_sets.write_rows(tmp_path / "set", rows_of(coco, "train"), numbers, "train-0")
    hub_sets.write_rows(tmp_path / "set", rows_of(coco, "train", named("cat", "dog")), texts, "train-1")
    hub_sets.write_rows(tmp_path / "set", rows_of(coco, "val"), numbers, "validation")
    with pytest.raises(UserError, match="parse string: '.*differ in the types of their columns: write them"):
        data.build(recipe_for(tmp_path / "set", format="hub", hub={"class_names": ["cat", "dog"]}))


@pytest.mark.parametrize("config", [None, "three"])
def test_a_set_with_several_configurations_lists_them(tmp_path, coco, recipe_for, config):
    card = "---\nconfigs:\n"
    for name in ("one", "two"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for split in ("train", "validation"):
            hub_sets.write_rows(tmp_path / "set" / name, rows_of(coco, "val"), kinds(), split)
        card += f"- config_name: {name}\n  data_dir: {name}\n"
    (tmp_path / "set/README.md").write_text(f"{card}---\n")
    with pytest.raises(UserError, match="'one', 'two'.*; set data.hub.config to one of them$") as refused:
        data.build(recipe_for(tmp_path / "set", format="hub", hub={"config": config}))
    assert "\n" not in str(refused.value)
    for name in ("one", "two"):
        assert data.build(recipe_for(tmp_path / "set", format="hub", hub={"config": name})).train.num_targets()
