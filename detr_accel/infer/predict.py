"""``detr-accel predict``: pictures with boxes, names and scores, and the detections as COCO json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from detr_accel import data
from detr_accel.infer.detector import Detector, load
from detr_accel.structures import Classes, Detections, UserError

DEFAULT_THRESHOLD = 0.7  # DETR's own demonstration, for checkpoints that were never evaluated here


def predict(
    path: str | Path,
    images: Sequence[str | Path],
    *,
    out: Path,
    threshold: float | None = None,
    decoder_layers: int | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> dict:
    """Find objects in images.

    Args:
        path: run, checkpoint or converted weights; see ``detector.load``.
        images: files, or folders of which every image is taken.
        out: folder for one picture per image and ``detections.json`` (a list in COCO's result format, each row with its
            file_name; boxes are [left, top, width, height] in pixels of the file).
        threshold: least score; None takes the one stored with the checkpoint, the best F1 on its validation set.
    Returns:
        counts and notes, as printed by the command line.
    Raises:
        UserError: no images, an unreadable one, an output folder that cannot be written.
    """
    detector = load(path, decoder_layers=decoder_layers, device=device)
    threshold, why = _threshold(threshold, detector)
    source = data.ImageFiles(images)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from None
    recipe = detector.recipe.model_copy(deep=True)
    recipe.evaluate.batch = 1  # an image's boxes do not depend on what it was padded with
    model = detector.model
    batches = data.eval_batches(recipe, source, rank=0, num_ranks=1, mean=model.mean, std=model.std)
    rows: list[dict] = []
    for index, batch in enumerate(
        tqdm(batches, total=len(source), desc="predict", unit="image", disable=quiet or None)
    ):
        (found,) = detector(batch, recipe.model.num_queries)
        found = _above(found, threshold)
        draw(source.sample(index).image, found, detector.classes).save(
            out / _picture_name(source.name(index), index), quality=92
        )
        rows += _coco_rows(found, source.name(index), detector.classes)
    (out / "detections.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    summary = f"{len(rows)} objects in {len(source)} images at score >= {threshold:.3f} ({why})"
    notes = [*detector.notes, summary, f"wrote {out}/detections.json and a picture of each image"]
    return {"images": len(source), "objects": len(rows), "threshold": threshold, "out": str(out), "notes": notes}


def _threshold(asked: float | None, detector: Detector) -> tuple[float, str]:
    """The least score, and where it comes from."""
    meta = detector.meta
    if asked is not None:
        return asked, "as asked"
    if meta.get("threshold") is None:
        return DEFAULT_THRESHOLD, "the checkpoint stores none; set it with --threshold"
    why = "best F1 on the checkpoint's validation set"
    if meta.get("metrics_window") not in (None, meta.get("window")):
        why += f" at window {meta['metrics_window']}"
    if detector.cut_from is not None:
        why += f", measured with all {detector.cut_from} decoder layers"
    return meta["threshold"], why


def _above(found: Detections, threshold: float) -> Detections:
    keep = found.scores >= threshold
    return Detections(found.image_id, found.scores[keep], found.labels[keep], found.boxes_xyxy_px[keep])


def _picture_name(name: str, index: int) -> str:
    return f"{index:05d}_{Path(name).stem}.jpg"


def _coco_rows(found: Detections, name: str, classes: Classes) -> list[dict]:
    rows = []
    for score, label, (x0, y0, x1, y1) in zip(
        found.scores.tolist(), found.labels.tolist(), found.boxes_xyxy_px.tolist(), strict=True
    ):
        rows.append(
            {
                "image_id": found.image_id,
                "file_name": name,
                "category_id": classes.category_ids[label],
                "category": classes.names[label],
                "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
                "score": round(score, 5),
            }
        )
    return rows


def draw(image: np.ndarray, found: Detections, classes: Classes) -> Image.Image:
    """A picture with boxes, names and scores; colours belong to classes.

    Args:
        image: uint8 [H, W, 3].
        found: boxes in pixels of this image.
    """
    picture = Image.fromarray(image)
    canvas = ImageDraw.Draw(picture)
    scale = max(picture.size)
    width, font = max(1, round(scale / 320)), ImageFont.load_default(size=max(10, round(scale / 45)))
    order = np.argsort(found.scores, kind="stable")  # the surest on top
    for i in order.tolist():
        label = int(found.labels[i])
        colour = _colour(label)
        x0, y0, x1, y1 = found.boxes_xyxy_px[i].tolist()
        canvas.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=colour, width=width)
        text = f"{classes.names[label] or label} {found.scores[i]:.2f}"
        left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
        x, y = max(0, min(x0, picture.width - right)), max(0, y0 - bottom - 2)
        canvas.rectangle((x, y, x + right + 2, y + bottom + 2), fill=colour)
        canvas.text((x + 1, y), text, fill="black", font=font)
    return picture


def _colour(label: int) -> tuple[int, int, int]:
    import colorsys

    # steps of the golden ratio around the colour wheel keep neighbours apart
    r, g, b = colorsys.hsv_to_rgb(label * 0.61803399 % 1, 0.65, 1.0)
    return int(255 * r), int(255 * g), int(255 * b)
