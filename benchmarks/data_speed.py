"""Images a second and core, from files to a normalised and padded batch, against the reference's pipeline.

    git clone https://github.com/facebookresearch/detr REFERENCE
    python benchmarks/data_speed.py --reference REFERENCE --data ../shared/data/coco_free \
      --out benchmarks/results/data_speed.json

Both make the DETR training batches of the same images (flip, resize or resize-crop-resize, 480 to 800 px short side, at
most 1333), in one process with one thread, in turns; the reference's are its own transforms and collation. The unit is
CPU time, which other work on the machine disturbs less than the clock; figures are medians over the turns. ``photos``
are the same pictures enlarged to the size that phones take (4032 x 3024) and saved as JPEG.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from detr_accel import data  # noqa: E402
from detr_accel.recipe import Recipe  # noqa: E402

BATCH, MEAN, STD = 2, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTO_PX = 4032


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--photos", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(args.reference))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    result = {"command": " ".join(sys.argv), "commit": commit.strip(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        photos = enlarge(args.data, Path(folder) / "photos", args.photos)
        for name, root, images in (("coco", args.data, args.images), ("photos", photos, args.photos)):
            result[name] = compare(root, images, args.turns, Path(folder) / "cache")
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def compare(root: Path, images: int, turns: int, folder: Path) -> dict[str, float]:
    """Images per second of CPU time, each way in turns: to a batch on the CPU, cold and from the cache, and what a
    worker does where the pixels are worked on by a GPU."""
    sources = {
        "reference": reference(root, images), "ours": ours(root, images),
        "ours_cached": ours(root, images, cache="disk", cache_folder=str(folder)),
        "worker": ours(root, images, pixels="device"),
        "worker_cached": ours(root, images, pixels="device", cache="disk", cache_folder=str(folder)),
    }  # fmt: skip
    for work in sources.values():  # files into the page cache, imports, first-time work
        work(0)
    rates: dict[str, list[float]] = {name: [] for name in sources}
    for turn in range(turns):
        for name, work in sources.items():
            begun = time.process_time()
            work(turn)
            rates[name].append(images / (time.process_time() - begun))
    found = {name: statistics.median(values) for name, values in rates.items()}
    spread = {f"{name}_spread": [min(values), max(values)] for name, values in rates.items()}
    ratios = {f"{name}_ratio": value / found["reference"] for name, value in found.items() if name != "reference"}
    return {"images": images, **found, **spread, **ratios}


def ours(root: Path, images: int, **more):
    """One epoch of ``images`` images of the recipe's own loader, in this process."""
    recipe = Recipe.model_validate(
        {"data": {"root": str(root), "workers": 0, **more}, "batch": {"size": BATCH, "micro": BATCH}}
    )
    source = data.Subset(data.with_cache(recipe, data.build(recipe), quiet=True).train, range(images))
    per_epoch = data.windows_per_epoch(images, BATCH)

    def work(turn: int) -> None:
        windows = data.train_windows(
            recipe, source, rank=0, num_ranks=1, start_window=turn * per_epoch, end_window=(turn + 1) * per_epoch,
            mean=MEAN, std=STD,
        )  # fmt: skip
        for _ in windows:
            pass

    return work


def reference(root: Path, images: int):
    """The same images through facebookresearch/detr's dataset, transforms and collation."""
    import random

    import torchvision

    if not hasattr(torchvision, "_is_tracing"):  # its util.misc asks old torchvision for it
        torchvision._is_tracing = lambda: False
    from datasets.coco import CocoDetection, make_coco_transforms
    from util.misc import collate_fn

    found = CocoDetection(
        str(root / "train"), str(root / "annotations/instances_train.json"), make_coco_transforms("train"), False
    )

    def work(turn: int) -> None:
        random.seed(turn)
        torch.manual_seed(turn)
        order = torch.randperm(images).tolist()
        for i in range(0, images, BATCH):
            collate_fn([found[j] for j in order[i : i + BATCH]])

    return work


def enlarge(root: Path, folder: Path, count: int) -> Path:
    """The first images of a COCO folder at a phone's size, with their boxes."""
    tree = json.loads((root / "annotations/instances_train.json").read_text())
    tree["images"] = sorted(tree["images"], key=lambda i: i["id"])[:count]
    scales = {}
    (folder / "train").mkdir(parents=True)
    for record in tree["images"]:
        with Image.open(root / "train" / record["file_name"]) as picture:
            scale = PHOTO_PX / max(picture.size)
            size = (round(picture.width * scale), round(picture.height * scale))
            large = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        large.save(folder / "train" / record["file_name"], quality=90)
        scales[record["id"]] = scale
        record["width"], record["height"] = size
    tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] in scales]
    for a in tree["annotations"]:
        a["bbox"] = [v * scales[a["image_id"]] for v in a["bbox"]]
        a["area"] *= scales[a["image_id"]] ** 2
    (folder / "annotations").mkdir()
    for split in ("train", "val"):
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(tree))
    (folder / "val").symlink_to(folder / "train")
    return folder


if __name__ == "__main__":
    main()
