"""The sections ``model`` and ``loss`` of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from detr_accel.recipe_parts import Fraction, Positive, Section, Text


class Backbone(Section):
    """A timm model, used through features_only."""

    name: str = "resnet101.tv_in1k"
    """Any timm name with features: ``resnet101.tv_in1k`` is the one of the DETR paper."""
    weights: str = "pretrained"
    """``pretrained`` (timm's, downloaded once), ``none`` (random: needs norm live), or the path of a local file."""
    norm: Literal["auto", "frozen", "live"] = "auto"
    """``frozen``: BatchNorm keeps the pretrained statistics, as DETR does. ``live``: it trains. ``auto``: frozen
    exactly when the weights are pretrained; frozen statistics on random weights are refused."""
    frozen_stages: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """How many parts, counted from the stem, do not train: 0 none, 1 stem, 2 stem and first stage (DETR). ``auto``: 2
    with pretrained weights, 0 with random ones."""
    dc5: bool = False
    """Dilate the last stage: stride 16 instead of 32, about twice the computation."""
    pixels: Literal["timm", "unit"] = "timm"
    """How images are normalised. ``timm``: with the mean and deviation that the backbone's weights were trained with.
    ``unit``: 0..1 as they are, which the published RT-DETR weights want."""
    first_shortcut: bool = False
    """A convolution in the first stage's first shortcut too, as the published RT-DETR-R18 and -R34 have and timm's
    ``resnet18d`` and ``resnet34d`` have not; it starts as the identity."""
    fold_norm: bool = True
    """Fold frozen BatchNorm into the convolution at each forward: the same model, less memory and time."""


class RtDetr(Section):
    """What only RT-DETR has. The defaults are RT-DETR-R50's."""

    encoder_dim: Annotated[int, Field(ge=8, le=2048)] = 256
    """Width of the hybrid encoder (R101: 384); a multiple of num_heads and of 4."""
    encoder_feedforward: Positive = 1024
    """Width inside the encoder's attention layer's feed-forward part (R101: 2048)."""
    expansion: Annotated[float, Field(gt=0, le=4)] = 1.0
    """Width inside the encoder's fusion blocks, as a share of encoder_dim (R18, R34: 0.5)."""
    num_blocks: Positive = 3
    """Convolution blocks in each fusion block (R18, R34: 3; fewer are faster)."""
    num_points: Annotated[list[Positive], Field(min_length=1)] = [4, 4, 4]
    """Points of each feature map, finest first, that a head of a query looks at; as many maps as numbers."""
    sampling: Literal["bilinear", "discrete"] = "bilinear"
    """``discrete`` looks at whole cells only, which every runtime can do (RT-DETRv2); its offsets do not train."""
    activation: Literal["relu", "silu"] = "relu"
    """In the decoder's feed-forward parts (DEIM: silu)."""
    mlp_activation: Literal["relu", "silu"] = "relu"
    """In the small nets that say boxes and make positions of them (DEIM: silu)."""
    query_pos_layers: Literal[2, 3] = 2
    """Layers of the net that makes a query's position of its box: 2, twice as wide inside (RT-DETR), or 3 (DEIM)."""
    learned_queries: bool = False
    """Queries start with learned contents instead of the image's."""
    look_twice: bool = True
    """A layer's box loss reaches the layer before it, too, as in the original's training."""
    num_denoising: Annotated[int, Field(ge=0)] = 100
    """About how many disturbed true boxes an image's decoder is to put right while training; 0: none."""
    label_noise: Fraction = 0.5
    """Half of it is the share of their labels that are drawn anew."""
    box_noise: Annotated[float, Field(ge=0)] = 1.0
    """How far a corner may move, in halves of the box's sides; from there to twice as far it is to be told nothing."""
    mirror_boxes: bool = False
    """Disturbed corners that have changed sides span a box all the same (DEIM), instead of one without area."""


class Model(Section):
    """The detector. The defaults are DETR's own, and with ``name: rtdetr`` RT-DETR's."""

    name: Literal["detr", "rtdetr"] = "detr"
    """``detr``: the plain one. ``rtdetr``: learns several times as fast and finds small objects better; both versions,
    the second by its options below."""
    rtdetr: RtDetr = RtDetr()
    """What only RT-DETR has."""
    backbone: Backbone = Backbone()
    """The feature extractor."""
    hidden_dim: Annotated[int, Field(ge=8, le=2048)] = 256
    """Width of the transformer; a multiple of num_heads and of 4."""
    num_heads: Positive = 8
    """Attention heads; hidden_dim is split among them."""
    num_encoder_layers: Annotated[int, Field(ge=0)] = 6
    """Self-attention layers over the image's features (RT-DETR: 1)."""
    num_decoder_layers: Positive = 6
    """Layers in which queries become objects."""
    dim_feedforward: Positive = 2048
    """Width inside each layer's feed-forward part."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of activations dropped in the transformer while training."""
    num_queries: Positive = 100
    """Most objects that can be found in one image."""
    init_from: Text | None = None
    """Start from a trained detector: a run, a checkpoint or a converted folder, a .pth or .safetensors file, or a hub
    id such as ``facebook/detr-resnet-101``. Takes the place of backbone.weights."""
    init_head: Literal["match", "keep", "reset"] = "match"
    """What happens to the class head of init_from: ``match`` takes the rows whose class names are in the data set,
    ``keep`` takes it whole (class tables must be equal), ``reset`` starts it anew."""
    activation_checkpointing: list[Literal["backbone", "encoder", "decoder"]] | Literal["auto"] = []
    """Parts that are computed again in backward instead of being kept: less memory, more time. ``auto``: none, unless
    the worst window that the data can bring does not fit without; then as many as it takes."""

    @model_validator(mode="after")
    def _dims_fit(self) -> Model:
        if self.hidden_dim % self.num_heads or self.hidden_dim % 4:
            raise ValueError(
                f"hidden_dim {self.hidden_dim} must be a multiple of num_heads {self.num_heads} and of 4 (two axes of "
                "sine and cosine)"
            )
        width = self.rtdetr.encoder_dim
        if self.name == "rtdetr" and (width % self.num_heads or width % 4):
            raise ValueError(f"rtdetr.encoder_dim {width} must be a multiple of num_heads {self.num_heads} and of 4")
        if self.name == "rtdetr" and self.backbone.dc5:
            raise ValueError("backbone.dc5 belongs to DETR: RT-DETR reads three feature maps as they are")
        if self.name == "rtdetr" and int(self.rtdetr.expansion * width) < 1:
            raise ValueError(f"rtdetr.expansion {self.rtdetr.expansion:g} leaves nothing of encoder_dim {width}")
        if self.name != "rtdetr" and self.rtdetr != RtDetr():
            raise ValueError(
                f"rtdetr is set, but model.name is {self.name}, which reads nothing of it: leave it out, or set "
                "model.name=rtdetr"
            )
        return self


class Loss(Section):
    """Weights of the loss terms and of the matching cost (DETR: 1, 5, 2 for both; RT-DETR: 2, 5, 2 in matching)."""

    kind: Literal["auto", "ce", "vfl", "mal"] = "auto"
    """How classes are judged. ``ce``: cross-entropy, DETR's. ``vfl``: a score is to tell how well the box fits,
    RT-DETR's. ``mal``: the same with more weight on boxes that fit badly, DEIM's. ``auto``: by the detector."""
    ce: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the cross-entropy over all queries."""
    vfl: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the varifocal loss."""
    vfl_alpha: Fraction = 0.75
    """Its weight of queries that are no object."""
    vfl_gamma: Annotated[float, Field(ge=0)] = 2.0
    """How much less of that weight those get which already say so."""
    mal: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the matchability-aware loss."""
    mal_gamma: Annotated[float, Field(gt=0)] = 1.5
    """Its exponent, of the fit and of the score."""
    bbox: Annotated[float, Field(ge=0)] = 5.0
    """Weight of the L1 distance of matched boxes."""
    giou: Annotated[float, Field(ge=0)] = 2.0
    """Weight of 1 - GIoU of matched boxes."""
    eos_coef: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Weight of the no-object class."""
    aux: bool = True
    """Supervise every decoder layer, not only the last; RT-DETR's layers have heads of their own and need it."""
    cost_class: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the class probability in matching."""
    cost_bbox: Annotated[float, Field(ge=0)] = 5.0
    """Weight of the L1 distance in matching."""
    cost_giou: Annotated[float, Field(ge=0)] = 2.0
    """Weight of GIoU in matching."""

    @model_validator(mode="after")
    def _some_weight(self) -> Loss:
        if self.cost_class == self.cost_bbox == self.cost_giou == 0:
            raise ValueError("cost_class, cost_bbox and cost_giou are all 0: nothing would decide the matching")
        return self


_KINDS = {"detr": ("ce",), "rtdetr": ("vfl", "mal")}  # ways of judging classes that fit, the detector's own first
_OF_KIND = {  # what each of them reads alone
    "ce": ("ce", "eos_coef"), "vfl": ("vfl", "vfl_alpha", "vfl_gamma"), "mal": ("mal", "mal_gamma"),
}  # fmt: skip


def kind_of(model: Model, loss: Loss) -> str:
    """``loss.kind``, ``auto`` resolved."""
    return _KINDS[model.name][0] if loss.kind == "auto" else loss.kind


def misfit(model: Model, loss: Loss) -> str | None:
    """Why the two sections do not go together; None where they do."""
    fitting = _KINDS[model.name]
    if loss.kind in ("auto", *fitting):
        return None
    return f"loss.kind is {loss.kind}, which does not fit model.name {model.name}: use {' or '.join(fitting)} (or auto)"


def norms_train(model: Model) -> bool:
    """Whether the backbone's normalisation layers train."""
    trained = model.backbone.weights != "none" or model.init_from is not None
    return model.backbone.norm == "live" or (model.backbone.norm == "auto" and not trained)


def _unread(model: Model, loss: Loss) -> list[str]:
    kind, default = kind_of(model, loss), Loss()
    return [
        f"loss.{name} is set, but this recipe's loss.kind is {kind}, which does not read it: leave it out"
        + f", or set loss.kind={other}" * (other in _KINDS[model.name])
        for other, names in _OF_KIND.items() if other != kind
        for name in names if getattr(loss, name) != getattr(default, name)
    ]  # fmt: skip


def norms_see_a_forward(model: Model) -> bool:
    """Whether some of the detector's norms train, and so see the images of one forward only."""
    return model.name == "rtdetr" or norms_train(model)


def unwise(model: Model, loss: Loss, lr_backbone: float, lr_backbone_norms: float | None) -> list[str]:
    """What a new recipe should not say of its model, and a stored one may have said."""
    why = _unread(model, loss)
    if model.name == "rtdetr" and not loss.aux:
        why.append(
            "loss.aux is false, but RT-DETR's decoder layers have heads of their own, which nothing else would train"
        )
    if lr_backbone_norms is not None and (lr_backbone == 0 or not norms_train(model)):
        why.append(
            "optim.lr_backbone_norms is set, but the backbone's norms are frozen: leave it out, or set "
            "model.backbone.norm=live and optim.lr_backbone above 0"
        )
    return why


DEFAULTS_OF: dict[str, dict[str, dict[str, Any]]] = {  # detector -> section -> what differs from the defaults above
    "rtdetr": {
        "model": {"num_encoder_layers": 1, "dim_feedforward": 1024, "dropout": 0.0, "num_queries": 300},
        "loss": {"cost_class": 2.0},
        "batch": {"micro": 4},  # its norms train
    },
}
