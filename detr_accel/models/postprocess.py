"""From the detector's outputs to detections. Legend: B batch, Q queries, C classes, K detections of an image."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from detr_accel.boxes import cxcywh_to_xyxy
from detr_accel.models.autocast import full_precision
from detr_accel.structures import Detections


@torch.no_grad()
def detections(
    outputs: dict[str, Tensor], image_ids: list[int], orig_sizes_px: Tensor, max_detections: int = 100
) -> list[Detections]:
    """The best class of every query (no threshold, no clipping, no suppression: as DETR), in one transfer.

    Args:
        outputs: pred_logits [B, Q, C + 1], pred_boxes [B, Q, 4] cxcywh 0..1.
        image_ids: B of them.
        orig_sizes_px: [B, 2], (h, w) of the files.
        max_detections: most per image.
    Returns:
        B detections, each sorted by score; equal scores keep the order of the queries.
    """
    logits, boxes = full_precision(outputs["pred_logits"]), full_precision(outputs["pred_boxes"])
    scores, labels = logits.softmax(-1)[..., :-1].max(-1)  # [B, Q]
    host = torch.cat((scores[..., None], labels[..., None].to(scores.dtype), cxcywh_to_xyxy(boxes)), -1).cpu().numpy()
    sizes_px = orig_sizes_px.cpu().numpy().astype(host.dtype)
    found = []
    for image_id, rows, (h, w) in zip(image_ids, host, sizes_px, strict=True):
        order = np.argsort(-rows[:, 0], kind="stable")[:max_detections]
        rows = rows[order]
        boxes_xyxy_px = (rows[:, 2:] * np.array([w, h, w, h], rows.dtype)).astype(np.float32)
        found.append(Detections(image_id, rows[:, 0].astype(np.float32), rows[:, 1].astype(np.int64), boxes_xyxy_px))
    return found
