"""Rewrites the weights of a bundle's checkpoint exactly, with NumPy alone, and packs them for the fused kernels.

The rewrites are the same as in `sjepa_deploy.export.rewrite`, in float64, rounded once to float32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.spec import EncoderSpec, ModelSpec

Array = NDArray[np.float64]
Weights = dict[str, Array]


class Packed:
    """Packs arrays one after the other into one buffer, each at a multiple of 16 bytes.

    Attributes
    ----------
    offsets, sizes : dict of str to int
        Start and length of each array, in units of 4 bytes.
    size : int
        Length, in units of 4 bytes.
    """

    def __init__(self) -> None:
        self.offsets: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self.size = 0
        self._parts: list[NDArray[np.float32]] = []

    def add(self, name: str, *arrays: NDArray[Any]) -> None:
        """Append `arrays` under `name` as float32. Numbers of 16 bits stay as they are."""
        flat = np.concatenate([self._words(array) for array in arrays])
        flat = np.pad(flat, (0, -len(flat) % 4))
        self.offsets[name], self.sizes[name] = self.size, len(flat)
        self.size += len(flat)
        self._parts.append(flat)

    @staticmethod
    def _words(array: NDArray[Any]) -> NDArray[np.float32]:
        if array.dtype.itemsize == 2:
            return np.ascontiguousarray(array).ravel().view(np.float32)
        return array.astype(np.float32).ravel()

    def words(self) -> NDArray[np.float32]:
        """Return the buffer."""
        return np.concatenate(self._parts)


def pack(spec: ModelSpec, weights: Weights, *, half: bool, slices: int) -> tuple[Packed, Packed | None]:
    """Return all weights of a model in the order of its kernel, and the first transformer layer, for the offsets in a layer.

    Parameters
    ----------
    spec : ModelSpec
        The model.
    weights : dict of str to array
        Checkpoint of the model.
    half : bool
        Whether the feed-forward weights are float16.
    slices : int
        Number of parts of the feed-forward units.
    """
    packed = Packed()
    packed.add("ENCODER", *encoder_weights(spec.encoder, weights))
    if spec.variant == "prelocal":
        filters = weights["spatial_conv.1.weight"].reshape(spec.n_spat_filters, spec.n_chans).T
        packed.add("FILTERS", np.pad(filters, ((0, 0), (0, -spec.n_spat_filters % 4))))
        packed.add("HEAD", weights["final_layer.1.weight"])
        packed.add("BIAS", weights["final_layer.1.bias"])
        return packed, None
    layer = None
    if spec.needs_positions:
        packed.add("POSITIONS", position_encoding(spec, weights))
        layers = [_layer(weights, f"transformer.encoder.layers.{i}.", spec.encoder.n_heads, half, slices)
                  for i in range(spec.encoder.n_layers)]  # fmt: skip
        layer = layers[0]
        packed.add("LAYERS", *(one.words() for one in layers))
        scale, shift = weights["transformer.encoder.norm.weight"], weights["transformer.encoder.norm.bias"]
        folded = spec.variant != "base"  # into the head
        packed.add("NORM", np.ones_like(scale) if folded else scale, np.zeros_like(shift) if folded else shift)
    if spec.variant != "base":
        head, bias = head_weights(spec, weights)
        packed.add("HEAD", head)
        packed.add("BIAS", bias)
    return packed, layer


def encoder_weights(encoder: EncoderSpec, weights: Weights) -> list[Array]:
    """Return the first convolution (taps, dim), scale, shift, and each product (kernel * dim, next dim)."""
    arrays = [weights["feature_encoder.1.0.weight"][:, 0].T]
    arrays += [weights["feature_encoder.1.2.weight"], weights["feature_encoder.1.2.bias"]]
    for i in range(2, len(encoder.conv_layers) + 1):
        weight = weights[f"feature_encoder.{i}.0.weight"]  # (next dim, dim, kernel)
        arrays.append(weight.transpose(2, 1, 0))
    return arrays


def position_encoding(spec: ModelSpec, weights: Weights) -> Array:
    """Return the position encoding of all tokens, shape (n_chans, n_tokens, emb_dim), as `sjepa_deploy.models` computes it."""
    spatial, time_dim, n_tokens = weights["pos_encoder.pos_encoder_spat.weight"], spec.encoder.time_dim, spec.n_tokens_per_channel
    step = np.float32(-math.log(spec.encoder.max_n_tokens) / max(time_dim, 1))
    frequency = np.exp(np.arange(0, time_dim, 2).astype(np.float32) * step)
    phase = np.arange(n_tokens).astype(np.float32)[:, None] * frequency
    temporal = np.stack([np.sin(phase), np.cos(phase)], axis=-1).reshape(n_tokens, -1)
    encoding = np.zeros((spec.n_chans, n_tokens, spec.encoder.emb_dim))
    encoding[..., : spatial.shape[1]] = spatial[:, None]
    encoding[..., spatial.shape[1] : spatial.shape[1] + time_dim] = temporal
    return encoding


def _layer(weights: Weights, prefix: str, n_heads: int, half: bool, slices: int) -> Packed:
    """Pack one encoder layer, rewritten as `sjepa_deploy.export.rewrite.EncoderLayer` describes."""
    w = {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}
    query, key, value = np.split(w["self_attn.in_proj_weight"], 3)
    query_bias, _, value_bias = np.split(w["self_attn.in_proj_bias"], 3)
    scale = 1 / math.sqrt(len(query) // n_heads)
    out = w["self_attn.out_proj.weight"]
    in_slices = np.split(w["linear1.weight"], slices)  # (hidden, emb)
    out_slices = np.split(w["linear2.weight"], slices, axis=1)  # (emb, hidden)
    layer = Packed()
    layer.add("QKV", np.concatenate([query * scale, key, value]).T)
    layer.add("QUERY_BIAS", query_bias * scale)
    layer.add("OUT", out.T)
    layer.add("OUT_BIAS", w["self_attn.out_proj.bias"] + out @ value_bias)
    layer.add("NORM1", w["norm1.weight"], w["norm1.bias"])
    layer.add("LINEAR1", *(_tiles(part, half) for part in in_slices))
    layer.add("LINEAR1_BIAS", w["linear1.bias"])
    layer.add("LINEAR2", *(_tiles(part, half) for part in out_slices))
    layer.add("LINEAR2_BIAS", w["linear2.bias"])
    layer.add("NORM2", w["norm2.weight"], w["norm2.bias"])
    return layer


def _tiles(weight: Array, half: bool) -> NDArray[np.floating]:
    """Return `weight` (M, K) in the order in which the lanes of a warp hold tiles of it.

    A tile has 16 rows and 8 float32 or 16 float16 columns. Tiles of the same rows follow each other. In a tile, lane 4 g + t
    holds rows g and g + 8. The lane holds columns t and t + 4 in float32, and the pairs at 2 t and 2 t + 8 in float16. This is
    fragment A of mma.m16n8k8 and mma.m16n8k16 in the manual of PTX.
    """
    pair = 2 if half else 1
    tiles = weight.reshape(len(weight) // 16, 2, 8, -1, 2, 4, pair)  # (row tile, g high, g, column tile, t high, t, pair)
    ordered = tiles.transpose(0, 3, 2, 5, 4, 1, 6)
    return ordered.astype(np.float16 if half else np.float32)


def head_weights(spec: ModelSpec, weights: Weights) -> tuple[Array, Array]:
    """Return one linear map of all tokens, shape (n_outputs, n_chans, n_tokens, emb_dim), and its bias."""
    filters = weights["final_layer.spat_conv.weight"].reshape(spec.n_spat_filters, spec.n_chans)
    linear = weights["final_layer.linear.weight"].reshape(
        spec.n_outputs, spec.n_spat_filters, spec.n_tokens_per_channel, spec.encoder.emb_dim
    )
    head = np.einsum("vc,ovne->ocne", filters, linear)
    bias = weights["final_layer.linear.bias"] + np.einsum("v,ovne->o", weights["final_layer.spat_conv.bias"], linear)
    if spec.needs_positions:  # the last normalisation's scale and shift
        bias = bias + (head * weights["transformer.encoder.norm.bias"]).sum((1, 2, 3))
        head = head * weights["transformer.encoder.norm.weight"]
    return head, bias
