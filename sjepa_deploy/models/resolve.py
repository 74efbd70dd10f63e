"""Makes one `ModelSpec` of a checkpoint, a user's flags and the default contract."""

from __future__ import annotations

import dataclasses
from typing import Any

from sjepa_deploy.eeg import montage
from sjepa_deploy.eeg.steps import BandPass, Channels, Reference, Step
from sjepa_deploy.errors import CheckpointError, SpecError, listed
from sjepa_deploy.models.checkpoint import Checkpoint
from sjepa_deploy.models.encoder_sizes import FLAGS, PUBLISHED, settle_encoder
from sjepa_deploy.spec import EncoderSpec, ModelSpec, Preprocessing, Variant

DEFAULT_MONTAGE = "GSN-HydroCel-129"
DEFAULT_N_TIMES = 200
DEFAULT_SFREQ = 100.0


def resolve_spec(
    asked: dict[str, Any], checkpoint: Checkpoint | None, *, asked_montage: montage.Montage | None = None
) -> tuple[ModelSpec, tuple[str, ...]]:
    """Put together what the checkpoint settles, what a user asks for, and the default contract.

    Parameters
    ----------
    asked : dict
        Fields of `ModelSpec` that the user named; of its preprocessing, a dict of the fields of `Preprocessing`; of its encoder,
        a dict of what `settle_encoder` takes, or an `EncoderSpec` where the weights are random.
    checkpoint : Checkpoint or None
        Where the weights come from; None for random ones.
    asked_montage : Montage or None
        Channels and positions that the user named.

    Returns
    -------
    spec : ModelSpec
        The spec to build.
    assumed : tuple of str
        One sentence for each value that neither settled.

    Raises
    ------
    CheckpointError
        If what the user asks for contradicts the checkpoint.
    SpecError
        If the result describes no model.
    """
    known = dict(checkpoint.known) if checkpoint else {}
    assumed: list[str] = []
    asked = dict(asked)
    asked_preprocessing: dict[str, Any] = asked.pop("preprocessing", {})  # other steps contradict nothing
    asked_encoder: Any = asked.pop("encoder", {})
    known.pop("encoder", None)
    if asked_montage is not None:
        asked |= {"ch_names": asked_montage.ch_names, "n_chans": len(asked_montage.ch_names)}
        if "positions" not in known and asked_montage.positions is not None:
            known["positions"] = asked_montage.positions
    if checkpoint is not None:
        _refuse_contradictions(asked, known, checkpoint)
    fields = known | asked
    variant: Variant = fields["variant"]
    needs_positions = variant in ("contextual", "base")
    if fields.get("ch_names") is None and fields.get("n_chans") in (None, 129) and (needs_positions or "n_chans" not in fields):
        net = montage.read_montage(DEFAULT_MONTAGE)
        fields |= {"ch_names": net.ch_names, "positions": net.positions, "n_chans": len(net.ch_names)}
        assumed.append(f"the channels are those of {DEFAULT_MONTAGE}")
    if "n_times" not in fields:
        fields["n_times"] = DEFAULT_N_TIMES
        assumed.append(f"a window has {DEFAULT_N_TIMES} samples")
    if "sfreq" not in fields:
        fields["sfreq"] = DEFAULT_SFREQ
        assumed.append(f"the sampling rate is {DEFAULT_SFREQ:g} Hz")
    if "steps" in fields:
        fields["steps"] = _with_band_and_reference(fields["steps"], asked_preprocessing)
    else:
        alone = fields.get("n_chans") == 1  # nothing would be left of it
        default = Preprocessing.default(fields["sfreq"])
        default = dataclasses.replace(default, reference="none" if alone else default.reference)
        fields["steps"] = dataclasses.replace(default, **asked_preprocessing).steps
        if not {"l_freq", "h_freq"} <= set(asked_preprocessing):
            assumed.append("recordings are filtered as in the published pretraining")
        if "reference" not in asked_preprocessing:
            assumed.append("one channel keeps its reference" if alone else "recordings are referenced to their average")
    if "phase" not in fields:
        fields["phase"] = "zero-phase"
        assumed.append("the model learned from zero-phase filtered recordings")
    if checkpoint is None:
        fields["encoder"] = asked_encoder if isinstance(asked_encoder, EncoderSpec) else _random_encoder(asked_encoder)
    else:
        fields["encoder"], assumed_sizes = settle_encoder(
            checkpoint.weights,
            checkpoint.told,
            asked_encoder,
            variant=variant,
            n_times=fields["n_times"],
            file_name=checkpoint.file_name,
        )
        assumed += assumed_sizes
    spec = ModelSpec.of(**fields)
    if spec.needs_positions and spec.positions is None:
        raise SpecError(
            f"The {spec.variant} model needs the positions of its {spec.n_chans} channels, which nothing settles.",
            "Name their montage with --montage, and with --channels which of its channels they are.",
        )
    if checkpoint and checkpoint.n_tokens is not None and spec.n_tokens_per_channel != checkpoint.n_tokens:
        raise CheckpointError(
            f"Windows of {spec.n_times} samples give {spec.n_tokens_per_channel} time tokens, but the head of "
            f"{checkpoint.file_name} was made for {checkpoint.n_tokens}.",
            f"Use --n-times from {_n_times_for(spec, checkpoint.n_tokens)}{_or_strides(assumed)}.",
        )
    return spec, tuple(assumed)


