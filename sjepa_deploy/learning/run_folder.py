"""Keeps the folder of a training run: its configuration, and the checkpoints that a stopped run goes on from.

A file is written beside its place and moved there, so that a killed process or a full disk leaves the old file or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from sjepa_deploy.eeg.signal_file import SIGNAL_FILE
from sjepa_deploy.errors import MissingDependencyError, SjepaError, TrainingError, TrainingStoppedError, listed
from sjepa_deploy.files import json_file, load_json, remove_partial, write_atomically
from sjepa_deploy.learning.origin import SPLIT_FILE
from sjepa_deploy.models.braindecode_config import CONFIG_FILE
from sjepa_deploy.models.checkpoint import WEIGHTS_FILE
from sjepa_deploy.models.weight_files import DAMAGED
from sjepa_deploy.serialize import DecodeError, decode, encode, overridden

try:
    import lightning
    from lightning.fabric.plugins.io import TorchCheckpointIO
    from lightning.pytorch import callbacks
except ImportError as error:
    raise MissingDependencyError("Lightning", "train") from error

T = TypeVar("T")

DATA_FILE = "data.json"
"""The hashes of the recordings, labels and parts that the run learns from."""

RUN_FILE = "run.json"
"""The configuration of the run: only a run of the same configuration goes on."""

COLLAPSED_FOLDER = "collapsed"
"""Folder beside the run that gets the model of a pretraining that failed."""

LAST_FILE = "last.ckpt"
BEST_FILE = "best.ckpt"


class KeepEpochs(callbacks.Checkpoint):
    """Saves every epoch as ``last.ckpt``, and the epoch of the lowest validation loss as ``best.ckpt`` too.

    Its state names no path: the folder of a run may move before the run goes on. Lightning's own `ModelCheckpoint` forgets the
    best loss then, and takes the best checkpoint of whatever is at the old place.

    Parameters
    ----------
    folder : Path
        Folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.best_epoch = -1
        self.best_loss = math.inf

    def state_dict(self) -> dict[str, Any]:
        """Return the best epoch and its loss."""
        return {"best_epoch": self.best_epoch, "best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best epoch and its loss from a checkpoint."""
        self.best_epoch, self.best_loss = state_dict["best_epoch"], state_dict["best_loss"]

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the epoch. The best checkpoint is a copy of the last one, which is written first and tells of both."""
        loss = float(trainer.callback_metrics["val_loss"])
        if improved := loss < self.best_loss:
            self.best_epoch, self.best_loss = trainer.current_epoch, loss
        trainer.save_checkpoint(self.folder / LAST_FILE)
        if improved and trainer.is_global_zero:
            write_atomically(self.folder / BEST_FILE, (self.folder / LAST_FILE).read_bytes())
        trainer.strategy.barrier()


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints whole, in the folder of the run.

    Lightning's own writes them into the folder for temporary files and copies them over, which a kill or a full disk cuts.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`."""
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_atomically(Path(path), content.getvalue())


def check_run(folder: Path, config: object, *, resume: bool = False, replace: bool = False) -> Path | None:
    """Check, before the work starts, that a run may use `folder`, and return the checkpoint to go on from.

    Raises
    ------
    TrainingError
        If there is a run that is neither resumed nor replaced, or another one, or a model, or nothing to resume; if a checkpoint
        is damaged, or the best one is not the last one's.
    """
    if resume and replace:
        raise TrainingError("A run is either resumed or replaced.", "Give --resume or --force.")
    try:
        str(folder.resolve()).encode()
    except UnicodeEncodeError as e:  # neither TensorBoard nor Lightning write there
        raise TrainingError(f"The name of the folder {folder} is no UTF-8.", "Choose another --out.") from e
    last, run_file = folder / LAST_FILE, folder / RUN_FILE
    if replace:
        return None
    if last.is_file():
        if not resume:
            raise TrainingError(
                f"{folder} already holds a run.", "Go on with --resume, replace it with --force, or choose another --out."
            )
        if not _goes_on(encode(config), _read_run(run_file, type(config))):
            raise TrainingError(
                f"The run in {folder} has another configuration.", f"Use the one in {RUN_FILE}, or choose another --out."
            )
        _check_checkpoints(folder)
        return last
    if resume and not run_file.is_file():
        raise TrainingError(f"{folder} holds no run to go on with.", "Leave out --resume, or name the --out of the run.")
    if any((folder.parent / name).exists() for name in (WEIGHTS_FILE, CONFIG_FILE)):
        raise TrainingError(f"{folder.parent} already holds a model.", "Use --force to replace it, or choose another --out.")
    return None


def as_begun(config: T, folder: Path) -> T:
    """Return `config` with what the run in `folder` does where an older release began it, which had no setting for that."""
    file = folder / RUN_FILE
    return overridden(config, _untold(_read_json(file))) if file.is_file() else config


def _untold(stored: Any) -> dict[str, Any]:
    """Return what older releases did, which is not the default of this one, as changes of a configuration."""
    changes: dict[str, Any] = {}
    try:
        if "masking" in stored and "warmup_steps" not in stored:
            changes |= {"warmup_steps": 0, "engine.gradient_clip": stored["engine"]["gradient_clip"]}
        if "split_seed" not in stored["data"]:
            changes["data.split_seed"] = int(stored["engine"]["seed"])
        if "phase" not in stored["data"]:
            changes["data.phase"] = "zero-phase"
        if "variant" in stored and "class_weights" not in stored:
            changes["class_weights"] = "none"
    except (KeyError, TypeError, ValueError):  # it is no configuration, which is told where the run is checked
        return {}
    return changes


def check_data(folder: Path, hashes: dict[str, str]) -> None:
    """Refuse to go on with a run on other data. Runs of older releases do not tell theirs.

    Raises
    ------
    TrainingError
        If recordings, labels or parts are not those that the run began with.
    """
    file = folder / DATA_FILE
    if file.is_file() and (changed := [name for name, digest in hashes.items() if _read_json(file).get(name) != digest]):
        raise TrainingError(
            f"The {listed(changed)} are not those that the run in {folder} began with.",
            "Bring the data back as they were, or start again with --force.",
        )


def start_run(folder: Path, config: object, hashes: dict[str, str], *, replace: bool) -> None:
    """Make the folder of a run, and note its configuration and the hashes of its data.

    Raises
    ------
    TrainingError
        If the folder cannot be written.
    """
    try:
        if replace:
            (folder.parent / WEIGHTS_FILE).unlink(missing_ok=True)
            (folder.parent / CONFIG_FILE).unlink(missing_ok=True)
            (folder.parent / SIGNAL_FILE).unlink(missing_ok=True)
            (folder.parent / SPLIT_FILE).unlink(missing_ok=True)
            if (folder / RUN_FILE).is_file():
                shutil.rmtree(folder)
                shutil.rmtree(folder.parent / COLLAPSED_FOLDER, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / DATA_FILE, json_file(hashes))
        write_atomically(folder / RUN_FILE, json_file(config))
    except OSError as e:
        raise TrainingError(f"{folder} cannot be written ({e.strerror}).", "Choose another --out.") from e


def go_on(folder: Path, config: object) -> None:
    """Remove what a killed process left half written, make the best checkpoint if it is missing, and note a longer run."""
    for name in (LAST_FILE, BEST_FILE, RUN_FILE, DATA_FILE):
        remove_partial(folder / name)
    for name in (WEIGHTS_FILE, CONFIG_FILE, SIGNAL_FILE):
        remove_partial(folder.parent / name)
    last = read_checkpoint_file(folder / LAST_FILE)
    if _best_epoch(last, folder) == last["epoch"]:
        write_atomically(folder / BEST_FILE, (folder / LAST_FILE).read_bytes())
    write_atomically(folder / RUN_FILE, json_file(config))


def read_checkpoint_file(file: Path) -> dict[str, Any]:
    """Return the content of one of Lightning's checkpoints, on the CPU.

    Raises
    ------
    TrainingError
        If the file is missing or damaged.
    """
    try:
        content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except DAMAGED as e:
        raise TrainingError(f"{file} is missing or damaged.", "Start again with --force.") from e
    return content


@contextlib.contextmanager
def saving_to(folder: Path) -> Iterator[None]:
    """Turn a disk that is full into a training that was stopped.

    Raises
    ------
    TrainingStoppedError
        If there is no space left.
    """
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise TrainingStoppedError(
            f"There is no space left for {folder} ({os.strerror(e.errno)}).", "Free some, and go on with --resume.", exit_code=2
        ) from e


def _goes_on(config: dict[str, Any], stored: Any) -> bool:
    """Return whether a run of `config` goes on with the run that is stored: it may have more epochs and more patience."""
    try:
        longer = {name: config["engine"][name] for name in ("max_epochs", "patience")}
        if any(longer[name] < stored["engine"][name] for name in longer):
            return False
        return bool(config == stored | {"engine": stored["engine"] | longer})
    except (KeyError, TypeError):
        return False


def _read_run(file: Path, cls: type) -> Any:
    """Return the configuration of a run, with the settings that its release did not have."""
    stored = _read_json(file)
    try:
        config: Any = decode(cls, stored)
    except (DecodeError, SjepaError):
        return stored  # of another kind of run, or of a newer release
    return encode(overridden(config, _untold(stored)))


def _read_json(file: Path) -> Any:
    try:
        return load_json(file.read_bytes(), finite=False)
    except (OSError, ValueError) as e:
        raise TrainingError(f"{file} is missing or damaged.", "Start again with --force.") from e


def _check_checkpoints(folder: Path) -> None:
    """Refuse a run whose best checkpoint is not that of the last one. Where they are of one epoch, the last one is enough."""
    last = read_checkpoint_file(folder / LAST_FILE)
    epoch = _best_epoch(last, folder)
    if epoch in (-1, last["epoch"]):
        return
    best = read_checkpoint_file(folder / BEST_FILE)
    if best["epoch"] != epoch or _state(best, folder) != _state(last, folder):
        raise TrainingError(
            f"{folder / BEST_FILE} is not the best checkpoint of the run in {LAST_FILE}.",
            "Put the run's own checkpoints back, or start again with --force.",
        )


def _best_epoch(last: dict[str, Any], folder: Path) -> int:
    epoch: int = _state(last, folder)["best_epoch"]
    return epoch


def _state(checkpoint: dict[str, Any], folder: Path) -> dict[str, Any]:
    state: dict[str, Any] | None = checkpoint.get("callbacks", {}).get(KeepEpochs.__qualname__)
    if state is None:
        raise TrainingError(f"The run in {folder} was saved by another release.", "Start again with --force.")
    return state
