"""Reads and writes the checkpoint of one model: our folders, braindecode's and Hugging Face's, state dicts, Lightning's files.

A checkpoint never runs code.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from sjepa_deploy.bundle import TRAINING_KEY
from sjepa_deploy.eeg.signal_file import SIGNAL_FILE, read_signal, write_signal
from sjepa_deploy.errors import CheckpointError, listed
from sjepa_deploy.files import file_hash, load_json, write_atomically
from sjepa_deploy.models.braindecode_config import (
    CONFIG_FILE,
    arguments_in,
    braindecode_config,
    pick_embedding_rows,
    told_by_braindecode,
)
from sjepa_deploy.models.encoder_sizes import EMBEDDING, Told
from sjepa_deploy.models.hub import find_checkpoint
from sjepa_deploy.models.networks import SignalJEPAModule, build_model
from sjepa_deploy.models.weight_files import check_left_out, find_model, read_file
from sjepa_deploy.serialize import DecodeError, decode, encode
from sjepa_deploy.spec import ModelSpec, Variant, upgraded

WEIGHTS_FILE = "model.safetensors"
SPEC_KEY = "sjepa_deploy"
"""Key of config.json that holds our `ModelSpec`; braindecode passes over it."""

TARGET = ("target_mean", "target_std")
"""Fine-tuning keeps these keys beside a regression model, whose last layer gives standardised targets while it learns."""

PRETRAINING = ("jepa.teacher", "spread", "val_l1", "val_l1_mean")
"""Pretraining keeps these keys beside the base model: the teacher, and figures of the last epoch."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Holds the weights of one model and what is known about the model.

    Attributes
    ----------
    weights : dict of str to Tensor
        State dict, float32, without the prefix of a trainer.
    variant : {"prelocal", "postlocal", "contextual", "base"}
        Told by the keys.
    known : dict
        Fields of `ModelSpec` that the configuration or the shapes of the weights settle.
    n_tokens : int or None
        Time tokens that the head was made for. The base model has no head.
    file_name, file_format, sha256 : str
        Name, kind and hash of the file that the weights came from.
    told : Told
        What the configuration tells, or a trainer's hyper-parameters.
    notes : tuple of str
        What a user should know about how the file was read.
    training : dict
        The record of the training (`TRAINING_KEY`), as it is stored.
    """

    weights: dict[str, Tensor]
    variant: Variant
    known: dict[str, Any]
    n_tokens: int | None
    file_name: str
    file_format: str
    sha256: str
    told: Told = field(default_factory=Told)
    notes: tuple[str, ...] = ()
    training: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(
    path: Path | str, *, prefix: str | None = None, allow_left_out: tuple[str, ...] = (), max_norm: float | None = None
) -> Checkpoint:
    """Read a checkpoint of any of the known kinds.

    Parameters
    ----------
    path : Path or str
        ``org/name`` or ``org/name@revision`` of the Hugging Face Hub, see `find_checkpoint`;
        a folder with ``config.json`` and ``model.safetensors`` (ours, braindecode's or Hugging Face's; ``pytorch_model.bin``
        is read too, and so is ``signal.json``), a state dict (``.safetensors``, ``.pth``, ``.pt``, ``.bin``, also inside of a
        mapping) or a Lightning ``.ckpt``, whose hyper-parameters are read.
    prefix : str or None
        What stands before the model's keys, where a file holds several models.
    allow_left_out : tuple of str
        Weights or modules that are of no SignalJEPA model, and that may be left out.
    max_norm : float or None
        Largest norm of a row of the position table (``max_norm`` of `torch.nn.Embedding`), where no configuration tells.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, would run code, or holds no SignalJEPA model; if weights beside the model would be left
        out that are not allowed to; or if a configuration contradicts the weights.
    """
    place = find_checkpoint(path)
    path = place.path
    config: dict[str, Any] = {}
    file = path
    if path.is_dir():
        config = _read_config(path / CONFIG_FILE)
        files = [path / name for name in (WEIGHTS_FILE, "pytorch_model.bin") if (path / name).is_file()]
        if not files:
            raise CheckpointError(f"{path} holds no {WEIGHTS_FILE}.", "Name the folder or file that holds the weights.")
        file = files[0]
    elif not path.is_file():
        raise CheckpointError(f"There is no checkpoint at {path}.", "Check the path.")
    content = read_file(file)
    found = find_model(content.tensors, file, prefix)
    weights, beside, notes = _as_float32(found.weights, file), dict(found.beside), found.notes
    variant = _variant_of(weights, file)
    if found.prefix == "model." and all(name in beside for name in TARGET):
        weights = in_target_unit(weights, *(beside.pop(name).float() for name in TARGET))
        notes += ("the mean and the spread of the target were folded into the last layer",)
    if found.prefix == "jepa.base.":
        beside = {key: tensor for key, tensor in beside.items() if not key.startswith(PRETRAINING)}
        notes += ("left out: what only pretraining needs",)
    notes += check_left_out(beside, allow_left_out, file)
    known, n_tokens = _known_from_weights(weights, variant, file)
    told = _told_by(config, variant, str(path / CONFIG_FILE)) if path.is_dir() else Told()
    if path.is_dir():
        told, untold = _with_signal(told, path, ours=SPEC_KEY in config)
        notes += untold
    if content.settings and not path.is_dir():
        told = _told_by_trainer(content.settings, variant, f"the hyper-parameters in {file}")
    if "ch_names" in told.known and EMBEDDING in weights:
        weights, picked = pick_embedding_rows(weights, told.known["ch_names"], config, path)
        notes += picked
        known["n_chans"] = len(told.known["ch_names"]) if picked else known["n_chans"]
    for name, value in told.known.items():
        if name in known and known[name] != value:
            raise CheckpointError(
                f"{path / CONFIG_FILE if path.is_dir() else file} says {name} = {value}, but the weights have {known[name]}.",
                "Use the configuration that belongs to these weights.",
            )
    if max_norm is not None:
        if told.max_norm not in (None, max_norm):
            raise CheckpointError(f"{path} says max_norm = {told.max_norm:g}, not {max_norm:g}.", "Leave --max-norm out.")
        told = dataclasses.replace(told, max_norm=max_norm)
    if EMBEDDING in weights and told.max_norm is not None:
        weights = weights | {EMBEDDING: _with_max_norm(weights[EMBEDDING], told.max_norm)}
    known.update(told.known)
    sha256 = file_hash(file)
    training = (config or content.settings).get(TRAINING_KEY)
    return Checkpoint(
        weights=weights,
        variant=variant,
        known=known,
        n_tokens=n_tokens,
        file_name=place.name,
        file_format=("folder, " if path.is_dir() else "") + content.file_format,
        sha256=sha256,
        told=told,
        notes=notes,
        training=training if isinstance(training, dict) else {},
    )


def load_model(checkpoint: Checkpoint, spec: ModelSpec) -> SignalJEPAModule:
    """Build the model of `spec` with the weights of `checkpoint`.

    Raises
    ------
    CheckpointError
        If keys are missing, unexpected or of another shape. The message lists them.
    """
    if spec.variant != checkpoint.variant:
        raise CheckpointError(
            f"{checkpoint.file_name} holds a {checkpoint.variant} model, not a {spec.variant} one.",
            f"Use --variant {checkpoint.variant}, or a {spec.variant} checkpoint.",
        )
    model = build_model(spec, seed=0)
    wanted = model.state_dict()
    problems = []
    if missing := [k for k in wanted if k not in checkpoint.weights]:
        problems.append(f"missing {listed(missing)}")
    if unexpected := [k for k in checkpoint.weights if k not in wanted]:
        problems.append(f"unexpected {listed(unexpected)}")
    shapes = [
        f"{k} is {tuple(w.shape)} instead of {tuple(wanted[k].shape)}"
        for k, w in checkpoint.weights.items()
        if k in wanted and w.shape != wanted[k].shape
    ]
    if shapes:
        problems.append(f"misshapen: {listed(shapes)}")
    if problems:
        raise CheckpointError(
            f"{checkpoint.file_name} does not fit a {spec.variant} model of {spec.n_chans} channels: {'; '.join(problems)}.",
            "Use the checkpoint of this model, or the flags that describe it.",
        )
    model.load_state_dict(checkpoint.weights)
    return model.eval()


def write_checkpoint(model: SignalJEPAModule, folder: Path | str, *, training: object | None = None) -> None:
    """Write `model` as ``config.json`` and ``model.safetensors``, which braindecode's ``from_pretrained`` loads too.

    The signal is in ``signal.json`` as well: braindecode's ``save_pretrained`` drops our part of ``config.json``.

    Parameters
    ----------
    model : SignalJEPAModule
        What to write.
    folder : Path or str
        Where. Each file is moved to its place whole. The configuration is removed first and written last: a killed process
        never leaves one beside the weights of another model.
    training : dataclass, mapping or None
        Origin of the weights (data, transfer, scores), kept in ``config.json`` under `TRAINING_KEY`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().float().contiguous().cpu() for k, v in model.state_dict().items()}
    config = braindecode_config(model.spec) | {SPEC_KEY: encode(model.spec)}
    if training is not None:
        config[TRAINING_KEY] = encode(training)
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    write_signal(folder / SIGNAL_FILE, model.spec.signal)
    write_atomically(folder / WEIGHTS_FILE, save(weights, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG_FILE, (json.dumps(config, indent=1) + "\n").encode())


def in_target_unit(weights: Mapping[str, Tensor], mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """Return the state dict of a regression model whose last layer gives the target in its own unit, not standardised.

    Parameters
    ----------
    weights : mapping of str to Tensor
        State dict whose last layer gives (target - `mean`) / `std`.
    mean, std : Tensor, scalar
        Mean and standard deviation of the training targets.
    """
    linear = "final_layer.linear" if "final_layer.linear.weight" in weights else "final_layer.1"
    weight, bias = weights[f"{linear}.weight"], weights[f"{linear}.bias"]
    return dict(weights) | {f"{linear}.weight": weight * std, f"{linear}.bias": bias * std + mean}


# ---- files ----------------------------------------------------------------------------------------------------------------


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} holds no {CONFIG_FILE}.", "Name the weights file itself if there is none.")
    try:
        config = load_json(path.read_bytes(), finite=False)
    except ValueError as e:
        raise CheckpointError(f"{path} is not JSON ({e}).", "Get the file again.") from e
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a configuration.", "Get the file again.")
    return config


# ---- what a file says of its model ----------------------------------------------------------------------------------------


def _as_float32(weights: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    if odd := [k for k, v in weights.items() if v.is_meta or v.layout != torch.strided or not v.is_floating_point()]:
        raise CheckpointError(
            f"{file} holds tensors that are not plain floating-point numbers: {listed(odd)}.", "Save the model unquantised."
        )
    weights = {k: v.float() for k, v in weights.items()}
    if bad := [k for k, v in weights.items() if not torch.isfinite(v).all()]:
        raise CheckpointError(f"{file} holds values that are not finite in {listed(bad)}.", "Use an earlier checkpoint.")
    return weights


def _variant_of(weights: dict[str, Tensor], file: Path) -> Variant:
    has = {part: any(k.startswith(part) for k in weights) for part in ("spatial_conv", "transformer", "final_layer")}
    match (has["spatial_conv"], has["transformer"], has["final_layer"]):
        case (True, False, True):
            return "prelocal"
        case (False, False, True):
            return "postlocal"
        case (False, True, True):
            return "contextual"
        case (False, True, False):
            return "base"
    parts = ", ".join(part for part, there in has.items() if there) or "only the feature encoder"
    raise CheckpointError(f"{file} is no known variant: it has {parts}.", "Use a whole model's checkpoint.")


def _known_from_weights(weights: dict[str, Tensor], variant: Variant, file: Path) -> tuple[dict[str, Any], int | None]:
    """Return the fields that shapes settle, and the head's time tokens."""
    known: dict[str, Any] = {"variant": variant}
    convolutions = [k for k in weights if re.fullmatch(r"feature_encoder\.\d+\.0\.weight", k)]
    _check_shapes(weights, dict.fromkeys(convolutions, 3) | ({EMBEDDING: 2} if EMBEDDING in weights else {}), file)
    if variant == "base":
        if EMBEDDING in weights:
            known["n_chans"] = len(weights[EMBEDDING])
        return known, None
    filters = "spatial_conv.1.weight" if variant == "prelocal" else "final_layer.spat_conv.weight"
    linear = "final_layer.1.weight" if variant == "prelocal" else "final_layer.linear.weight"
    if absent := [k for k in (filters, linear) if k not in weights]:
        raise CheckpointError(f"{file} lacks {listed(absent)}, which a {variant} model has.", "Use a whole model's checkpoint.")
    last = max(convolutions, key=lambda k: int(k.split(".")[1]))
    _check_shapes(weights, {filters: 4 if variant == "prelocal" else 5, linear: 2}, file)
    n_filters, n_chans = weights[filters].shape[0], weights[filters].shape[2]
    n_outputs, size = weights[linear].shape
    emb_dim = weights[last].shape[0]
    if size % (n_filters * emb_dim):
        raise CheckpointError(
            f"{file} has a head of {size} inputs ({linear}), which {n_filters} filters of {emb_dim} dimensions do not divide.",
            "Use a whole model's checkpoint.",
        )
    known |= {"n_chans": n_chans, "n_spat_filters": n_filters, "n_outputs": n_outputs}
    return known, size // (n_filters * emb_dim)


def _check_shapes(weights: dict[str, Tensor], n_dims: dict[str, int], file: Path) -> None:
    if wrong := [f"{k} is {tuple(weights[k].shape)}" for k, n in n_dims.items() if weights[k].ndim != n or 0 in weights[k].shape]:
        raise CheckpointError(f"{file} has misshapen weights: {listed(wrong)}.", "Use a whole model's checkpoint.")


def _told_by(config: dict[str, Any], variant: Variant, place: str) -> Told:
    """Return the facts that a configuration tells: our spec if it is there, else braindecode's arguments."""
    if SPEC_KEY not in config:
        return told_by_braindecode(config, variant, place)
    try:
        stored = upgraded(config[SPEC_KEY])
        spec = decode(ModelSpec, stored)
    except DecodeError as e:
        raise CheckpointError(f"{place} has a spec that does not fit: {e}.", "Get the file again.") from e
    known = {
        f.name: value
        for part in (spec, spec.signal)
        for f in dataclasses.fields(part)
        if f.name != "signal" and (value := getattr(part, f.name)) is not None
    }
    if stored.get("task") is None:
        del known["task"]  # older releases did not store the task
    known["encoder"] = {f.name: getattr(spec.encoder, f.name) for f in dataclasses.fields(spec.encoder)}
    return Told(known=known, activation=True, max_norm=math.inf)


def _with_signal(told: Told, folder: Path, *, ours: bool) -> tuple[Told, tuple[str, ...]]:
    """Add what ``signal.json`` tells: braindecode's ``save_pretrained`` keeps that file, and drops our part of the configuration.

    Returns
    -------
    told : Told
        With the fields of the signal.
    notes : tuple of str
        What is lost.

    Raises
    ------
    CheckpointError
        If both files tell other values.
    """
    if not (folder / SIGNAL_FILE).is_file():
        lost = f"the folder holds no {SIGNAL_FILE}, and {CONFIG_FILE} does not say which signal the model learned from"
        return told, () if ours else (lost,)
    stored = read_signal(folder / SIGNAL_FILE)
    for name in stored:
        before = told.known.get(name)
        if stored[name] is not None and before is not None and before != stored[name]:
            raise CheckpointError(
                f"{CONFIG_FILE} and {SIGNAL_FILE} in {folder} tell another {name}.", "Keep the file that belongs to the weights."
            )
    known = told.known | {name: value for name, value in stored.items() if value is not None}
    return dataclasses.replace(told, known=known), ()


def _told_by_trainer(settings: dict[str, Any], variant: Variant, place: str) -> Told:
    """Return the facts that the hyper-parameters of a trainer tell, ours or another's."""
    return _told_by(settings if SPEC_KEY in settings else arguments_in(settings, place), variant, place)


def _with_max_norm(table: Tensor, max_norm: float) -> Tensor:
    """Return the rows as `torch.nn.Embedding` uses them, which scales longer ones by max_norm / (norm + 1e-7)."""
    norm = table.norm(dim=1, keepdim=True)
    return torch.where(norm > max_norm, table * (max_norm / (norm + 1e-7)), table)
