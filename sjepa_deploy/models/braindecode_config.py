"""Reads and writes braindecode's ``config.json``: the arguments of its SignalJEPA classes, and what they tell of a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sjepa_deploy.eeg import montage
from sjepa_deploy.errors import CheckpointError, listed
from sjepa_deploy.models.encoder_sizes import EMBEDDING, Told
from sjepa_deploy.serialize import DecodeError, decode, encode
from sjepa_deploy.spec import ModelSpec, Variant

CONFIG_FILE = "config.json"


def braindecode_config(spec: ModelSpec) -> dict[str, Any]:
    """Return the arguments of braindecode's class for `spec` as JSON types."""
    encoder = spec.encoder
    config: dict[str, Any] = {
        "n_outputs": None if spec.variant == "base" else spec.n_outputs,
        "n_chans": spec.n_chans,
        "chs_info": None,
        "n_times": spec.n_times,
        "input_window_seconds": None,
        "sfreq": spec.sfreq,
        "feature_encoder__conv_layers_spec": encode(encoder.conv_layers),
        "drop_prob": encoder.drop_prob,
        "pos_encoder__spat_dim": encoder.spat_dim,
        "pos_encoder__time_dim": encoder.time_dim,
        "pos_encoder__sfreq_features": encoder.sfreq_features,
        "transformer__d_model": encoder.emb_dim,
        "transformer__num_encoder_layers": encoder.n_layers,
        "transformer__num_decoder_layers": encoder.n_decoder_layers,
        "transformer__nhead": encoder.n_heads,
    }
    if spec.variant != "base":
        config["n_spat_filters"] = spec.n_spat_filters
    if spec.ch_names is not None and spec.positions is not None:
        config["chs_info"] = [{"ch_name": n, "loc": list(p)} for n, p in zip(spec.ch_names, spec.positions, strict=True)]
    return config


@dataclass(frozen=True, kw_only=True)
class _Channel:
    ch_name: str
    loc: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class _Config:
    """Holds the arguments of braindecode's classes that we read, for their types."""

    n_outputs: int | None = None
    n_chans: int | None = None
    chs_info: tuple[_Channel, ...] | None = None
    n_times: int | None = None
    input_window_seconds: float | None = None
    sfreq: float | None = None
    n_spat_filters: int | None = None
    feature_encoder__conv_layers_spec: tuple[tuple[int, int, int], ...] | None = None
    drop_prob: float | None = None
    pos_encoder__spat_dim: int | None = None
    pos_encoder__time_dim: int | None = None
    pos_encoder__sfreq_features: float | None = None
    transformer__num_encoder_layers: int | None = None
    transformer__num_decoder_layers: int | None = None
    transformer__nhead: int | None = None
    channel_embedding: str | None = None


ENCODER_ARGUMENTS = {
    "feature_encoder__conv_layers_spec": "conv_layers",
    "drop_prob": "drop_prob",
    "pos_encoder__spat_dim": "spat_dim",
    "pos_encoder__time_dim": "time_dim",
    "pos_encoder__sfreq_features": "sfreq_features",
    "transformer__num_encoder_layers": "n_layers",
    "transformer__num_decoder_layers": "n_decoder_layers",
    "transformer__nhead": "n_heads",
}
"""Braindecode's names of the fields of `EncoderSpec`."""

SUPPORTED: dict[str, tuple[Any, ...]] = {
    "feature_encoder__mode": (None, "default"),
    "feature_encoder__conv_bias": (None, False),
    "activation": (None, "torch.nn.modules.activation.GELU", "torch.nn.GELU", "GELU", "gelu"),
}
"""Arguments of which only these values are supported. None takes braindecode's default."""

HARMLESS = {"padding_idx", "scale_grad_by_freq", "sparse"}
"""Arguments of `torch.nn.Embedding` that change nothing in a trained model."""

ARGUMENTS = frozenset({f.name for f in dataclasses.fields(_Config)} | set(SUPPORTED) | {"pos_encoder__spat_kwargs"})


