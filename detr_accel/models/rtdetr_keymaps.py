"""The names that four programs give to the same RT-DETR weights, both ways and without loss.

Ours are those of the original's second version, which DEIM keeps, with timm's ResNet in the place of its own. The first
version numbers what the second names; transformers has its own names, and two generations of them. Batch counters of
the backbone are there exactly where its normalisation is live. What is computed from sizes alone (anchors, their mask,
the points' scale) is left out on reading and made anew on writing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from detr_accel.models.keymaps import StateDict, strip_wrappers

Rules = Sequence[tuple[str, str]]  # patterns, tried one after the other; each may apply

_STAGE = r"backbone\.res_layers\.(\d+)\.blocks\.(\d+)\."
_CONV_NORM = (  # where the first version has a sequence, the second has names
    (r"^(encoder\.input_proj\.\d+)\.0\.", r"\1.conv."),
    (r"^(encoder\.input_proj\.\d+)\.1\.", r"\1.norm."),
    (r"^decoder\.enc_output\.0\.", "decoder.enc_output.proj."),
    (r"^decoder\.enc_output\.1\.", "decoder.enc_output.norm."),
)
_TO_FIRST = (
    (r"^(encoder\.input_proj\.\d+)\.conv\.", r"\1.0."),
    (r"^(encoder\.input_proj\.\d+)\.norm\.", r"\1.1."),
    (r"^decoder\.enc_output\.proj\.", "decoder.enc_output.0."),
    (r"^decoder\.enc_output\.norm\.", "decoder.enc_output.1."),
)
_STEM = {"conv1_1": ("conv1.0", "conv1.1"), "conv1_2": ("conv1.3", "conv1.4"), "conv1_3": ("conv1.6", "bn1")}
_BUFFERS = re.compile(r"(^|\.)(anchors|valid_mask|num_points_scale|n_points_scale|pos_embed\d*)$")  # computed anew
_QKV = re.compile(r"^(.+self_attn)\.([qkv])_proj\.(weight|bias)$")
_IN_PROJ = re.compile(r"^(.+self_attn)\.in_proj_(weight|bias)$")


def is_official(state: StateDict) -> bool:
    """Whether these are the original's names, of either version, or DEIM's."""
    return any(".res_layers." in k for k in state) and any("dec_score_head." in k for k in state)


def is_transformers(state: StateDict) -> bool:
    """Whether these are transformers' names, of either version."""
    return any(strip_wrappers(k).startswith(("model.encoder_input_proj.", "model.enc_score_head.")) for k in state)


def version_of(state: StateDict) -> int:
    """1 or 2: which version's names official weights have."""
    return 1 if any(re.search(r"(^|\.)input_proj\.0\.0\.weight$", k) for k in state) else 2


def anchors_of(state: StateDict) -> torch.Tensor | None:
    """The anchors that lie beside official weights, float32 [N, 4]; None where there are none."""
    found = (v for k, v in state.items() if k.endswith("decoder.anchors") and v.dim() == 3 and v.shape[::2] == (1, 4))
    return next((v[0].float() for v in found), None)


def heads_stand_twice(state: StateDict) -> bool:
    """Whether transformers' weights have their heads a second time, under shorter names."""
    return any(strip_wrappers(k).startswith("class_embed.") for k in state)


def from_official(state: StateDict) -> StateDict:
    """RT-DETR's (both versions') and DEIM's names -> ours. A name that no rule knows stays, to be refused."""
    ours = {}
    for key, value in state.items():
        key = strip_wrappers(key)
        if _BUFFERS.search(key):
            continue
        for pattern, replacement in _CONV_NORM:
            key = re.sub(pattern, replacement, key)
        ours[_stem_from(_block_from(key))] = value
    return ours


def to_official(state: StateDict, version: int = 2) -> StateDict:
    """Our names -> those of the original's first or second version (DEIM's are those of the second)."""
    theirs = {}
    for key, value in state.items():
        key = _stem_to(_block_to(key))
        if version == 1:
            for pattern, replacement in _TO_FIRST:
                key = re.sub(pattern, replacement, key)
        theirs[key] = value
    return theirs


def _block_from(key: str) -> str:
    match = re.match(rf"^{_STAGE}(.+)$", key)
    if not match:
        return key
    rest = match[3]
    rest = re.sub(r"^branch2([abc])\.conv\.", lambda m: f"conv{'abc'.index(m[1]) + 1}.", rest)
    rest = re.sub(r"^branch2([abc])\.norm\.", lambda m: f"bn{'abc'.index(m[1]) + 1}.", rest)
    rest = re.sub(r"^short\.(?:conv\.)?norm\.", "downsample.2.", rest)
    rest = re.sub(r"^short\.(?:conv\.)?conv\.", "downsample.1.", rest)
    return f"backbone.body.layer{int(match[1]) + 1}.{match[2]}.{rest}"


