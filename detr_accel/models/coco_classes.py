"""The 80 categories of COCO, and the labels that published checkpoints give them: 91 in DETR's, 80 in RT-DETR's.

COCO numbers its categories 1 to 90 with ten gaps. DETR's published heads use the raw category id as the label, so label
0 and the gaps exist in the head and are never used; RT-DETR's count the 80 in the order of their ids. Source: COCO's
own ``instances_val2017.json``, ``categories``.
"""

from __future__ import annotations

from collections.abc import Sequence

from detr_accel.structures import Classes

COCO_NAMES: dict[int, str] = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat",
    10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench", 16: "bird", 17: "cat",
    18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe",
    27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove", 41: "skateboard",
    42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife",
    50: "spoon", 51: "bowl", 52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot",
    58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard",
    77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book",
    85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush",
}  # fmt: skip

NUM_LABELS = 91
_OTHER_NAMES = {  # of Pascal VOC, in transformers' configs of RT-DETR
    "motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant",
    "diningtable": "dining table", "tvmonitor": "tv",
}  # fmt: skip


def coco_91() -> Classes:
    """The class table of the published DETR heads: label = category id, ``None`` at 0 and at the gaps."""
    names = tuple(COCO_NAMES.get(i) for i in range(NUM_LABELS))
    ids = tuple(i if i in COCO_NAMES else None for i in range(NUM_LABELS))
    return Classes(names, ids)


def coco_80() -> Classes:
    """The class table of the published RT-DETR heads: the 80 in the order of their category ids, without gaps."""
    return Classes(tuple(COCO_NAMES.values()), tuple(COCO_NAMES))


def assumed(num_labels: int, published: Classes, as_published: str, report: list[str]) -> Classes:
    """The class table of a file that has none: the published one where the number of labels is its, else numbers.

    Args:
        as_published: what the report says of the first.
    """
    other = "(others: convert the file, then write their names into the new classes.json)"
    if num_labels == len(published):
        report.append(f"class table: COCO's 80 names {as_published}, as in the published models {other}")
        return published
    report.append(
        f"class table: the file has none; its {num_labels} labels are called category 0, category 1, ... {other}"
    )
    return Classes(tuple(f"category {i}" for i in range(num_labels)), tuple(range(num_labels)))


def are_coco_80(names: Sequence[str | None]) -> bool:
    """Whether these are the names of COCO's 80 in their order; the older names of six of them count, too."""
    plain = [_OTHER_NAMES.get(n.lower(), n.lower()) if n else n for n in names]
    return plain == list(COCO_NAMES.values())
