"""RT-DETR's own ``.pth``, of both versions, and DEIM's: read, and written back as it came.

The weights go there and back unchanged, bit for bit. What such a file has beside them is computed from sizes alone and
is made anew on writing, so that the original's strict loading finds it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from detr_accel import recipe as recipes
from detr_accel.models import rtdetr_architecture, weights
from detr_accel.models import rtdetr_keymaps as keymaps
from detr_accel.models.architecture import count_layers
from detr_accel.models.class_rows import num_labels
from detr_accel.models.coco_classes import assumed, coco_80
from detr_accel.models.keymaps import StateDict
from detr_accel.models.rtdetr_architecture import NAMES, PUBLISHED_HEADS, PUBLISHED_QUERIES, PUBLISHED_SIDE, Told
from detr_accel.models.weights import Loaded
from detr_accel.structures import UserError

EXTRA = "detr_accel"  # the entry of a .pth that holds what the official format has no place for
_STRIDES = (8, 16, 32)


def is_official(state: StateDict) -> bool:
    """Whether these are the original's names, of either version."""
    return keymaps.is_official(state)


def read(raw: StateDict, extra: Any, path: Path, place: str, num_heads: int | None) -> Loaded:
    """
    Args:
        raw: under the file's names.
        extra: the file's entry ``detr_accel``, or None.
        place: of the weights in the file: ``ema.module``, ``model`` or nothing.
        num_heads: where the file cannot tell.
    Raises:
        UserError: no RT-DETR, or sizes that do not fit together.
    """
    state, version = keymaps.from_official(raw), keymaps.version_of(raw)
    scale = next((v for k, v in raw.items() if k.endswith("num_points_scale")), None)
    points = None if scale is None else rtdetr_architecture.points_of(scale)
    told = Told(num_points=points, num_heads=None if points else num_heads)
    meta = {"weights": "ema" if place == "ema.module" else "raw", "source": path.name, "format": "official"}
    meta |= {"version": version, "place": place}
    report = [f"{path.name}: RT-DETR's key names, version {version}, {len(state)} tensors"]
    if (anchors := keymaps.anchors_of(raw)) is not None:
        size = _size_of(anchors, count_layers(state, "decoder.input_proj."))
        if size is not None:
            meta["anchors_size_px"] = list(size)
        if size is not None and size[0] == size[1]:
            told = replace(told, side_px=size[0])
        else:
            shown = "unknown shape" if size is None else f"{size[0]} x {size[1]} (h x w)"
            report.append(f"beware: trained on images of {shown}; here they are squeezed to squares of {told.side_px}")
    if place == "ema.module":
        report.append("weights: the averaged ones (ema.module)")
    if extra:
        recipe, classes = weights.read_extra(extra, f"{path}: entry {EXTRA}")
        report.append(f"class table and recipe: as kept in the file's entry {EXTRA}")
    else:
        recipe = rtdetr_architecture.infer(state, path.stem, path, told)
        classes = assumed(num_labels(state) or 0, coco_80(), "in the order of their category ids", report)
        report += _assumed_lines(recipe.model, version, points is None and num_heads is None)
    weights.check_head(state, classes, path)
    return Loaded(state, recipe, classes, meta, path, report)


def content(loaded: Loaded) -> tuple[dict[str, Any], list[str]]:
    """What ``torch.save`` is to write, and lines to print.

    Raises:
        UserError: the original does not have this detector.
    """
    model = loaded.recipe.model
    _check_backbone(loaded)
    version = loaded.meta.get("version", 2)
    theirs = keymaps.to_official(loaded.state_dict, version)
    lines = [f"key names: those of RT-DETR's version {version}" + (", which DEIM has too" if version == 2 else "")]
    if version == 2:
        height, width = loaded.meta.get("anchors_size_px") or (0, 0)
        if height == width:  # of rectangles our recipe knows nothing, and of squares everything
            height = width = rtdetr_architecture.side_of(loaded.recipe.data)
        theirs |= _buffers(model, height, width)
        lines.append(f"anchors: for images of {height} x {width}, which must be eval_spatial_size there")
    lines += _to_be_told(loaded)
    place = loaded.meta.get("place", "both")  # which one the original takes is its config's use_ema
    found: dict[str, Any] = {"ema": {"module": theirs}} if place in ("ema.module", "both") else {}
    found |= {"model": theirs} if place in ("model", "both") else {}
    found = found if place else theirs
    told = Told(num_points=tuple(model.rtdetr.num_points) if version == 2 else None)
    same_size = version == 2 or rtdetr_architecture.side_of(loaded.recipe.data) == PUBLISHED_SIDE
    plain = same_size and loaded.recipe.data.square and _inferred(loaded, told) == model
    if loaded.classes != coco_80() or not plain:
        found = found if place else {"model": theirs}
        found[EXTRA] = {"classes": loaded.classes.to_json(), "recipe": recipes.dumps(loaded.recipe)}
        lines.append(f"class table and recipe: kept in the entry {EXTRA}, which the official code does not read")
    return found, lines


