"""COCO evaluation: ``score`` a list of detections, or ``run`` a whole split over all processes."""

from detr_accel.evaluate.classes import match_classes
from detr_accel.evaluate.coco import Metrics, out_of_reach, score
from detr_accel.evaluate.sharded import run

__all__ = ["Metrics", "match_classes", "out_of_reach", "run", "score"]
