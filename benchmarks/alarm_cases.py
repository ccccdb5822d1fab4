"""Which alarm speaks in a run that is broken on purpose, after how many windows, and whether healthy runs stay silent.

    OMP_NUM_THREADS=1 python benchmarks/alarm_cases.py --weights PATH/efficientnet-lite0-57934424.pth
    OMP_NUM_THREADS=1 python benchmarks/alarm_cases.py --only lr_2e-3 frozen    # these alone; the others stay

Every run is a shipped recipe made short: windows of 4 images of about 96 pixels, a small backbone; 300 windows where it
is healthy, 100 or 300 where it is broken. The real data are read at ../shared/data; a run whose data are absent is left
out. The detectors that some runs start from are trained first (recipes/detr_shapes.yaml, 3,000 windows;
recipes/shapes.yaml, 1,000), unless --start and --rtdetr-start name some. Alarms about time and memory are left aside: a
CPU training shares its cores with the loader, and what the machine does meanwhile is no part of a run.
Writes benchmarks/results/alarm_cases.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from detr_accel import data, monitor  # noqa: E402
from detr_accel import recipe as recipes  # noqa: E402
from detr_accel.data.shapes import ShapesSource  # noqa: E402
from detr_accel.monitor.alarms import judge_rows  # noqa: E402
from detr_accel.monitor.machine_rules import MACHINE  # noqa: E402
from detr_accel.structures import UserError  # noqa: E402
from detr_accel.train.loop import train  # noqa: E402

DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results" / "alarm_cases.json"
WINDOWS = 300
SHORT = [
    f"schedule.steps={WINDOWS}", "batch.size=4", "batch.micro=4", "log.every=1", "log.wandb.enabled=false",
    "device=cpu", "evaluate.every_epochs=1000", "evaluate.batch=8", "checkpoint.every_epochs=1000", "data.workers=1",
    "data.augment.scales=[96]", "data.augment.max_size=128", "data.augment.crop=0", "data.eval_size=96",
    "data.eval_max_size=128", "data.shapes.num_val=8", "precision=no",
]  # fmt: skip
SMALL = [
    "model.backbone.name=test_resnet", "model.backbone.weights=none", "model.backbone.dc5=true", "model.hidden_dim=64",
    "model.num_encoder_layers=1", "model.num_decoder_layers=2", "model.dim_feedforward=128", "model.num_queries=30",
    "model.activation_checkpointing=[]", "optim.lr_backbone=1e-4",
]  # fmt: skip
# the detector of recipes/detr_shapes.yaml, for whatever starts from it
SHAPES = ["model.hidden_dim=128", "model.num_decoder_layers=3", "model.dim_feedforward=512", "model.num_queries=10"]
MANY = "model.num_queries=100"  # as DETR has: some of these images hold more than thirty objects
BRIEF = ["schedule.steps=100"]
DEEP = ["model.num_encoder_layers=6", "model.num_decoder_layers=6"]  # as DETR is
START = ["model.init_from=START", "optim.lr_backbone=1e-5"]
RTDETR_START = ["model.init_from=LEARNED", "optim.lr=1e-4", "optim.lr_backbone=1e-5"]
STARTS = {"START": ("detr_shapes", 3000), "LEARNED": ("shapes", 1000)}  # what stands for a run of which recipe


@dataclass(frozen=True)
class Case:
    """One run. ``data``: a folder of DATA, a function that writes one, or None for procedural shapes."""

    what: str
    recipe: str
    overrides: list[str]
    data: str | Callable[[Path], None] | None = None
    alarm: str | None = None  # who should speak; None: nobody


def shapes_folder(
    folder: Path,
    *,
    change: Callable[[dict, dict], None] = lambda box, image: None,
    black: bool = False,
    num_train: int = 400,
) -> None:
    """Shapes as files in COCO's layout.

    Args:
        change: mends (or breaks) an annotation, given its image's record.
        black: pictures without anything in them.
    """
    (folder / "annotations").mkdir(parents=True)
    for split, number in (("train", num_train), ("val", 16)):
        source = ShapesSource(42, split, number, 96, 3, 0.05, 1.0)
        truth = source.ground_truth()
        (folder / split).mkdir()
        for i, record in enumerate(truth["images"]):
            record["file_name"] = f"{i}.png"
            picture = source.sample(i).image
            Image.fromarray(np.zeros_like(picture) if black else picture).save(folder / split / record["file_name"])
        images = {record["id"]: record for record in truth["images"]}
        for annotation in truth["annotations"]:
            change(annotation, images[annotation["image_id"]])
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(truth))


def shifted(folder: Path) -> None:
    """Every label is the next one's: what counting from 0 instead of 1 does."""
    shapes_folder(folder, change=lambda box, image: box.update(category_id=box["category_id"] % 6 + 1))