def _block_to(key: str) -> str:
    match = re.match(r"^backbone\.body\.layer(\d)\.(\d+)\.(.+)$", key)
    if not match:
        return key
    stage, block, rest = int(match[1]) - 1, match[2], match[3]
    rest = re.sub(r"^conv(\d)\.", lambda m: f"branch2{'abc'[int(m[1]) - 1]}.conv.", rest)
    rest = re.sub(r"^bn(\d)\.", lambda m: f"branch2{'abc'[int(m[1]) - 1]}.norm.", rest)
    pooled = "conv." if stage else ""  # behind an average pooling, except in the first stage
    rest = re.sub(r"^downsample\.1\.", f"short.{pooled}conv.", rest)
    rest = re.sub(r"^downsample\.2\.", f"short.{pooled}norm.", rest)
    return f"backbone.res_layers.{stage}.blocks.{block}.{rest}"


def _stem_from(key: str) -> str:
    for theirs, (conv, norm) in _STEM.items():
        key = key.replace(f"backbone.conv1.{theirs}.conv.", f"backbone.body.{conv}.")
        key = key.replace(f"backbone.conv1.{theirs}.norm.", f"backbone.body.{norm}.")
    return key


def _stem_to(key: str) -> str:
    for theirs, (conv, norm) in _STEM.items():
        key = key.replace(f"backbone.body.{conv}.", f"backbone.conv1.{theirs}.conv.")
        key = key.replace(f"backbone.body.{norm}.", f"backbone.conv1.{theirs}.norm.")
    return key