def _with_band_and_reference(steps: tuple[Step, ...], asked: dict[str, Any]) -> tuple[Step, ...]:
    """Return `steps` with the band and the reference of the fields of `Preprocessing` that a user named."""
    changed = list(steps)
    edges = {name: asked[name] for name in ("l_freq", "h_freq") if name in asked}
    if edges:
        bands = [i for i, step in enumerate(changed) if isinstance(step, BandPass)]
        if bands:
            changed[bands[0]] = dataclasses.replace(changed[bands[0]], **edges)
        else:
            changed.insert(0, BandPass(l_freq=edges.get("l_freq"), h_freq=edges.get("h_freq")))
    if "reference" in asked:
        changed = [step for step in changed if not isinstance(step, Reference)]
        if asked["reference"] == "average":
            changed.insert(next(i for i, step in enumerate(changed) if isinstance(step, Channels)) + 1, Reference())
    return tuple(changed)


def _random_encoder(asked: dict[str, Any]) -> EncoderSpec:
    """Return the encoder that a user asks for without a checkpoint: the published one with other values."""
    sizes = {name: value for name, value in asked.items() if value is not None}
    if strides := sizes.pop("strides", None):
        if len(strides) != len(PUBLISHED.conv_layers):
            raise SpecError(f"There are {len(strides)} strides for {len(PUBLISHED.conv_layers)} convolutions.", "Name one each.")
        layers = zip(PUBLISHED.conv_layers, strides, strict=True)
        sizes["conv_layers"] = tuple((dim, kernel, stride) for (dim, kernel, _), stride in layers)
    return EncoderSpec(**sizes)


def _or_strides(assumed: list[str]) -> str:
    """Return the other way out where the strides, which the number of tokens follows from, are only assumed."""
    return f", or name other strides with {FLAGS['strides']}" if any(FLAGS["strides"] in each for each in assumed) else ""


def _refuse_contradictions(asked: dict[str, Any], known: dict[str, Any], checkpoint: Checkpoint) -> None:
    for name, value in asked.items():
        if name == "n_times" or name not in known:
            continue  # another length with the same number of tokens runs on the same weights
        same = value == known[name]
        if name == "ch_names":
            same = [n.casefold() for n in value] == [n.casefold() for n in known[name]]
        if not same:
            raise CheckpointError(
                f"{checkpoint.file_name} has {name} = {_shown(known[name])}, which contradicts the {_shown(value)} asked for.",
                "Leave the flag out, or use another checkpoint.",
            )


def _shown(value: object) -> str:
    return listed(list(map(str, value)), 4) if isinstance(value, tuple) else str(value)


def _n_times_for(spec: ModelSpec, n_tokens: int) -> str:
    return f"{spec.encoder.span(n_tokens)} to {spec.encoder.span(n_tokens + 1) - 1}"