def black(folder: Path) -> None:
    shapes_folder(folder, black=True)


def rewritten(name: str, bbox: Callable[[list[float], dict], list[float]]) -> Callable[[Path], None]:
    """A folder of DATA whose boxes are written another way; the pictures are linked to."""

    def write(folder: Path) -> None:
        (folder / "annotations").mkdir(parents=True)
        for split in ("train", "val"):
            (folder / split).symlink_to(DATA / name / split, target_is_directory=True)
            tree = json.loads((DATA / name / "annotations" / f"instances_{split}.json").read_text())
            images = {record["id"]: record for record in tree["images"]}
            for annotation in tree["annotations"]:
                annotation["bbox"] = bbox(annotation["bbox"], images[annotation["image_id"]])
            (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(tree))

    return write


def corners(box: list[float], image: dict) -> list[float]:
    x, y, w, h = box
    return [x, y, x + w, y + h]


def fractions(box: list[float], image: dict) -> list[float]:
    x, y, w, h = box
    return [x / image["width"], y / image["height"], w / image["width"], h / image["height"]]


COCO, FINE = "detr_r101_coco", "detr_finetune"
BROKEN = {
    "lr_2e-3": Case("learning rate 2e-3", "detr_shapes", [*DEEP, "optim.lr=2e-3", "schedule.warmup_steps=0"],
                    alarm="Diverged"),
    "labels_shifted": Case("labels shifted by one", FINE, [*SHAPES, *START, *BRIEF], shifted, "Classes do not fit"),
    "xyxy_bccd": Case("boxes as corners (blood cells)", COCO, [*SMALL, *BRIEF], rewritten("bccd", corners),
                      "Boxes leave their images"),
    "xyxy_cards": Case("boxes as corners (cards)", COCO, [*SMALL, *BRIEF], rewritten("cards", corners),
                       "Boxes leave their images"),
    "fractions": Case("boxes in fractions of the image", COCO, [*SMALL, *BRIEF], rewritten("bccd", fractions),
                      "Tiny boxes"),
    "head_rate_0": Case("learning rate 0 on the head", "detr_shapes", [*BRIEF, "optim.lr=0"],
                        alarm="Part without learning rate"),
    "black": Case("all images black", "detr_shapes", [*BRIEF, "data.format=coco"], black, "Blank images"),
    "batch_1": Case("batch of 1, not accumulated", "detr_shapes", [*BRIEF, "batch.size=1", "batch.micro=1"],
                    alarm="Batch of one image"),
    "frozen": Case("frozen model", "detr_shapes", [*BRIEF, "optim.lr=0", "optim.lr_backbone=0"],
                   alarm="Nothing learns"),
    "no_boxes": Case("no boxes", "detr_shapes", [*BRIEF, "data.shapes.empty_fraction=1"],
                     alarm="Windows without boxes"),
    "few_queries": Case("fewer queries than boxes", COCO, [*SMALL, *BRIEF, "model.num_queries=5"], "bccd",
                        "More boxes than queries"),
    "rtdetr_lr": Case("learning rate 1e-1 (RT-DETR)", "shapes",
                      ["optim.lr=1e-1", "optim.lr_backbone=1e-1", "schedule.warmup_steps=0"], alarm="Diverged"),
    "rtdetr_labels_shifted": Case("labels shifted by one (RT-DETR)", "shapes",
                                  [*RTDETR_START, *BRIEF, "data.format=coco"], shifted, "Classes do not fit"),
    "rtdetr_xyxy": Case("boxes as corners (blood cells, RT-DETR)", "shapes", [*BRIEF, "data.format=coco"],
                        rewritten("bccd", corners), "Boxes leave their images"),
    "rtdetr_fractions": Case("boxes in fractions of the image (RT-DETR)", "shapes", [*BRIEF, "data.format=coco"],
                             rewritten("bccd", fractions), "Tiny boxes"),
    "rtdetr_head_rate_0": Case("learning rate 0 on the head (RT-DETR)", "shapes", [*BRIEF, "optim.lr=0"],
                               alarm="Part without learning rate"),
    "rtdetr_black": Case("all images black (RT-DETR)", "shapes", [*BRIEF, "data.format=coco"], black, "Blank images"),
    "rtdetr_frozen": Case("frozen model (RT-DETR)", "shapes", [*BRIEF, "optim.lr=0", "optim.lr_backbone=0"],
                          alarm="Nothing learns"),
    "rtdetr_no_boxes": Case("no boxes (RT-DETR)", "shapes", [*BRIEF, "data.shapes.empty_fraction=1"],
                            alarm="Windows without boxes"),
    "rtdetr_few_queries": Case("fewer queries than boxes (RT-DETR)", "shapes", [*BRIEF, "model.num_queries=2"],
                               alarm="More boxes than queries"),
}  # fmt: skip
HEALTHY = {
    "rtdetr_shapes": Case("shapes, as shipped (RT-DETR)", "shapes", []),
    "rtdetr_bccd": Case("blood cells, RT-DETR, ImageNet backbone", "rtdetr_tiny_cpu",
                        ["model.backbone.weights=WEIGHTS"], "bccd"),
    "shapes": Case("detr_shapes, as shipped", "detr_shapes", []),
    "shapes_detr_lr": Case("shapes, DETR's learning rates", "detr_shapes", ["optim.lr=1e-4", "optim.lr_backbone=1e-5"]),
    "shapes_deep": Case("shapes, six and six layers", "detr_shapes", [*DEEP, "optim.lr=1e-4"]),
    "shapes_hard": Case("shapes without colours, half of the images empty", "detr_shapes",
                        ["data.shapes.colour_cue=0", "data.shapes.empty_fraction=0.5"]),
    "bccd": Case("blood cells", COCO, SMALL, "bccd"),
    "bccd_imagenet": Case("blood cells, ImageNet backbone", "../benchmarks/bccd_detr.yaml",
                          ["model.backbone.weights=WEIGHTS"], "bccd"),
    "cards": Case("cards", "detr_r50_coco", SMALL, "cards"),
    "cards_dropout": Case("cards, cosine, average of weights", COCO,
                          [*SMALL, "schedule.kind=cosine", "ema.enabled=true", "schedule.warmup_steps=50"], "cards"),
    "coco_free": Case("COCO images, 80 classes", COCO, [*SMALL, MANY], "coco_free"),
    "coco_free_dc5": Case("COCO images, batch of 2", "detr_r101_dc5_coco",
                          [*SMALL, MANY, "batch.size=2", "batch.micro=2"], "coco_free"),
    "finetune": Case("shapes, from a trained detector", FINE, [*SHAPES, *START], shapes_folder),
    "finetune_cards": Case("cards, from a detector of shapes, backbone frozen", FINE,
                           [*SHAPES, *START, "optim.lr_backbone=0"], "cards"),
}  # fmt: skip


