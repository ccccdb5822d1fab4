"""How boxes are written where they are not COCO's [x, y, width, height] in pixels, and whether a reading fits."""

from __future__ import annotations

import numpy as np

READINGS = {  # other formats that people export -> left, top, right, bottom
    "[x1, y1, x2, y2]": lambda a, b, c, d: (a, b, c, d),
    "[centre x, centre y, width, height]": lambda a, b, c, d: (a - c / 2, b - d / 2, a + c / 2, b + d / 2),
    "[y, x, height, width]": lambda a, b, c, d: (b, a, b + d, a + c),
}
SLACK = 0.05  # of an image's side, and at least 2 pixels: annotators draw over the border


def inside(left, top, right, bottom, h: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Which boxes lie in their images, a little over the border allowed: bool [N]; everything in pixels."""
    over_w, over_h = np.maximum(2, SLACK * w), np.maximum(2, SLACK * h)
    return (left >= -over_w) & (top >= -over_h) & (right <= w + over_w) & (bottom <= h + over_h)
