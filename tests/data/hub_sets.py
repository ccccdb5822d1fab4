"""A COCO folder written as Hugging Face data sets, in either layout."""

import json

import datasets
import numpy as np

CLASSES = datasets.ClassLabel(names=["cat", "dog"])
BOX = datasets.List(datasets.Value("float32"), length=4)
IMAGES = {"image": datasets.Image(), "image_id": datasets.Value("int64")}
SIZES = {"width": datasets.Value("int32"), "height": datasets.Value("int32")}
MORE = {"id": datasets.Value("int64"), "area": datasets.Value("float64"), "iscrowd": datasets.Value("bool")}


def lists_of(category=CLASSES) -> dict:
    """A struct of lists."""
    return {name: datasets.List(kind) for name, kind in ({"bbox": BOX, "category": category} | MORE).items()}


def structs_of(category=CLASSES) -> datasets.List:
    """A list of structs."""
    return datasets.List({"bbox": BOX, "category": category} | MORE)


def tree_of(coco, split: str) -> dict:
    return json.loads((coco / f"annotations/instances_{split}.json").read_text())


def records(coco, split: str, layout: str) -> list[dict]:
    """The rows of the same set as a Hugging Face one."""
    tree, rows = tree_of(coco, split), []
    label_of = {row["id"]: label for label, row in enumerate(tree["categories"])}
    for image in tree["images"]:
        own = [a for a in tree["annotations"] if a["image_id"] == image["id"]]
        objects = [
            {k: a[k] for k in ("id", "bbox", "area")}
            | {"category": label_of[a["category_id"]], "iscrowd": bool(a["iscrowd"])}
            for a in own
        ]
        if layout == "lists":
            objects = {k: [o[k] for o in objects] for k in ("id", "bbox", "area", "category", "iscrowd")}
        row = {k: image[k] for k in ("height", "width")} | {"image_id": image["id"], "objects": objects}
        path = coco / split / image["file_name"]
        rows.append(row | {"image": {"bytes": path.read_bytes(), "path": path.name}})
    return rows


def arrow(coco, split: str, layout: str = "lists", sizes=SIZES, images=IMAGES) -> datasets.Dataset:
    classes = datasets.ClassLabel(names=[row["name"] for row in tree_of(coco, split)["categories"]])
    objects = lists_of(classes) if layout == "lists" else structs_of(classes)
    features = datasets.Features(images | sizes | {"objects": objects})
    rows = [{k: row[k] for k in features} for row in records(coco, split, layout)]
    return datasets.Dataset.from_list(rows, features=features)


def parquet(coco, folder, layout: str = "lists", shards: int = 2, uneven: bool = False, **columns):
    """A folder as the Hub has them; ``uneven``: shards of very different lengths."""
    folder.mkdir()
    train = arrow(coco, "train", layout, **columns)
    ends = np.linspace(0, len(train) ** 0.5, shards + 1) ** 2 if uneven else np.linspace(0, len(train), shards + 1)
    ends = ends.round().astype(int).tolist()
    for s in range(shards):
        train.select(range(ends[s], ends[s + 1])).to_parquet(folder / f"train-{s:05d}-of-{shards:05d}.parquet")
    arrow(coco, "val", layout, **columns).to_parquet(folder / "validation-00000-of-00001.parquet")
    return folder


def saved(coco, folder, layout: str = "lists", **_):
    both = {"train": arrow(coco, "train", layout), "validation": arrow(coco, "val", layout)}
    datasets.DatasetDict(both).save_to_disk(folder)
    return folder


def imagefolder(coco, folder, layout: str = "lists", **_):
    for split, name in (("train", "train"), ("val", "validation")):
        (folder / name).mkdir(parents=True)
        with open(folder / name / "metadata.jsonl", "w") as file:
            for row in records(coco, split, layout):
                picture = row.pop("image")
                (folder / name / picture["path"]).write_bytes(picture["bytes"])
                file.write(json.dumps(row | {"file_name": picture["path"]}) + "\n")
    return folder


def write_rows(folder, rows: list[dict], features: dict, split: str = "train"):
    folder.mkdir(exist_ok=True)
    kinds = datasets.Features(features)
    datasets.Dataset.from_list([{k: r[k] for k in kinds} for r in rows], features=kinds).to_parquet(
        folder / f"{split}.parquet"
    )
    return folder
