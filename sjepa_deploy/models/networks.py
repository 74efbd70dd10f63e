"""Builds the SignalJEPA networks in plain PyTorch (Guetschel, Moreau, Tangermann 2024, doi 10.3217/978-3-99161-014-4-003).

Parameters carry the names of braindecode's implementation, so that checkpoints move both ways.
Shapes are written with B windows, C channels, T samples, N time tokens a channel, E embedding dimensions,
V spatial filters, O outputs. Tokens are in channel-major order: index = channel * N + time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from sjepa_deploy.errors import SpecError
from sjepa_deploy.spec import EncoderSpec, ModelSpec, Position


class FeatureEncoder(nn.Sequential):
    """Convolves every channel alone over time: (B, C, T) to (B, C * N, E)."""

    def __init__(self, encoder: EncoderSpec) -> None:
        dims = [1, *(dim for dim, _, _ in encoder.conv_layers)]
        blocks = []
        for i, ((dim_in, dim), (_, kernel, stride)) in enumerate(zip(pairwise(dims), encoder.conv_layers, strict=True)):
            conv = nn.Conv1d(dim_in, dim, kernel, stride=stride, bias=False)
            nn.init.kaiming_normal_(conv.weight)
            norm = [nn.GroupNorm(dim, dim)] if i == 0 else []
            blocks.append(nn.Sequential(conv, nn.Dropout(encoder.drop_prob), *norm, nn.GELU()))
        super().__init__(nn.Identity(), *blocks)  # the first place is braindecode's rearrangement: keys start at 1

    def forward(self, eeg: Tensor) -> Tensor:
        """Return the tokens, shape (B, C * N, E), of `eeg`, shape (B, C, T)."""
        batch, n_chans, n_times = eeg.shape
        local: Tensor = super().forward(eeg.reshape(batch * n_chans, 1, n_times))  # type: ignore[no-untyped-call]
        return local.transpose(1, 2).reshape(batch, -1, local.shape[1])


class ChannelEmbedding(nn.Embedding):
    """Holds one learned vector a channel, initialised with the cosine encoding of its coordinates."""

    def __init__(self, positions: tuple[Position, ...], dim: int) -> None:
        self.positions = positions
        super().__init__(len(positions), dim)

    def reset_parameters(self) -> None:
        """Initialise from the coordinates, over the range 0 .. 10 x the largest absolute one."""
        with torch.no_grad():
            self.weight.copy_(encode_positions(self.positions, self.embedding_dim))


class PositionEncoder(nn.Module):
    """Encodes the positions of the tokens: the spatial part is learned, the temporal part fixed."""

    encoding_time: Tensor

    def __init__(self, positions: tuple[Position, ...], n_tokens: int, encoder: EncoderSpec) -> None:
        super().__init__()
        self.emb_dim = encoder.emb_dim
        self.pos_encoder_spat = ChannelEmbedding(positions, encoder.spat_dim)
        encoding_time = encode_time(n_tokens, encoder.time_dim, encoder.max_n_tokens)
        self.register_buffer("encoding_time", encoding_time, persistent=False)

    def forward(self) -> Tensor:
        """Return the encoding of all tokens, shape (C * N, E)."""
        spatial, temporal = self.pos_encoder_spat.weight, self.encoding_time
        n_chans, n_tokens = len(spatial), len(temporal)
        parts = [spatial[:, None].expand(-1, n_tokens, -1), temporal[None].expand(n_chans, -1, -1)]
        if rest := self.emb_dim - spatial.shape[1] - temporal.shape[1]:
            parts.append(spatial.new_zeros(n_chans, n_tokens, rest))
        return torch.cat(parts, dim=-1).flatten(0, 1)


def encode_positions(positions: tuple[Position, ...], dim: int) -> Tensor:
    """Return the cosine encoding, shape (C, dim) float32, of electrode positions in metres.

    Each coordinate x takes dim / 3 values sin, cos of x / (10 max|x|) * exp(2 pi (1 - i / (dim / 3))), i even: the
    initialisation of braindecode's channel embedding.
    """
    per_axis = dim // 3
    coordinates = torch.tensor(positions, dtype=torch.float64)
    frequency = torch.exp((1 - torch.arange(0, per_axis, 2) / per_axis) * 2 * math.pi)
    phase = (coordinates / (10 * coordinates.abs().max()))[..., None] * frequency
    encoding = torch.stack([phase.sin(), phase.cos()], dim=-1)  # (C, 3, dim / 6, 2)
    return encoding.flatten(1).float()


def encode_time(n_tokens: int, dim: int, max_n_tokens: int) -> Tensor:
    """Return the sine-cosine encoding, shape (n_tokens, dim) float32, of the time tokens (Vaswani et al. 2017)."""
    frequency = torch.exp(torch.arange(0, dim, 2) * (-math.log(max_n_tokens) / dim))
    phase = torch.arange(n_tokens)[:, None] * frequency
    return torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(1)


class SpatialHead(nn.Module):
    """Applies spatial filters over the channels of the tokens, then one linear layer: (B, C * N, E) to (B, O)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spat_conv = nn.Conv3d(1, spec.n_spat_filters, (spec.n_chans, 1, 1))
        self.linear = nn.Linear(head_size(spec), spec.n_outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the outputs, shape (B, O), of `tokens`, shape (B, C * N, E)."""
        n_chans = self.spat_conv.kernel_size[0]
        by_channel = tokens.reshape(len(tokens), 1, n_chans, -1, tokens.shape[-1])
        filtered = self.spat_conv(by_channel)
        return self.linear(filtered.flatten(1))  # type: ignore[no-any-return]


def head_size(spec: ModelSpec) -> int:
    """Return the input size V * N * E of the last linear layer."""
    return spec.n_spat_filters * spec.n_tokens_per_channel * spec.encoder.emb_dim


class SpatialConv(nn.Sequential):
    """Applies spatial filters to the signals: (B, C, T) to (B, V, T)."""

    def __init__(self, spec: ModelSpec) -> None:
        conv = nn.Conv2d(1, spec.n_spat_filters, (spec.n_chans, 1))
        super().__init__(nn.Identity(), conv)  # the first place is braindecode's rearrangement

    def forward(self, eeg: Tensor) -> Tensor:
        """Return the virtual channels, shape (B, V, T), of `eeg`, shape (B, C, T)."""
        virtual: Tensor = super().forward(eeg[:, None])  # type: ignore[no-untyped-call]
        return virtual[:, :, 0]


class SignalJEPAModule(nn.Module):
    """Holds what the base model and its variants share: the `spec` and the feature encoder."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert MODELS[spec.variant] is type(self), f"{type(self).__name__} was built from a {spec.variant} spec"
        self.spec = spec
        self.feature_encoder = FeatureEncoder(spec.encoder)


class SignalJEPAWithTransformer(SignalJEPAModule):
    """Encodes with all three parts: feature encoder, position encoding, transformer."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        if spec.positions is None:
            raise SpecError(
                f"The {spec.variant} model needs the positions of its channels.",
                "Name a montage, or give positions with the channels.",
            )
        self.pos_encoder = PositionEncoder(spec.positions, spec.n_tokens_per_channel, spec.encoder)
        self.transformer = nn.Transformer(
            spec.encoder.emb_dim,
            spec.encoder.n_heads,
            spec.encoder.n_layers,
            spec.encoder.n_decoder_layers,
            batch_first=True,
        )

    def encode(self, eeg: Tensor) -> Tensor:
        """Return the contextual features, shape (B, C * N, E), of `eeg`, shape (B, C, T)."""
        tokens = self.feature_encoder(eeg) + self.pos_encoder()
        return self.transformer.encoder(tokens)  # type: ignore[no-any-return]


class SignalJEPA(SignalJEPAWithTransformer):
    """Computes the base model: (B, C, T) to features (B, C * N, E)."""

    def forward(self, eeg: Tensor) -> Tensor:
        """Return the contextual features, shape (B, C * N, E)."""
        return self.encode(eeg)


class SignalJEPA_Contextual(SignalJEPAWithTransformer):
    """Applies the whole encoder, then spatial filters and a linear layer: (B, C, T) to (B, O)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.final_layer = SpatialHead(spec)

    @property
    def spatial_filter(self) -> nn.Conv3d:
        """Return the spatial filters, weight of shape (V, 1, C, 1, 1)."""
        return self.final_layer.spat_conv

    def forward(self, eeg: Tensor) -> Tensor:
        """Return the predictions, shape (B, O)."""
        return self.final_layer(self.encode(eeg))  # type: ignore[no-any-return]


class SignalJEPA_PostLocal(SignalJEPAModule):
    """Applies the feature encoder, then spatial filters and a linear layer: (B, C, T) to (B, O)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.final_layer = SpatialHead(spec)

    @property
    def spatial_filter(self) -> nn.Conv3d:
        """Return the spatial filters, weight of shape (V, 1, C, 1, 1)."""
        return self.final_layer.spat_conv

    def forward(self, eeg: Tensor) -> Tensor:
        """Return the predictions, shape (B, O)."""
        return self.final_layer(self.feature_encoder(eeg))  # type: ignore[no-any-return]


class SignalJEPA_PreLocal(SignalJEPAModule):
    """Applies spatial filters to the signals, then the feature encoder and a linear layer: (B, C, T) to (B, O)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.spatial_conv = SpatialConv(spec)
        self.final_layer = nn.Sequential(nn.Flatten(), nn.Linear(head_size(spec), spec.n_outputs))

    def forward(self, eeg: Tensor) -> Tensor:
        """Return the predictions, shape (B, O)."""
        return self.final_layer(self.feature_encoder(self.spatial_conv(eeg)))  # type: ignore[no-any-return]


MODELS: dict[str, type[SignalJEPAModule]] = {
    "prelocal": SignalJEPA_PreLocal,
    "postlocal": SignalJEPA_PostLocal,
    "contextual": SignalJEPA_Contextual,
    "base": SignalJEPA,
}


def build_model(spec: ModelSpec, *, seed: int | None = None) -> SignalJEPAModule:
    """Build the model of `spec` with random weights.

    Parameters
    ----------
    spec : ModelSpec
        Spec of the model to build.
    seed : int or None
        Seed of the initialisation; None draws from torch's global generator.

    Raises
    ------
    SpecError
        If the variant needs positions and the spec has none.
    """
    if seed is None:
        return MODELS[spec.variant](spec)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MODELS[spec.variant](spec)


def last_linear(model: SignalJEPAModule) -> nn.Linear:
    """Return the last layer of a variant, which gives its outputs. The base model has none."""
    assert model.spec.variant != "base", "the base model outputs features"
    layer = model.final_layer[1] if isinstance(model, SignalJEPA_PreLocal) else model.final_layer.linear  # type: ignore[union-attr]
    assert isinstance(layer, nn.Linear)
    return layer


@contextlib.contextmanager
def reference_mode(model: nn.Module) -> Iterator[None]:
    """Evaluate without dropout, gradient or the transformer fast path, whose rounding differs."""
    fast_path, training = torch.backends.mha.get_fastpath_enabled(), model.training
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        model.train(training)
