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


def write(found: Facts, name: str, root: str, format_: str = "coco", detector: str = "auto") -> str:
    """The recipe as YAML text.

    Args:
        name: of the run.
        root, format_: of ``data``.
        detector: ``detr``, ``rtdetr``, or ``auto``: by the data.
    """
    chosen, why = _choice(found) if detector == "auto" else (detector, "as asked")
    return _text(_ROWS[chosen](found, root, format_, why), name, root)


def _detr_rows(found: Facts, root: str, format_: str, why: str) -> list[tuple[str, str]]:
    """Lines and their reasons, for DETR-R101 from COCO weights."""
    short, why_size = _size(found)
    scales = sorted({min(800, _step(short * f)) for f in (0.8, 0.9, 1.0, 1.1, 1.2)})
    bound = _step(max(scales) * min(found.long_to_short, 1.7))
    queries, why_queries = _queries(found, 100)
    batch, epochs, steps = _length(found)
    flip, why_flip = _flip(found)
    return [
        *_data_rows(found, root, format_),
        ("  augment:", ""),
        (f"    scales: [{', '.join(map(str, scales))}]", why_size),
        (f"    max_size: {bound}", f"hardly an image is more than {found.long_to_short:.2f} times as long as wide"),
        (f"    flip: {flip}", why_flip),
        (f"  eval_size: {short}", "the middle of the scales"),
        (f"  eval_max_size: {bound}", ""),
        ("model:", ""),
        ("  name: detr", why),
        ("  init_from: facebook/detr-resnet-101", _why_start(found, "DETR")),
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
        *_last_rows(found, steps, queries),
    ]


def _rtdetr_rows(found: Facts, root: str, format_: str, why: str) -> list[tuple[str, str]]:
    """The same for RT-DETRv2-R101 from COCO weights, as in recipes/rtdetr_finetune.yaml."""
    queries, why_queries = _queries(found, 300)
    batch, epochs, steps = _length(found)
    flip, why_flip = _flip(found)
    side, why_side = _side(found)
    scales = [side + step for step in (-96, -64, -32, 0, 0, 32, 64, 96)]
    return [
        *_data_rows(found, root, format_),
        ("  square: true", "the weights know images squeezed to squares"),
        (f"  eval_size: {side}", why_side),
        ("  augment:", ""),
        (f"    scales: [{', '.join(map(str, scales))}]", "around it, one for a step"),
        ("    scale_by: window", ""),
        ("    scales_stop: 0.9", "the last tenth sees images as evaluation does"),
        ("    crop: 0.0", "DETR's crop; the next two are RT-DETR's, more gently"),
        ("    photometric: {probability: 0.5}", "0 where colours tell the classes apart"),
        ("    iou_crop: {probability: 0.5}", ""),
        (f"    flip: {flip}", why_flip),
        ("model:", ""),
        ("  name: rtdetr", why),
        ("  init_from: PekingU/rtdetr_v2_r101vd", _why_start(found, "RT-DETR")),
        ("  backbone: {name: resnet101d, pixels: unit}", "as the weights were trained"),
        ("  rtdetr: {encoder_dim: 384, encoder_feedforward: 2048}", "R101's"),
        (f"  num_queries: {queries}", why_queries),
        ("  activation_checkpointing: auto", "only where one image would not fit into memory"),
        ("batch:", ""),
        (f"  size: {batch}", _why_batch(batch, steps)),
        ("  micro: auto", "as many at a time as fit"),
        ("optim:", ""),
        (f"  lr: {'1.0e-4' if batch == 16 else '5.0e-5'}", "RT-DETR's 1e-4 belongs to 16 images a step"),
        (f"  lr_backbone: {'1.0e-5' if batch == 16 else '5.0e-6'}", "a tenth"),
        ("  no_decay: [norms]", "as RT-DETR"),
        ("schedule:", ""),
        (f"  epochs: {epochs}", f"about {steps:,} steps; a longer training is this one number"),
        ("  kind: flat_cosine", "half of it at the full rate, then less and less"),
        ("  min_factor: 0.05", ""),
        (f"  warmup_steps: {max(20, min(500, steps // 20))}", "new classes start from nothing"),
        *_last_rows(found, steps, queries),
    ]


