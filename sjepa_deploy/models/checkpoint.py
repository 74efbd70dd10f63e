"""Weights in and out: our folders, braindecode / Hugging Face folders, bare state dicts, Lightning checkpoints.

A checkpoint never runs code: files are safetensors, or are unpickled by ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from sjepa_deploy.errors import CheckpointError, listed
from sjepa_deploy.files import file_hash, write_atomically
from sjepa_deploy.models.braindecode_config import (
    CONFIG_FILE,
    EMBEDDING,
    braindecode_config,
    known_from_braindecode,
    pick_embedding_rows,
)
from sjepa_deploy.models.networks import SignalJEPAModule, build_model
from sjepa_deploy.serialize import DecodeError, decode, encode
from sjepa_deploy.spec import ModelSpec, Variant

WEIGHTS_FILE = "model.safetensors"
SPEC_KEY = "sjepa_deploy"
"""Key of config.json that holds our `ModelSpec`; braindecode passes over it."""

TRAINING_KEY = "sjepa_deploy_training"
"""Key of config.json that holds where the weights come from."""

ANCHOR = "feature_encoder.1.0.weight"
"""The key that every SignalJEPA model has; what stands before it is the prefix of a trainer's module."""

LAYERS = re.compile(r"transformer\.(encoder|decoder)\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The weights of one model and what is known about it.

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
    notes : tuple of str
        What a user should know about how the file was read.
    """

    weights: dict[str, Tensor]
    variant: Variant
    known: dict[str, Any]
    n_tokens: int | None
    file_name: str
    file_format: str
    sha256: str
    notes: tuple[str, ...] = ()


def read_checkpoint(path: Path | str, *, prefix: str | None = None) -> Checkpoint:
    """Read a checkpoint of any of the known kinds.

    Parameters
    ----------
    path : Path or str
        A folder with ``config.json`` and ``model.safetensors`` (ours, braindecode's or Hugging Face's; ``pytorch_model.bin``
        is read too), a state dict (``.safetensors``, ``.pth``, ``.pt``, ``.bin``) or a Lightning ``.ckpt``.
    prefix : str or None
        What stands before the model's keys, where a file holds several models.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, would run code, or holds no SignalJEPA model.
    """
    path = Path(path)
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
    state, file_format = _read_tensors(file)
    weights, notes = _strip_prefix(state, file, prefix)
    weights = _as_float32(weights, file)
    variant = _variant_of(weights, file)
    known, n_tokens = _known_from_weights(weights, variant, file)
    from_config = _known_from_config(config, variant, path)
    if "ch_names" in from_config and EMBEDDING in weights:
        weights, picked = pick_embedding_rows(weights, from_config["ch_names"], config, path)
        notes += picked
        known["n_chans"] = len(from_config["ch_names"]) if picked else known["n_chans"]
    for name, value in from_config.items():
        if name in known and known[name] != value and name != "encoder":
            raise CheckpointError(
                f"{path / CONFIG_FILE} says {name} = {value}, but the weights have {known[name]}.",
                "Use the configuration that belongs to these weights.",
            )
    known.update(from_config)
    sha256 = file_hash(file)
    return Checkpoint(
        weights=weights,
        variant=variant,
        known=known,
        n_tokens=n_tokens,
        file_name=path.name if path.is_dir() else file.name,
        file_format=("folder, " if path.is_dir() else "") + file_format,
        sha256=sha256,
        notes=notes,
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

    Parameters
    ----------
    model : SignalJEPAModule
        What to write.
    folder : Path or str
        Where. Each file is moved to its place whole. The configuration is removed first and written last: a killed process
        never leaves one beside the weights of another model.
    training : dataclass, mapping or None
        Where the weights come from (data, transfer, scores), kept in ``config.json`` under `TRAINING_KEY`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().float().contiguous().cpu() for k, v in model.state_dict().items()}
    config = braindecode_config(model.spec) | {SPEC_KEY: encode(model.spec)}
    if training is not None:
        config[TRAINING_KEY] = encode(training)
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    write_atomically(folder / WEIGHTS_FILE, save(weights, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG_FILE, (json.dumps(config, indent=1) + "\n").encode())


DAMAGED = (RuntimeError, EOFError, ValueError, OSError, LookupError, TypeError, AttributeError, AssertionError, struct.error)
"""What ``torch.load`` raises on files that are cut, altered or something else altogether."""


# ---- files ----------------------------------------------------------------------------------------------------------------


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} holds no {CONFIG_FILE}.", "Name the weights file itself if there is none.")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{path} is not JSON ({e}).", "Get the file again.") from e
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a configuration.", "Get the file again.")
    return config


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], str]:
    if file.suffix == ".safetensors":
        try:
            return load_file(file), "safetensors"
        except (SafetensorError, ValueError) as e:
            raise CheckpointError(f"{file} is truncated or not a safetensors file ({e}).", "Get the file again.") from e
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)  # an error follows
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        name = re.search(r"GLOBAL (\S+)", str(e))
        what = f" ({name.group(1)})" if name else ""
        if not name and not file.read_bytes().startswith((b"PK", b"\x80")):  # neither a zip file nor a pickle
            raise CheckpointError(f"{file} is not a PyTorch file.", "Name the file or folder that holds the weights.") from e
        raise CheckpointError(
            f"{file} is a pickle that holds more than tensors{what} and could run code when it is loaded.",
            "Save the state dict alone, best as safetensors, on a machine that trusts the file.",
        ) from e
    except DAMAGED as e:
        raise CheckpointError(f"{file} is truncated or not a PyTorch file ({_first_line(e)}).", "Get the file again.") from e
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        return _tensors_of(content["state_dict"], file), "Lightning checkpoint"
    return _tensors_of(content, file), "PyTorch state dict"


def _tensors_of(content: object, file: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{file} holds no state dict.", "Save model.state_dict().")
    return {str(k): v for k, v in content.items() if isinstance(v, Tensor)}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:120] or type(error).__name__


def _strip_prefix(state: dict[str, Tensor], file: Path, prefix: str | None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    prefixes = sorted({k[: -len(ANCHOR)] for k in state if k.endswith(ANCHOR)})
    if prefix is not None and prefix not in prefixes:
        raise CheckpointError(
            f"{file} holds no model under the prefix {prefix!r}.", f"Use one of: {', '.join(map(repr, prefixes)) or 'none'}."
        )
    if not prefixes:
        raise CheckpointError(
            f"{file} holds no SignalJEPA model: no key ends in {ANCHOR}.", "Use the checkpoint of a SignalJEPA model."
        )
    if prefix is None and len(prefixes) > 1:
        raise CheckpointError(
            f"{file} holds {len(prefixes)} models under {', '.join(map(repr, prefixes))}.", "Choose one with --prefix."
        )
    prefix = prefixes[0] if prefix is None else prefix
    nested = tuple(p for p in prefixes if p != prefix and p.startswith(prefix))  # another model inside of this one's prefix
    own = [k for k in state if k.startswith(prefix) and not k.startswith(nested)]
    weights = {k[len(prefix) :]: state[k] for k in own}
    others = [k for k in state if k not in set(own)]
    notes = [f"the prefix {prefix!r} was taken off the keys"] if prefix else []
    notes += [f"left out, not under the prefix: {listed(others)}"] if others else []
    return weights, tuple(notes)


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
    encoder: dict[str, Any] = {}
    counts = {"encoder": 0, "decoder": 0}
    for match in filter(None, map(LAYERS.match, weights)):
        counts[match[1]] = max(counts[match[1]], int(match[2]) + 1)
    if variant in ("contextual", "base"):
        encoder = {"n_layers": counts["encoder"], "n_decoder_layers": counts["decoder"]}
    known: dict[str, Any] = {"variant": variant, "encoder": encoder}
    if EMBEDDING in weights:
        _check_shapes(weights, {EMBEDDING: 2}, file)
    if variant == "base":
        if EMBEDDING in weights:
            known["n_chans"] = len(weights[EMBEDDING])
        return known, None
    filters = "spatial_conv.1.weight" if variant == "prelocal" else "final_layer.spat_conv.weight"
    linear = "final_layer.1.weight" if variant == "prelocal" else "final_layer.linear.weight"
    if absent := [k for k in (filters, linear) if k not in weights]:
        raise CheckpointError(f"{file} lacks {listed(absent)}, which a {variant} model has.", "Use a whole model's checkpoint.")
    convolutions = [k for k in weights if re.fullmatch(r"feature_encoder\.\d+\.0\.weight", k)]
    last = max(convolutions, key=lambda k: int(k.split(".")[1]))
    _check_shapes(weights, {filters: 4 if variant == "prelocal" else 5, linear: 2, last: 3}, file)
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


def _known_from_config(config: dict[str, Any], variant: Variant, path: Path) -> dict[str, Any]:
    """Return the fields that config.json settles: our spec if it is there, else braindecode's arguments."""
    if SPEC_KEY in config:
        try:
            spec = decode(ModelSpec, config[SPEC_KEY])
        except DecodeError as e:
            raise CheckpointError(f"{path / CONFIG_FILE} has a spec that does not fit: {e}.", "Get the file again.") from e
        return {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if getattr(spec, f.name) is not None}
    return known_from_braindecode(config, variant, path)
