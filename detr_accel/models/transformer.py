"""DETR's transformer: post-norm, positions added at every layer. Legend: B batch, N image tokens, Q queries, D width,
L decoder layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr_accel.models import recompute
from detr_accel.models.attention import Attention
from detr_accel.models.autocast import within_half


class EncoderLayer(nn.Module):
    """Self-attention over the image, then a feed-forward net."""

    def __init__(self, dim: int, num_heads: int, dim_feedforward: int, dropout: float, activation: str = "relu"):
        super().__init__()
        self.activation = activation
        self.self_attn = Attention(dim, num_heads, dropout)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = dropout

    def forward(self, src: Tensor, pos: Tensor, key_valid: Tensor | None) -> Tensor:
        """src, pos: [B, N, D]; key_valid: bool [B, 1, 1, N]. Returns [B, N, D]."""
        place = src + pos
        src = self.norm1(src + self._drop(self.self_attn(place, place, src, key_valid)))
        return self.norm2(src + self._drop(feed_forward(self, src)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class DecoderLayer(nn.Module):
    """Self-attention among the queries, cross-attention to the image, then a feed-forward net."""

    activation = "relu"

    def __init__(self, dim: int, num_heads: int, dim_feedforward: int, dropout: float):
        super().__init__()
        self.self_attn = Attention(dim, num_heads, dropout)
        self.multihead_attn = Attention(dim, num_heads, dropout)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = dropout

    def forward(self, tgt: Tensor, query_pos: Tensor, memory: Tensor, memory_place: Tensor, key_valid: Tensor | None):
        """tgt, query_pos: [B, Q, D]; memory, memory_place (memory + positions): [B, N, D]. Returns [B, Q, D]."""
        place = tgt + query_pos
        tgt = self.norm1(tgt + self._drop(self.self_attn(place, place, tgt)))
        attended = self.multihead_attn(tgt + query_pos, memory_place, memory, key_valid)
        tgt = self.norm2(tgt + self._drop(attended))
        return self.norm3(tgt + self._drop(feed_forward(self, tgt)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


def feed_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """linear1, activation, dropout, linear2 of a layer: [..., D] -> [..., D]."""
    hidden = ACTIVATIONS[layer.activation](layer.linear1(x))
    return within_half(layer.linear2(F.dropout(hidden, layer.dropout, layer.training)))


ACTIVATIONS = {
    "relu": lambda x: F.relu(x, inplace=True), "silu": lambda x: F.silu(x, inplace=True), "gelu": F.gelu,
}  # fmt: skip


class Encoder(nn.Module):
    def __init__(self, layers: list[EncoderLayer], checkpointing: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.checkpointing = checkpointing

    def forward(self, src: Tensor, pos: Tensor, key_valid: Tensor | None) -> Tensor:
        for layer in self.layers:
            src = recompute.call(self.checkpointing, layer, src, pos, key_valid)
        return src


class Decoder(nn.Module):
    def __init__(self, layers: list[DecoderLayer], dim: int, checkpointing: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(dim)  # shared: it stands before the heads of every layer, and feeds no next layer
        self.checkpointing = checkpointing

    def forward(self, tgt: Tensor, query_pos: Tensor, memory: Tensor, pos: Tensor, key_valid: Tensor | None) -> Tensor:
        """Returns the normalised output of every layer: [L, B, Q, D]."""
        memory_place = memory + pos  # the same for every layer
        outputs = []
        for layer in self.layers:
            tgt = recompute.call(self.checkpointing, layer, tgt, query_pos, memory, memory_place, key_valid)
            outputs.append(tgt)
        return self.norm(torch.stack(outputs))


class Transformer(nn.Module):
    """Encoder and decoder.

    Source: Carion et al. 2020, appendix A.3; weights start as there (Xavier on every matrix, in_proj as one).
    """

    def __init__(
        self,
        dim: int = 256,
        num_heads: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        checkpoint_encoder: bool = False,
        checkpoint_decoder: bool = False,
    ):
        super().__init__()
        shape = (dim, num_heads, dim_feedforward, dropout)
        self.encoder = Encoder([EncoderLayer(*shape) for _ in range(num_encoder_layers)], checkpoint_encoder)
        self.decoder = Decoder([DecoderLayer(*shape) for _ in range(num_decoder_layers)], dim, checkpoint_decoder)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, src: Tensor, pos: Tensor, query_embed: Tensor, key_valid: Tensor | None) -> Tensor:
        """
        Args:
            src, pos: image tokens and their positions, [B, N, D].
            query_embed: [Q, D].
            key_valid: bool [B, 1, 1, N], True = image.
        Returns:
            [L, B, Q, D], normalised.
        """
        memory = self.encoder(src, pos, key_valid)
        query_pos = query_embed.unsqueeze(0).expand(len(src), -1, -1).to(src.dtype)
        return self.decoder(torch.zeros_like(query_pos), query_pos, memory, pos, key_valid)
