"""``detr-accel predict``: pictures with boxes, names and scores, and the detections as COCO json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from detr_accel import data
from detr_accel.infer.detector import Detector, load
from detr_accel.monitor.memory import is_out_of_memory
from detr_accel.structures import Classes, Detections, UserError, writing

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
            file_name; boxes are [left, top, width, height] in pixels of the file; image_id counts the files from 1).
            Where the prediction ends early, the list has what was found until then.
        threshold: least score, 0..1; None takes the one stored with the checkpoint, the best F1 on its validation set.
    Returns:
        counts, notes as printed by the command line, and ``skipped``: the files that could not be read, each with why.
    Raises:
        UserError: no images, an output folder that is also an input, has another prediction or cannot be written, an
            impossible threshold.
    """
    if threshold is not None and not 0 <= threshold <= 1:  # NaN is not, either
        raise UserError(f"--threshold {threshold} is no score: give a number from 0 to 1")
    detector = load(path, decoder_layers=decoder_layers, device=device)
    source = data.ImageFiles(images, lambda files: tqdm(files, "look", unit="file", delay=2, disable=quiet or None))
    _check_out(out, images, source)
    threshold, why = _threshold(threshold, detector)
    found = _Found(list(source.skipped))
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    try:
        _find(detector, source, threshold, quiet, out, found)
    finally:
        with writing(out):
            (out / "detections.json").write_text(json.dumps(found.rows, indent=1), encoding="utf-8")
    return _summary(detector, source, found, threshold, why, out)


@dataclass
class _Found:
    """What a prediction comes to."""

    skipped: list[tuple[str, str]]  # files that could not be read, each with why
    rows: list[dict] = field(default_factory=list)
    undrawn: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)  # files over which the model said numbers that are none


def _find(
    detector: Detector, source: data.ImageFiles, threshold: float, quiet: bool, out: Path, told: _Found
) -> None:
    for index, found in enumerate(_found(detector, source, quiet)):
        name = source.name(index)
        try:
            if isinstance(found, UserError):
                raise found
            picture = source.sample(index).image
        except UserError as error:
            told.skipped.append((name, str(error)))
            continue
        if not (np.isfinite(found.scores).all() and np.isfinite(found.boxes_xyxy_px).all()):
            told.not_finite.append(name)
        found = _above(found, threshold, detector.classes)
        told.rows += _coco_rows(found, name, detector.classes)
        with writing(out):
            try:
                draw(picture, found, detector.classes).save(out / _picture_name(name, found.image_id), quality=92)
            except OSError as error:
                if error.errno is not None:
                    raise
                told.undrawn.append(name)  # a JPEG has 65,500 pixels a side at most


def _found(detector: Detector, source: data.ImageFiles, quiet: bool) -> Iterator[Detections | UserError]:
    """What is in each image, or why it cannot be read."""
    recipe = detector.recipe.model_copy(deep=True)
    recipe.evaluate.batch = 1  # an image's boxes do not depend on what it was padded with
    mean, std = detector.model.mean, detector.model.std
    batches = data.eval_batches(recipe, source, rank=0, num_ranks=1, mean=mean, std=std, keep_faults=True)
    for batch in tqdm(batches, total=len(source), desc="predict", unit="image", disable=quiet or None):
        if isinstance(batch, UserError):
            yield batch
        else:
            try:
                (found,) = detector(batch, recipe.model.num_queries)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                h, w = batch.canvas_px
                more = "; --device cpu may have more" if detector.device.type == "cuda" else ""
                yield UserError(f"memory ran out over {w}x{h} pixels{more}")
            else:
                yield found


def _summary(
    detector: Detector, source: data.ImageFiles, found: _Found, threshold: float, why: str, out: Path
) -> dict:
    skipped, rows, undrawn, not_finite = found.skipped, found.rows, found.undrawn, found.not_finite
    given = len(source.paths) + len(source.skipped)
    done = given - len(skipped)
    notes = [
        *detector.notes,
        f"{len(rows)} objects in {done} images at score >= {threshold:.3f} ({why})",
        f"wrote {out}/detections.json and " + ("pictures" if undrawn else "a picture of each image"),
    ]
    if undrawn:
        notes.append(f"no picture of {', '.join(undrawn)}, as a JPEG cannot be so large; their objects are in the list")
    if source.passed_over:
        others = ", ".join(f"{count} {what}" for what, count in source.passed_over.most_common(6))
        notes.append(f"not looked at, beside the images: {others}")
    if not_finite:
        some = ", ".join(not_finite[:3]) + ", ..." * (len(not_finite) > 3)
        notes.append(
            f"beware: the model's numbers are not finite over {len(not_finite)} images ({some}), and what is not is "
            "left out: look at the weights"
        )
    if skipped:
        notes += [f"skipped {len(skipped)} of {given} files:", *(f"    {reason}" for _, reason in skipped)]
    return {
        "images": done, "objects": len(rows), "threshold": threshold, "out": str(out),
        "skipped": [{"file_name": name, "reason": reason} for name, reason in skipped], "undrawn": undrawn,
        "not_finite": not_finite, "notes": notes,
    }  # fmt: skip


def _check_out(out: Path, given: Sequence[str | Path], source: data.ImageFiles) -> None:
    """
    Raises:
        UserError: a later run would take the pictures for images, a picture would take an image's place, or there is a
            prediction already.
    """
    if (out / "detections.json").is_file():
        raise UserError(
            f"--out {out} holds a prediction already, and its pictures would be mixed with those of this one: choose "
            "another folder, or remove it first"
        )
    if any(Path(path).is_dir() and Path(path).resolve() == out.resolve() for path in given):
        raise UserError(
            f"--out {out} is also a folder of images, and pictures would be mixed with them: choose another"
        )
    inputs = {path.resolve() for path in source.paths}
    for index in range(len(source)):
        picture = out / _picture_name(source.name(index), source.image_id(index))
        if picture.resolve() in inputs:
            raise UserError(f"--out {out}: the picture {picture.name} would overwrite an image: choose another folder")


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


def _above(found: Detections, threshold: float, classes: Classes) -> Detections:
    """What scores enough, has finite numbers and a category: the published heads have labels that no category uses."""
    used = np.array([category is not None for category in classes.category_ids])
    keep = (found.scores >= threshold) & used[found.labels] & np.isfinite(found.boxes_xyxy_px).all(-1)
    return Detections(found.image_id, found.scores[keep], found.labels[keep], found.boxes_xyxy_px[keep])


def _picture_name(name: str, image_id: int) -> str:
    stem = Path(name).stem.encode(errors="surrogateescape")[:200].decode(errors="replace")  # a name has 255 bytes
    return f"{image_id:05d}_{stem}.jpg"


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
