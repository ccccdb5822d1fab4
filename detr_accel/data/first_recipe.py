"""A first recipe for a folder: about twenty lines, each with its reason from the data."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

import numpy as np

from detr_accel.data.coco import CocoSource

_WORDS = {"true", "false", "null", "yes", "no", "on", "off"}
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


def write(
    found: Facts, name: str, root: str, format_: str = "coco", detector: str = "auto", file: str | None = None
) -> str:
    """The recipe as YAML text: settings of one reason share a line, and what the defaults say already is left out.

    Args:
        name: of the run.
        root, format_: of ``data``.
        detector: ``detr``, ``rtdetr``, or ``auto``: by the data.
        file: where it will lie, for the command that trains it; None: NAME.yaml.
    """
    chosen, why = _choice(found) if detector == "auto" else (detector, "as asked")
    return _text(_ROWS[chosen](found, root, format_, why), name, file or f"{name}.yaml")


def _detr_rows(found: Facts, root: str, format_: str, why: str) -> list[tuple[str, str]]:
    """Lines and their reasons, for DETR-R101 from COCO weights."""
    short, why_size = _size(found)
    scales = sorted({min(800, _step(short * f)) for f in (0.8, 0.9, 1.0, 1.1, 1.2)})
    bound, why_bound = _bound(found, max(scales))
    sizes = {"scales": f"[{', '.join(map(str, scales))}]", "max_size": bound}
    queries, why_queries = _queries(found, 100)
    batch, epochs, steps = _length(found)
    return [
        *_data_rows(found, root, format_),
        (f"  eval_size: {short}", why_size),
        (f"  eval_max_size: {bound}", why_bound),
        *_augment_rows(found, sizes),
        ("model:", ""),
        ("  name: detr", why),
        ("  init_from: facebook/detr-resnet-101", _why_start(found, "DETR")),
        (f"  num_queries: {queries}", why_queries),
        (f"batch: {{size: {batch}, micro: auto}}", _why_batch(batch, steps)),
        _optim_row(batch, "DETR"),
        (
            f"schedule: {{epochs: {epochs}, drop_at: [0.8], warmup_steps: {_warmup(steps)}}}",
            f"about {steps:,} steps; the rate drops for the last fifth",
        ),
        *_last_rows(found, steps, queries),
    ]


def _rtdetr_rows(found: Facts, root: str, format_: str, why: str) -> list[tuple[str, str]]:
    """The same for RT-DETRv2-R101 from COCO weights, as in recipes/rtdetr_finetune.yaml."""
    queries, why_queries = _queries(found, 300)
    batch, epochs, steps = _length(found)
    side, why_side = _side(found)
    scales = ", ".join(str(side + step) for step in (-96, -64, -32, 0, 32, 64, 96))
    flip = [("flip: 0.0", f"{found.sided[0][:24]!r} mirrored is another class")] if found.sided else []
    augment = [
        (f"scales: [{scales}]", "around eval_size"),
        ("scale_by: window, scales_stop: 0.9, crop: 0.0", "one for a step; at the end evaluation's"),
        ("photometric: {probability: 0.5}", "0 where colours tell the classes apart"),
        *flip,
        ("iou_crop: {probability: 0.5}", "RT-DETR's, gentler" + "; flip: 0 where mirroring is wrong" * (not flip)),
    ]
    return [
        *_data_rows(found, root, format_),
        ("  square: true", "the weights know images squeezed to squares"),
        (f"  eval_size: {side}", why_side),
        *_flow("  augment: ", augment),
        ("model:", ""),
        ("  name: rtdetr", why),
        ("  init_from: PekingU/rtdetr_v2_r101vd", _why_start(found, "RT-DETR")),
        ("  backbone: {name: resnet101d, pixels: unit}", "as the weights were trained"),
        ("  rtdetr: {encoder_dim: 384, encoder_feedforward: 2048}", "R101's"),
        (f"  num_queries: {queries}", why_queries),
        ("  activation_checkpointing: auto", "before fewer than four images see its norms at a time"),
        (f"batch: {{size: {batch}, micro: auto}}", _why_batch(batch, steps)),
        _optim_row(batch, "RT-DETR", ", no_decay: [norms]"),
        (
            f"schedule: {{epochs: {epochs}, kind: flat_cosine, warmup_steps: {_warmup(steps)}}}",
            f"{steps:,} steps, the second half ever slower",
        ),
        *_last_rows(found, steps, queries),
    ]


def _flow(start: str, settings: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """A mapping in braces, a line for each reason."""
    starts = [start + "{"] + [" " * (len(start) + 1)] * (len(settings) - 1)
    ends = [","] * (len(settings) - 1) + ["}"]
    return [(a + text + b, why) for a, (text, why), b in zip(starts, settings, ends, strict=True)]


def _optim_row(batch: int, detector: str, more: str = "") -> tuple[str, str]:
    if batch == 16:
        return f"optim: {{lr: 1.0e-4, lr_backbone: 1.0e-5{more}}}", f"{detector}'s 1e-4, used with 16 images a step"
    return f"optim: {{lr: 5.0e-5, lr_backbone: 5.0e-6{more}}}", f"below {detector}'s 1e-4, for 16 images and more"


def _data_rows(found: Facts, root: str, format_: str) -> list[tuple[str, str]]:
    """The reason stands above the folder, whose name may be long."""
    return [
        ("data:", f"{found.num_images:,} images to train on, {found.num_val:,} to validate on"),
        *([(f"  format: {format_}", "a Hugging Face data set")] if format_ != "coco" else []),
        (f"  root: {_quoted(root)}", ""),
    ]


def _augment_rows(found: Facts, sizes: dict[str, object]) -> list[tuple[str, str]]:
    """Flipping is the default: only where it would be wrong is it spoken of by a line of its own."""
    told = ", ".join(f"{key}: {value}" for key, value in sizes.items())
    if not found.sided:
        return _flow("  augment: ", [(told, "around eval_size; flip: 0 where mirroring is wrong")])
    flip = ("flip: 0.0", f"{found.sided[0][:24]!r} mirrored is another class")
    return _flow("  augment: ", [(told, "around eval_size"), flip])


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
        *(crowd if found.fullest > 90 else []),
        (f"early_stop: {{{stop}}}", why_stop),
    ]


_ROWS = {"detr": _detr_rows, "rtdetr": _rtdetr_rows}


def _text(rows: list[tuple[str, str]], name: str, file: str) -> str:
    width = max(len(text) for text, why in rows if why) + 2
    lines = [f"{text:{width}s}# {why}" if why else text for text, why in rows]
    head = [
        "# A first recipe, from what is in the data. Each line says why; any may be changed.",
        f"#   accelerate launch --config_file accelerate_config.yaml train.py --recipe {shlex.quote(file)}",
    ]
    return "\n".join([*head, f"name: {_quoted(name)}", *lines, ""])


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


def _choice(found: Facts) -> tuple[str, str]:
    """Which detector, and why."""
    seen = found.small_px * min(1.0, 640 / found.short_px)  # of the small boxes, where RT-DETR sees them
    if seen < 48:
        return "rtdetr", f"boxes below {found.small_px:.0f} px: its stride is 8, DETR's 32"
    if found.fullest > 90:
        return "rtdetr", f"your fullest image has {found.fullest} objects"
    if found.num_images < _FEW:
        return "rtdetr", f"of {found.num_images:,} images it learns in fewer steps"
    return "detr", f"{found.num_images:,} images, nothing small; else: rtdetr"


def _side(found: Facts) -> tuple[int, str]:
    """The square to train on: what the weights know, more where small boxes would vanish."""
    seen = found.small_px * min(1.0, 640 / found.short_px)
    if seen < 12 and found.short_px > 640:
        return 800, f"a tenth of the boxes are below {found.small_px:.0f} px: enlarged"
    return 640, "what the weights were trained at"


def _queries(found: Facts, trained: int) -> tuple[int, str]:
    """
    Args:
        trained: how many the weights have; RT-DETR's are chosen from the image, so that more of them know as much.
    """
    why = f"your fullest image has {found.fullest} object{'s' * (found.fullest != 1)}"
    why += f"; {trained} come trained" * (trained == 100)
    enough = found.fullest <= 0.9 * trained
    return trained if enough else int(np.ceil(found.fullest * 1.3 / 100) * 100), why


def _epochs(found: Facts, batch: int) -> int:
    """About 4,000 steps for a few hundred images, 50 epochs for ten thousand and more."""
    per_epoch = max(1, -(-found.num_images // batch))
    return int(np.clip(round(4000 / per_epoch), 12 if found.num_images >= _MANY else 50, 200))


def _stop(found: Facts) -> tuple[str, str]:
    if found.num_val < 50:
        return "patience: 10, metric: loss", f"AP over so few images ({found.num_val}) jumps too much to follow"
    return "patience: 10", f"no better AP in 10 evaluations of {found.num_val:,} images"


def _why_batch(batch: int, steps: int) -> str:
    why = "the original's own" if batch == 16 else f"16 would halve the {steps:,} steps"
    return f"{why}; micro: what fits"


def _why_start(found: Facts, detector: str) -> str:
    if found.num_images < _FEW and detector == "DETR":
        return f"from scratch DETR needs {_FEW:,} images, you have {found.num_images:,}"
    return "COCO weights: far fewer steps than from scratch"


def _quoted(text: str) -> str:
    """As YAML's text, whatever it looks like: a number, a date, a truth value, or nothing of the kind."""
    plain = re.fullmatch(r"\.{0,2}/?[A-Za-z_][\w./~-]*|/[\w./~-]*", text) and text.lower() not in _WORDS
    return text if plain else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
