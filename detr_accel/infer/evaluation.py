"""``detr-accel eval``: COCO metrics of a checkpoint, on its own split or on another folder."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from detr_accel import data, evaluate, models
from detr_accel import recipe as recipes
from detr_accel.infer.detector import FREE, Detector, load
from detr_accel.monitor.memory import is_out_of_memory
from detr_accel.structures import Detections, UserError, check_free, writing


def evaluate_checkpoint(
    path: str | Path,
    *,
    split: str | None = None,
    data_folder: Path | None = None,
    decoder_layers: int | None = None,
    device: str = "auto",
    precision: str = "float32",
    overrides: Sequence[str] = (),
    detections: Path | None = None,
    quiet: bool = False,
) -> tuple[evaluate.Metrics, list[str]]:
    """Evaluate a run or a checkpoint.

    Args:
        split: ``train``, ``val`` or ``test``; None takes val, or the only one of data_folder.
        data_folder: a COCO folder; None takes the data set in the checkpoint's recipe, cut as it was for the training.
            Classes are matched by name.
        decoder_layers, device, precision: see ``detector.load``.
        overrides: ``key=value`` for the checkpoint's recipe, in its sections data and evaluate, or one of
            ``detector.FREE``.
        detections: a new file for what was found, in COCO's result format with the data set's own ids.
    Returns:
        the metrics, and the sentences that say what was evaluated on what, and how.
    Raises:
        UserError: anything the person can mend, in one sentence.
    """
    if detections is not None:
        check_free(detections)
        with writing(detections):  # now, and not after an hour
            detections.parent.mkdir(parents=True, exist_ok=True)
            detections.touch()
            detections.unlink()
    keys = [text.partition("=")[0].strip() for text in overrides]
    of_model = [text for key, text in zip(keys, overrides, strict=True) if key in FREE]
    of_data = [text for text in overrides if text not in of_model]
    for key, text in zip(keys, overrides, strict=True):
        if key not in FREE and key.split(".")[0] not in ("data", "evaluate"):
            near = difflib.get_close_matches(key, FREE, n=1, cutoff=0.8)
            known = f"keys of data and evaluate, and {' and '.join(FREE)} of an RT-DETR"
            rest = f"an evaluation takes {known}; the rest belongs to the weights"
            raise UserError(f"{text}: " + (f"did you mean {near[0]}?" if near else rest))
    detector = load(path, decoder_layers=decoder_layers, device=device, precision=precision, overrides=of_model)
    detector.recipe = recipe = recipes.changed(detector.recipe, of_data) if of_data else detector.recipe
    source = _source(detector, split, data_folder)
    to_category, said = evaluate.match_classes(detector.classes, source.classes)
    said += _trained_on(detector, source, data_folder)
    batches = data.eval_batches(recipe, source, rank=0, num_ranks=1, mean=detector.model.mean, std=detector.model.std)
    total = -(-len(source) // recipe.evaluate.batch)
    num_queries, few = _queries(detector, asked=FREE[0] in keys)
    try:
        metrics = evaluate.run(
            lambda batch: detector(batch, recipe.evaluate.max_detections), batches,
            ground_truth=source.ground_truth(), to_category=to_category,
            max_detections=recipe.evaluate.max_detections, num_queries=num_queries,
            backend=recipe.evaluate.backend,
            progress=lambda it: tqdm(it, total=total, desc="evaluate", unit="batch", disable=quiet or None),
            keep_images=[source.image_id(i) for i in range(len(source))] if detections is not None else (),
        )  # fmt: skip
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"evaluation ran out of memory: {_smaller(recipe.evaluate.batch)}") from error
    lost = [f"left out of the evaluation: {why}" for why in metrics.lost.values()]
    if detections is not None:
        lost.append(_write(detections, metrics.kept, to_category))
    return metrics, [*detector.notes, f"data: {data.describe(source)}", *said, *few, *lost, _precision_note(detector)]


def _queries(detector: Detector, *, asked: bool) -> tuple[int, list[str]]:
    """How many detections of an image there can be, and words where that is fewer than the recipe has queries.

    Args:
        asked: somebody set their number for this evaluation.
    Raises:
        UserError: more were asked for than there can be.
    """
    recipe, model = detector.recipe, detector.model
    side = min(recipe.data.eval_size, recipe.data.eval_max_size)
    num = models.most_queries(recipe, model, side)
    if num == recipe.model.num_queries:
        return num, []
    if asked:
        models.check_cells(recipe, model, train=False)
    return num, [f"queries: {num} of {recipe.model.num_queries}, as squares of {side} pixels have no more cells"]


def _write(path: Path, found: dict[int, Detections], to_category: dict[int, int]) -> str:
    rows = [
        {"image_id": image_id, "category_id": to_category[label], "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
        for image_id, one in found.items()
        for label, score, (x0, y0, x1, y1) in zip(
            one.labels.tolist(), one.scores.tolist(), one.boxes_xyxy_px.tolist(), strict=True
        )
        if label in to_category and math.isfinite(score + x0 + y0 + x1 + y1)
    ]
    try:
        with writing(path):
            path.write_text(json.dumps(rows), encoding="utf-8")
    except UserError as error:  # the figures are there all the same
        return f"beware: {error}"
    return f"wrote {path}: {len(rows)} detections in COCO's result format"


def _smaller(batch: int) -> str:
    fewer = f"evaluate.batch below {batch}, or " if batch > 1 else ""
    return f"set {fewer}a smaller data.eval_size"


def _source(detector: Detector, split: str | None, folder: Path | None) -> data.Source:
    root = detector.recipe.data.root
    if folder is None and root is not None and not Path(root).expanduser().exists():
        keeps = ", which keeps the run's own split" if detector.split is not None else ""
        raise UserError(
            f"there is no folder {root}, where this checkpoint's recipe has its data: where it has moved give "
            f"data.root=FOLDER{keeps}; for another data set give --data FOLDER"
        )
    return data.eval_source(detector.recipe, folder, split, detector.split)


def _trained_on(detector: Detector, source: data.Source, folder: Path | None) -> list[str]:
    """Where another folder's images have ids that this run was trained on, as of a json that it has cut in two."""
    trained = set(detector.split["train"]) if folder is not None and detector.split is not None else set()
    seen = sum(source.image_id(i) in trained for i in range(len(source)))
    if not seen:
        return []
    return [
        f"beware: {seen} of {len(source)} images have the ids of images that this run was trained on; if it is the "
        f"same set, give data.root={folder} instead, which evaluates what was kept for validation"
    ]


def _precision_note(detector: Detector) -> str:
    """In which precision these figures were taken, and the run's own where they differ."""
    sentence = f"evaluated in {detector.precision}"
    trained = detector.meta.get("precision") or detector.recipe.precision
    if trained in ("bf16", "fp16") and trained != detector.precision:
        sentence += f"; the run took its own figures in {trained}, as --precision {trained} does"
    return sentence
