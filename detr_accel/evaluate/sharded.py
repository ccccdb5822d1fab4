"""Evaluation over several processes: every image once, no padding, one exchange at the end.

Each process predicts its own share and keeps small arrays; the shares are gathered once, checked for completeness and
scored on the main process, and every process gets the result. Communication comes in as plain callables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np

from detr_accel.evaluate.coco import Metrics, score
from detr_accel.structures import Batch, Detections, Lost, UserError


@dataclass
class Share:
    """What one process found, packed: n images, K detections."""

    image_ids: np.ndarray  # int64 [n]
    counts: np.ndarray  # int64 [n], detections of each image
    scores: np.ndarray  # float32 [K]
    labels: np.ndarray  # int32 [K]
    boxes_xyxy_px: np.ndarray  # float32 [K, 4]
    lost: tuple[Lost, ...] = ()  # images of its batches that could not be read
    error: str | None = None  # a process that failed says so here, instead of leaving the others waiting


def run(
    predict: Callable[[Batch], list[Detections]],
    batches: Iterable[Batch],
    *,
    ground_truth: dict,
    to_category: dict[int, int],
    gather: Callable[[list], list] = lambda shares: shares,
    broadcast: Callable[[list], list] | None = None,
    is_main: bool = True,
    max_detections: int = 100,
    num_queries: int | None = None,
    backend: str = "hotcoco",
    progress: Callable[[Iterable[Batch]], Iterable[Batch]] = lambda batches: batches,
    keep_images: Collection[int] = (),
) -> Metrics:
    """Predict this process's batches, and score those of all processes together. An image that could not be read (its
    batch says so) counts in neither detections nor ground truth, and is named in ``Metrics.lost``.

    The same numbers to the last digit for any number of processes, as long as ``predict`` sees the same batches.

    Args:
        predict: one Detections per image of the batch.
        batches: this process's share of the split.
        ground_truth: COCO json of the whole split.
        to_category: the model's label -> the data set's category id.
        gather: a list on each process -> all of them joined, on every process (``accelerate.utils.gather_object``).
            Called once.
        broadcast: the main process's list -> the same on every process (``accelerate.utils.broadcast_object_list``).
            Called once. Without it every process scores for itself, with the same result and more work.
        is_main: whether this process scores, when there is a broadcast.
        progress: wraps the batches, to show how far it is.
        keep_images: image ids whose detections come back in ``Metrics.kept``, on the processes that score.
    Returns:
        The same Metrics on every process.
    Raises:
        UserError: on every process alike, when an image is missing or counted twice or the prediction failed somewhere.
    """
    keep = set(keep_images)
    share, failure = _predict_share(predict, progress(batches))
    shares = gather([share])
    kept: dict[int, Detections] = {}
    outcome: Metrics | str | None = None
    if is_main or broadcast is None:
        try:
            detections, lost = _join(shares)
            ground_truth = _without(ground_truth, lost)
            _check_each_once([d.image_id for d in detections], ground_truth)
            outcome = score(
                ground_truth, detections, to_category, max_detections=max_detections, num_queries=num_queries,
                backend=backend,
            )  # fmt: skip
            outcome = replace(outcome, lost=lost)
            kept = {d.image_id: d for d in detections if d.image_id in keep}
        except Exception as error:  # told to all, so that no process goes on alone
            outcome = str(error) if isinstance(error, UserError) else f"scoring failed: {type(error).__name__}: {error}"
            failure = failure if isinstance(error, UserError) else error
    if broadcast is not None:
        outcome = broadcast([outcome])[0]
    if failure is not None:
        raise failure
    if isinstance(outcome, str):
        raise UserError(outcome)
    assert isinstance(outcome, Metrics)
    return replace(outcome, kept=kept)


def _predict_share(
    predict: Callable[[Batch], list[Detections]], batches: Iterable[Batch]
) -> tuple[Share, Exception | None]:
    found: list[Detections] = []
    lost: list[Lost] = []
    try:
        for batch in batches:
            lost += batch.lost if isinstance(batch, Batch) else ()
            found += predict(batch) if len(batch) else []
    except Exception as error:  # the other processes wait in gather: reach it first, raise after
        return _pack([], f"{type(error).__name__}: {error}"), error
    return _pack(found, lost=tuple(lost)), None


def _pack(found: list[Detections], error: str | None = None, lost: tuple[Lost, ...] = ()) -> Share:
    def join(parts: list[np.ndarray], dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        return np.concatenate(parts).astype(dtype) if parts else np.zeros(shape, dtype)

    return Share(
        image_ids=np.array([d.image_id for d in found], dtype=np.int64),
        counts=np.array([len(d.scores) for d in found], dtype=np.int64),
        scores=join([d.scores for d in found], np.float32, (0,)),
        labels=join([d.labels for d in found], np.int32, (0,)),
        boxes_xyxy_px=join([d.boxes_xyxy_px.reshape(-1, 4) for d in found], np.float32, (0, 4)),
        lost=lost,
        error=error,
    )


def _join(shares: list[Share]) -> tuple[list[Detections], dict[int, str]]:
    """All detections, and the images that nobody could read."""
    errors = [s.error for s in shares if s.error]
    if errors:
        raise UserError(f"prediction failed during evaluation on {len(errors)} of {len(shares)} processes: {errors[0]}")
    found: list[Detections] = []
    for s in shares:
        ends = np.cumsum(s.counts)
        for image_id, start, end in zip(s.image_ids.tolist(), ends - s.counts, ends, strict=True):
            cut = slice(start, end)
            found.append(Detections(image_id, s.scores[cut], s.labels[cut].astype(np.int64), s.boxes_xyxy_px[cut]))
    return found, dict(sorted(pair for s in shares for pair in s.lost))


def _without(ground_truth: dict, lost: dict[int, str]) -> dict:
    """
    Raises:
        UserError: nothing is left.
    """
    if not lost:
        return ground_truth
    images = [i for i in ground_truth["images"] if i["id"] not in lost]
    if not images:
        raise UserError(f"none of the {len(lost)} validation images can be read; {next(iter(lost.values()))}")
    annotations = [a for a in ground_truth["annotations"] if a["image_id"] not in lost]
    return {**ground_truth, "images": images, "annotations": annotations}


def _check_each_once(image_ids: list[int], ground_truth: dict) -> None:
    """Every image of the split exactly once, or the metric is of some other set."""
    seen = Counter(image_ids)
    wanted = {image["id"] for image in ground_truth["images"]}
    twice = sorted(i for i, n in seen.items() if n > 1)
    missing, unknown = sorted(wanted - seen.keys()), sorted(seen.keys() - wanted)
    for what, ids in (("evaluated twice", twice), ("not evaluated", missing), ("not in the ground truth", unknown)):
        if ids:
            named = ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
            raise UserError(f"{len(ids)} of {len(wanted)} validation images {what} (ids {named}); the metric would lie")
