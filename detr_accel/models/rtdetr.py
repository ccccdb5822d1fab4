"""RT-DETR. Legend: B batch, H W canvas, D width, L decoder layers, N tokens of all levels, Q queries, Dn denoising
queries, C classes.

Attribute names give the keys of the original's second version, with ``backbone.body`` for its own ResNet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr_accel.models import recompute
from detr_accel.models.attention import Attention
from detr_accel.models.autocast import full_precision, no_autocast
from detr_accel.models.backbone import Backbone
from detr_accel.models.deformable import DeformableAttention, Levels, levels_of
from detr_accel.models.denoising import DenoisingQueries
from detr_accel.models.detr import Mlp
from detr_accel.models.hybrid_encoder import ConvNorm, HybridEncoder
from detr_accel.models.transformer import feed_forward
from detr_accel.structures import UserError

_ANCHOR = 0.05  # side of the finest level's anchors, in 0..1 of the image; the next level's is twice as long
_NEAR_BORDER = 0.01  # an anchor with a coordinate closer to 0 or 1 than this is none
_FAR = 1e4  # the logit of what is no anchor: a sigmoid of exactly 1, without a gradient


@dataclass(frozen=True)
class DecoderShape:
    """What the decoder is made of.

    Args:
        dim: D; num_points: sampling points of a head, for each level; query_pos_dims: widths of the net that makes a
            query's position of its box; mlp_activation: in that net and in the box heads; learned_queries: their
            contents are learned instead of taken from the image.
        look_twice: a layer's box loss also reaches the layer before it, as in the original's training.
    """

    dim: int = 256
    num_heads: int = 8
    num_layers: int = 6
    dim_feedforward: int = 1024
    dropout: float = 0.0
    num_queries: int = 300
    num_points: tuple[int, ...] = (4, 4, 4)
    sampling: str = "bilinear"
    activation: str = "relu"
    mlp_activation: str = "relu"
    query_pos_dims: tuple[int, ...] = (512, 256)
    learned_queries: bool = False
    look_twice: bool = True


class DeformableDecoderLayer(nn.Module):
    """Self-attention among the queries, a few points of the image, a feed-forward net."""

    def __init__(self, shape: DecoderShape):
        super().__init__()
        dim = shape.dim
        self.activation, self.dropout = shape.activation, shape.dropout
        self.self_attn = Attention(dim, shape.num_heads, shape.dropout)
        self.cross_attn = DeformableAttention(dim, shape.num_heads, shape.num_points, shape.sampling)
        self.linear1 = nn.Linear(dim, shape.dim_feedforward)
        self.linear2 = nn.Linear(shape.dim_feedforward, dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(
        self, tgt: Tensor, query_pos: Tensor, boxes: Tensor, memory: Tensor, levels: Levels, may_see: Tensor | None
    ) -> Tensor:
        """tgt, query_pos [B, Q, D]; boxes [B, Q, 4]; memory [B, N, D]; may_see bool [1, 1, Q, Q]. -> [B, Q, D]"""
        place = tgt + query_pos
        tgt = self.norm1(tgt + self._drop(self.self_attn(place, place, tgt, may_see)))
        tgt = self.norm2(tgt + self._drop(self.cross_attn(tgt + query_pos, boxes, memory, levels)))
        return self.norm3(tgt + self._drop(feed_forward(self, tgt)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class RTDETRDecoder(nn.Module):
    """Picks the most promising cells of the encoder's maps as queries, and makes them boxes layer by layer.

    Args:
        dim_in: width of the encoder's maps; one for each level.
        num_classes: C; there is no class "nothing".
        denoising: whether there are embeddings for disturbed labels.
    Source: Zhao et al. 2024; Lv et al. 2024 for the second version's options.
    """

    def __init__(
        self, dim_in: int, shape: DecoderShape, num_classes: int, denoising: bool = True, checkpointing: bool = False
    ):
        super().__init__()
        dim = shape.dim
        self.shape, self.checkpointing = shape, checkpointing
        self.input_proj = nn.ModuleList(ConvNorm(dim_in, dim, activate=False) for _ in shape.num_points)
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList()})
        self.decoder["layers"].extend(DeformableDecoderLayer(shape) for _ in range(shape.num_layers))
        if denoising:
            self.denoising_class_embed = nn.Embedding(num_classes + 1, dim, padding_idx=num_classes)
        if shape.learned_queries:
            self.tgt_embed = nn.Embedding(shape.num_queries, dim)
        self.query_pos_head = Mlp(4, list(shape.query_pos_dims), shape.mlp_activation)
        self.enc_output = nn.ModuleDict({"proj": nn.Linear(dim, dim), "norm": nn.LayerNorm(dim)})
        self.enc_score_head = nn.Linear(dim, num_classes)
        self.enc_bbox_head = Mlp(dim, [dim, dim, 4], shape.mlp_activation)
        self.dec_score_head = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(shape.num_layers))
        heads = (Mlp(dim, [dim, dim, 4], shape.mlp_activation) for _ in range(shape.num_layers))
        self.dec_bbox_head = nn.ModuleList(heads)
        self._init()

    @property
    def layers(self) -> nn.ModuleList:
        return self.decoder["layers"]

    @torch.no_grad()
    def _init(self) -> None:
        """Every query starts as its anchor, and every class as unlikely as one in a hundred."""
        for head in (self.enc_score_head, *self.dec_score_head):
            nn.init.constant_(head.bias, -math.log(99))
        for head in (self.enc_bbox_head, *self.dec_bbox_head):
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)
        for layer in (self.enc_output["proj"], *self.query_pos_head.layers):
            nn.init.xavier_uniform_(layer.weight)
        if self.shape.learned_queries:
            nn.init.xavier_uniform_(self.tgt_embed.weight)

    def forward(self, maps: Sequence[Tensor], mask: Tensor, denoising: DenoisingQueries | None = None) -> dict:
        """
        Args:
            maps: of the encoder, finest first.
            mask: bool [B, H, W], True = padding; [B, 0, 0] where nothing is padded.
        Returns:
            see ``RTDETR.forward``.
        """
        maps = [projection(m) for projection, m in zip(self.input_proj, maps, strict=True)]
        levels = levels_of(maps, mask)
        memory = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)  # [B, N, D]
        if self.training and memory.shape[1] < self.shape.num_queries:
            raise UserError(
                f"model.num_queries is {self.shape.num_queries}, but an image of this size has only {memory.shape[1]} "
                "cells to choose from: lower model.num_queries, or enlarge the images (data.augment.scales, "
                "data.eval_size)"
            )
        tgt, boxes_logit, encoder = self._select(memory, levels)
        may_see = None
        if denoising is not None:
            known, known_logit = self._disturbed(denoising, tgt.dtype, boxes_logit.dtype)
            tgt, boxes_logit = torch.cat((known, tgt), 1), torch.cat((known_logit, boxes_logit), 1)
            may_see = denoising.may_see(self.shape.num_queries)
        elif self.training and hasattr(self, "denoising_class_embed"):
            tgt = tgt + 0 * self.denoising_class_embed.weight.sum()  # every parameter has a gradient in every window
        layers = self._decode(tgt, boxes_logit.detach().sigmoid(), memory, levels, may_see)
        num_known = 0 if denoising is None else denoising.size.num_queries
        *aux, last = [_outputs(logits[:, num_known:], boxes[:, num_known:]) for logits, boxes in layers]
        outputs = {**last, "aux_outputs": aux, "enc_outputs": encoder}
        if denoising is not None:
            outputs["dn_outputs"] = [_outputs(logits[:, :num_known], boxes[:, :num_known]) for logits, boxes in layers]
        return outputs

    def _select(self, memory: Tensor, levels: Levels) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Contents [B, Q, D], box logits [B, Q, 4] and the encoder's own prediction for the Q best cells."""
        dtype = torch.promote_types(memory.dtype, torch.float32)
        anchors, is_anchor = _anchors(levels, memory.device, dtype)  # [B or 1, N, 4], [B or 1, N, 1]
        cells = self.enc_output["norm"](self.enc_output["proj"](memory * is_anchor.to(memory.dtype)))
        with no_autocast(memory.device):  # bfloat16 near -4.6 has steps of 1/32: hundreds of cells would tie
            logits = self.enc_score_head(full_precision(cells))  # [B, N, C]
        best = logits.detach().amax(-1)
        if levels.valid is not None:
            best = best.masked_fill(~levels.valid, -math.inf)  # padding is the last resort
        num = min(self.shape.num_queries, memory.shape[1])  # of a panorama there may be fewer cells than queries
        chosen = best.topk(num, dim=1).indices[..., None]  # [B, Q, 1]

        def at(values: Tensor) -> Tensor:
            return values.expand(len(memory), -1, -1).gather(1, chosen.expand(-1, -1, values.shape[-1]))

        contents = at(cells)
        with no_autocast(memory.device):
            boxes_logit = self.enc_bbox_head(full_precision(contents)) + at(anchors)
            encoder = _outputs(at(logits), boxes_logit.sigmoid())
        contents = contents.detach()
        if self.shape.learned_queries:
            contents = self.tgt_embed.weight[None, :num].expand(len(memory), -1, -1).to(contents.dtype)
        return contents, boxes_logit, encoder

    def _disturbed(self, denoising: DenoisingQueries, dtype: torch.dtype, box_dtype: torch.dtype):
        contents = self.denoising_class_embed(denoising.labels).to(dtype)  # [B, Dn, D]
        return contents, inverse_sigmoid(denoising.boxes_cxcywh.to(box_dtype))

    def _decode(
        self, tgt: Tensor, boxes: Tensor, memory: Tensor, levels: Levels, may_see: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """boxes [B, Q, 4] without graph. Returns logits and boxes of every layer."""
        found, before = [], boxes
        for layer, score, place in zip(self.layers, self.dec_score_head, self.dec_bbox_head, strict=False):
            with no_autocast(tgt.device):  # half precision would give neighbouring cells one position
                query_pos = self.query_pos_head(full_precision(boxes)).to(tgt.dtype)
            tgt = recompute.call(self.checkpointing, layer, tgt, query_pos, boxes, memory, levels, may_see)
            with no_autocast(tgt.device):
                exact = full_precision(tgt)
                logits, step = score(exact), place(exact)
                after = (step + inverse_sigmoid(boxes)).sigmoid()
                seen = (step + inverse_sigmoid(before)).sigmoid() if self.shape.look_twice and found else after
            found.append((logits, seen))
            before, boxes = after, after.detach()
        return found


class RTDETR(nn.Module):
    """Real-time DETR: three maps of a backbone, a hybrid encoder, queries picked from it, deformable attention.

    Where images are padded, the padding is no key, no place to look and no query, and boxes are in 0..1 of the image
    without it. The original knows only images squeezed to one square.

    Source: Zhao et al., DETRs Beat YOLOs on Real-time Object Detection, CVPR 2024; Lv et al., RT-DETRv2, 2024.
    """

    has_background = False  # classes are independent: sigmoid, no class "nothing"
    heads = ("decoder.enc_score_head", "decoder.enc_bbox_head", "decoder.dec_score_head", "decoder.dec_bbox_head")

    def __init__(self, backbone: Backbone, encoder: HybridEncoder, decoder: RTDETRDecoder):
        super().__init__()
        self.backbone, self.encoder, self.decoder = backbone, encoder, decoder
        self.mean: tuple[float, ...] = backbone.mean  # what images are normalised with, per channel, of 0..1
        self.std: tuple[float, ...] = backbone.std

    @property
    def num_classes(self) -> int:
        return self.decoder.enc_score_head.out_features

    @property
    def num_queries(self) -> int:
        return self.decoder.shape.num_queries

    @property
    def class_rows(self) -> Tensor:
        """[C, D], the weights with which the last layer says each class."""
        return self.decoder.dec_score_head[-1].weight

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What holds most of the memory."""
        return {"backbone": self.backbone, "encoder": self.encoder, "decoder": self.decoder}

    @property
    def num_decoder_layers(self) -> int:
        return len(self.decoder.layers)

    def keep_layers(self, num_layers: int) -> None:
        decoder = self.decoder
        decoder.decoder["layers"] = decoder.layers[:num_layers]
        decoder.dec_score_head = decoder.dec_score_head[:num_layers]
        decoder.dec_bbox_head = decoder.dec_bbox_head[:num_layers]

    def forward(self, images: Tensor, mask: Tensor, denoising: DenoisingQueries | None = None) -> dict:
        """
        Args:
            images: [B, 3, H, W], normalised, 0 where padded.
            mask: bool [B, H, W], True = padding; [B, 0, 0] where nothing is padded.
            denoising: disturbed boxes to be found again (training).
        Returns:
            pred_logits [B, Q, C]; pred_boxes [B, Q, 4] cxcywh in 0..1 of the un-padded image, float32 or better;
            aux_outputs: the same two of every earlier decoder layer; enc_outputs: of the encoder's best cells;
            dn_outputs: of every decoder layer for the Dn denoising queries, where there are any.
        """
        return self.decoder(self.encoder(self.backbone(images), mask), mask, denoising)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of what lies in 0..1; closer than eps to either end counts as eps."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def _outputs(logits: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    return {"pred_logits": logits, "pred_boxes": boxes}


def _anchors(levels: Levels, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A box logit for each cell: a small square around its centre. [B or 1, N, 4] and whether it is one, [.., N, 1]."""
    rows = []
    for i, (h, w) in enumerate(levels.sizes):
        y = ((torch.arange(h, device=device, dtype=dtype) + 0.5) / h)[:, None].expand(h, w)
        x = ((torch.arange(w, device=device, dtype=dtype) + 0.5) / w)[None].expand(h, w)
        centre = torch.stack((x, y), -1).flatten(0, 1)[None]  # [1, h*w, 2]
        if levels.ratios is not None:
            centre = centre / levels.ratios[:, i, None].to(dtype).clamp(min=1e-6)  # in 0..1 of the image
        rows.append(torch.cat((centre, torch.full_like(centre, _ANCHOR * 2**i)), -1))
    anchors = torch.cat(rows, 1)
    is_anchor = ((anchors > _NEAR_BORDER) & (anchors < 1 - _NEAR_BORDER)).all(-1, keepdim=True)
    if levels.valid is not None:
        is_anchor = is_anchor & levels.valid[..., None]
    inside = anchors.clamp(_NEAR_BORDER, 1 - _NEAR_BORDER)
    return torch.where(is_anchor, torch.log(inside / (1 - inside)), _FAR), is_anchor
