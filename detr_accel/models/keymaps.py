"""The names that three programs give to the same DETR weights, both ways and without loss.

Ours are the official ones with ``backbone.body.`` for ``backbone.0.body.``. transformers prefixes ``model.``, renames
the parts of a layer and keeps query, key and value apart where the official code has one ``in_proj``. Its files come in
old names (the Hub's, and what ``save_pretrained`` still writes) and in the names of version 5's modules; and with two
backbones, timm's (the official names) and its own ResNet ("no timm"). All are read; old names are written.

Legend: D hidden_dim.
"""

from __future__ import annotations

import re

import torch

StateDict = dict[str, torch.Tensor]

_PREFIXES = {  # ours -> transformers
    "backbone.body.": "model.backbone.conv_encoder.model.",
    "input_proj.": "model.input_projection.",
    "query_embed.": "model.query_position_embeddings.",
    "transformer.decoder.norm.": "model.decoder.layernorm.",
    "class_embed.": "class_labels_classifier.",
    "bbox_embed.": "bbox_predictor.",
}
_FEED_FORWARD = {"linear1.": "fc1.", "linear2.": "fc2."}
_LAYER = {  # the parts of one layer: ours -> transformers; the in_proj of an attention is cut in three
    "encoder": {
        "self_attn.": "self_attn.",
        "norm1.": "self_attn_layer_norm.",
        "norm2.": "final_layer_norm.",
        **_FEED_FORWARD,
    },
    "decoder": {
        "self_attn.": "self_attn.",
        "multihead_attn.": "encoder_attn.",
        "norm1.": "self_attn_layer_norm.",
        "norm2.": "encoder_attn_layer_norm.",
        "norm3.": "final_layer_norm.",
        **_FEED_FORWARD,
    },
}
_OUR_LAYER = re.compile(r"^transformer\.(encoder|decoder)\.layers\.(\d+)\.(.+)$")
_THEIR_LAYER = re.compile(r"^model\.(encoder|decoder)\.layers\.(\d+)\.(.+)$")
_VERSION_5 = (  # names of transformers 5's modules -> names on the Hub
    (re.compile(r"^model\.backbone\.model\."), "model.backbone.conv_encoder.model."),
    (re.compile(r"_attn\.o_proj\."), "_attn.out_proj."),
    (re.compile(r"^(model\.(?:en|de)coder\.layers\.\d+)\.mlp\.(fc[12])\."), r"\1.\2."),
)
_QKV = re.compile(r"^(.+_attn)\.([qkv])_proj\.(weight|bias)$")
_IN_PROJ = re.compile(r"^(.+_attn)\.in_proj_(weight|bias)$")

MASKED = "{} is a DETR with mask heads (panoptic or segmentation); only detectors can be converted"


def strip_wrappers(key: str) -> str:
    """Without what DataParallel, DDP and torch.compile put before or into a name."""
    while key.startswith("module."):
        key = key.removeprefix("module.")
    return ".".join(part for part in key.split(".") if part != "_orig_mod")


def is_counter(key: str) -> bool:
    """Whether the entry is live BatchNorm's batch counter, which frozen normalisation does not have."""
    return key.endswith(".num_batches_tracked")


def from_official(state: StateDict) -> StateDict:
    return {re.sub(r"^backbone\.0\.body\.", "backbone.body.", strip_wrappers(k)): v for k, v in state.items()}


def to_official(state: StateDict) -> StateDict:
    return {re.sub(r"^backbone\.body\.", "backbone.0.body.", k): v for k, v in state.items() if not is_counter(k)}


def is_transformers(state: StateDict) -> bool:
    return any(k.startswith(("model.encoder.", "model.decoder.", "class_labels_classifier.")) for k in state)


def is_masked(state: StateDict) -> bool:
    """Whether the weights are those of a DETR with a mask head (panoptic, segmentation)."""
    return any(k.startswith(("detr.", "mask_head.", "bbox_attention.")) for k in state)


