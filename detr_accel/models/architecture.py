"""Which detector a bag of weights is, read off its names and shapes.

A foreign checkpoint says nothing about its architecture; the shapes say all of it except the number of heads (DETR: 8)
and whether the last stage is dilated (DC5), which leave the shapes as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from detr_accel import recipe as recipes
from detr_accel.models.keymaps import StateDict, is_counter
from detr_accel.structures import UserError

_RESNETS = {  # kind of block, blocks per layer, width of layer1's first convolution, inputs of its second -> timm name
    ("basic", (2, 2, 2, 2), 64, 64): "resnet18.tv_in1k",
    ("basic", (3, 4, 6, 3), 64, 64): "resnet34.tv_in1k",
    ("bottleneck", (3, 4, 6, 3), 64, 64): "resnet50.tv_in1k",
    ("bottleneck", (3, 4, 23, 3), 64, 64): "resnet101.tv_in1k",
    ("bottleneck", (3, 8, 36, 3), 64, 64): "resnet152.tv_in1k",
    ("bottleneck", (3, 4, 6, 3), 128, 4): "resnext50_32x4d.tv_in1k",
    ("bottleneck", (3, 4, 23, 3), 256, 8): "resnext101_32x8d.tv_in1k",
    ("bottleneck", (3, 4, 6, 3), 128, 128): "wide_resnet50_2.tv_in1k",
    ("bottleneck", (3, 4, 23, 3), 128, 128): "wide_resnet101_2.tv_in1k",
}
_BODY = "backbone.body."
_PLAIN_RESNET = re.compile(
    r"(conv1|bn1|layer[1-4]\.\d+\.(conv[123]|bn[123]|downsample\.[01]))"
    r"\.(weight|bias|running_mean|running_var|num_batches_tracked)"
)
_NEEDED = (
    *("query_embed.weight", "input_proj.weight", "class_embed.weight", "class_embed.bias"),
    "transformer.decoder.layers.0.linear1.weight",
)
DATA_ROOT = "/data/coco"  # stands in the recipe of a foreign checkpoint, which knows no data set


def body_of(state: StateDict) -> StateDict:
    """The backbone's own entries, without prefix."""
    return {k.removeprefix(_BODY): v for k, v in state.items() if k.startswith(_BODY)}


