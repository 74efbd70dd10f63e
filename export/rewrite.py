"""Rewrites a fine-tuned model exactly: the same function in fewer and cheaper operations.

Each rewrite changes a copy of a model in place, replaces whole submodules and leaves the model's ``forward`` alone. No rewrite
changes the model's result beyond rounding (tests/test_rewrite.py compares each with the untouched model in float64). `rewrite`
applies all rewrites in order.

Every matrix product of a rewritten model is a `Product` or an `Attention`. These modules compute in the dtype of their weights
and leave everything between them in float32. `set_precision` makes a typed model of another precision: it casts those weights.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, PyTorch's own convention

from sjepa_deploy.models.networks import (
    FeatureEncoder,
    SignalJEPA_PreLocal,
    SignalJEPAModule,
    SignalJEPAWithTransformer,
    SpatialHead,
)
from sjepa_deploy.spec import Precision

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Product(nn.Module):
    """Multiplies rows with a matrix and adds a bias: (..., K) to (..., M) in the dtype of the weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Take `weight`, shape (M, K), and `bias`, shape (M,)."""
        super().__init__()
        self.weight = _constant(weight)
        self.bias = None if bias is None else _constant(bias)

    def forward(self, rows: Tensor) -> Tensor:
        """Run the module; its class says on which shapes."""
        return F.linear(rows.to(self.weight.dtype), self.weight, self.bias)


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone().contiguous(), requires_grad=False)


def gelu(x: Tensor) -> Tensor:
    """Return the exact GELU in the order of operations that ONNX Runtime fuses into one; torch's exporter writes another."""
    return x * (torch.erf(x / math.sqrt(2)) + 1) * 0.5


# ---- feature encoder ------------------------------------------------------------------------------------------------------


class RowFeatureEncoder(nn.Module):
    """Computes the feature encoder with its strided convolutions as matrix products on rows of time steps.

    A convolution whose stride equals its kernel reads every time step once: with the steps as rows of `dim` values, `kernel`
    neighbouring rows are one longer row, without any copy. Only the time steps that reach a token are computed after the
    first normalisation, whose statistics need all of them.
    """

    def __init__(self, encoder: FeatureEncoder, steps: tuple[int, ...]) -> None:
        """Take the encoder and the time steps after the normalisation and each product."""
        super().__init__()
        first, *rest = [block for block in encoder if isinstance(block, nn.Sequential)]
        norm = first[2]
        assert isinstance(norm, nn.GroupNorm)
        assert norm.num_groups == norm.num_channels, "each channel is normalised alone"
        self.conv, self.norm = first[0], norm
        convolutions = [conv for conv, *_ in rest if isinstance(conv, nn.Conv1d)]
        self.kernels = [conv.kernel_size[0] for conv in convolutions]
        self.steps = steps
        self.products = nn.ModuleList(Product(conv.weight.permute(0, 2, 1).flatten(1)) for conv in convolutions)

    def forward(self, eeg: Tensor) -> Tensor:
        """Run the module; its class says on which shapes."""
        x = self.conv(eeg.reshape(-1, 1, eeg.shape[-1]))
        x = F.instance_norm(x, weight=self.norm.weight, bias=self.norm.bias, eps=self.norm.eps)
        x = gelu(x[..., : self.steps[0]]).transpose(1, 2)
        for product, kernel, steps in zip(self.products, self.kernels, self.steps[1:], strict=True):
            x = gelu(product(x.reshape(-1, steps, kernel * x.shape[-1])))
        return x.reshape(-1, eeg.shape[1] * x.shape[1], x.shape[2]).to(eeg.dtype)


def needed_steps(kernels: list[int], n_tokens: int) -> tuple[int, ...]:
    """Return the number of time steps of each layer that `n_tokens` output tokens need, first layer first."""
    steps = [n_tokens]
    for kernel in reversed(kernels):
        steps.append(steps[-1] * kernel)
    return tuple(reversed(steps))


def convolutions_as_products(model: SignalJEPAModule) -> None:
    """Turn convolutions 2.. into products on rows and drop the time steps that reach no token.

    Requires that their strides equal their kernels (true of the published encoder); a model with others is left as it is.
    """
    layers = model.spec.encoder.conv_layers[1:]
    if any(kernel != stride for _, kernel, stride in layers):
        return
    steps = needed_steps([kernel for _, kernel, _ in layers], model.spec.n_tokens_per_channel)
    model.feature_encoder = RowFeatureEncoder(model.feature_encoder, steps)  # type: ignore[assignment]


