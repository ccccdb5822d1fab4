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
    outputs: dict[str, Tensor],
    image_ids: list[int],
    orig_sizes_px: Tensor,
    max_detections: int = 100,
    has_background: bool = True,
) -> list[Detections]:
    """The best of each image (no threshold, no clipping, no suppression), in one transfer.

    Args:
        outputs: pred_logits [B, Q, C + 1] (or [B, Q, C]), pred_boxes [B, Q, 4] cxcywh 0..1.
        image_ids: B of them.
        orig_sizes_px: [B, 2], (h, w) of the files.
        max_detections: most per image.
        has_background: a query is one object or none, and says its best class (DETR); otherwise classes are
            independent, and one query may say several (RT-DETR).
    Returns:
        B detections, each sorted by score; equal scores keep the order of the queries.
    """
    logits, boxes = full_precision(outputs["pred_logits"]), full_precision(outputs["pred_boxes"])
    if has_background:
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)  # [B, Q]
        queries = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    else:
        scores = logits.sigmoid().flatten(1)  # [B, Q * C]
        num = min(max_detections, scores.shape[1])
        # stable, unlike topk: equal scores must not depend on the size of the batch
        scores, place = (t[:, :num] for t in scores.sort(dim=1, descending=True, stable=True))
        queries, labels = place // logits.shape[-1], place % logits.shape[-1]
    boxes = cxcywh_to_xyxy(boxes).gather(1, queries[..., None].expand(-1, -1, 4))
    host = torch.cat((scores[..., None], labels[..., None].to(scores.dtype), boxes), -1).cpu().numpy()
    sizes_px = orig_sizes_px.cpu().numpy().astype(host.dtype)
    found = []
    for image_id, rows, (h, w) in zip(image_ids, host, sizes_px, strict=True):
        order = np.argsort(-rows[:, 0], kind="stable")[:max_detections]
        rows = rows[order]
        boxes_xyxy_px = (rows[:, 2:] * np.array([w, h, w, h], rows.dtype)).astype(np.float32)
        found.append(Detections(image_id, rows[:, 0].astype(np.float32), rows[:, 1].astype(np.int64), boxes_xyxy_px))
    return found