def name_resnet(state: StateDict) -> str | None:
    """timm's name of the torchvision ResNet in these weights, or None where it is another backbone."""
    body = body_of(state)
    if not {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer1.0.conv2.weight"} <= body.keys():
        return None
    if not all(_PLAIN_RESNET.fullmatch(name) for name in body):
        return None
    block = "bottleneck" if "layer1.0.conv3.weight" in body else "basic"
    depths = tuple(count_layers(body, f"layer{i}.") for i in (1, 2, 3, 4))
    width, inputs = len(body["layer1.0.conv1.weight"]), body["layer1.0.conv2.weight"].shape[1]
    return _RESNETS.get((block, depths, width, inputs))


def count_layers(state: StateDict, prefix: str) -> int:
    """How many numbered parts stand behind ``prefix``."""
    numbers = {k.removeprefix(prefix).split(".")[0] for k in state if k.startswith(prefix)}
    return len(numbers)


def infer(
    state: StateDict,
    name: str,
    source: str | Path,
    *,
    backbone: str | None = None,
    dc5: bool = False,
    num_heads: int = 8,
    dropout: float = 0.1,
    pixels: str = "timm",
    sizes: Mapping[str, Any] = MappingProxyType({}),
) -> recipes.Recipe:
    """The recipe of foreign weights that bear our names.

    Args:
        name: of the recipe; characters that it may not have become ``-``.
        source: for messages.
        backbone: timm name; read off the shapes where it is None.
        sizes: keys of ``data``.
    Raises:
        UserError: a part is missing that every DETR has, or the backbone is none that is known.
    """
    missing = [k for k in _NEEDED if k not in state]
    if missing:
        raise UserError(f"{source} holds no DETR detector: no {', '.join(missing)} among its {len(state)} tensors")
    backbone = backbone or name_resnet(state)
    if backbone is None:
        raise UserError(
            f"{source}: its backbone is none of torchvision's ResNets, so its name cannot be read off the weights; "
            "convert it from a transformers folder, whose config.json names it"
        )
    num_queries, hidden_dim = state["query_embed.weight"].shape
    if hidden_dim % num_heads:
        raise UserError(f"{source}: width {hidden_dim} is no multiple of {num_heads} heads; say num_heads")
    model = recipes.Model(
        backbone=recipes.Backbone(name=backbone, norm="frozen", frozen_stages=2, dc5=dc5, pixels=pixels),
        hidden_dim=hidden_dim,
        num_heads=num_heads,
        num_encoder_layers=count_layers(state, "transformer.encoder.layers."),
        num_decoder_layers=count_layers(state, "transformer.decoder.layers."),
        dim_feedforward=len(state["transformer.decoder.layers.0.linear1.weight"]),
        dropout=dropout,
        num_queries=num_queries,
    )
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-") or "converted"
    return recipes.Recipe(name=name, data=recipes.Data(root=DATA_ROOT, **sizes), model=model)


def check(state: StateDict, recipe: recipes.Recipe, num_classes: int, source: str | Path) -> None:
    """Refuse weights that are not exactly those of the recipe's model (batch counters aside).

    Raises:
        UserError: with the first differences, explained where they are those of a known variant.
    """
    from detr_accel import models  # the builder imports this package

    own = models.build(recipe, num_classes, device="meta", load_weights=False).state_dict()
    unexpected = [k for k in state if k not in own and not is_counter(k)]
    missing = [k for k in own if k not in state and not is_counter(k)]
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    if not unexpected + missing + shapes:
        return
    for part, sentence in _VARIANTS.items():
        if any(k.startswith(part) for k in unexpected):
            raise UserError(f"{source} {sentence}")
    faults = [f"{k} is unexpected" for k in unexpected] + [f"{k} is missing" for k in missing]
    faults += [f"{k} is {list(state[k].shape)} instead of {list(own[k].shape)}" for k in shapes]
    more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
    raise UserError(f"{source} is not a detector that this toolkit has: {'; '.join(faults[:3])}{more}")


_VARIANTS = {
    "transformer.encoder.norm.": "was trained with --pre_norm, which this toolkit's DETR does not have",
    "backbone.1.": "has learned position embeddings; only sine positions, those of the published models, are supported",
}


def differing(asked: recipes.Model, told: recipes.Model) -> list[str]:
    """What to set in a recipe of the same detector to start from a source. Fewer layers than it has may stay so."""
    if asked.name != told.name:
        return []
    found = []
    for key in _SETTINGS[told.name]:
        ours, theirs = (_value(model, key) for model in (asked, told))
        if ours != theirs and not (key in _LAYERS and ours < theirs):
            shown = theirs if isinstance(theirs, str) else json.dumps(theirs, separators=(",", ":"))
            found.append(f"model.{key}={shown}")
    return found


def _value(model: recipes.Model, key: str) -> object:
    value: object = model
    for name in key.split("."):
        value = getattr(value, name)
    # which of timm's weights it once began with says nothing about its shapes
    return value.partition(".")[0] if key == "backbone.name" else value


_BACKBONE = ("backbone.name", "backbone.first_shortcut", "backbone.pixels")
_LAYERS = ("num_encoder_layers", "num_decoder_layers")
_BOTH = ("hidden_dim", "num_heads", *_LAYERS, "dim_feedforward")
_SETTINGS = {  # keys of ``model`` that say what the weights are
    "detr": (*_BACKBONE, "backbone.dc5", *_BOTH),
    "rtdetr": (
        *(*_BACKBONE, *_BOTH, "rtdetr.encoder_dim"),
        *("rtdetr.encoder_feedforward", "rtdetr.expansion", "rtdetr.num_blocks", "rtdetr.num_points"),
        *("rtdetr.activation", "rtdetr.mlp_activation", "rtdetr.query_pos_layers", "rtdetr.learned_queries"),
    ),
}
