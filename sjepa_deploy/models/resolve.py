"""Makes one `ModelSpec` of a checkpoint, a user's flags and the default contract."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from sjepa_deploy.eeg import montage
from sjepa_deploy.eeg.steps import Step
from sjepa_deploy.eeg.steps.changed import changed_steps
from sjepa_deploy.errors import CheckpointError, SpecError, listed
from sjepa_deploy.models.checkpoint import Checkpoint
from sjepa_deploy.models.encoder_sizes import FLAGS, PUBLISHED, settle_encoder
from sjepa_deploy.serialize import encode
from sjepa_deploy.spec import EncoderSpec, EventWindow, ModelSpec, Preprocessing, Unit

DEFAULT_MONTAGE = "GSN-HydroCel-129"
DEFAULT_N_TIMES = 200
DEFAULT_SFREQ = 100.0
DEFAULT_UNIT: Unit = "uV"


@dataclass(frozen=True, kw_only=True)
class Assumption:
    """Tells one value that neither a checkpoint nor its user settled.

    Attributes
    ----------
    what : str
        The value in words.
    flag : str
        What changes it; "" where nothing does.
    of_signal : bool
        Whether the value is part of the signal that the model learned from: another one changes decisions without any error.
    """

    what: str
    flag: str = ""
    of_signal: bool = False

    def __str__(self) -> str:
        return f"{self.what} ({self.flag})" if self.flag else self.what


def resolve_spec(
    asked: dict[str, Any], checkpoint: Checkpoint | None, *, asked_montage: montage.Montage | None = None
) -> tuple[ModelSpec, tuple[Assumption, ...]]:
    """Put together what the checkpoint settles, what a user asks for, and the default contract.

    Parameters
    ----------
    asked : dict
        Fields of `ModelSpec` and `SignalSpec` that the user named; ``preprocessing`` is a dict of what `changed_steps` takes,
        ``event_window`` one of the fields of `EventWindow`, ``encoder`` one of what `settle_encoder` takes, or an `EncoderSpec`
        where the weights are random.
    checkpoint : Checkpoint or None
        Where the weights come from; None for random ones.
    asked_montage : Montage or None
        Channels and positions that the user named.

    Returns
    -------
    spec : ModelSpec
        The spec to build.
    assumed : tuple of Assumption
        What neither settled.

    Raises
    ------
    CheckpointError
        If what the user asks for contradicts the checkpoint.
    SpecError
        If the result describes no model.
    """
    known = dict(checkpoint.known) if checkpoint else {}
    asked = dict(asked)
    asked_changes: dict[str, Any] = asked.pop("preprocessing", {})  # other steps contradict nothing
    asked_encoder: Any = asked.pop("encoder", {})
    known.pop("encoder", None)
    if asked_montage is not None:
        asked |= {"ch_names": asked_montage.ch_names, "n_chans": len(asked_montage.ch_names)}
        if "positions" not in known and asked_montage.positions is not None:
            known["positions"] = asked_montage.positions
    asked |= _event_window(asked.pop("event_window", {}), known)
    if checkpoint is not None:
        _refuse_contradictions(asked, known, checkpoint)
    fields = known | asked
    if "class_names" in fields:
        fields.setdefault("n_outputs", len(fields["class_names"]))
    assumed = _assume_signal(fields, asked_changes)
    if checkpoint is None:
        fields["encoder"] = asked_encoder if isinstance(asked_encoder, EncoderSpec) else _random_encoder(asked_encoder)
    else:
        assumed += _assume_task(fields, checkpoint)
        fields["encoder"], sizes = settle_encoder(
            checkpoint.weights,
            checkpoint.told,
            asked_encoder,
            variant=fields["variant"],
            n_times=fields["n_times"],
            file_name=checkpoint.file_name,
        )
        assumed += [Assumption(what=what) for what in sizes]
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


def _assume_signal(fields: dict[str, Any], changes: dict[str, Any]) -> list[Assumption]:
    """Fill in what `fields` lack of the signal, and tell what was assumed."""
    assumed: list[Assumption] = []

    def assume(what: str, flag: str) -> None:
        assumed.append(Assumption(what=what, flag=flag, of_signal=True))

    needs_positions = fields["variant"] in ("contextual", "base")
    if fields.get("ch_names") is None and fields.get("n_chans") in (None, 129) and (needs_positions or "n_chans" not in fields):
        net = montage.read_montage(DEFAULT_MONTAGE)
        fields |= {"ch_names": net.ch_names, "positions": net.positions, "n_chans": len(net.ch_names)}
        assume(f"the channels are those of {DEFAULT_MONTAGE}", "--montage, --channels")
    if "n_times" not in fields:
        fields["n_times"] = DEFAULT_N_TIMES
        assume(f"a window has {DEFAULT_N_TIMES} samples", "--n-times")
    if "sfreq" not in fields:
        fields["sfreq"] = DEFAULT_SFREQ
        assume(f"the sampling rate is {DEFAULT_SFREQ:g} Hz", "--sfreq")
    if "unit" not in fields:
        fields["unit"] = DEFAULT_UNIT
        assume(f"the samples are in {DEFAULT_UNIT}", "--unit")
    if "steps" not in fields:
        alone = fields.get("n_chans") == 1  # nothing would be left of it
        default = Preprocessing.default(fields["sfreq"])
        default = dataclasses.replace(default, reference="none" if alone else default.reference)
        fields["steps"] = default.steps
        if not {"l_freq", "h_freq"} <= set(changes):
            upper = "half the rate" if default.h_freq is None else f"{default.h_freq:g} Hz"
            lower = "0" if default.l_freq is None else f"{default.l_freq:g}"
            assume(f"recordings are band-passed from {lower} to {upper}, as in the published pretraining", "--band")
        if "reference" not in changes:
            assume(
                "one channel keeps its reference"
                if alone
                else "recordings are referenced to the average of the model's channels",
                "--reference",
            )
    fields["steps"] = changed_steps(fields["steps"], changes, fields.get("ch_names"))
    if "phase" not in fields:
        fields["phase"] = "zero-phase"
        assume("the model learned from zero-phase filtered recordings", "--phase")
    return assumed


def _assume_task(fields: dict[str, Any], checkpoint: Checkpoint) -> list[Assumption]:
    """Tell what nothing says of the windows' events and of the outputs of a checkpoint."""
    assumed = []
    if "event_window" not in fields and "steps" not in checkpoint.known:
        assumed.append(Assumption(what="the windows belong to no events", flag="--tmin, --events"))
    if not {"task", "class_names"} & set(fields) and fields["variant"] != "base":
        assumed.append(Assumption(what="the outputs are numbers, not classes", flag="--task, --class-names"))
    return assumed


