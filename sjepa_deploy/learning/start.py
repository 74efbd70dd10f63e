"""Starts a fine-tuning from a fine-tuned model: the contract of that model holds, and all its weights are the start."""

from __future__ import annotations

import dataclasses
from typing import Any

from sjepa_deploy.eeg.steps import Alignment, RunningAlignment, Step
from sjepa_deploy.errors import CheckpointError, DataError, listed
from sjepa_deploy.learning.data import DataConfig, Windows
from sjepa_deploy.models.checkpoint import Checkpoint, load_model
from sjepa_deploy.models.encoder_sizes import settle_encoder
from sjepa_deploy.models.networks import SignalJEPAModule
from sjepa_deploy.spec import ModelSpec

DATA_OF_MODEL = ("sfreq", "n_times", "ch_names", "steps", "phase")
"""Settings of the data that are the model's, where it tells them."""


def settings_of(start: Checkpoint, data: DataConfig) -> dict[str, Any]:
    """Return what a model settles of a fine-tuning that starts from it, as changes of a `FinetuneConfig` with `data`.

    Raises
    ------
    CheckpointError
        If `start` is a base model.
    """
    if start.variant == "base":
        raise CheckpointError(f"{start.file_name} is a base model.", "Name it with --pretrained.")
    known = {name: start.known[name] for name in DATA_OF_MODEL if start.known.get(name) is not None}
    if "steps" in known:
        known["preprocessing"] = None
    window = start.known.get("event_window")
    if window is not None and data.target is not None:
        known["target"] = dataclasses.replace(data.target, tmin=window.start)
    changed = dataclasses.replace(data, **known)
    return {"variant": start.variant, "n_spat_filters": start.known["n_spat_filters"], "data": changed}


def start_from(start: Checkpoint, windows: Windows) -> SignalJEPAModule:
    """Return the model of a checkpoint, to learn from `windows`.

    Raises
    ------
    CheckpointError
        If the windows or their labels are not what the model was made for.
    """
    known, signal = start.known, windows.signal
    n_outputs = 1 if windows.class_names is None else len(windows.class_names)
    _refuse(start, "outputs", known["n_outputs"], n_outputs)
    if known.get("class_names") is not None:
        if windows.class_names is not None and sorted(windows.class_names) == sorted(known["class_names"]):
            _refuse(start, "order of the classes", listed(known["class_names"]), listed(windows.class_names))
        _refuse(start, "classes", known["class_names"], windows.class_names)
    _refuse(start, "channels", known["n_chans"], signal.n_chans)
    for name in ("sfreq", "unit", "phase"):
        _refuse(start, name, known.get(name), getattr(signal, name))
    if known.get("ch_names") is not None and signal.ch_names is not None:
        _refuse(start, "channels", *([each.casefold() for each in names] for names in (known["ch_names"], signal.ch_names)))
    if known.get("steps") is not None:
        _refuse(start, "steps", _apart_from_matrices(known["steps"]), _apart_from_matrices(signal.steps))
    if known.get("positions") is not None:
        signal = signal.replace(positions=known["positions"])
    encoder, _ = settle_encoder(
        start.weights, start.told, {}, variant=start.variant, n_times=signal.n_times, file_name=start.file_name
    )
    spec = ModelSpec(
        variant=start.variant,
        n_outputs=n_outputs,
        n_spat_filters=known["n_spat_filters"],
        class_names=windows.class_names,
        encoder=encoder,
        signal=signal,
    )
    if spec.needs_positions and spec.positions is None:
        raise DataError("The channels have no positions, which the position encoder needs.", "Name their montage with --montage.")
    return load_model(start, spec)


def _apart_from_matrices(steps: tuple[Step, ...]) -> list[Step | str]:
    """Return steps without the matrices that align a person: those of people differ."""
    return ["alignment" if isinstance(step, (Alignment, RunningAlignment)) else step for step in steps]


def _refuse(start: Checkpoint, what: str, theirs: Any, ours: Any) -> None:
    if theirs is not None and theirs != ours:
        raise CheckpointError(
            f"{start.file_name} was made for other {what} than the data have: {theirs}, not {ours}.",
            "Give data of the model's contract, in its order of classes (--classes), or start from a base model (--pretrained).",
        )