class OffsetFree(nn.Module):
    """Runs a module on signals without their offset: each channel minus its first sample."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, eeg: Tensor) -> Tensor:
        """Run the module; its class says on which shapes."""
        return self.module(eeg - eeg[..., :1])  # type: ignore[no-any-return]


def remove_offset(model: SignalJEPAModule) -> None:
    """Subtract each channel's first sample from the input.

    The first normalisation removes any constant, so the subtraction changes rounding alone. Without the subtraction, float32
    products lose four digits to electrode offsets of 20 mV under a signal of 10 uV. Every token sees the first sample. A mean
    over the window could let in a NaN that no convolution reads.
    """
    if isinstance(model, SignalJEPA_PreLocal):
        model.spatial_conv = OffsetFree(model.spatial_conv)  # type: ignore[assignment]
    else:
        model.feature_encoder = OffsetFree(model.feature_encoder)  # type: ignore[assignment]


class SpatialProduct(nn.Module):
    """Applies spatial filters as one matrix product: (B, C, T) to (B, V, T)."""

    def __init__(self, weight: Tensor) -> None:
        """Take the filters, shape (V, C)."""
        super().__init__()
        self.weight = _constant(weight)

    def forward(self, eeg: Tensor) -> Tensor:
        """Run the module; its class says on which shapes."""
        return self.weight @ eeg


def spatial_conv_as_product(model: SignalJEPAModule) -> None:
    """Turn PreLocal's spatial convolution into a matrix product without its bias, which the first normalisation removes."""
    if isinstance(model, SignalJEPA_PreLocal):
        conv = model.spatial_conv[1]
        assert isinstance(conv, nn.Conv2d)
        model.spatial_conv = SpatialProduct(conv.weight.flatten(1))  # type: ignore[assignment]


# ---- transformer ----------------------------------------------------------------------------------------------------------


class ConstantPositions(nn.Module):
    """Holds the position encoding of a model with fixed channels and length, shape (C * N, E)."""

    def __init__(self, encoding: Tensor) -> None:
        super().__init__()
        self.encoding = _constant(encoding)

    def forward(self) -> Tensor:
        """Return the encoding."""
        return self.encoding


def constant_positions(model: SignalJEPAModule) -> None:
    """Compute the position encoding once."""
    if isinstance(model, SignalJEPAWithTransformer):
        encoding = model.pos_encoder()
        model.pos_encoder = ConstantPositions(encoding)  # type: ignore[assignment]


def drop_decoder(model: SignalJEPAModule) -> None:
    """Drop the predictor of pretraining, which no forward uses."""
    if isinstance(model, SignalJEPAWithTransformer):
        del model.transformer.decoder