def _event_window(asked: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Return the event window that a user names, in part or whole, with what the checkpoint says of the other part."""
    if not asked:
        return {}
    before: EventWindow | None = known.get("event_window")
    if "start" not in asked and before is None:
        raise SpecError(
            "The events are named, but not where windows start after them.", "Name the start with --tmin, in seconds."
        )
    if before is None:
        return {"event_window": EventWindow(**asked)}
    if not before.events:
        known["event_window"] = before = dataclasses.replace(before, events=asked.get("events", ()))
    return {"event_window": dataclasses.replace(before, **asked)}


def _random_encoder(asked: dict[str, Any]) -> EncoderSpec:
    """Return the encoder that a user asks for without a checkpoint: the published one with other values."""
    sizes = {name: value for name, value in asked.items() if value is not None}
    if strides := sizes.pop("strides", None):
        if len(strides) != len(PUBLISHED.conv_layers):
            raise SpecError(f"There are {len(strides)} strides for {len(PUBLISHED.conv_layers)} convolutions.", "Name one each.")
        layers = zip(PUBLISHED.conv_layers, strides, strict=True)
        sizes["conv_layers"] = tuple((dim, kernel, stride) for (dim, kernel, _), stride in layers)
    return EncoderSpec(**sizes)


def _or_strides(assumed: list[Assumption]) -> str:
    """Return the other way out where the strides, which the number of tokens follows from, are only assumed."""
    return f", or name other strides with {FLAGS['strides']}" if any(FLAGS["strides"] in each.what for each in assumed) else ""


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
    if isinstance(value, EventWindow):
        return f"{value.start:g} s after {listed(value.events) or 'events'}"
    if isinstance(value, tuple) and any(isinstance(each, Step) for each in value):
        return listed([str(encode(each)) for each in value], 12)
    return listed(list(map(str, value)), 4) if isinstance(value, tuple) else str(value)


def _n_times_for(spec: ModelSpec, n_tokens: int) -> str:
    return f"{spec.encoder.span(n_tokens)} to {spec.encoder.span(n_tokens + 1) - 1}"
