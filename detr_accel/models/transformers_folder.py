"""A detector as transformers keeps it: ``model.safetensors``, ``config.json``, ``preprocessor_config.json``.

A DETR here; an RT-DETR is handed to ``rtdetr_folder``.

Read without transformers installed. The config as read travels in ``meta``, so that a detector goes back as it came.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from detr_accel.models import architecture, rtdetr_folder, weights
from detr_accel.models.coco_classes import COCO_NAMES, NUM_LABELS, coco_91
from detr_accel.models.keymaps import MASKED, from_transformers, is_counter, is_masked, to_transformers
from detr_accel.models.rtdetr_folder import MEAN, STD
from detr_accel.models.weights import Loaded
from detr_accel.structures import Classes, UserError

_KEPT_CONFIG = "transformers_config"
_COUNTS = ("encoder_attention_heads", "decoder_attention_heads")
EDGES = {"shortest_edge": 800, "longest_edge": 1333}  # of the published detectors, in pixels
_RESNET_PARTS = {"conv1", "bn1", "maxpool", "layer1", "layer2", "layer3", "layer4"}


def read(folder: Path) -> Loaded:
    """
    Raises:
        UserError: no detector of a known kind, a variant that ours is not, or damaged.
    """
    config = rtdetr_folder.read_table(folder / "config.json")
    if config.get("model_type") in rtdetr_folder.KINDS:
        return rtdetr_folder.read(folder, config)
    _check_config(config, folder)
    if not (folder / weights.MODEL).is_file():
        raise UserError(f"{folder} has no {weights.MODEL}: only transformers folders with safetensors can be read")
    raw = weights.read_safetensors(folder / weights.MODEL)
    if is_masked(raw):
        raise UserError(MASKED.format(folder))
    named = from_transformers(raw)
    state = {k: v for k, v in named.items() if not is_counter(k)}
    report = [f"{folder}: transformers' key names, {len(raw)} tensors"]
    if len(named) > len(state):
        report.append(f"left out: {len(named) - len(state)} batch counters, which frozen normalisation does not use")
    sizes, pixels = _preprocessing(folder, report)
    recipe = architecture.infer(
        state,
        folder.name,
        folder,
        backbone=architecture.name_resnet(state) or _timm_name(config),
        dc5=_is_dc5(config),
        num_heads=config.get("encoder_attention_heads", 8),
        dropout=config.get("dropout", 0.1),
        pixels=pixels,
        sizes=sizes,
    )
    classes = _classes(config, len(state["class_embed.bias"]) - 1, folder, report)
    meta = {"weights": "raw", "source": folder.name, "format": "transformers", _KEPT_CONFIG: config}
    return Loaded(state, recipe, classes, meta, folder, report)


def write(loaded: Loaded, folder: Path) -> None:
    """
    Raises:
        UserError: transformers' DETR would compute something else with this backbone.
    """
    parts = {name.split(".")[0] for name in architecture.body_of(loaded.state_dict)}
    if not parts <= _RESNET_PARTS:
        raise UserError(
            f"transformers' DETR would compute something else with {loaded.recipe.model.backbone.name} (it replaces "
            "normalisations together with their activation), so only ResNets are written for it; keep this detector in "
            "our format"
        )
    config = {**(loaded.meta.get(_KEPT_CONFIG) or _config(loaded)), **rtdetr_folder.class_entries(loaded.classes)}
    state = to_transformers(loaded.state_dict, own_resnet=_own_resnet(config))
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / weights.MODEL, metadata={"format": "pt"})
    (folder / "config.json").write_text(weights.to_json(config), encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(weights.to_json(_preprocessor(loaded)), encoding="utf-8")


def _check_config(config: dict[str, Any], folder: Path) -> None:
    kind = config.get("model_type")
    if kind != "detr":
        known = ", ".join(("detr", *rtdetr_folder.KINDS))
        raise UserError(
            f"{folder}/config.json describes {kind or 'no model'}, not detr: it cannot be converted (known: {known})"
        )
    rtdetr_folder.check_types(config, _COUNTS, folder)
    resnet = config.get("backbone_config") or {}
    wanted = [
        (config, "position_embedding_type", "sine"),
        (config, "activation_function", "relu"),
        (config, "decoder_attention_heads", config.get("encoder_attention_heads", 8)),
        (config, "num_channels", 3),
        (resnet, "downsample_in_bottleneck", False),
        (resnet, "downsample_in_first_stage", False),
    ]
    for part, key, value in wanted:
        if part.get(key, value) != value:
            raise UserError(f"{folder}/config.json: {key} is {part[key]!r}; this toolkit's DETR has {value!r} there")


def _own_resnet(config: dict) -> bool:
    """Whether the backbone is transformers' own ResNet rather than timm's."""
    return (config.get("backbone_config") or {}).get("model_type") == "resnet"


def _is_dc5(config: dict) -> bool:
    nested = config.get("backbone_config") or {}
    kwargs = config.get("backbone_kwargs") or {}
    return bool(config.get("dilation")) or 16 in (nested.get("output_stride"), kwargs.get("output_stride"))


def _timm_name(config: dict) -> str | None:
    return config.get("backbone") or (config.get("backbone_config") or {}).get("backbone")


def _classes(config: dict, num_labels: int, folder: Path, report: list[str]) -> Classes:
    table = {int(k): v for k, v in (config.get("id2label") or {}).items()}
    if sorted(table) != list(range(num_labels)):
        raise UserError(f"{folder}: config.json names {len(table)} labels, but the head has {num_labels} and no-object")
    if num_labels == NUM_LABELS and all(table[i] == name for i, name in COCO_NAMES.items()):
        report.append("class table: COCO's 80 names at their category ids (91 labels)")
        return coco_91()  # some configs name the gaps too (12: street sign); no category uses them
    report.append(f"class table: {num_labels} labels from config.json")
    return rtdetr_folder.class_table(config, [table[i] for i in range(num_labels)])


def _preprocessing(folder: Path, report: list[str]) -> tuple[dict[str, Any], str]:
    """Keys of ``data``, and how pixels are normalised, by preprocessor_config.json; what ours has not is reported."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return {}, "timm"
    told = rtdetr_folder.read_table(path)
    sizes = _sizes(told.get("size", EDGES), told)
    if sizes is None:
        report.append(f"beware: its images are resized to {told.get('size')}, here to {EDGES}")
    if not told.get("do_normalize", True):
        return sizes or {}, "unit"
    mean, std = told.get("image_mean", MEAN), told.get("image_std", STD)
    if not (_are_levels(mean, MEAN) and _are_levels(std, STD)):
        report.append(f"beware: its images are normalised with mean {mean} and std {std}, here with {MEAN} and {STD}")
    return sizes or {}, "timm"


