"""Reads the tensors of a file, and finds one model among them.

A file never runs code: it is safetensors, or is unpickled by ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from sjepa_deploy.errors import CheckpointError, listed

ANCHOR = "1.0.weight"
"""The key inside of ``feature_encoder`` that every SignalJEPA model has; what stands before both is the trainer's prefix."""

PARTS = ("feature_encoder", "pos_encoder", "transformer", "spatial_conv", "final_layer")
"""The modules of a SignalJEPA model."""

WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
"""Prefixes that torch.compile, FSDP, activation checkpointing and DDP add to the keys of a part that they wrap."""

STATE_DICTS = ("state_dict", "model_state_dict", "model")

DAMAGED = (RuntimeError, EOFError, ValueError, OSError, LookupError, TypeError, AttributeError, AssertionError, struct.error)
"""Errors that ``torch.load`` raises on files that are cut, altered or of another kind."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """Holds what a file contains.

    Attributes
    ----------
    tensors : dict of str to Tensor
        All tensors of the state dict.
    file_format : str
        Kind of file.
    settings : dict of str to object
        Lightning's ``hyper_parameters``.
    """

    tensors: dict[str, Tensor]
    file_format: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Found:
    """Holds one model of a file.

    Attributes
    ----------
    weights : dict of str to Tensor
        State dict, without the prefix of a trainer and without the marks of wrappers.
    prefix : str
        Text that stood before the model's keys.
    beside : dict of str to Tensor
        What is neither of this model nor of another one, nor a counter.
    notes : tuple of str
        What was changed or left out.
    """

    weights: dict[str, Tensor]
    prefix: str
    beside: dict[str, Tensor]
    notes: tuple[str, ...]


def read_file(file: Path) -> Content:
    """Read the tensors of `file`.

    Raises
    ------
    CheckpointError
        If the file is damaged, would run code, or holds no state dict.
    """
    if file.suffix == ".safetensors":
        try:
            tensors = load(file.read_bytes())  # in an order of its own each time
            return Content(tensors={name: tensors[name] for name in sorted(tensors)}, file_format="safetensors")
        except (SafetensorError, ValueError) as e:
            raise CheckpointError(f"{file} is truncated or not a safetensors file ({e}).", "Get the file again.") from e
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)  # an error follows
            warnings.filterwarnings("ignore", message="'torch.load' received a zip file", category=UserWarning)  # the same
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        _refuse_programs(file)
        name = re.search(r"GLOBAL (\S+)", str(e))
        what = f" ({name.group(1)})" if name else ""
        if not name and not file.read_bytes().startswith((b"PK", b"\x80")):  # neither a zip file nor a pickle
            raise CheckpointError(f"{file} is not a PyTorch file.", "Name the file or folder that holds the weights.") from e
        raise CheckpointError(
            f"{file} is a pickle that holds more than tensors{what} and could run code when it is loaded.",
            "Save the state dict alone, best as safetensors, on a machine that trusts the file.",
        ) from e
    except DAMAGED as e:
        _refuse_programs(file)
        raise CheckpointError(f"{file} is truncated or not a PyTorch file ({_first_line(e)}).", "Get the file again.") from e
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{file} holds no state dict.", "Save model.state_dict().")
    return _content_of(content)


def find_model(tensors: dict[str, Tensor], file: Path, prefix: str | None) -> Found:
    """Find the model under `prefix`, or the only one.

    Raises
    ------
    CheckpointError
        If there is none, or several and no prefix.
    """
    anchors = (re.fullmatch(r"(.*)feature_encoder\.(.*)", key) for key in tensors)
    prefixes = sorted({m[1] for m in anchors if m and WRAPPERS.sub("", m[2]) == ANCHOR})
    if prefix is not None and prefix not in prefixes:
        raise CheckpointError(
            f"{file} holds no model under the prefix {prefix!r}.", f"Use one of: {', '.join(map(repr, prefixes)) or 'none'}."
        )
    if not prefixes:
        raise CheckpointError(
            f"{file} holds no SignalJEPA model: no key ends in feature_encoder.{ANCHOR}.",
            "Use the checkpoint of a SignalJEPA model.",
        )
    if prefix is None and len(prefixes) > 1:
        raise CheckpointError(
            f"{file} holds {len(prefixes)} models under {', '.join(map(repr, prefixes))}.", "Choose one with --prefix."
        )
    prefix = prefixes[0] if prefix is None else prefix
    notes = [f"the prefix {prefix!r} was taken off the keys"] if prefix else []
    # A key belongs to the model with the longest prefix that fits: another model may stand inside of this one's prefix.
    owners = {key: max((p for p in prefixes if _is_of_model(key, p)), key=len, default=None) for key in tensors}
    weights = {WRAPPERS.sub("", key[len(prefix) :]): tensor for key, tensor in tensors.items() if owners[key] == prefix}
    n_own = list(owners.values()).count(prefix)
    if len(weights) < n_own:
        raise CheckpointError(f"{file} holds keys of one model twice, wrapped and not.", "Save model.state_dict() again.")
    if any(owner == prefix and WRAPPERS.search(key[len(prefix) :]) for key, owner in owners.items()):
        notes.append("the marks of wrappers (torch.compile, FSDP, DDP) were taken off the keys")
    if others := [key for key, owner in owners.items() if owner not in (prefix, None)]:
        notes.append(f"left out, of another model: {listed(others)}")
    counters = [key for key, owner in owners.items() if owner is None and _is_counter(tensors[key])]
    if counters:
        notes.append(f"left out, counters: {listed(counters)}")
    beside = {key: tensors[key] for key, owner in owners.items() if owner is None and key not in counters}
    return Found(weights=weights, prefix=prefix, beside=beside, notes=tuple(notes))


def check_left_out(beside: Iterable[str], allowed: tuple[str, ...], file: Path) -> tuple[str, ...]:
    """Return a note on what is left out beside a model.

    Parameters
    ----------
    beside : iterable of str
        Keys of weights that are of no model.
    allowed : tuple of str
        Keys, or modules with all that is in them, that the user lets be left out.
    file : Path
        Where they are, for messages.

    Raises
    ------
    CheckpointError
        If a weight is not allowed, or a name in `allowed` is of none.
    """
    beside = list(beside)
    if unused := [name for name in allowed if not any(_is_in(key, name) for key in beside)]:
        raise CheckpointError(
            f"{file} leaves out no weight of the name {listed(unused)}.",
            f"Leave the name out of --allow-left-out; what is left out: {listed(beside) or 'nothing'}.",
        )
    if refused := [key for key in beside if not any(_is_in(key, name) for name in allowed)]:
        modules = sorted({key.rpartition(".")[0] or key for key in refused})
        raise CheckpointError(
            f"{file} holds weights that are of no SignalJEPA model: {listed(refused)}. A layer before or behind the model "
            "changes its predictions.",
            f"Fold them into the model, or leave them out with --allow-left-out {','.join(modules)}.",
        )
    return (f"left out, as allowed: {listed(beside)}",) if beside else ()


def _content_of(content: Mapping[Any, Any]) -> Content:
    """Return the state dict in what was saved: itself, or a mapping inside; of several with a model, all under their names."""
    holds = {str(name): value for name, value in content.items() if isinstance(value, Mapping)}
    holds = {name: value for name, value in holds.items() if _has_model(value)}
    if _has_model(content) or not holds:
        nested = next((content[name] for name in STATE_DICTS if isinstance(content.get(name), Mapping)), content)
    elif len(holds) == 1:
        nested = next(iter(holds.values()))
    else:
        nested = {f"{name}.{key}": value for name, state in holds.items() for key, value in state.items()}
    tensors = {str(key): value for key, value in nested.items() if isinstance(value, Tensor)}
    is_lightning = nested is not content and "state_dict" in content
    settings = content.get("hyper_parameters") if nested is not content else None
    return Content(
        tensors=tensors,
        file_format="Lightning checkpoint" if is_lightning else "PyTorch state dict",
        settings=dict(settings) if isinstance(settings, Mapping) else {},
    )


def _has_model(state: Mapping[Any, Any]) -> bool:
    return any(
        isinstance(value, Tensor) and WRAPPERS.sub("", str(key)).endswith(f"feature_encoder.{ANCHOR}")
        for key, value in state.items()
    )


def _is_of_model(key: str, prefix: str) -> bool:
    return key.startswith(prefix) and key[len(prefix) :].partition(".")[0] in PARTS


def _is_counter(tensor: Tensor) -> bool:
    return tensor.ndim == 0 and not tensor.is_floating_point() and not tensor.is_complex()


def _is_in(key: str, module: str) -> bool:
    return key == module or key.startswith(f"{module}.")


def _refuse_programs(file: Path) -> None:
    """Refuse zip files that PyTorch writes and that hold no state dict, with what they are."""
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return
    if not names:
        raise CheckpointError(f"{file} is an empty zip file.", "Get the file again.")
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise CheckpointError(
            f"{file} is a TorchScript program, which holds code.",
            "Save model.state_dict() of the model that was scripted or traced.",
        )
    if any(name.endswith(("archive_format", "serialized_exported_program.json", "/models/model.json")) for name in names):
        raise CheckpointError(f"{file} is a program of torch.export.", "Save model.state_dict() of the model that was exported.")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:120] or type(error).__name__
