"""Which entries of a detector's weights have a row for each class, and how many rows stand behind those.

DETR: one head with a last row for "no object". RT-DETR: a head for the encoder and one for each decoder layer, and
embeddings of the labels that denoising disturbs, with a last row for empty slots.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from detr_accel.models.keymaps import StateDict

_KINDS = (  # pattern -> rows behind the classes
    (re.compile(r"class_embed\.(weight|bias)"), 1),
    (re.compile(r"decoder\.(enc_score_head|dec_score_head\.\d+)\.(weight|bias)"), 0),
    (re.compile(r"decoder\.denoising_class_embed\.weight"), 1),
)


def class_entries(keys: Iterable[str]) -> dict[str, int]:
    """Entry -> rows behind its classes, of the entries that have a row for each class."""
    return {k: behind for k in keys for pattern, behind in _KINDS if pattern.fullmatch(k)}


def num_labels(state: StateDict) -> int | None:
    """C, read off the class head; None where there is none."""
    for key in ("class_embed.bias", "decoder.enc_score_head.bias"):
        if key in state:
            return len(state[key]) - class_entries([key])[key]
    return None


def pick(state: StateDict, labels: Sequence[int], num: int) -> StateDict:
    """The class entries with only the rows of these labels, of ``num``, and those behind them."""
    found = {}
    for key, behind in class_entries(state).items():
        found[key] = state[key][[*labels, *range(num, num + behind)]].clone()
    return found
