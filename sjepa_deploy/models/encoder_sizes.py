"""Settles the sizes of a checkpoint's encoder from the shapes of weights, from a configuration, or by assumption.

Shapes tell the layers and their sizes. The shapes do not tell the strides of the convolutions, the attention heads, the scale of
the time encoding, the activation, nor whether the position table is used with ``max_norm``. Weights of another model therefore
load without an error, and give other predictions. Where nothing tells, the value of the published models is assumed and named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sjepa_deploy.errors import CheckpointError, listed
from sjepa_deploy.spec import EncoderSpec, Variant

EMBEDDING = "pos_encoder.pos_encoder_spat.weight"
"""The key of the position table: a row a channel, or a row for each of the 62 channels of the pretraining."""

PUBLISHED = EncoderSpec()

FLAGS = {
    "strides": "--strides",
    "n_heads": "--n-heads",
    "sfreq_features": "--sfreq-features",
    "max_norm": "--max-norm",
}
"""Sizes that no shape tells; a user may state them."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """Holds what a configuration says of a model.

    Attributes
    ----------
    known : dict of str to object
        Fields of `ModelSpec`; ``encoder`` is a dict of those of `EncoderSpec`.
    activation : bool
        Whether it names the activation, which is then the supported one.
    max_norm : float or None
        Largest norm of a row of the position table; infinity for none, None where nothing says so.
    """

    known: dict[str, Any] = field(default_factory=dict)
    activation: bool = False
    max_norm: float | None = None


def sizes_of_weights(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fields of `EncoderSpec` that the shapes of a whole model tell."""
    sizes: dict[str, Any] = {}
    layers = [m for m in map(re.compile(r"transformer\.(encoder|decoder)\.layers\.(\d+)\.").match, weights) if m]
    if layers:
        counts = {part: max((int(m[2]) + 1 for m in layers if m[1] == part), default=0) for part in ("encoder", "decoder")}
        sizes |= {"n_layers": counts["encoder"], "n_decoder_layers": counts["decoder"]}
    if EMBEDDING in weights:
        sizes["spat_dim"] = weights[EMBEDDING].shape[1]
    return sizes


def settle_encoder(
    weights: Mapping[str, Tensor], told: Told, asked: Mapping[str, Any], *, variant: Variant, n_times: int | None, file_name: str
) -> tuple[EncoderSpec, tuple[str, ...]]:
    """Put together the sizes of the encoder.

    Parameters
    ----------
    weights : mapping of str to Tensor
        State dict of the whole model.
    told : Told
        What the configuration says.
    asked : mapping of str to object
        What the user says: ``strides``, ``n_heads``, ``sfreq_features``; None says nothing.
    variant : {"prelocal", "postlocal", "contextual", "base"}
        The model, which may have no transformer.
    n_times : int or None
        Samples of a window; None where any length may come.
    file_name : str
        The checkpoint, for messages.

    Returns
    -------
    encoder : EncoderSpec
        The sizes.
    assumed : tuple of str
        One sentence for each value that nothing tells and that the predictions depend on.

    Raises
    ------
    CheckpointError
        If the user contradicts the configuration, or nothing tells what cannot be assumed.
    """
    fields: dict[str, Any] = sizes_of_weights(weights) | told.known.get("encoder", {})
    asked = {name: value for name, value in asked.items() if value is not None}
    kernels = _kernels(weights)
    settled = dict(fields)
    if "conv_layers" in fields:
        settled["strides"] = tuple(stride for *_, stride in fields["conv_layers"])
    for name, value in asked.items():
        if name in settled and settled[name] != value:
            raise CheckpointError(
                f"{file_name} has {name} = {settled[name]}, which contradicts the {value} asked for.",
                "Leave the flag out, or use another checkpoint.",
            )
    settled |= asked
    assumed = []
    if "strides" not in settled:
        if tuple(kernel for _, kernel in kernels) != tuple(kernel for _, kernel, _ in PUBLISHED.conv_layers):
            raise CheckpointError(
                f"{file_name} has kernels of {listed([str(k) for _, k in kernels])} samples, and nothing tells their strides.",
                f"Name the strides, as in {FLAGS['strides']} {','.join(['2'] * len(kernels))}.",
            )
        settled["strides"] = tuple(stride for *_, stride in PUBLISHED.conv_layers)
        assumed.append(f"the convolutions have strides of {', '.join(map(str, settled['strides']))} ({FLAGS['strides']})")
    if "conv_layers" not in fields and len(settled["strides"]) != len(kernels):
        raise CheckpointError(
            f"There are {len(settled['strides'])} strides for {len(kernels)} convolutions.", "Name one stride a convolution."
        )
    if "conv_layers" not in fields:
        settled["conv_layers"] = tuple(
            (dim, kernel, stride) for (dim, kernel), stride in zip(kernels, settled["strides"], strict=True)
        )
    if not told.activation:
        assumed.append("the convolutions are followed by GELU, the only activation that is supported")
    if variant in ("contextual", "base"):
        assumed += _assume_for_transformer(settled, told, n_times, file_name)
    elif settled["conv_layers"][-1][0] != PUBLISHED.emb_dim:
        settled = {"n_heads": 1, "spat_dim": 0, "time_dim": 0} | settled  # no transformer: any that fit
    del settled["strides"]
    return EncoderSpec(**settled), tuple(assumed)


def _assume_for_transformer(settled: dict[str, Any], told: Told, n_times: int | None, file_name: str) -> list[str]:
    """Fill in what is not settled of the transformer and its position encoding, and return a sentence for each."""
    assumed = []
    emb_dim = settled["conv_layers"][-1][0]
    if "n_heads" not in settled:
        if emb_dim % PUBLISHED.n_heads:
            raise CheckpointError(f"Nothing tells the attention heads of {file_name}.", f"Name them with {FLAGS['n_heads']}.")
        settled["n_heads"] = PUBLISHED.n_heads
        assumed.append(f"the transformer has {PUBLISHED.n_heads} heads ({FLAGS['n_heads']})")
    if "time_dim" not in settled:
        # braindecode leaves dimensions that encode neither place nor time uninitialised: no trained model has any.
        settled["time_dim"] = emb_dim - settled.get("spat_dim", PUBLISHED.spat_dim)
    if "sfreq_features" not in settled:
        settled["sfreq_features"] = PUBLISHED.sfreq_features
        encoder = EncoderSpec(**{name: value for name, value in settled.items() if name != "strides"})
        if n_times is None or encoder.n_outputs_of_layers(n_times)[-1] > 1:  # the first token is encoded alike at every rate
            assumed.append(f"time tokens are encoded at {PUBLISHED.sfreq_features:g} Hz ({FLAGS['sfreq_features']})")
    if told.max_norm is None:
        assumed.append(f"the position table is used without max_norm ({FLAGS['max_norm']})")
    return assumed


def _kernels(weights: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """Return (dim, kernel) of each convolution, in their order."""
    pattern = re.compile(r"feature_encoder\.(\d+)\.0\.weight")
    found = sorted((int(m[1]), tuple(weights[m[0]].shape)) for m in map(pattern.fullmatch, weights) if m)
    return [(shape[0], shape[-1]) for _, shape in found]