def _data_rows(found: Facts, root: str, format_: str) -> list[tuple[str, str]]:
    rows = [
        ("data:", ""),
        (f"  root: {_quoted(root)}", f"{found.num_images:,} images to train on, {found.num_val:,} to validate on"),
    ]
    if format_ != "coco":
        rows.insert(1, (f"  format: {format_}", "a Hugging Face data set"))
    return rows


def _length(found: Facts) -> tuple[int, int, int]:
    """Images a step, epochs, and steps in all."""
    batch = 16 if found.num_images >= _FEW else 8
    epochs = _epochs(found, batch)
    return batch, epochs, int(epochs * -(-found.num_images // batch))


def _last_rows(found: Facts, steps: int, queries: int) -> list[tuple[str, str]]:
    metric, why_metric = _metric(found)
    average = min(0.9998, round(1 - 1 / max(50, steps / 50), 4))
    crowd = [("evaluate:", ""), (f"  max_detections: {queries}", "as many as there are queries")]
    return [
        ("ema:", ""),
        ("  enabled: true", "the average of the last steps validates better on few images"),
        (f"  decay: {average}", f"remembers about {round(1 / (1 - average)):,} of {steps:,} steps"),
        (f"  warmup_steps: {max(50, steps // 20)}", ""),
        *(crowd if found.fullest > 90 else []),
        ("early_stop:", ""),
        ("  patience: 10", "evaluations without anything better"),
        (f"  metric: {metric}", why_metric),
    ]


_ROWS = {"detr": _detr_rows, "rtdetr": _rtdetr_rows}


def _text(rows: list[tuple[str, str]], name: str, root: str) -> str:
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


def _choice(found: Facts) -> tuple[str, str]:
    """Which detector, and why."""
    seen = found.small_px * min(1.0, 640 / found.short_px)  # of the small boxes, where RT-DETR sees them
    if seen < 48:
        return "rtdetr", f"a tenth of the boxes are below {found.small_px:.0f} px: it sees with a stride of 8"
    if found.fullest > 90:
        return "rtdetr", f"your fullest image has {found.fullest} objects: it has 300 queries"
    if found.num_images < _FEW:
        return "rtdetr", f"of {found.num_images:,} images it learns in a fraction of DETR's steps"
    return "detr", f"{found.num_images:,} images and no small objects; rtdetr is the other one (rtdetr_finetune.yaml)"


def _side(found: Facts) -> tuple[int, str]:
    """The square to train on: what the weights know, more where small boxes would vanish."""
    seen = found.small_px * min(1.0, 640 / found.short_px)
    if seen < 12 and found.short_px > 640:
        return 800, f"the weights' 640, enlarged: a tenth of the boxes are below {found.small_px:.0f} px in your images"
    return 640, "what the weights were trained at"


def _queries(found: Facts, trained: int) -> tuple[int, str]:
    """
    Args:
        trained: how many the weights have; RT-DETR's are chosen from the image, so that more of them know as much.
    """
    fullest = f"your fullest image has {found.fullest} object{'s' * (found.fullest != 1)}"
    if found.fullest <= 0.9 * trained:
        return trained, f"{fullest}; {trained} come trained with the weights"
    more = "more are chosen from the image as those were" if trained == 300 else f"those beyond {trained} start anew"
    return int(np.ceil(found.fullest * 1.3 / 100) * 100), f"{fullest}; {more}"


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
    return "the original's own" if batch == 16 else f"{steps:,} steps in all; the original's 16 would halve them"


def _why_start(found: Facts, detector: str) -> str:
    if found.num_images < _FEW and detector == "DETR":
        return f"COCO weights: from scratch DETR needs about {_FEW:,} images, you have {found.num_images:,}"
    return "COCO weights: far fewer steps than from scratch"


def _quoted(text: str) -> str:
    return text if re.fullmatch(r"[\w./~-]+", text) else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
