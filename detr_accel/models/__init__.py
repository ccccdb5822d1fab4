"""Detectors, matching and losses. Only this file sees a recipe; everything below takes plain arguments."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn

from detr_accel.models import weights
from detr_accel.models.backbone import Backbone, num_cells
from detr_accel.models.class_losses import CrossEntropy, Matchability, Varifocal
from detr_accel.models.denoising import Noise
from detr_accel.models.detr import DETR, keep_decoder_layers
from detr_accel.models.hybrid_encoder import HybridEncoder
from detr_accel.models.losses import SetCriterion
from detr_accel.models.matcher import Matcher, focal_cost, softmax_cost
from detr_accel.models.postprocess import detections
from detr_accel.models.rtdetr import RTDETR, DecoderShape, RTDETRDecoder
from detr_accel.models.transformer import Transformer
from detr_accel.recipe import Model, Recipe
from detr_accel.recipe_model import kind_of, norms_train
from detr_accel.structures import Targets, UserError

__all__ = [
    "build", "build_criterion", "check_cells", "checkpoint_parts", "checkpointing_ladder", "detections",
    "detections_of", "init_from",
    "keep_decoder_layers", "most_queries", "not_decayed", "num_cells", "param_groups", "weights",
]  # fmt: skip


def build(
    recipe: Recipe, num_classes: int, *, device: torch.device | str = "cpu", load_weights: bool = True
) -> nn.Module:
    """The detector of a recipe.

    Args:
        num_classes: C; the head gets one more for "no object".
        load_weights: False never touches disk or network; the caller loads a state dict afterwards.
    Raises:
        UserError: backbone unknown, or its weights not to be had.
    """
    with torch.device("meta") if torch.device(device).type == "meta" else nullcontext():
        model = _BUILDERS[recipe.model.name](recipe, num_classes, load_weights)
    if recipe.optim.lr_backbone == 0:
        model.backbone.requires_grad_(False)
    is_meta = any(p.is_meta for p in model.parameters())
    return model if is_meta else model.to(device)


def check_cells(recipe: Recipe, model: nn.Module, *, train: bool = True) -> None:
    """RT-DETR's queries are chosen among cells: the smallest square must have as many. Training would end when one is
    drawn that has fewer, and an evaluation would go on with fewer queries.

    Args:
        train: False looks at the squares of an evaluation alone.
    Raises:
        UserError: it has fewer.
    """
    data = recipe.data
    side = min(data.eval_size, data.eval_max_size)
    if train:
        side = min(*data.augment.scales, data.augment.max_size, side)
    if (cells := most_queries(recipe, model, side)) < recipe.model.num_queries:
        raise UserError(
            f"model.num_queries is {recipe.model.num_queries}, but squares of {side} pixels have only {cells} cells to "
            f"choose from: at most model.num_queries={cells}, or enlarge the squares "
            f"({'data.augment.scales, ' if train else ''}data.eval_size)"
        )


def most_queries(recipe: Recipe, model: nn.Module, side_px: int) -> int:
    """How many of its queries a detector has on a square: an RT-DETR's are chosen among the cells that there are. Where
    images keep their shapes (``data.square`` false) that differs between them, and all count."""
    asked = recipe.model.num_queries
    if recipe.model.name != "rtdetr" or not recipe.data.square:
        return asked
    return min(asked, model.backbone.num_cells(side_px))


def build_criterion(recipe: Recipe, num_classes: int) -> nn.Module:
    """Matching and losses of a recipe; on the CPU, to be moved to the model's device."""
    loss, model = recipe.loss, recipe.model
    kind = kind_of(model, loss)
    class_loss = _CLASS_LOSSES[kind](loss)
    assert class_loss.background == _MODELS[model.name].has_background, kind
    class_cost = softmax_cost if class_loss.background else focal_cost
    matcher = Matcher(loss.cost_class, loss.cost_bbox, loss.cost_giou, class_cost)
    term_weights = {kind: getattr(loss, kind), "bbox": loss.bbox, "giou": loss.giou}
    r = model.rtdetr
    noise = Noise(r.num_denoising, r.label_noise, r.box_noise, r.mirror_boxes) if model.name == "rtdetr" else None
    return SetCriterion(num_classes, model.num_queries, matcher, term_weights, class_loss, loss.aux, noise)


def detections_of(model: nn.Module, outputs: dict, targets: list[Targets], max_detections: int = 100):
    """What a detector's outputs say of its images, at least as many of each as there are queries (the originals keep so
    many; an evaluation then counts max_detections of each class); see ``postprocess.detections``."""
    sizes, most = torch.tensor([t.orig_size_px for t in targets]), max(max_detections, model.num_queries)
    return detections(outputs, [t.image_id for t in targets], sizes, most, model.has_background)


