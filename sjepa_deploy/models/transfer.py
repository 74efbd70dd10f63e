"""Moves weights of a pretrained base model into a variant, and reports what became of each weight.

==================== ============================ ========== ==========
part                 PreLocal                     PostLocal  Contextual
==================== ============================ ========== ==========
feature_encoder      random, or taken where asked taken      taken
pos_encoder          not there                    not there  taken
transformer          not there                    not there  taken
spatial filters      new                          new        new
final_layer          new                          new        new
==================== ============================ ========== ==========

PreLocal's feature encoder has no channel axis: its weights fit, and the paper's best pipelines took them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sjepa_deploy.errors import CheckpointError, listed
from sjepa_deploy.models.checkpoint import Checkpoint
from sjepa_deploy.models.encoder_sizes import EMBEDDING, settle_encoder
from sjepa_deploy.models.networks import SignalJEPAModule, build_model
from sjepa_deploy.spec import EncoderSpec, ModelSpec, Variant

NEW_PARTS: dict[Variant, tuple[str, ...]] = {
    "prelocal": ("spatial_conv", "final_layer"),
    "postlocal": ("final_layer",),
    "contextual": ("final_layer",),
}
"""Modules that no base model has: spatial filters and the last layer (``final_layer.spat_conv`` is the spatial filter)."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """Names a weight that has a place in the variant and was not taken.

    Attributes
    ----------
    name : str
        Key of the state dict.
    reason : str
        One sentence.
    """

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class TransferReport:
    """Reports what became of every weight.

    Attributes
    ----------
    source, sha256 : str
        Name and hash of the file of the base model.
    variant : {"prelocal", "postlocal", "contextual"}
        What the weights went into.
    taken : tuple of str
        Keys of the variant that hold the base model's values.
    new : tuple of str
        Keys of the variant that hold new values.
    left : tuple of str
        Keys of the base model that have no place in the variant.
    skipped : tuple of Skipped
        Keys of the base model that have a place and were not taken, with the reason.
    channels_taken, channels_new : tuple of str
        Channels whose position embedding was taken by name, and those where it was made from their coordinates.
    notes : tuple of str
        What differs between the data of pretraining and of fine-tuning.
    """

    source: str
    sha256: str
    variant: Variant
    taken: tuple[str, ...]
    new: tuple[str, ...]
    left: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    channels_taken: tuple[str, ...] = ()
    channels_new: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def transfer(
    base: Checkpoint, spec: ModelSpec, *, seed: int = 0, encoder_to_prelocal: bool = False, accept_sfreq: bool = False
) -> tuple[SignalJEPAModule, TransferReport]:
    """Build the model of `spec` with the weights that it takes from a base model.

    Parameters
    ----------
    base : Checkpoint
        The base model.
    spec : ModelSpec
        The variant to build. Its channels and length are free; its `encoder` must be the base model's (`base_encoder`).
    seed : int
        Seed of the new weights.
    encoder_to_prelocal : bool
        Take the feature encoder into PreLocal too.
    accept_sfreq : bool
        Take filters that were learned at another sampling rate.

    Raises
    ------
    CheckpointError
        If `base` is no base model, has other sizes (both are named), another unit, or another rate that was not accepted.
    """
    if base.variant != "base":
        raise CheckpointError(
            f"{base.file_name} holds a {base.variant} model, not a base model.", "Name the checkpoint that sjepa-pretrain wrote."
        )
    assert spec.variant != "base", "a base model is not transferred into a base model"
    notes = _compare_inputs(base, spec, accept_sfreq)
    model = build_model(spec, seed=seed)
    own = model.state_dict()
    taken: dict[str, Tensor] = {}
    skipped: list[Skipped] = []
    channels_taken: tuple[str, ...] = ()
    for name, weight in base.weights.items():
        if name not in own:
            continue
        if spec.variant == "prelocal" and not encoder_to_prelocal:
            skipped.append(Skipped(name=name, reason="PreLocal starts from random weights unless the transfer is asked for."))
        elif name == EMBEDDING:
            rows, channels_taken, reason = _position_rows(base, weight, own[name], spec)
            if channels_taken:
                taken[name] = rows
            if reason:
                skipped.append(Skipped(name=name, reason=reason))
        elif weight.shape != own[name].shape:
            raise CheckpointError(
                f"{name} of {base.file_name} has the shape {tuple(weight.shape)}, the {spec.variant} model's "
                f"{tuple(own[name].shape)}.",
                "Build the variant with the encoder of the base model.",
            )
        else:
            taken[name] = weight
    wanted = [k for k in own if k.split(".")[0] not in NEW_PARTS[spec.variant]]
    if spec.variant != "prelocal" and (missing := [k for k in wanted if k not in base.weights and k != EMBEDDING]):
        raise CheckpointError(f"{base.file_name} lacks {listed(missing)}.", "Use a whole base model's checkpoint.")
    model.load_state_dict(own | taken)
    report = TransferReport(
        source=base.file_name,
        sha256=base.sha256,
        variant=spec.variant,
        taken=tuple(taken),
        new=tuple(k for k in own if k not in taken),
        left=tuple(k for k in base.weights if k not in own),
        skipped=tuple(skipped),
        channels_taken=channels_taken,
        channels_new=tuple(n for n in spec.ch_names or () if spec.needs_positions and n not in channels_taken),
        notes=notes,
    )
    return model, report


def base_encoder(base: Checkpoint, asked: EncoderSpec | None = None) -> tuple[EncoderSpec, tuple[str, ...]]:
    """Return the sizes of the encoder in `base`, and a sentence for each that is assumed.

    Parameters
    ----------
    base : Checkpoint
        The base model.
    asked : EncoderSpec or None
        What the user says, which tells what no shape does.

    Raises
    ------
    CheckpointError
        If `asked` contradicts the checkpoint.
    """
    names = ("n_heads", "sfreq_features")
    said = {} if asked is None else {name: getattr(asked, name) for name in names}
    if asked is not None:
        said["strides"] = tuple(stride for *_, stride in asked.conv_layers)
    return settle_encoder(base.weights, base.told, said, variant="base", n_times=None, file_name=base.file_name)


def _compare_inputs(base: Checkpoint, spec: ModelSpec, accept_sfreq: bool) -> tuple[str, ...]:
    """Refuse inputs that the weights were not trained for, and return the other differences."""
    known: dict[str, Any] = base.known
    notes = []
    if known.get("unit", spec.unit) != spec.unit:
        raise CheckpointError(
            f"{base.file_name} was pretrained on {known['unit']}, the data are in {spec.unit}.", "Use data in the same unit."
        )
    sfreq = known.get("sfreq")
    if sfreq is None:
        notes.append("the base model's sampling rate is not known")
    elif not math.isclose(sfreq, spec.sfreq):
        if not accept_sfreq:
            raise CheckpointError(
                f"{base.file_name} was pretrained at {sfreq:g} Hz, the data are at {spec.sfreq:g} Hz: its filters would mean "
                "other frequencies.",
                f"Resample with --sfreq {sfreq:g}, or take them as they are with --accept-sfreq.",
            )
        notes.append(f"filters learned at {sfreq:g} Hz are used at {spec.sfreq:g} Hz")
    if (length := known.get("n_times")) not in (None, spec.n_times):
        notes.append(f"pretrained on windows of {length} samples, fine-tuned on {spec.n_times}")
    if "steps" in known and known["steps"] != spec.signal.steps:
        notes.append("pretrained on recordings that went through other steps")
    if known.get("phase", spec.signal.phase) != spec.signal.phase:
        notes.append(f"pretrained on {known['phase']} recordings, fine-tuned on {spec.signal.phase} ones")
    return tuple(notes)


def _position_rows(base: Checkpoint, weight: Tensor, own: Tensor, spec: ModelSpec) -> tuple[Tensor, tuple[str, ...], str]:
    """Return the embedding of the variant's channels, the channels taken by name, and why the others were not."""
    if weight.shape[1] != own.shape[1]:
        raise CheckpointError(
            f"{EMBEDDING} of {base.file_name} has the shape {tuple(weight.shape)}, the {spec.variant} model's "
            f"{tuple(own.shape)}.",
            "Build the variant with the encoder of the base model.",
        )
    names: tuple[str, ...] | None = base.known.get("ch_names")
    if names is None or len(names) != len(weight) or spec.ch_names is None:
        side = "base model" if spec.ch_names is not None else "data"
        return own, (), f"The channels of the {side} have no names: the embedding was made from the coordinates."
    row_of = {name.casefold(): row for row, name in enumerate(names)}
    here = [i for i, name in enumerate(spec.ch_names) if name.casefold() in row_of]
    there = [row_of[spec.ch_names[i].casefold()] for i in here]
    rows = own.clone()
    rows[torch.tensor(here, dtype=torch.long)] = weight[torch.tensor(there, dtype=torch.long)]
    unused = [name for row, name in enumerate(names) if row not in there]
    reason = f"The rows of {len(unused)} channels are of no channel here: {listed(unused)}." if unused else ""
    return rows, tuple(spec.ch_names[i] for i in here), reason
