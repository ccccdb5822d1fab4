"""COCO evaluation: ``score`` a list of detections, or ``run`` a whole split over all processes."""

from detr_accel.evaluate.classes import match_classes
from detr_accel.evaluate.coco import Metrics, beyond_limits, score
from detr_accel.evaluate.sharded import run

__all__ = ["Metrics", "beyond_limits", "match_classes", "run", "score"]