def _sizes(size: Any, preprocessor: dict) -> dict[str, Any] | None:
    """What ``size`` is in keys of ``data``; None where there are none for it."""
    if type(size) is int:  # of old: the short side
        size = {"shortest_edge": size, "longest_edge": preprocessor.get("max_size", 1333)}
    if not isinstance(size, dict) or not all(type(value) is int and value > 0 for value in size.values()):
        return None
    if size.keys() == {"shortest_edge", "longest_edge"}:
        return {"eval_size": size["shortest_edge"], "eval_max_size": size["longest_edge"], "square": False}
    if size.keys() == {"height", "width"} and size["height"] == size["width"]:
        side = size["height"]
        return {"eval_size": side, "eval_max_size": max(side, 1333), "square": True}
    return None


def _are_levels(found: Any, known: list[float]) -> bool:
    """Whether these are the known numbers, one a channel, to three digits."""
    numbers = isinstance(found, list) and all(type(v) in (int, float) for v in found)
    return numbers and [round(v, 3) for v in found] == known


def _config(loaded: Loaded) -> dict:
    told = loaded.recipe.model
    heads, width = told.num_heads, told.dim_feedforward
    return {
        "architectures": ["DetrForObjectDetection"],
        "model_type": "detr",
        "backbone": told.backbone.name,
        "backbone_config": None,
        "use_timm_backbone": True,
        "use_pretrained_backbone": False,
        "dilation": told.backbone.dc5,
        "num_channels": 3,
        "d_model": told.hidden_dim,
        "num_queries": told.num_queries,
        **{"encoder_layers": told.num_encoder_layers, "decoder_layers": told.num_decoder_layers},
        **{"encoder_attention_heads": heads, "decoder_attention_heads": heads},
        **{"encoder_ffn_dim": width, "decoder_ffn_dim": width},
        **{"dropout": told.dropout, "attention_dropout": told.dropout, "activation_dropout": told.dropout},
        "activation_function": "relu",
        "position_embedding_type": "sine",
        "eos_coefficient": loaded.recipe.loss.eos_coef,
    }


def _preprocessor(loaded: Loaded) -> dict:
    data = loaded.recipe.data
    mean, std = _mean_std(loaded.recipe.model.backbone.name)
    side, square = min(data.eval_size, data.eval_max_size), data.square
    edges = {"shortest_edge": data.eval_size, "longest_edge": data.eval_max_size}
    return {
        "image_processor_type": "DetrImageProcessor",
        "format": "coco_detection",
        "do_resize": True,
        "size": {"height": side, "width": side} if square else edges,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": loaded.recipe.model.backbone.pixels != "unit",
        "image_mean": list(mean),
        "image_std": list(std),
        "do_pad": True,
    }


def _mean_std(backbone: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    import timm

    told = timm.get_pretrained_cfg(backbone)
    return (tuple(told.mean), tuple(told.std)) if told else (tuple(MEAN), tuple(STD))
