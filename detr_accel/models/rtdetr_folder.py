"""RT-DETR as transformers keeps it (``rt_detr``, ``rt_detr_v2``): ``model.safetensors``, ``config.json``,
``preprocessor_config.json``.

Read without transformers installed. The config as read travels in ``meta``, so that a detector goes back as it came.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from detr_accel.models import rtdetr_architecture, weights
from detr_accel.models import rtdetr_keymaps as keymaps
from detr_accel.models.class_rows import num_labels
from detr_accel.models.coco_classes import are_coco_80, coco_80
from detr_accel.models.rtdetr_architecture import PUBLISHED_SIDE, Told
from detr_accel.models.weights import Loaded
from detr_accel.structures import Classes, UserError

KINDS = ("rt_detr", "rt_detr_v2")
_KEPT_CONFIG, _KEPT_PREPROCESSOR = "transformers_config", "transformers_preprocessor"
CATEGORY_IDS = "category_ids"  # ours: transformers keeps and ignores keys that it does not know
NO_NAME = "N/A"
_ACTIVATIONS = ("relu", "silu")
_SAMPLING = {"default": "bilinear", "discrete": "discrete"}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's


def read(folder: Path, config: dict[str, Any]) -> Loaded:
    """
    Args:
        config: the folder's config.json.
    Raises:
        UserError: a variant that ours is not, or damaged.
    """
    check_types(config, _COUNTS, folder)
    _check_config(config, folder)
    if not (folder / weights.MODEL).is_file():
        raise UserError(f"{folder} has no {weights.MODEL}: only transformers folders with safetensors can be read")
    raw = weights.read_safetensors(folder / weights.MODEL)
    state = keymaps.from_transformers(raw)
    report = [f"{folder}: transformers' key names, {len(raw)} tensors"]
    preprocessor, pixels, side_px = _preprocessor_of(folder, report)
    told = Told(
        num_heads=config.get("decoder_attention_heads", 8),
        num_points=(config.get("decoder_n_points", 4),) * config.get("num_feature_levels", 3),
        num_queries=config.get("num_queries", 300),
        pixels=pixels,
        sampling=_SAMPLING[config.get("decoder_method", "default")],
        activation=config.get("decoder_activation_function", "relu"),
        dropout=config.get("dropout", 0.0),
        num_denoising=config.get("num_denoising", 100),
        label_noise=config.get("label_noise_ratio", 0.5),
        box_noise=config.get("box_noise_scale", 1.0),
        side_px=side_px,
    )
    recipe = rtdetr_architecture.infer(state, folder.name, folder, told)
    classes = _classes(config, num_labels(state) or 0, folder)
    report.append(f"class table: {len(classes)} labels from config.json")
    if classes == coco_80():
        report[-1] += ": COCO's 80 in the order of their category ids"
    meta = {"weights": "raw", "source": folder.name, "format": "transformers", _KEPT_CONFIG: config}
    meta |= {_KEPT_PREPROCESSOR: preprocessor, "heads_twice": keymaps.heads_stand_twice(raw)}
    return Loaded(state, recipe, classes, meta, folder, report)


def write(loaded: Loaded, folder: Path) -> list[str]:
    """
    Returns:
        lines to print.
    Raises:
        UserError: transformers' RT-DETR does not have this detector.
    """
    _check_writable(loaded)
    now = _config(loaded)
    kept = _still_true(loaded.meta.get(_KEPT_CONFIG), now)
    config = dict(kept or now)
    if kept is None or _classes(kept, len(loaded.classes), folder, strict=False) != loaded.classes:
        config |= class_entries(loaded.classes)
    state = keymaps.to_transformers(loaded.state_dict, loaded.meta.get("heads_twice", False))
    if config["model_type"] == "rt_detr_v2":
        state |= _points_scale(loaded)
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / weights.MODEL, metadata={"format": "pt"})
    (folder / "config.json").write_text(weights.to_json(config), encoding="utf-8")
    preprocessor = loaded.meta.get(_KEPT_PREPROCESSOR) or _preprocessor(loaded)
    if (_side_of(preprocessor) or PUBLISHED_SIDE) != rtdetr_architecture.side_of(loaded.recipe.data):
        preprocessor = {**preprocessor, "size": _preprocessor(loaded)["size"]}
    (folder / "preprocessor_config.json").write_text(weights.to_json(preprocessor), encoding="utf-8")
    lines = [f"model_type: {config['model_type']}"]
    if not loaded.recipe.data.square:
        lines.append(
            "beware: this detector was trained on rectangles (data.square is false), and transformers squeezes images "
            f"to squares ({preprocessor.get('size')}): it answers worse there"
        )
    return lines


_COUNTS = ("decoder_attention_heads", "decoder_n_points", "num_feature_levels", "num_queries")


def check_types(config: dict, counts: Sequence[str], folder: Path) -> None:
    """What is reckoned with must be what it seems to be: people edit configs.

    Args:
        counts: keys of whole numbers above 0.
    Raises:
        UserError: one that is something else.
    """
    counts = [key for key in counts if key in config and not (type(config[key]) is int and config[key] > 0)]
    faults = [(key, "a whole number above 0") for key in counts]
    numbers = ("dropout", "label_noise_ratio", "box_noise_scale")
    faults += [(key, "a number") for key in numbers if type(config.get(key, 0.0)) not in (int, float)]
    tables = ("backbone_config", "backbone_kwargs", "id2label")
    faults += [(key, "a table") for key in tables if not isinstance(config.get(key) or {}, dict)]
    if not faults and not all(str(key).isdecimal() for key in config.get("id2label") or {}):
        faults.append(("id2label", "a table of labels 0, 1, ..."))
    if not faults and not all(isinstance(name, str) for name in (config.get("id2label") or {}).values()):
        faults.append(("id2label", "a table of names"))
    for key, wanted in faults:
        raise UserError(f"{folder}/config.json: {key} is {config[key]!r}; it must be {wanted}")


def _check_config(config: dict, folder: Path) -> None:
    resnet = config.get("backbone_config") or {}
    heads = config.get("encoder_attention_heads", config.get("num_attention_heads", 8))
    levels = config.get("num_feature_levels", 3)
    wanted = [
        (resnet, "model_type", "rt_detr_resnet"),
        (resnet, "hidden_act", "relu"),
        (resnet, "downsample_in_bottleneck", False),
        (resnet, "downsample_in_first_stage", False),
        (resnet, "num_channels", 3),
        (config, "encoder_activation_function", "gelu"),
        (config, "activation_function", "silu"),
        (config, "normalize_before", False),
        (config, "with_box_refine", True),
        (config, "positional_encoding_temperature", 10000),
        (config, "layer_norm_eps", 1e-5),
        (config, "batch_norm_eps", 1e-5),
        (config, "decoder_attention_heads", heads),
        (config, "encode_proj_layers", [levels - 1]),
        (config, "decoder_n_levels", levels),
        (config, "decoder_offset_scale", 0.5),
    ]
    for part, key, value in wanted:
        if part.get(key, value) != value:
            raise UserError(f"{folder}/config.json: {key} is {part[key]!r}; this toolkit's RT-DETR has {value!r} there")
    for key, known in (("decoder_activation_function", _ACTIVATIONS), ("decoder_method", tuple(_SAMPLING))):
        if config.get(key, known[0]) not in known:
            raise UserError(f"{folder}/config.json: {key} is {config[key]!r}; it must be one of {', '.join(known)}")


def _check_writable(loaded: Loaded) -> None:
    model, r = loaded.recipe.model, loaded.recipe.model.rtdetr
    named = rtdetr_architecture.name_resnet(loaded.state_dict)
    base = model.backbone.name.split(".")[0]
    basic = "backbone.body.layer1.0.conv3.weight" not in loaded.state_dict
    foreign = named is None or named.split(".")[0] != base
    plain = basic and not rtdetr_architecture.has_first_shortcut(loaded.state_dict)
    faults = {
        f"backbone {model.backbone.name} (only resnet18d, resnet34d, resnet50d, resnet101d)": foreign,
        f"{base} without a convolution in its first shortcut (train with model.backbone.first_shortcut=true)": (
            plain and not foreign
        ),
        f"num_points {r.num_points}": len(set(r.num_points)) > 1 or len(r.num_points) != 3,
        f"num_blocks {r.num_blocks}": r.num_blocks != 3,
        f"mlp_activation {r.mlp_activation}": r.mlp_activation != "relu",
        f"query_pos_layers {r.query_pos_layers}": r.query_pos_layers != 2,
        "learned_queries": r.learned_queries,
    }
    found = [what for what, is_so in faults.items() if is_so]
    if found:
        raise UserError(
            f"transformers' RT-DETR does not have {', '.join(found)}: keep this detector in our format"
        )


def _classes(config: dict, num: int, folder: Path, strict: bool = True) -> Classes | None:
    table = {int(k): v for k, v in (config.get("id2label") or {}).items()}
    if sorted(table) != list(range(num)):
        if not strict:
            return None
        raise UserError(f"{folder}: config.json names {len(table)} labels, but the head has {num}")
    given = class_table(config, [table[i] for i in range(num)])
    return coco_80() if not isinstance(config.get(CATEGORY_IDS), list) and are_coco_80(given.names) else given


def class_table(config: dict, labels: Sequence[str]) -> Classes:
    """Names, with our category ids where the config has them, else with the labels' own numbers."""
    names = tuple(None if label == NO_NAME else label for label in labels)
    ids = config.get(CATEGORY_IDS)
    if not isinstance(ids, list) or len(ids) != len(names):
        ids = [None if name is None else i for i, name in enumerate(names)]
    return Classes(names, tuple(ids))


