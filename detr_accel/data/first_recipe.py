"""A first recipe for a folder: about thirty short lines, each setting with its reason from the data."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from detr_accel.data.coco import CocoSource

_SIDES = {"left", "right", "l", "r", "lh", "rh"}  # a class that a mirrored picture would turn into another
_FEW, _MANY = 10_000, 50_000


@dataclass(frozen=True)
class Facts:
    """What a recipe depends on."""

    num_images: int
    num_val: int
    num_classes: int
    fullest: int  # most objects in one image
    boxes_per_image: float
    short_px: int  # median short side
    long_to_short: float  # of the most elongated image in a hundred
    small_px: float  # a tenth of the boxes are smaller than this, square root of the area
    sided: tuple[str, ...]  # class names with a side in them


def facts(train: CocoSource, val: CocoSource) -> Facts:
    """Read them off, without decoding an image."""
    sizes = np.array([train.size_px(i) for i in range(len(train))], np.float64)
    pick, counts, keep = train._kept()
    wanted = keep & ~train.table.crowd[pick]
    per_image = np.bincount(np.repeat(np.arange(len(train)), counts)[wanted], minlength=len(train))
    areas = np.prod(train.table.boxes_xywh_px[pick][wanted, 2:], axis=1)
    names = [n for n in train.classes.names if n is not None]
    ratio = sizes.max(1) / sizes.min(1)
    return Facts(
        num_images=len(train), num_val=len(val), num_classes=len(names), fullest=int(per_image.max(initial=0)),
        boxes_per_image=float(per_image.mean()), short_px=int(np.median(sizes.min(1))),
        long_to_short=float(np.quantile(ratio, 0.99)), small_px=float(np.sqrt(np.quantile(areas, 0.1))),
        sided=tuple(n for n in names if _SIDES & set(re.split(r"[^a-z]+", n.lower()))),
    )  # fmt: skip


def write(found: Facts, name: str, root: str, format_: str = "coco") -> str:
    """The recipe as YAML text.

    Args:
        name: of the run.
        root, format_: of ``data``.
    """
    short, why_size = _size(found)
    scales = sorted({min(800, _step(short * f)) for f in (0.8, 0.9, 1.0, 1.1, 1.2)})
    bound = _step(max(scales) * min(found.long_to_short, 1.7))
    queries, why_queries = _queries(found)
    batch = 16 if found.num_images >= _FEW else 8
    epochs = _epochs(found, batch)
    steps = int(epochs * -(-found.num_images // batch))
    flip, why_flip = _flip(found)
    metric, why_metric = _metric(found)
    average = min(0.9998, round(1 - 1 / max(50, steps / 50), 4))
    rows = [
        ("data:", ""),
        (f"  root: {_quoted(root)}", f"{found.num_images:,} images to train on, {found.num_val:,} to validate on"),
        ("  augment:", ""),
        (f"    scales: [{', '.join(map(str, scales))}]", why_size),
        (f"    max_size: {bound}", f"hardly an image is more than {found.long_to_short:.2f} times as long as wide"),
        (f"    flip: {flip}", why_flip),
        (f"  eval_size: {short}", "the middle of the scales"),
        (f"  eval_max_size: {bound}", ""),
        ("model:", ""),
        ("  init_from: facebook/detr-resnet-101", _why_start(found)),
        (f"  num_queries: {queries}", why_queries),
        ("  activation_checkpointing: auto", "only where one image would not fit into memory"),
        ("batch:", ""),
        (f"  size: {batch}", _why_batch(batch, steps)),
        ("  micro: auto", "as many at a time as fit"),
        ("optim:", ""),
        (f"  lr: {'1.0e-4' if batch == 16 else '5.0e-5'}", "DETR's 1e-4 belongs to 16 images a step"),
        (f"  lr_backbone: {'1.0e-5' if batch == 16 else '5.0e-6'}", "a tenth, as in DETR"),
        ("schedule:", ""),
        (f"  epochs: {epochs}", f"about {steps:,} steps; a longer training is this one number"),
        ("  drop_at: [0.8]", "the rate drops for the last fifth"),
        (f"  warmup_steps: {max(20, min(500, steps // 20))}", "new classes start from nothing"),
        ("ema:", ""),
        ("  enabled: true", "the average of the last steps validates better on few images"),
        (f"  decay: {average}", f"remembers about {round(1 / (1 - average)):,} of {steps:,} steps"),
        (f"  warmup_steps: {max(50, steps // 20)}", ""),
        ("evaluate:", ""),
        (f"  max_detections: {max(100, queries)}", "COCO's 100" if queries <= 100 else "as many as there are queries"),
        ("early_stop:", ""),
        ("  patience: 10", "evaluations without anything better"),
        (f"  metric: {metric}", why_metric),
    ]
    if format_ != "coco":
        rows.insert(1, (f"  format: {format_}", "a Hugging Face data set"))
    if queries <= 100:
        rows = [row for row in rows if not row[0].strip().startswith(("evaluate:", "max_detections"))]
    width = max(len(text) for text, why in rows if why) + 2
    lines = [f"{text:{width}s}# {why}" if why else text for text, why in rows]
    head = [
        f"# A first recipe for {root}, from what is in it. Each line says why; any may be changed.", "#",
        f"#   accelerate launch --config_file accelerate_config.yaml train.py --recipe {name}.yaml", f"name: {name}",
    ]  # fmt: skip
    return "\n".join([*head, *lines, ""])


def _step(value: float) -> int:
    """A multiple of 32, the stride of the features."""
    return max(64, int(round(value / 32)) * 32)


def _size(found: Facts) -> tuple[int, str]:
    """The short side to train at: the images' own, more where small boxes would vanish, within DETR's 800."""
    own = float(np.clip(found.short_px, 320, 800))
    seen = found.small_px * own / found.short_px  # of the small boxes, at that size
    if seen < 24 and own < 800:
        larger = min(800.0, own * 24 / max(seen, 1e-6))
        return _step(larger), (
            f"a tenth of the boxes are below {found.small_px:.0f} px where the short side has {found.short_px}: "
            "enlarged, as the features have a stride of 32"
        )
    if found.short_px > 800:
        return 800, f"DETR's own size; the images' short side of {found.short_px} px is more than it can use"
    return _step(own), f"around the images' own short side of {found.short_px} px"


def _queries(found: Facts) -> tuple[int, str]:
    fullest = f"your fullest image has {found.fullest} object{'s' * (found.fullest != 1)}"
    if found.fullest <= 90:
        return 100, f"{fullest}; 100 come trained with the weights"
    return int(np.ceil(found.fullest * 1.3 / 100) * 100), f"{fullest}; those beyond 100 start anew"


def _epochs(found: Facts, batch: int) -> int:
    """About 4,000 steps for a few hundred images, 50 epochs for ten thousand and more."""
    per_epoch = max(1, -(-found.num_images // batch))
    return int(np.clip(round(4000 / per_epoch), 12 if found.num_images >= _MANY else 50, 200))


def _flip(found: Facts) -> tuple[float, str]:
    if found.sided:
        return 0.0, f"a mirrored picture would turn {found.sided[0]!r} into its opposite"
    return 0.5, "no class name speaks of left or right; 0 where mirrored pictures are wrong (text, digits)"


def _metric(found: Facts) -> tuple[str, str]:
    if found.num_val < 50:
        return "loss", f"AP of {found.num_val} validation images jumps too much to wait for"
    return "AP", "of the validation split"


def _why_batch(batch: int, steps: int) -> str:
    return "DETR's own" if batch == 16 else f"{steps:,} steps in all; DETR's 16 would halve them"


def _why_start(found: Facts) -> str:
    if found.num_images < _FEW:
        return f"COCO weights: from scratch DETR needs about {_FEW:,} images, you have {found.num_images:,}"
    return "COCO weights: far fewer steps than from scratch"


def _quoted(text: str) -> str:
    return text if re.fullmatch(r"[\w./~-]+", text) else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