def _to_be_told(loaded: Loaded) -> list[str]:
    """What would change the original's answers in silence."""
    recipe, classes = loaded.recipe, loaded.classes
    model, r, lines = recipe.model, recipe.model.rtdetr, []
    if not recipe.data.square:
        lines.append(
            "beware: this detector was trained on rectangles (data.square is false), and the original squeezes images "
            "to squares: it answers worse there"
        )
    if model.backbone.pixels != "unit":
        lines.append(
            "beware: this detector's images are normalised with the backbone's mean and deviation, the original's are "
            "not: add that to its transforms, or it finds little"
        )
    small = "silu" if r.query_pos_layers == 3 else "relu"  # as DEIM's configs say, and RT-DETR's
    told = {
        "num_classes": (len(classes), len(coco_80())), "remap_mscoco_category": (classes == coco_80(), True),
        "num_queries": (model.num_queries, PUBLISHED_QUERIES),
        "num_top_queries": (model.num_queries, PUBLISHED_QUERIES), "nhead": (model.num_heads, PUBLISHED_HEADS),
        "cross_attn_method": (r.sampling, "bilinear"), "activation": (r.activation, small),
        "mlp_act": (r.mlp_activation, small),
        "num_points": (list(r.num_points), [4] * len(r.num_points)),
    }  # fmt: skip
    other = [f"{key} {ours}" for key, (ours, published) in told.items() if ours != published]
    lines += [f"its config must say: {', '.join(other)}"] if other else []
    if classes != coco_80() and classes.category_ids != tuple(range(len(classes))):
        pairs = ", ".join(f"{i} is {id}" for i, id in enumerate(classes.category_ids) if id is not None)
        lines.append(f"it answers with labels, which its evaluation takes for category ids: {pairs} in your data")
    return lines


def _inferred(loaded: Loaded, told: Told) -> recipes.Model | None:
    try:
        return rtdetr_architecture.infer(loaded.state_dict, "x", "x", told).model
    except UserError:
        return None


def _check_backbone(loaded: Loaded) -> None:
    backbone = loaded.recipe.model.backbone
    named = rtdetr_architecture.name_resnet(loaded.state_dict)
    base = backbone.name.split(".")[0]
    if named is None or named.split(".")[0] != base or base not in NAMES.values():
        raise UserError(
            f"the original RT-DETR has {', '.join(NAMES.values())} only, not {backbone.name}: keep this detector "
            "in our format"
        )
    if base in (NAMES[18], NAMES[34]) and not rtdetr_architecture.has_first_shortcut(loaded.state_dict):
        raise UserError(
            f"the original's {base} has a convolution in its first shortcut and this one has none: train with "
            "model.backbone.first_shortcut=true, or keep this detector in our format"
        )


def _assumed_lines(model: recipes.Model, version: int, heads_assumed: bool) -> list[str]:
    r = model.rtdetr
    lines = [
        f"architecture: {model.backbone.name}, encoder {r.encoder_dim} wide, {model.num_encoder_layers} + "
        f"{model.num_decoder_layers} layers, decoder {model.hidden_dim} wide, activation {r.activation}",
        "pixels: taken as 0..1 without mean and deviation, as the original has them",
    ]
    if not r.learned_queries:
        lines.append(f"num_queries: the weights do not show it; taken as {PUBLISHED_QUERIES}")
    if version == 2:
        lines.append(
            f"sampling: the weights do not show it; taken as {r.sampling} (published files with dsp in their name have "
            "discrete: convert them, then set model.rtdetr.sampling in the new recipe.yaml)"
        )
    if heads_assumed:
        points = ", ".join(map(str, r.num_points))
        lines.append(f"num_heads: the weights do not show it; taken as {model.num_heads}, with points {points}")
    return lines


def _size_of(anchors: torch.Tensor, num_levels: int) -> tuple[int, int] | None:
    """The (h, w) of the images that a file's anchors [N, 4] are for; None where they are none of the original's."""
    if not 1 <= num_levels <= 6:
        return None
    strides = _strides(num_levels)
    area = len(anchors) / sum(1 / s**2 for s in strides)
    near = range(round(math.sqrt(area)) - _STRIDES[-1], round(math.sqrt(area)) + _STRIDES[-1] + 1)
    squares = [(side, side) for side in sorted(near, key=lambda side: side % _STRIDES[-1] != 0)]
    for h, w in [*squares, *((h, round(area / h)) for h in range(_STRIDES[-1], 4097, _STRIDES[-1]))]:
        if min(h, w) < _STRIDES[-1] or sum(int(h / s) * int(w / s) for s in strides) != len(anchors):
            continue
        # cells lie 0.05 apart, and a file may be in half precision
        if torch.allclose(_anchors(num_levels, h, w)[0], anchors, atol=1e-2):
            return h, w
    return None


def _anchors(num_levels: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The original's: float32 [N, 4], infinite where there is none, and whether there is one, bool [N, 1]."""
    rows = []
    for level, stride in enumerate(_strides(num_levels)):
        h, w = int(height / stride), int(width / stride)
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        centre = (torch.stack((x, y), -1).flatten(0, 1) + 0.5) / torch.tensor([w, h], dtype=torch.float32)
        rows.append(torch.cat((centre, torch.full_like(centre, 0.05 * 2.0**level)), -1))
    boxes = torch.cat(rows)
    valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)
    return torch.where(valid, torch.log(boxes / (1 - boxes)), torch.inf), valid


def _buffers(model: recipes.Model, height: int, width: int) -> StateDict:
    """anchors float32 [1, N, 4], valid_mask bool [1, N, 1] and, of each decoder layer, num_points_scale [P]."""
    anchors, valid = _anchors(len(model.rtdetr.num_points), height, width)
    scale = rtdetr_architecture.scale_of(model.rtdetr.num_points)
    layers = range(model.num_decoder_layers)
    scales = {f"decoder.decoder.layers.{i}.cross_attn.num_points_scale": scale.clone() for i in layers}
    return {"decoder.anchors": anchors[None], "decoder.valid_mask": valid[None]} | scales


def _strides(num_levels: int) -> list[int]:
    return [_STRIDES[-1] >> i for i in range(num_levels)][::-1]
