"""``detr-accel eval``: COCO metrics of a checkpoint, on its own split or on another folder."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from detr_accel import data, evaluate
from detr_accel.infer.detector import load
from detr_accel.structures import UserError


def evaluate_checkpoint(
    path: str | Path,
    *,
    split: str | None = None,
    data_folder: Path | None = None,
    decoder_layers: int | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> tuple[evaluate.Metrics, list[str]]:
    """Evaluate a run or a checkpoint.

    Args:
        split: ``train`` or ``val`` of the data set in the checkpoint's recipe; val when neither this nor data_folder.
        data_folder: a COCO folder; its validation split, or its only one. Classes are matched by name.
        decoder_layers: see ``detector.load``.
    Returns:
        the metrics, and the sentences that say what was evaluated on what.
    """
    detector = load(path, decoder_layers=decoder_layers, device=device)
    source = _source(detector.recipe, split, data_folder)
    to_category, said = evaluate.match_classes(detector.classes, source.classes)
    recipe = detector.recipe
    batches = data.eval_batches(recipe, source, rank=0, num_ranks=1, mean=detector.model.mean, std=detector.model.std)
    total = -(-len(source) // recipe.evaluate.batch)
    metrics = evaluate.run(
        lambda batch: detector(batch, recipe.evaluate.max_detections),
        batches,
        ground_truth=source.ground_truth(),
        to_category=to_category,
        max_detections=recipe.evaluate.max_detections,
        backend=recipe.evaluate.backend,
        progress=lambda it: tqdm(it, total=total, desc="evaluate", unit="batch", disable=quiet or None),
    )
    return metrics, [*detector.notes, *said]


def _source(recipe, split: str | None, folder: Path | None):
    if folder is not None:
        return data.eval_source(recipe, folder, "val")
    if recipe.data.root is not None and not Path(recipe.data.root).is_dir():
        raise UserError(
            f"there is no folder {recipe.data.root}, where this checkpoint's recipe has its data: give --data FOLDER"
        )
    splits = data.build(recipe)
    return splits.train if split == "train" else splits.val
