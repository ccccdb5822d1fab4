"""DETR. Legend: B batch, H W canvas, h w feature size, N = h * w, Q queries, C classes, D width, L decoder layers.

Attribute names give the official checkpoints' keys, with ``backbone.body`` for ``backbone.0.body``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr_accel.models.attention import valid_keys
from detr_accel.models.autocast import full_precision, no_autocast
from detr_accel.models.backbone import Backbone
from detr_accel.models.position import sine_positions
from detr_accel.models.transformer import ACTIVATIONS, Transformer
from detr_accel.structures import UserError


class Mlp(nn.Module):
    """Linear layers with an activation between: D_in -> dims[0] -> ... -> dims[-1]."""

    def __init__(self, dim_in: int, dims: list[int], activation: str = "relu"):
        super().__init__()
        self.activation = activation
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip([dim_in, *dims[:-1]], dims, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = ACTIVATIONS[self.activation](layer(x))
        return self.layers[-1](x)


class DETR(nn.Module):
    """End-to-end object detection: a backbone, a transformer, and a set of queries that each become one object or none.

    Args:
        backbone: image -> last feature map.
        transformer: of width D.
        num_classes: C; the heads give C + 1 logits, the last one meaning "no object".
        num_queries: Q, most objects in one image.
    Source: Carion et al., End-to-End Object Detection with Transformers, ECCV 2020.
    """

    has_background = True  # the last logit means "no object"
    heads = ("class_embed", "bbox_embed")  # prefixes of what says class and box

    def __init__(
        self, backbone: Backbone, transformer: Transformer, hidden_dim: int, num_classes: int, num_queries: int
    ):
        super().__init__()
        self.backbone = backbone
        self.transformer = transformer
        self.input_proj = nn.Conv2d(backbone.num_channels, hidden_dim, kernel_size=1)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.bbox_embed = Mlp(hidden_dim, [hidden_dim, hidden_dim, 4])
        self.mean: tuple[float, ...] = backbone.mean  # what images are normalised with, per channel, of 0..1
        self.std: tuple[float, ...] = backbone.std

    @property
    def num_classes(self) -> int:
        return self.class_embed.out_features - 1

    @property
    def num_queries(self) -> int:
        return self.query_embed.num_embeddings

    @property
    def class_rows(self) -> Tensor:
        """[C, D], the weights that say each class, "no object" aside."""
        return self.class_embed.weight[:-1]

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What holds most of the memory."""
        return {"backbone": self.backbone, "encoder": self.transformer.encoder, "decoder": self.transformer.decoder}

    @property
    def num_decoder_layers(self) -> int:
        return len(self.transformer.decoder.layers)

    def keep_layers(self, num_layers: int) -> None:
        self.transformer.decoder.layers = self.transformer.decoder.layers[:num_layers]

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor | list[dict[str, Tensor]]]:
        """
        Args:
            images: [B, 3, H, W], normalised, 0 where padded.
            mask: bool [B, H, W], True = padding.
        Returns:
            pred_logits [B, Q, C + 1]; pred_boxes [B, Q, 4] cxcywh in 0..1 of the un-padded image, float32 or better;
            aux_outputs: the same two of every earlier decoder layer, first layer first.
        """
        features = self.input_proj(self.backbone(images)[-1])  # [B, D, h, w]
        mask = F.interpolate(mask[None].float(), size=features.shape[-2:])[0].bool()  # nearest, as the original
        tokens = features.flatten(2).transpose(1, 2)  # [B, N, D]
        pos_dtype = torch.promote_types(tokens.dtype, torch.float32)
        pos = sine_positions(mask, tokens.shape[-1], pos_dtype).to(tokens.dtype)
        hs = self.transformer(tokens, pos, self.query_embed.weight, valid_keys(mask.flatten(1)))  # [L, B, Q, D]
        with no_autocast(hs.device):  # bfloat16 near 0.9 has steps of 1/256: five pixels of 1333, and scores that tie
            hs = full_precision(hs)  # the heads see all layers at once
            logits, boxes = self.class_embed(hs), self.bbox_embed(hs).sigmoid()  # [L, B, Q, C + 1], [L, B, Q, 4]
        pairs = zip(logits.unbind(0), boxes.unbind(0), strict=True)
        *aux, last = [{"pred_logits": c, "pred_boxes": b} for c, b in pairs]
        return {**last, "aux_outputs": aux}


def keep_decoder_layers(model: nn.Module, num_layers: int) -> nn.Module:
    """Drop the last decoder layers, in place: the auxiliary losses trained every earlier layer with the same norm and
    heads (or its own ones), so that any of them can be the last.

    Raises:
        UserError: num_layers is not in 1..L.
    """
    total = model.num_decoder_layers
    if not 1 <= num_layers <= total:
        raise UserError(f"decoder layers {num_layers}: this model has {total}, so give 1 to {total}")
    model.keep_layers(num_layers)
    return model