def arguments(name: str, case: Case, folder: Path, weights: Path | None, starts: dict[str, Path]) -> list[str] | None:
    """The overrides of a run; None where something that it needs is not here."""
    small = SMALL if case.recipe in (COCO, FINE) else []
    known = {"WEIGHTS": weights, **{word: starts.get(word) for word in STARTS}}
    if any(word in str(case.overrides) and file is None for word, file in known.items()):
        return None
    own = case.overrides
    for word, file in known.items():
        own = [a.replace(word, str(file)) for a in own]
    if isinstance(case.data, str):
        return [*SHORT, *small, *own, f"data.root={DATA / case.data}"] if (DATA / case.data).is_dir() else None
    if case.data is None:
        return [*SHORT, *small, *own]
    try:
        case.data(folder)
    except FileNotFoundError:
        return None
    return [*SHORT, *small, *own, f"data.root={folder}"]


def run(name: str, case: Case, place: Path, weights: Path | None, starts: dict[str, Path]) -> dict | None:
    """Train; returns what spoke and when."""
    words = arguments(name, case, place / "data" / name, weights, starts)
    if words is None:
        return None
    file = ROOT / "recipes" / (case.recipe if case.recipe.endswith(".yaml") else f"{case.recipe}.yaml")
    begun, refused = time.perf_counter(), None
    try:
        train(recipes.load(file, [*words, f"name={name}"]), runs=place / "runs")
    except UserError as error:
        refused = str(error)
    folder = place / "runs" / name
    if refused and not (folder / "alarms.jsonl").exists():  # before the first window
        return result(case, [], refused) | {"seconds": round(time.perf_counter() - begun, 1)}
    rows = lines(folder / "alarms.jsonl")
    shutil.copy(folder / "checkpoints" / "last" / "state.json", folder / "state.json")
    shutil.rmtree(folder / "checkpoints")
    return result(case, rows, refused) | {"seconds": round(time.perf_counter() - begun, 1)}


def judged_again(name: str, case: Case, place: Path) -> dict | None:
    """The same of a run that was kept, by the rules as they are now; every window of it was logged."""
    folder = place / "runs" / name
    if not (folder / "recipe.yaml").exists():
        return None
    recipe, state = recipes.load(folder / "recipe.yaml"), folder / "state.json"
    head_loaded = json.loads(state.read_text())["alarms"]["head_loaded"] if state.exists() else 0.0
    about = monitor.about(recipe, len(data.build(recipe).train))
    said = judge_rows(lines(folder / "metrics.jsonl"), about, head_loaded)
    return result(case, [{"window": window, **vars(alarm)} for window, alarm in said], None) | {"judged_again": True}