class EncoderLayer(nn.Module):
    """Computes a post-norm encoder layer on rows of tokens, shape (B * L, E), with L tokens a window.

    Queries, keys and values come from one product. The query weights contain the scale 1/sqrt(head size). The key bias shifts
    all scores of a query alike, so softmax removes this bias. The weights of the attention add up to one, so the value bias
    moves into the output bias.
    """

    def __init__(self, layer: nn.TransformerEncoderLayer, n_tokens: int) -> None:
        super().__init__()
        attention = layer.self_attn
        w_q, w_k, w_v = attention.in_proj_weight.chunk(3)
        b_q, _, b_v = attention.in_proj_bias.chunk(3)
        scale = 1 / math.sqrt(attention.head_dim)
        out = attention.out_proj
        zeros = torch.zeros_like(b_q)
        self.shape = (-1, n_tokens, 3, attention.num_heads, attention.head_dim)
        self.qkv = Product(torch.cat([w_q * scale, w_k, w_v]), torch.cat([b_q * scale, zeros, zeros]))
        self.out = Product(out.weight, out.bias + out.weight @ b_v)
        self.norm1, self.norm2 = layer.norm1, layer.norm2
        self.linear1 = Product(layer.linear1.weight, layer.linear1.bias)
        self.linear2 = Product(layer.linear2.weight, layer.linear2.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """Run the module; its class says on which shapes."""
        qkv = self.qkv(rows).reshape(self.shape).permute(2, 0, 3, 1, 4)  # (3, B, heads, L, head size)
        query, key, value = torch.split(qkv, [1, 1, 1])
        scores = query @ key.transpose(-1, -2)
        weights = scores.to(rows.dtype).softmax(-1).to(qkv.dtype)
        mixed = (weights @ value).transpose(2, 3).reshape(-1, rows.shape[1])
        rows = self.norm1(rows + self.out(mixed).to(rows.dtype))
        return self.norm2(rows + self.linear2(F.relu(self.linear1(rows))).to(rows.dtype))  # type: ignore[no-any-return]


class RowEncoder(nn.Module):
    """Runs the transformer's encoder on rows of tokens: (B, L, E) to (B, L, E)."""

    def __init__(self, encoder: nn.TransformerEncoder, n_tokens: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(layer, n_tokens) for layer in encoder.layers)
        assert isinstance(encoder.norm, nn.LayerNorm)
        self.norm = encoder.norm

    def forward(self, tokens: Tensor) -> Tensor:
        """Run the module; its class says on which shapes."""
        rows = tokens.flatten(0, 1)
        for layer in self.layers:
            rows = layer(rows)
        normed: Tensor = self.norm(rows)
        return normed.reshape(-1, *tokens.shape[1:])


def fuse_attention(model: SignalJEPAModule) -> None:
    """Replace every encoder layer by an `EncoderLayer`."""
    if isinstance(model, SignalJEPAWithTransformer):
        n_tokens = model.spec.n_chans * model.spec.n_tokens_per_channel
        model.transformer.encoder = RowEncoder(model.transformer.encoder, n_tokens)


# ---- head -----------------------------------------------------------------------------------------------------------------


class LinearHead(nn.Module):
    """Maps all tokens linearly to the outputs: (B, L, E) to (B, O)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """Take `weight`, shape (O, L, E), and `bias`, shape (O,)."""
        super().__init__()
        self.weight = _constant(weight)
        self.bias = _constant(bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Run the module; its class says on which shapes."""
        return F.linear(tokens.flatten(1), self.weight.flatten(1), self.bias)


def fold_head(model: SignalJEPAModule) -> None:
    """Merge the spatial filters and the linear layer after them into one linear map."""
    head = model.final_layer if hasattr(model, "final_layer") else None
    if isinstance(head, SpatialHead):
        filters = head.spat_conv.weight.flatten(1)  # (V, C)
        n_filters, emb_dim = filters.shape[0], model.spec.encoder.emb_dim
        linear = head.linear.weight.reshape(model.spec.n_outputs, n_filters, -1, emb_dim)  # (O, V, N, E)
        weight = torch.einsum("vc,ovne->ocne", filters, linear).flatten(1, 2)
        bias = head.linear.bias + torch.einsum("v,ovne->o", head.spat_conv.bias, linear)
        model.final_layer = LinearHead(weight, bias)


def fold_last_norm(model: SignalJEPAModule) -> None:
    """Fold the scale and shift of the transformer's last normalisation into the head.

    `fold_head` must come first. The base model has no head and keeps scale and shift.
    """
    head = getattr(model, "final_layer", None)
    if isinstance(model, SignalJEPAWithTransformer) and isinstance(head, LinearHead):
        norm = model.transformer.encoder.norm
        assert isinstance(norm, nn.LayerNorm)
        bias = head.bias + (head.weight * norm.bias).sum((1, 2))
        model.final_layer = LinearHead(head.weight * norm.weight, bias)
        model.transformer.encoder.norm = nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)


# ---- all of them ----------------------------------------------------------------------------------------------------------

REWRITES = (
    constant_positions,
    drop_decoder,
    fuse_attention,
    fold_head,
    fold_last_norm,
    spatial_conv_as_product,
    convolutions_as_products,
    remove_offset,
)
"""All rewrites, in the order in which they must be applied."""


def rewrite(model: SignalJEPAModule) -> SignalJEPAModule:
    """Return a copy of `model` for inference with all rewrites applied in float64 and rounded once to float32."""
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for step in REWRITES:
            step(model)
    return model.float()


def set_precision(model: SignalJEPAModule, precision: Precision) -> None:
    """Cast the weights of every product of a rewritten model to `precision`.

    Some parts stay in float32, because parity needs float32 there: the spatial filters of PreLocal and the first convolution
    (they see raw amplitudes, which overflow float16), the normalisations, softmax, the residual stream, and the head.
    """
    for module in model.modules():
        if isinstance(module, Product):
            module.to(DTYPES[precision])