def class_entries(classes: Classes) -> dict:
    """The class table as transformers' config.json has it, and our category ids."""
    names = [NO_NAME if name is None else name for name in classes.names]
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        CATEGORY_IDS: list(classes.category_ids),
    }


def _preprocessor_of(folder: Path, report: list[str]) -> tuple[dict | None, str, int]:
    """preprocessor_config.json, how its images are normalised in our words, and the side of its squares, in pixels."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        report.append("pixels: taken as 0..1 without mean and deviation, as the published models have them")
        return None, "unit", PUBLISHED_SIDE
    told = read_table(path)
    side = _side_of(told)
    if side is None:
        report.append(f"beware: its images are resized to {told.get('size')}, here to squares of {PUBLISHED_SIDE}")
        side = PUBLISHED_SIDE
    if not told.get("do_normalize", False):
        return told, "unit", side
    given = [told.get("image_mean"), told.get("image_std")]
    if given != [MEAN, STD]:
        raise UserError(f"{path}: images are normalised with {given}; only ImageNet's mean and deviation, or none, fit")
    return told, "timm", side


def _side_of(preprocessor: dict) -> int | None:
    """Of the squares that a preprocessor makes, in pixels; None where it makes others."""
    size = preprocessor.get("size")
    side = size.get("height") if isinstance(size, dict) else None
    return side if type(side) is int and side >= 32 and size.get("width") == side else None


def read_table(path: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: no json, or one of something else.
    """
    told = weights.read_json(path)
    if not isinstance(told, dict):
        raise UserError(f"{path} is no table of settings: copy it again")
    return told


