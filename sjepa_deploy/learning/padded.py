"""Runs the layers of `nn.Transformer` over padded sequences, on the same weights, several times faster on a GPU.

`nn.MultiheadAttention` hands padding to the attention kernel as a bias, which the fastest kernels do not take. Here it travels in
one more dimension of the heads: queries hold 1 there, padded keys a number so negative that their weight is exactly 0. Heads of 8
dimensions leave room for it, since these kernels compute with 32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

PADDED_LOGIT = -1e4
"""Attention logit of a padded key: its exponential is 0 in every dtype, and float16 holds it."""

ALIGNMENT = 8
"""The kernels take heads of a multiple of so many dimensions."""


def encoder_layer(layer: nn.TransformerEncoderLayer, tokens: Tensor, padding: Tensor) -> Tensor:
    """Return ``layer(tokens, src_key_padding_mask=padding)`` for tokens (B, L, E) and padding (B, L), bool.

    The values at padded places are arbitrary, but finite.
    """
    assert not layer.norm_first
    tokens = layer.norm1(tokens + layer.dropout1(attend(layer.self_attn, tokens, tokens, padding)))
    return layer.norm2(tokens + layer.dropout2(_feed_forward(layer, tokens)))  # type: ignore[no-any-return]


def decoder_layer(
    layer: nn.TransformerDecoderLayer, queries: Tensor, context: Tensor, padding: Tensor, context_padding: Tensor
) -> Tensor:
    """Return the output of `layer` for queries (B, L, E) and context (B, S, E), padded as said."""
    assert not layer.norm_first
    queries = layer.norm1(queries + layer.dropout1(attend(layer.self_attn, queries, queries, padding)))
    queries = layer.norm2(queries + layer.dropout2(attend(layer.multihead_attn, queries, context, context_padding)))
    return layer.norm3(queries + layer.dropout3(_feed_forward(layer, queries)))  # type: ignore[no-any-return]


def attend(attention: nn.MultiheadAttention, queries: Tensor, context: Tensor, padding: Tensor) -> Tensor:
    """Return what `attention` gives queries (B, L, E) over context (B, S, E), of which `padding` (B, S) is left out."""
    size, n_heads = attention.embed_dim, attention.num_heads
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    if queries is context:
        q, k, v = linear(queries, weight, bias).chunk(3, dim=-1)
    else:
        q = linear(queries, weight[:size], bias[:size])
        k, v = linear(context, weight[size:], bias[size:]).chunk(2, dim=-1)
    q, k, v = (x.reshape(*x.shape[:-1], n_heads, -1).transpose(1, 2) for x in (q, k, v))
    dim = q.shape[-1]
    scale = dim**-0.5
    n_more = ALIGNMENT - dim % ALIGNMENT
    logits = torch.where(padding, PADDED_LOGIT / scale, 0.0).to(k.dtype)[:, None, :, None].expand(-1, n_heads, -1, 1)
    mixed: Tensor = scaled_dot_product_attention(
        torch.cat([q, q.new_ones(*q.shape[:-1], 1), q.new_zeros(*q.shape[:-1], n_more - 1)], dim=-1),
        torch.cat([k, logits, k.new_zeros(*k.shape[:-1], n_more - 1)], dim=-1),
        torch.cat([v, v.new_zeros(*v.shape[:-1], n_more)], dim=-1),
        dropout_p=attention.dropout if attention.training else 0.0,
        scale=scale,
    )
    return attention.out_proj(mixed[..., :dim].transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _feed_forward(layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer, tokens: Tensor) -> Tensor:
    hidden: Tensor = layer.dropout(layer.activation(layer.linear1(tokens)))
    return layer.linear2(hidden)  # type: ignore[no-any-return]