def result(case: Case, alarms: list[dict], refused: str | None) -> dict:
    alarms = [{key: row[key] for key in ("window", "title", "level", "text")} for row in alarms]
    return {
        "what": case.what, "recipe": case.recipe, "overrides": case.overrides, "expected": case.alarm,
        "alarms": [row for row in alarms if row["title"] not in MACHINE], "refused": refused, "commit": commit(),
    }  # fmt: skip


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def verdict(row: dict) -> str:
    """In a word: did it go as it should?"""
    titles = [alarm["title"] for alarm in row["alarms"]]
    if row["expected"] is None:
        return "silent" if not titles else "FALSE ALARM"
    if row["refused"] and not titles and "boxes look like" in row["refused"]:
        return "refused"  # in words, when the data are read: better than any alarm
    return "spoke" if row["expected"] in titles else "MISSED"


def table(rows: dict[str, dict]) -> str:
    """The result as a page."""
    lines = [
        "# Alarms in runs broken on purpose, and in healthy ones", "",
        f"Healthy runs have {WINDOWS} windows, broken ones 100 or {WINDOWS}; no time and memory alarms.", "",
        "`OMP_NUM_THREADS=1 python benchmarks/alarm_cases.py --weights PATH/efficientnet-lite0-57934424.pth`", "",
        "| what was broken | which alarm should speak | after windows | others that spoke |", "|---|---|---|---|",
    ]  # fmt: skip
    for row in (r for r in rows.values() if r["expected"]):
        missed = "refused when read" if verdict(row) == "refused" else "missed"
        at = next((str(a["window"]) for a in row["alarms"] if a["title"] == row["expected"]), missed)
        others = dict.fromkeys(f"{a['title']} ({a['window']})" for a in row["alarms"] if a["title"] != row["expected"])
        lines.append(f"| {row['what']} | {row['expected']} | {at} | {', '.join(others) or 'none'} |")
    lines += [
        "", "The three DETRs with boxes in another format were measured with reading as it was; since then such a data",
        "set is refused when it is read (`the boxes look like [x1, y1, x2, y2] (72 % of them leave their images when",
        "read as [x, y, width, height]): export them as ...`), and the alarms speak where that check cannot tell.",
        "", "| healthy run | recipe | alarms |", "|---|---|---|",
    ]  # fmt: skip
    for row in (r for r in rows.values() if not r["expected"]):
        said = ", ".join(f"{a['title']} ({a['window']})" for a in row["alarms"])
        lines.append(f"| {row['what']} | {Path(row['recipe']).stem} | {said or 'none'} |")
    return "\n".join(lines) + "\n"


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def start_detector(place: Path, recipe: str, steps: int) -> Path:
    """A detector of shapes that finds most of them."""
    words = [f"name={recipe}", f"schedule.steps={steps}", "evaluate.every_epochs=1000", "log.wandb.enabled=false"]
    return train(recipes.load(ROOT / "recipes" / f"{recipe}.yaml", [*words, "device=cpu"]), runs=place)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", type=Path, help="ImageNet weights of tf_efficientnet_lite0")
    parser.add_argument("--start", type=Path, help="a run of recipes/detr_shapes.yaml to start from")
    parser.add_argument("--rtdetr-start", type=Path, help="a run of recipes/shapes.yaml to start from")
    parser.add_argument("--only", nargs="*", help="names of runs")
    parser.add_argument("--keep", type=Path, help="where the runs are kept (default: a folder that is cleared away)")
    parser.add_argument("--again", action="store_true", help="judge the runs in --keep anew instead of training")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    cases = BROKEN | HEALTHY
    wanted = args.only or list(cases)
    rows = json.loads(args.out.read_text())["runs"] if args.out.exists() and args.only else {}
    with tempfile.TemporaryDirectory() as temporary:
        place = args.keep or Path(temporary)
        starts = {"START": args.start, "LEARNED": args.rtdetr_start}
        for word, (recipe, steps) in STARTS.items():
            needed = any(word in str(cases[name].overrides) for name in wanted)
            if starts[word] is None and not args.again and needed:
                starts[word] = start_detector(place / "start", recipe, steps)
        for number, name in enumerate(wanted, 1):
            if args.again:
                row = judged_again(name, cases[name], place)
            else:
                row = run(name, cases[name], place, args.weights, starts)
            if row is not None:
                rows[name] = row
            said = "left out: something that it needs is not here" if row is None else verdict(row)
            print(f"--- {number} of {len(wanted)}: {name}: {said}", flush=True)
            rows = {name: rows[name] for name in cases if name in rows}
            page = {"windows": WINDOWS, "torch": torch.__version__, "runs": rows}
            args.out.write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
            args.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")
    return 1 if any(verdict(row).isupper() for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