def _config(loaded: Loaded) -> dict:
    model, r = loaded.recipe.model, loaded.recipe.model.rtdetr
    second = r.sampling == "discrete"
    body = {k for k in loaded.state_dict if k.startswith("backbone.body.")}
    basic = "backbone.body.layer1.0.conv3.weight" not in body
    widths = [64, 128, 256, 512] if basic else [256, 512, 1024, 2048]
    depths = [len({k.split(".")[3] for k in body if k.startswith(f"backbone.body.layer{i}.")}) for i in (1, 2, 3, 4)]
    levels = len(r.num_points)
    config = {
        "architectures": ["RTDetrV2ForObjectDetection" if second else "RTDetrForObjectDetection"],
        "model_type": "rt_detr_v2" if second else "rt_detr",
        "backbone_config": {
            "model_type": "rt_detr_resnet", "embedding_size": 64, "hidden_sizes": widths, "depths": depths,
            "layer_type": "basic" if basic else "bottleneck", "out_indices": [2, 3, 4],
            "out_features": ["stage2", "stage3", "stage4"],
        },
        "freeze_backbone_batch_norms": not any(k.endswith(".num_batches_tracked") for k in body),
        "encoder_in_channels": widths[1:], "feat_strides": [8, 16, 32],
        "encoder_hidden_dim": r.encoder_dim, "encoder_ffn_dim": r.encoder_feedforward,
        "encoder_layers": model.num_encoder_layers, "hidden_expansion": r.expansion,
        "encoder_attention_heads": model.num_heads, "decoder_attention_heads": model.num_heads,
        "d_model": model.hidden_dim, "decoder_in_channels": [r.encoder_dim] * levels,
        "decoder_ffn_dim": model.dim_feedforward, "decoder_layers": model.num_decoder_layers,
        "decoder_n_points": r.num_points[0], "num_feature_levels": levels,
        "decoder_activation_function": r.activation, "num_queries": model.num_queries, "dropout": model.dropout,
        "num_denoising": r.num_denoising, "label_noise_ratio": r.label_noise, "box_noise_scale": r.box_noise,
    }  # fmt: skip
    return config | ({"decoder_n_levels": levels, "decoder_method": "discrete"} if second else {})


def _still_true(kept: dict | None, now: dict) -> dict | None:
    """A config as read, with what the recipe has changed since and no weight shows; None where it is another model."""
    if kept is None or kept.get("decoder_method", "default") != now.get("decoder_method", "default"):
        return None
    free = {"num_queries": 300, "dropout": 0.0, "num_denoising": 100, "label_noise_ratio": 0.5, "box_noise_scale": 1.0}
    changed = {key: now[key] for key, value in free.items() if now[key] != kept.get(key, value)}
    return {**kept, **changed}


def _points_scale(loaded: Loaded) -> dict[str, torch.Tensor]:
    scale = rtdetr_architecture.scale_of(loaded.recipe.model.rtdetr.num_points)
    layers = range(loaded.recipe.model.num_decoder_layers)
    return {f"model.decoder.layers.{i}.encoder_attn.n_points_scale": scale.clone() for i in layers}


def _preprocessor(loaded: Loaded) -> dict:
    side = rtdetr_architecture.side_of(loaded.recipe.data)
    return {
        "image_processor_type": "RTDetrImageProcessor",
        "format": "coco_detection",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": loaded.recipe.model.backbone.pixels != "unit",
        "image_mean": MEAN,
        "image_std": STD,
        "do_pad": False,
    }
