"""Which RT-DETR a bag of weights is, read off its shapes, under our names.

The shapes say nearly all: depths, widths, layers, points. They do not say the number of queries (published: 300), nor,
in the first version's files, heads and points apart (8 heads). Activations follow from the one shape that is DEIM's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from detr_accel import recipe as recipes
from detr_accel.models.architecture import DATA_ROOT, body_of, count_layers
from detr_accel.models.keymaps import StateDict, is_counter
from detr_accel.structures import UserError

_RESNETS = {  # kind of block, blocks per layer -> timm name
    ("basic", (2, 2, 2, 2)): "resnet18d.ra2_in1k",
    ("basic", (3, 4, 6, 3)): "resnet34d.ra2_in1k",
    ("bottleneck", (3, 4, 6, 3)): "resnet50d.ra2_in1k",
    ("bottleneck", (3, 4, 23, 3)): "resnet101d.ra2_in1k",
    ("bottleneck", (3, 8, 36, 3)): "resnet152d.ra2_in1k",
}
_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_DEEP_RESNET = re.compile(
    r"(conv1\.[036]\.weight|(conv1\.[14]|bn1)\." + _NORM + r"|layer[1-4]\.\d+\."
    r"(conv[123]\.weight|downsample\.1\.weight|(bn[123]|downsample\.2)\." + _NORM + r"))"
)
_NEEDED = (
    *("encoder.input_proj.0.conv.weight", "decoder.enc_output.proj.weight", "decoder.enc_score_head.bias"),
    *("decoder.decoder.layers.0.linear1.weight", "decoder.decoder.layers.0.cross_attn.attention_weights.weight"),
)
PUBLISHED_QUERIES, PUBLISHED_HEADS, PUBLISHED_SIDE = 300, 8, 640
NAMES = {18: "resnet18d", 34: "resnet34d", 50: "resnet50d", 101: "resnet101d"}  # depths that the original has


@dataclass(frozen=True)
class Told:
    """What a file says beside its weights; None: it does not.

    Args:
        num_points: sampling points of a head, for each level; pixels: see ``recipe.Backbone``; activation: of the
            decoder's feed-forward parts; side_px: of the squares that images are squeezed to.
    """

    num_heads: int | None = None
    num_points: tuple[int, ...] | None = None
    num_queries: int | None = None
    pixels: str = "unit"
    sampling: str = "bilinear"
    activation: str | None = None
    dropout: float = 0.0
    num_denoising: int = 100
    label_noise: float = 0.5
    box_noise: float = 1.0
    side_px: int = PUBLISHED_SIDE


def name_resnet(state: StateDict) -> str | None:
    """timm's name of the ResNet-D in these weights, None where the backbone is another."""
    body = body_of(state)
    if "layer1.0.conv1.weight" not in body or not all(_DEEP_RESNET.fullmatch(name) for name in body):
        return None
    block = "bottleneck" if "layer1.0.conv3.weight" in body else "basic"
    return _RESNETS.get((block, tuple(count_layers(body, f"layer{i}.") for i in (1, 2, 3, 4))))


def has_first_shortcut(state: StateDict) -> bool:
    """Whether a ResNet of two-convolution blocks has one more in its first shortcut."""
    body = body_of(state)
    return "layer1.0.downsample.1.weight" in body and "layer1.0.conv3.weight" not in body


def points_of(scale: torch.Tensor) -> tuple[int, ...]:
    """Points for each level, from the buffer in which the second version keeps 1 / n, n times for each level."""
    left, points = [max(1, round(1 / v)) for v in scale.flatten().tolist() if v > 0], []
    while left:
        points.append(left[0])
        left = left[left[0] :]
    return tuple(points)


def scale_of(points: Sequence[int]) -> torch.Tensor:
    """That buffer: float32 [P]."""
    return torch.tensor([1 / n for n in points for _ in range(n)], dtype=torch.float32)


def side_of(data: recipes.Data) -> int:
    """Of the squares that a detector sees, in pixels; the published one where it sees rectangles."""
    return min(data.eval_size, data.eval_max_size) if data.square else PUBLISHED_SIDE