def param_groups(model: nn.Module, norms_apart: bool = False) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Trainable parameters with their names: "backbone", "transformer" (with queries and projection), "heads".

    Args:
        norms_apart: the backbone's normalisation layers make a further group, "backbone_norms".
    """
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {"backbone": [], "transformer": [], "heads": []}
    norms = not_decayed(model.backbone, ["norms"]) if norms_apart else set()
    groups |= {"backbone_norms": []} if norms_apart else {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = "heads" if name.startswith(model.heads) else "transformer"
        if name.startswith("backbone."):
            group = "backbone_norms" if name.removeprefix("backbone.") in norms else "backbone"
        groups[group].append((name, parameter))
    return groups


def not_decayed(model: nn.Module, kinds: Sequence[str]) -> set[str]:
    """Names of the parameters of some kinds: ``norms``, of normalisation layers, and ``biases``, of all others."""
    names = set()
    for place, module in model.named_modules():
        is_norm = "Norm" in type(module).__name__
        for name, _ in module.named_parameters(place, recurse=False):
            if ("norms" in kinds and is_norm) or ("biases" in kinds and not is_norm and name.endswith("bias")):
                names.add(name)
    return names


def checkpointing_ladder(model: nn.Module) -> list[tuple[str, ...]]:
    """Parts to switch activation checkpointing on for, step by step: what holds most comes first."""
    backbone = ("backbone",) if model.backbone.has_blocks else ()
    return list(dict.fromkeys([(), backbone, (*backbone, "encoder"), (*backbone, "encoder", "decoder")]))


def checkpoint_parts(model: nn.Module, parts: Sequence[str]) -> None:
    """Switch activation checkpointing on for parts of a built model: backbone, encoder, decoder."""
    if "backbone" in parts:
        model.backbone.checkpoint_blocks()
    model.parts["encoder"].checkpointing |= "encoder" in parts
    model.parts["decoder"].checkpointing |= "decoder" in parts


def init_from(model: nn.Module, classes, asked: Model):
    """Start from a trained detector, as the recipe says; see ``convert.init_from``."""
    from detr_accel.models import convert

    return convert.init_from(model, classes, asked.init_from, asked.init_head, asked)


def _build_detr(recipe: Recipe, num_classes: int, load_weights: bool) -> DETR:
    model = recipe.model
    parts = () if model.activation_checkpointing == "auto" else model.activation_checkpointing  # auto: after a trial
    backbone = _build_backbone(recipe, load_weights)
    transformer = Transformer(
        model.hidden_dim,
        model.num_heads,
        model.num_encoder_layers,
        model.num_decoder_layers,
        model.dim_feedforward,
        model.dropout,
        checkpoint_encoder="encoder" in parts,
        checkpoint_decoder="decoder" in parts,
    )
    return DETR(backbone, transformer, model.hidden_dim, num_classes, model.num_queries)


def _build_rtdetr(recipe: Recipe, num_classes: int, load_weights: bool) -> RTDETR:
    model, r = recipe.model, recipe.model.rtdetr
    parts = () if model.activation_checkpointing == "auto" else model.activation_checkpointing
    backbone = _build_backbone(recipe, load_weights, num_maps=len(r.num_points))
    encoder = HybridEncoder(
        backbone.channels, r.encoder_dim, model.num_heads, model.num_encoder_layers, r.encoder_feedforward,
        model.dropout, r.expansion, r.num_blocks, "encoder" in parts,
    )  # fmt: skip
    dim = model.hidden_dim
    shape = DecoderShape(
        dim=dim, num_heads=model.num_heads, num_layers=model.num_decoder_layers,
        dim_feedforward=model.dim_feedforward, dropout=model.dropout, num_queries=model.num_queries,
        num_points=tuple(r.num_points), sampling=r.sampling, activation=r.activation, mlp_activation=r.mlp_activation,
        query_pos_dims=(2 * dim, dim) if r.query_pos_layers == 2 else (dim, dim, dim),
        learned_queries=r.learned_queries, look_twice=r.look_twice,
    )  # fmt: skip
    decoder = RTDETRDecoder(r.encoder_dim, shape, num_classes, r.num_denoising > 0, "decoder" in parts)
    return RTDETR(backbone, encoder, decoder)


def _build_backbone(recipe: Recipe, load_weights: bool, num_maps: int = 1) -> Backbone:
    backbone = recipe.model.backbone
    # init_from brings the backbone of a trained detector: as good as pretrained, and nothing else to load here
    trained = backbone.weights != "none" or recipe.model.init_from is not None
    norm = "live" if norms_train(recipe.model) else "frozen"
    stages = backbone.frozen_stages if backbone.frozen_stages != "auto" else 2 if trained else 0
    if not trained and norm == "frozen":
        raise UserError(
            "model.backbone.norm is frozen while model.backbone.weights is none: frozen statistics on random weights "
            "destroy the signal; use norm: live (or auto)"
        )
    if not trained and stages > 0:
        raise UserError(
            f"model.backbone.frozen_stages is {stages} while model.backbone.weights is none: random filters would "
            "never learn; use frozen_stages: 0 (or auto)"
        )
    made = Backbone(
        backbone.name,
        backbone.weights,
        norm,
        stages,
        backbone.dc5,
        backbone.fold_norm,
        "backbone" in recipe.model.activation_checkpointing,
        load_weights and recipe.model.init_from is None,
        num_maps,
        backbone.first_shortcut,
    )
    if backbone.pixels == "unit":
        made.mean, made.std = (0.0,) * 3, (1.0,) * 3
    return made


_BUILDERS = {"detr": _build_detr, "rtdetr": _build_rtdetr}
_MODELS = {"detr": DETR, "rtdetr": RTDETR}
_CLASS_LOSSES = {
    "ce": lambda loss: CrossEntropy(loss.eos_coef),
    "vfl": lambda loss: Varifocal(loss.vfl_alpha, loss.vfl_gamma),
    "mal": lambda loss: Matchability(loss.mal_gamma),
}
