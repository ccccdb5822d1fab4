"""A first recipe for a folder: about fifteen lines, each with its reason from the data."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from detr_accel.data.coco import CocoSource

_SIDES = {"left", "right", "l", "r", "lh", "rh"}  # a class that a mirrored picture would turn into another
_FEW, _MANY = 10_000, 50_000
_LONGEST = 1.7  # long side to short, beyond which images are shrunk


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
    """The recipe as YAML text: settings of one reason share a line, and what the defaults say already is left out.

    Args:
        name: of the run.
        root, format_: of ``data``.
    """
    return _text(_detr_rows(found, root, format_), name)


def _detr_rows(found: Facts, root: str, format_: str) -> list[tuple[str, str]]:
    """Lines and their reasons, for DETR-R101 from COCO weights."""
    short, why_size = _size(found)
    scales = sorted({min(800, _step(short * f)) for f in (0.8, 0.9, 1.0, 1.1, 1.2)})
    bound, why_bound = _bound(found, max(scales))
    sizes = {"scales": f"[{', '.join(map(str, scales))}]", "max_size": bound}
    queries, why_queries = _queries(found)
    batch, epochs, steps = _length(found)
    whole = batch == 16
    return [
        *_data_rows(found, root, format_),
        (f"  eval_size: {short}", why_size),
        (f"  eval_max_size: {bound}", why_bound),
        *_augment_rows(found, sizes),
        ("model:", ""),
        ("  init_from: facebook/detr-resnet-101", _why_start(found)),
        (f"  num_queries: {queries}", why_queries),
        (f"batch: {{size: {batch}, micro: auto}}", _why_batch(batch, steps)),
        (
            f"optim: {{lr: {'1.0e-4' if whole else '5.0e-5'}, lr_backbone: {'1.0e-5' if whole else '5.0e-6'}}}",
            "DETR's own, for 16 images a step" if whole else "DETR's 1e-4 and 1e-5 belong to 16 images a step",
        ),
        (
            f"schedule: {{epochs: {epochs}, drop_at: [0.8], warmup_steps: {_warmup(steps)}}}",
            f"about {steps:,} steps; the rate drops for the last fifth",
        ),
        *_last_rows(found, steps, queries),
    ]


def _data_rows(found: Facts, root: str, format_: str) -> list[tuple[str, str]]:
    """The reason stands above the folder, whose name may be long."""
    return [
        ("data:", f"{found.num_images:,} images to train on, {found.num_val:,} to validate on"),
        *([(f"  format: {format_}", "a Hugging Face data set")] if format_ != "coco" else []),
        (f"  root: {_quoted(root)}", ""),
    ]


def _augment_rows(found: Facts, sizes: dict[str, object]) -> list[tuple[str, str]]:
    """Flipping is the default: only where it would be wrong is it spoken of by a line of its own."""
    told = "  augment: {" + ", ".join(f"{key}: {value}" for key, value in sizes.items())
    if not found.sided:
        return [(told + "}", "around eval_size; flip: 0 where mirroring is wrong")]
    return [
        (told + ",", "around eval_size"),
        ("            flip: 0.0}", f"{found.sided[0][:24]!r} mirrored is another class"),
    ]


def _length(found: Facts) -> tuple[int, int, int]:
    """Images a step, epochs, and steps in all."""
    batch = 16 if found.num_images >= _FEW else 8
    epochs = _epochs(found, batch)
    return batch, epochs, int(epochs * -(-found.num_images // batch))


def _warmup(steps: int) -> int:
    """Steps for what starts from nothing, as new classes do."""
    return max(20, min(500, steps // 20))


def _last_rows(found: Facts, steps: int, queries: int) -> list[tuple[str, str]]:
    decay = min(0.9998, round(1 - 1 / max(50, steps / 50), 4))
    crowd = [(f"evaluate: {{max_detections: {queries}}}", "as many as there are queries")]
    stop, why_stop = _stop(found)
    return [
        (
            f"ema: {{enabled: true, decay: {decay}, warmup_steps: {max(50, steps // 20)}}}",
            f"validates the average of about {round(1 / (1 - decay)):,} of {steps:,} steps",
        ),
        *(crowd if queries > 100 else []),
        (f"early_stop: {{{stop}}}", why_stop),
    ]


def _text(rows: list[tuple[str, str]], name: str) -> str:
    width = max(len(text) for text, why in rows if why) + 2
    lines = [f"{text:{width}s}# {why}" if why else text for text, why in rows]
    head = [
        "# A first recipe, from what is in the data. Each line says why; any may be changed.",
        f"#   accelerate launch --config_file accelerate_config.yaml train.py --recipe {name}.yaml",
    ]
    return "\n".join([*head, f"name: {name}", *lines, ""])


def _step(value: float) -> int:
    """A multiple of 32, the stride of the features."""
    return max(64, int(round(value / 32)) * 32)


def _size(found: Facts) -> tuple[int, str]:
    """The short side to train at: the images' own, more where small boxes would vanish, within DETR's 800."""
    own = float(np.clip(found.short_px, 320, 800))
    seen = found.small_px * own / found.short_px  # of the small boxes, at that size
    if seen < 24 and own < 800:
        larger = min(800.0, own * 24 / max(seen, 1e-6))
        return _step(larger), f"a tenth of the boxes are below {found.small_px:.0f} px: enlarged"
    if found.short_px > 800:
        return 800, f"DETR's own; your images' short side is {found.short_px} px"
    if found.short_px < own:
        return _step(own), f"your images' short side of {found.short_px} px, enlarged"
    return _step(own), f"your images' own short side of {found.short_px} px"


def _bound(found: Facts, largest: int) -> tuple[int, str]:
    """The long side: longer images are shrunk, so that a few of them do not make every canvas large."""
    bound = _step(largest * min(found.long_to_short, _LONGEST))
    if found.long_to_short > _LONGEST:
        return bound, f"one image in a hundred is {found.long_to_short:.3g} times as long as wide"
    return bound, f"hardly an image is over {found.long_to_short:.2f} times as long as wide"


def _queries(found: Facts) -> tuple[int, str]:
    why = f"your fullest image has {found.fullest} object{'s' * (found.fullest != 1)}; 100 come trained"
    return 100 if found.fullest <= 90 else int(np.ceil(found.fullest * 1.3 / 100) * 100), why


def _epochs(found: Facts, batch: int) -> int:
    """About 4,000 steps for a few hundred images, 50 epochs for ten thousand and more."""
    per_epoch = max(1, -(-found.num_images // batch))
    return int(np.clip(round(4000 / per_epoch), 12 if found.num_images >= _MANY else 50, 200))


def _stop(found: Facts) -> tuple[str, str]:
    if found.num_val < 50:
        return "patience: 10, metric: loss", f"AP over so few images ({found.num_val}) jumps too much to follow"
    return "patience: 10", f"no better AP in 10 evaluations of {found.num_val:,} images"


def _why_batch(batch: int, steps: int) -> str:
    why = "DETR's own" if batch == 16 else f"16 would halve the {steps:,} steps"
    return f"{why}; micro: what fits"


def _why_start(found: Facts) -> str:
    if found.num_images < _FEW:
        return f"from scratch DETR needs {_FEW:,} images, you have {found.num_images:,}"
    return "COCO weights: far fewer steps than from scratch"


def _quoted(text: str) -> str:
    return text if re.fullmatch(r"[\w./~-]+", text) else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