_FROM_TRANSFORMERS: Rules = (
    # names of version 5's modules -> names on the Hub
    (r"^model\.encoder\.aifi\.", "model.encoder.encoder."),
    (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
    (r"(layers\.\d+)\.mlp\.(fc[12])\.", r"\1.\2."),
    # names on the Hub -> ours
    (r"^model\.(encoder|decoder)_input_proj\.(\d+)\.0\.", r"\1.input_proj.\2.conv."),
    (r"^model\.(encoder|decoder)_input_proj\.(\d+)\.1\.", r"\1.input_proj.\2.norm."),
    (r"^model\.enc_output\.0\.", "decoder.enc_output.proj."),
    (r"^model\.enc_output\.1\.", "decoder.enc_output.norm."),
    (r"^model\.(enc_score_head|enc_bbox_head|denoising_class_embed)\.", r"decoder.\1."),
    (r"^model\.weight_embedding\.", "decoder.tgt_embed."),
    (r"^model\.decoder\.query_pos_head\.", "decoder.query_pos_head."),
    (r"^(?:model\.decoder\.)?class_embed\.(\d+)\.", r"decoder.dec_score_head.\1."),
    (r"^(?:model\.decoder\.)?bbox_embed\.(\d+)\.", r"decoder.dec_bbox_head.\1."),
    (r"^model\.decoder\.layers\.(\d+)\.encoder_attn\.", r"decoder.decoder.layers.\1.cross_attn."),
    (r"^model\.decoder\.layers\.(\d+)\.encoder_attn_layer_norm\.", r"decoder.decoder.layers.\1.norm2."),
    (r"^model\.decoder\.layers\.(\d+)\.final_layer_norm\.", r"decoder.decoder.layers.\1.norm3."),
    (r"^model\.decoder\.layers\.", "decoder.decoder.layers."),
    (r"^model\.encoder\.encoder\.(\d+)\.layers\.(\d+)\.final_layer_norm\.", r"encoder.encoder.\1.layers.\2.norm2."),
    (r"^model\.encoder\.", "encoder."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.fc([12])\.", r".linear\1."),
    (r"^model\.backbone\.model\.", "backbone.body."),
)
_TO_TRANSFORMERS: Rules = (
    (r"^backbone\.body\.", "model.backbone.model."),
    (r"^(encoder|decoder)\.input_proj\.(\d+)\.conv\.", r"model.\1_input_proj.\2.0."),
    (r"^(encoder|decoder)\.input_proj\.(\d+)\.norm\.", r"model.\1_input_proj.\2.1."),
    (r"^decoder\.enc_output\.proj\.", "model.enc_output.0."),
    (r"^decoder\.enc_output\.norm\.", "model.enc_output.1."),
    (r"^decoder\.(enc_score_head|enc_bbox_head|denoising_class_embed)\.", r"model.\1."),
    (r"^decoder\.tgt_embed\.", "model.weight_embedding."),
    (r"^decoder\.query_pos_head\.", "model.decoder.query_pos_head."),
    (r"^decoder\.dec_score_head\.", "model.decoder.class_embed."),
    (r"^decoder\.dec_bbox_head\.", "model.decoder.bbox_embed."),
    (r"^decoder\.decoder\.layers\.(\d+)\.cross_attn\.", r"model.decoder.layers.\1.encoder_attn."),
    (r"^decoder\.decoder\.layers\.(\d+)\.norm2\.", r"model.decoder.layers.\1.encoder_attn_layer_norm."),
    (r"^decoder\.decoder\.layers\.(\d+)\.norm3\.", r"model.decoder.layers.\1.final_layer_norm."),
    (r"^decoder\.decoder\.layers\.", "model.decoder.layers."),
    (r"^encoder\.encoder\.(\d+)\.layers\.(\d+)\.norm2\.", r"model.encoder.encoder.\1.layers.\2.final_layer_norm."),
    (r"^encoder\.", "model.encoder."),
    (r"(layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(layers\.\d+)\.linear([12])\.", r"\1.fc\2."),
)


def from_transformers(state: StateDict) -> StateDict:
    """transformers' names, of the Hub or of version 5's modules -> ours; heads that are stored twice come once."""
    ours: StateDict = {}
    parts: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        key = strip_wrappers(key)
        if _BUFFERS.search(key):
            continue
        for pattern, replacement in _FROM_TRANSFORMERS:
            key = re.sub(pattern, replacement, key)
        key = _resnet_from(key)
        if match := _QKV.match(key):
            parts.setdefault((match[1], match[3]), {})[match[2]] = value
        else:
            ours[key] = value
    for (attention, kind), qkv in parts.items():
        if set(qkv) == set("qkv"):
            ours[f"{attention}.in_proj_{kind}"] = torch.cat([qkv["q"], qkv["k"], qkv["v"]])
        else:
            ours |= {f"{attention}.{letter}_proj.{kind}": value for letter, value in qkv.items()}
    return ours


def to_transformers(state: StateDict, heads_twice: bool = False) -> StateDict:
    """Our names -> transformers' on the Hub, where the heads of the published files stand twice."""
    theirs: StateDict = {}
    for key, value in state.items():
        key = _resnet_to(key)
        for pattern, replacement in _TO_TRANSFORMERS:
            key = re.sub(pattern, replacement, key)
        if match := _IN_PROJ.match(key):
            for letter, rows in zip("qkv", value.chunk(3), strict=True):  # [3D, D] -> 3 x [D, D]
                theirs[f"{match[1]}.{letter}_proj.{match[2]}"] = rows.contiguous()
            continue
        theirs[key] = value
        if heads_twice and key.startswith(("model.decoder.class_embed.", "model.decoder.bbox_embed.")):
            theirs[key.removeprefix("model.decoder.")] = value.clone()
    return theirs


def _resnet_from(key: str) -> str:
    if not key.startswith("backbone.body."):
        return key
    name = key.removeprefix("backbone.body.")
    if match := re.match(r"^embedder\.embedder\.(\d)\.(convolution|normalization)\.(.+)$", name):
        pair = list(_STEM.values())[int(match[1])]
        return f"backbone.body.{pair[match[2] == 'normalization']}.{match[3]}"
    match = re.match(r"^encoder\.stages\.(\d)\.layers\.(\d+)\.(.+)$", name)
    if not match:
        return key
    rest = re.sub(r"^shortcut\.(?:1\.)?convolution\.", "downsample.1.", match[3])
    rest = re.sub(r"^shortcut\.(?:1\.)?normalization\.", "downsample.2.", rest)
    rest = re.sub(r"^layer\.(\d)\.convolution\.", lambda m: f"conv{int(m[1]) + 1}.", rest)
    rest = re.sub(r"^layer\.(\d)\.normalization\.", lambda m: f"bn{int(m[1]) + 1}.", rest)
    return f"backbone.body.layer{int(match[1]) + 1}.{match[2]}.{rest}"


def _resnet_to(key: str) -> str:
    if not key.startswith("backbone.body."):
        return key
    name = key.removeprefix("backbone.body.")
    for i, pair in enumerate(_STEM.values()):
        for part, theirs in zip(pair, ("convolution", "normalization"), strict=True):
            if name.startswith(f"{part}."):
                return f"backbone.body.embedder.embedder.{i}.{theirs}.{name.removeprefix(f'{part}.')}"
    match = re.match(r"^layer(\d)\.(\d+)\.(.+)$", name)
    if not match:
        return key
    stage, rest = int(match[1]) - 1, match[3]
    pooled = "1." if stage else ""
    rest = re.sub(r"^downsample\.1\.", f"shortcut.{pooled}convolution.", rest)
    rest = re.sub(r"^downsample\.2\.", f"shortcut.{pooled}normalization.", rest)
    rest = re.sub(r"^conv(\d)\.", lambda m: f"layer.{int(m[1]) - 1}.convolution.", rest)
    rest = re.sub(r"^bn(\d)\.", lambda m: f"layer.{int(m[1]) - 1}.normalization.", rest)
    return f"backbone.body.encoder.stages.{stage}.layers.{match[2]}.{rest}"