def arguments_in(settings: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return braindecode's arguments among a trainer's hyper-parameters: at the top, or in mappings inside.

    Raises
    ------
    CheckpointError
        If two places tell other values.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        inside = {name: value} if name in ARGUMENTS else arguments_in(value, place) if isinstance(value, Mapping) else {}
        for each, new in {key: _as_json(item) for key, item in inside.items()}.items():
            old = found.get(each)
            if None not in (old, new) and old != new:
                raise CheckpointError(
                    f"{place} say {each} = {old!r} and {new!r}.", "Save the state dict alone, and say the right one by a flag."
                )
            found[each] = old if new is None else new
    return found


def _as_json(value: Any) -> Any:
    return [_as_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def _decode(config: dict[str, Any], place: str) -> _Config:
    fields = {f.name: config[f.name] for f in dataclasses.fields(_Config) if f.name in config}
    if isinstance(channels := fields.get("chs_info"), list):
        keys = [f.name for f in dataclasses.fields(_Channel)]  # MNE's channels have more
        fields["chs_info"] = [{k: ch[k] for k in keys if k in ch} if isinstance(ch, dict) else ch for ch in channels]
    try:
        return decode(_Config, fields)
    except DecodeError as e:
        raise CheckpointError(f"{place} does not describe a model: {e}.", "Get the file again.") from e


def told_by_braindecode(config: dict[str, Any], variant: Variant, place: str) -> Told:
    """Return the facts that braindecode's arguments tell.

    Parameters
    ----------
    config : dict of str to object
        The arguments. A missing argument tells nothing.
    variant : {"prelocal", "postlocal", "contextual", "base"}
        The model.
    place : str
        Place of the arguments, for messages.

    Raises
    ------
    CheckpointError
        If they do not describe a model, or one that is not supported.
    """
    if "interpolation_mode" in config:
        raise CheckpointError(
            f"{place} is of a model that interpolates its channels to those of the pretraining first (InterpolatedSignalJEPA), "
            "which is not supported.",
            "Name the weights file itself, with --montage sjepa-62: this exports the model of the 62 channels, and "
            "sjepa-run --interpolate brings recordings to them.",
        )
    if config.get("_init_transformer") is False:
        # braindecode's Contextual.from_pretrained(base) copies the base model's transformer and saves its own defaults (1.8.1).
        copied = ("transformer__", "pos_encoder__")
        config = {name: value for name, value in config.items() if not name.startswith(copied)}
    if config.get("_init_feature_encoder") is False:
        config = {name: value for name, value in config.items() if name not in SUPPORTED}
    for name, values in SUPPORTED.items():
        if config.get(name) not in values:
            raise _unsupported(place, name, config[name], values[1])
    read = _decode(config, place)
    fields = {f.name: value for f in dataclasses.fields(read) if (value := getattr(read, f.name)) is not None}
    known: dict[str, Any] = {n: fields[n] for n in ("n_chans", "n_times", "sfreq", "n_outputs", "n_spat_filters") if n in fields}
    if variant == "base":
        known.pop("n_outputs", None)
    seconds = read.input_window_seconds
    if "n_times" not in known and seconds and "sfreq" in known:
        known["n_times"] = round(seconds * known["sfreq"])
    if "sfreq" not in known and seconds and "n_times" in known:
        known["sfreq"] = known["n_times"] / seconds
    if encoder := {ours: fields[theirs] for theirs, ours in ENCODER_ARGUMENTS.items() if theirs in fields}:
        known["encoder"] = encoder
    if read.chs_info is None and read.channel_embedding == "pretrain_aligned":
        pretraining = montage.read_montage("sjepa-62")
        known |= {"ch_names": pretraining.ch_names, "positions": pretraining.positions, "n_chans": len(pretraining.ch_names)}
    elif read.chs_info:
        if read.n_chans not in (None, len(read.chs_info)):
            raise CheckpointError(
                f"{place} says n_chans = {read.n_chans}, but describes {len(read.chs_info)} channels.",
                "Use the configuration that belongs to these weights.",
            )
        known |= {"ch_names": tuple(ch.ch_name for ch in read.chs_info), "n_chans": len(read.chs_info)}
        locations = [ch.loc[:3] for ch in read.chs_info if ch.loc is not None]
        if len(locations) == len(read.chs_info) and all(len(x) == 3 and all(map(math.isfinite, x)) for x in locations):
            known["positions"] = tuple(locations)
    return Told(known=known, activation=config.get("activation") is not None, max_norm=_max_norm(config, place))


def _max_norm(config: dict[str, Any], place: str) -> float | None:
    name = "pos_encoder__spat_kwargs"
    if name not in config:
        return None
    options = config[name] or {}
    norm = options.get("max_norm") if isinstance(options, dict) else None
    known = isinstance(options, dict) and set(options) <= {"max_norm", "norm_type"} | HARMLESS
    if not known or options.get("norm_type", 2.0) != 2.0 or not (norm is None or (isinstance(norm, (int, float)) and norm > 0)):
        raise _unsupported(place, name, options, {"max_norm": 1.0})
    return math.inf if norm is None else float(norm)


def _unsupported(place: str, name: str, value: object, supported: object) -> CheckpointError:
    return CheckpointError(
        f"{place} sets {name} = {value!r}, which is not supported.", f"Use a model with {name} = {supported!r}."
    )


def pick_embedding_rows(
    weights: dict[str, Tensor], ch_names: tuple[str, ...], config: dict[str, Any], path: Path
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Take the rows of the model's channels out of the table of the 62 pretraining channels, where the model has that.

    braindecode's ``SignalJEPA_Contextual.from_pretrained(base)`` keeps the base model's table but saves a configuration that
    says "scratch" and ``_init_transformer: false`` (1.8.1): there the number of rows tells, and if it cannot, nothing does.
    """
    table = [name.casefold() for name in montage.read_montage("sjepa-62").ch_names]
    folded = [name.casefold() for name in ch_names]
    n_rows = len(weights[EMBEDDING])
    if config.get("channel_embedding") != "pretrain_aligned" and (n_rows != len(table) or n_rows == len(ch_names)):
        if config.get("_init_transformer") is False and sorted(folded) == sorted(table) and folded != table:
            raise CheckpointError(
                f"{path / CONFIG_FILE} does not tell whether the position table has its channels' order or the pretraining's.",
                'Set "channel_embedding" there to "pretrain_aligned", or remove "_init_transformer" if the order is its own.',
            )
        return weights, ()
    if unknown := [name for name in ch_names if name.casefold() not in table]:
        raise CheckpointError(
            f"The position table of this checkpoint has no row for {listed(unknown)}.", "Use channels of the pretraining."
        )
    rows = [table.index(name) for name in folded]
    if n_rows != len(table) or rows == list(range(len(table))):
        return weights, ()
    return weights | {EMBEDDING: weights[EMBEDDING][rows]}, (
        f"{len(rows)} of {len(table)} rows of the position table were taken by name",
    )