def infer(
    state: StateDict, name: str, source: str | Path, told: Told, *, backbone: str | None = None
) -> recipes.Recipe:
    """The recipe of foreign weights that bear our names.

    Args:
        name: of the recipe; characters that it may not have become ``-``.
        source: for messages.
    Raises:
        UserError: a part is missing that every RT-DETR has, or sizes that no RT-DETR has.
    """
    missing = [k for k in _NEEDED if k not in state] + [
        f"size of {k}" for k, v in state.items() if v.numel() * v.dim() == 0 and not is_counter(k)
    ]
    if missing:
        raise UserError(f"{source} holds no RT-DETR detector: no {', '.join(missing)} among its {len(state)} tensors")
    backbone = backbone or name_resnet(state)
    if backbone is None:
        raise UserError(
            f"{source}: its backbone is none of ResNet-18, 34, 50, 101 in RT-DETR's variant; no other is converted"
        )
    live = any(is_counter(k) for k in state if k.startswith("backbone."))
    part = {
        "name": backbone, "pixels": told.pixels, "norm": "live" if live else "frozen",
        "frozen_stages": 0 if live else 1, "first_shortcut": has_first_shortcut(state),
    }  # fmt: skip
    model = {"name": "rtdetr", "backbone": part, **_sizes(state, source, told)}
    data = {"root": DATA_ROOT, "square": True, "eval_size": told.side_px, "eval_max_size": told.side_px}
    tree: dict[str, Any] = {"data": data, "model": model}
    if model["rtdetr"]["query_pos_layers"] == 3:
        tree["loss"] = {"kind": "mal"}
    tree["name"] = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-") or "converted"
    return recipes.loads(json.dumps(tree), f"{source} (sizes of its weights)")


def _sizes(state: StateDict, source: str | Path, told: Told) -> dict[str, Any]:
    num_levels = count_layers(state, "decoder.input_proj.")
    encoder_dim, hidden_dim = (len(state[k]) for k in _NEEDED[:2])
    num_heads, num_points = _heads_and_points(state, num_levels, source, told)
    if hidden_dim % num_heads or encoder_dim % num_heads:
        raise UserError(
            f"{source}: widths {encoder_dim} and {hidden_dim} are no multiples of {num_heads} heads; say num_heads"
        )
    attention = state.get("encoder.encoder.0.layers.0.linear1.weight", ())
    fused = state.get("encoder.fpn_blocks.0.conv1.conv.weight", ())
    learned = "decoder.tgt_embed.weight" in state
    query_pos_layers = count_layers(state, "decoder.query_pos_head.layers.")
    deim = query_pos_layers == 3
    num_queries = len(state["decoder.tgt_embed.weight"]) if learned else told.num_queries or PUBLISHED_QUERIES
    rtdetr = {
        "encoder_dim": encoder_dim,
        "encoder_feedforward": len(attention) or 1024,
        "expansion": len(fused) / encoder_dim if len(fused) else 1.0,
        "num_blocks": count_layers(state, "encoder.fpn_blocks.0.bottlenecks.") or 3,
        "num_points": list(num_points),
        "sampling": told.sampling,
        "activation": told.activation or ("silu" if deim else "relu"),
        "mlp_activation": "silu" if deim else "relu",
        "query_pos_layers": query_pos_layers,
        "learned_queries": learned,
        "num_denoising": told.num_denoising if "decoder.denoising_class_embed.weight" in state else 0,
        "label_noise": told.label_noise,
        "box_noise": told.box_noise,
    }
    return {
        "rtdetr": rtdetr, "hidden_dim": hidden_dim, "num_heads": num_heads, "num_queries": num_queries,
        "num_encoder_layers": count_layers(state, "encoder.encoder.0.layers."),
        "num_decoder_layers": count_layers(state, "decoder.decoder.layers."),
        "dim_feedforward": len(state["decoder.decoder.layers.0.linear1.weight"]), "dropout": float(told.dropout),
    }  # fmt: skip


def _heads_and_points(
    state: StateDict, num_levels: int, source: str | Path, told: Told
) -> tuple[int, tuple[int, ...]]:
    """The weights know only the product of heads and points."""
    product = len(state["decoder.decoder.layers.0.cross_attn.attention_weights.weight"])
    points = told.num_points
    heads = told.num_heads or (product // sum(points) if points else PUBLISHED_HEADS)
    if points is None:
        points = (max(1, product // (heads * max(1, num_levels))),) * max(1, num_levels)
    if heads * sum(points) != product:
        raise UserError(
            f"{source}: {heads} heads do not fit its {product} sampling weights of {num_levels} levels; say num_heads"
        )
    return heads, points