def from_transformers(state: StateDict) -> StateDict:
    """transformers' DETR weights, old or new names, timm or own ResNet, under our names.

    A name that no rule knows is kept as it is, for the caller to refuse.
    """
    ours: StateDict = {}
    parts: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        name = _rename_from(key)
        if match := _QKV.match(name):
            parts.setdefault((match[1], match[3]), {})[match[2]] = value
        else:
            ours[name] = value
    for (attention, kind), qkv in parts.items():
        if set(qkv) == set("qkv"):
            ours[f"{attention}.in_proj_{kind}"] = torch.cat([qkv["q"], qkv["k"], qkv["v"]])  # [3D, D] or [3D]
        else:
            ours |= {f"{attention}.{letter}_proj.{kind}": value for letter, value in qkv.items()}
    return ours


def to_transformers(state: StateDict, *, own_resnet: bool = False) -> StateDict:
    """Our weights under the names on the Hub; ``own_resnet`` for the ResNet of transformers instead of timm's."""
    theirs: StateDict = {}
    for key, value in state.items():
        if is_counter(key):
            continue
        name = _rename_to(key, own_resnet)
        if match := _IN_PROJ.match(name):
            for letter, rows in zip("qkv", value.chunk(3), strict=True):  # [3D, D] -> 3 x [D, D]
                theirs[f"{match[1]}.{letter}_proj.{match[2]}"] = rows.contiguous()
        else:
            theirs[name] = value
    return theirs


def _rename_from(key: str) -> str:
    key = strip_wrappers(key)
    for pattern, replacement in _VERSION_5:
        key = pattern.sub(replacement, key)
    if match := _THEIR_LAYER.match(key):
        stack, index, rest = match.groups()
        rest = _swap_prefix(rest, {theirs: ours for ours, theirs in _LAYER[stack].items()})
        return f"transformer.{stack}.layers.{index}.{rest}"
    key = _swap_prefix(key, {theirs: ours for ours, theirs in _PREFIXES.items()})
    if key.startswith("backbone.body."):
        return "backbone.body." + _from_own_resnet(key.removeprefix("backbone.body."))
    return key


def _rename_to(key: str, own_resnet: bool) -> str:
    if match := _OUR_LAYER.match(key):
        stack, index, rest = match.groups()
        return f"model.{stack}.layers.{index}.{_swap_prefix(rest, _LAYER[stack])}"
    if own_resnet and key.startswith("backbone.body."):
        key = "backbone.body." + _to_own_resnet(key.removeprefix("backbone.body."))
    return _swap_prefix(key, _PREFIXES)


def _swap_prefix(key: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def _from_own_resnet(name: str) -> str:
    name = re.sub(r"^embedder\.embedder\.convolution\.", "conv1.", name)
    name = re.sub(r"^embedder\.embedder\.normalization\.", "bn1.", name)
    match = re.match(r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.(.+)$", name)
    if not match:
        return name
    rest = re.sub(r"^shortcut\.convolution\.", "downsample.0.", match[3])
    rest = re.sub(r"^shortcut\.normalization\.", "downsample.1.", rest)
    rest = re.sub(r"^layer\.(\d+)\.convolution\.", lambda m: f"conv{int(m[1]) + 1}.", rest)
    rest = re.sub(r"^layer\.(\d+)\.normalization\.", lambda m: f"bn{int(m[1]) + 1}.", rest)
    return f"layer{int(match[1]) + 1}.{match[2]}.{rest}"


def _to_own_resnet(name: str) -> str:
    match = re.match(r"^layer(\d+)\.(\d+)\.(.+)$", name)
    if not match:
        name = re.sub(r"^conv1\.", "embedder.embedder.convolution.", name)
        return re.sub(r"^bn1\.", "embedder.embedder.normalization.", name)
    rest = re.sub(r"^downsample\.0\.", "shortcut.convolution.", match[3])
    rest = re.sub(r"^downsample\.1\.", "shortcut.normalization.", rest)
    rest = re.sub(r"^conv(\d+)\.", lambda m: f"layer.{int(m[1]) - 1}.convolution.", rest)
    rest = re.sub(r"^bn(\d+)\.", lambda m: f"layer.{int(m[1]) - 1}.normalization.", rest)
    return f"encoder.stages.{int(match[1]) - 1}.layers.{match[2]}.{rest}"
