"""COCO evaluation: ``score`` a list of detections, or ``run`` a whole split over all processes."""

from detr_accel.evaluate.classes import match_classes
from detr_accel.evaluate.coco import Metrics, lost_in_crowds, score
from detr_accel.evaluate.sharded import run

__all__ = ["Metrics", "lost_in_crowds", "match_classes", "run", "score"]
