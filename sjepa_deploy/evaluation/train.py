"""Trains a model for each fold and seed of an evaluation, and predicts what each has not seen, offline and live.

A fold that is done is not trained again: its folder holds the model, and the hashes of the data that it learned from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sjepa_deploy.bundle import Bundle, Provenance
from sjepa_deploy.eeg.epochs import EPOCHS
from sjepa_deploy.eeg.recording import fit_recording
from sjepa_deploy.eeg.windows import FittedRecording
from sjepa_deploy.evaluation.folds import Fold
from sjepa_deploy.evaluation.predictions import Predictions, of_outputs
from sjepa_deploy.evaluation.task import BATCH, live_windows
from sjepa_deploy.export.to_bundle import to_bundle
from sjepa_deploy.learning.data import SYNTHETIC, DataConfig, Windows
from sjepa_deploy.learning.finetune import FinetuneConfig, finetune
from sjepa_deploy.learning.loading import load_windows
from sjepa_deploy.learning.origin import data_hashes
from sjepa_deploy.learning.progress import Epoch
from sjepa_deploy.learning.run_folder import check_data, check_run
from sjepa_deploy.models.braindecode_config import CONFIG_FILE
from sjepa_deploy.models.checkpoint import Checkpoint, load_model, read_checkpoint
from sjepa_deploy.models.networks import SignalJEPAModule, reference_mode
from sjepa_deploy.models.resolve import resolve_spec
from sjepa_deploy.runtime.predictor import load

if TYPE_CHECKING:
    import mne

BUNDLE_FOLDER = "bundle"

FOLD = "{fold}"
"""Stands for the number of the fold in the path of a base model."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Says which training is next."""

    number: int
    total: int
    fold: str
    seed: int

    def __str__(self) -> str:
        return f"training {self.number} of {self.total}: {self.fold}, seed {self.seed}"


def train_folds(
    config: FinetuneConfig,
    folder: Path,
    windows: Windows,
    folds: Sequence[Fold],
    seeds: Sequence[int],
    *,
    live: Windows | None = None,
    name: str | None = None,
    tell: Callable[[Step], None] = lambda step: None,
    tell_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> Iterator[Predictions]:
    """Train each fold with each seed, and give the predictions of its test part: offline, and live where there is a live path.

    Parameters
    ----------
    config : FinetuneConfig
        What to train. `{fold}` in the path of a base model stands for the number of the fold.
    folder : Path
        Folder of the evaluation.
    windows : Windows
        All windows.
    folds : sequence of Fold
        The folds.
    seeds : sequence of int
        Seeds of the trainings.
    live : Windows or None
        The same windows as the live decoder makes them, see `through_live_path`.
    name : str or None
        Name of the model in the table. None is the variant.
    tell, tell_epoch : callable
        Called before each training, and after each epoch.

    Raises
    ------
    TrainingError, DataError, CheckpointError
        See `sjepa_deploy.learning.finetune.finetune`.
    """
    steps = [(fold, seed) for fold in folds for seed in seeds]
    for i, (fold, seed) in enumerate(steps):
        tell(Step(number=i + 1, total=len(steps), fold=fold.name, seed=seed))
        place = folder / fold.name / f"seed-{seed}"
        own = replace(config, pretrained=base_of(config, fold), engine=replace(config.engine, seed=seed))
        train_once(own, place, windows, fold, tell_epoch=tell_epoch)
        checkpoint = read_checkpoint(place)
        model = load_model(checkpoint, resolve_spec({}, checkpoint)[0])
        known: dict[str, Any] = {"model": name or config.variant, "class_names": windows.class_names}
        tested = fold.split.test
        outputs = _run(model, windows.eeg, tested)
        yield Predictions(
            way="offline",
            seed=np.full(len(tested), seed),
            **known,
            **rows_of(windows, fold),
            **of_outputs(outputs, windows.class_names),
        )
        if live is None:
            continue
        there = np.array([bool(np.isfinite(live.eeg[row]).all()) for row in tested], np.bool_)
        with load(bundle_of(model, checkpoint, place / BUNDLE_FOLDER), check_unit=False) as predict:
            outputs = predict.predict(np.ascontiguousarray(live.eeg[tested[there]]))
        yield Predictions(
            way="live",
            seed=np.full(int(there.sum()), seed),
            **known,
            **{key: value[there] for key, value in rows_of(windows, fold).items()},
            **of_outputs(outputs, windows.class_names),
        )


def base_of(config: FinetuneConfig, fold: Fold) -> str | None:
    """Return the path of the base model of a fold."""
    return None if config.pretrained is None else config.pretrained.replace(FOLD, str(fold.number))


def train_once(
    config: FinetuneConfig,
    folder: Path,
    windows: Windows,
    fold: Fold,
    *,
    tell_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> None:
    """Train one fold, or go on with its run, or do nothing where the model is finished.

    Raises
    ------
    TrainingError
        If the folder holds a run of another configuration or of other data.
    """
    run = folder / "training"
    if (folder / CONFIG_FILE).is_file() and run.is_dir():
        check_run(run, config, resume=True)
        check_data(run, data_hashes(windows, fold.split))
        return
    resume = (run / "last.ckpt").is_file()
    finetune(config, folder, resume=resume, data=(windows, fold.split), tell_epoch=tell_epoch)


def bundle_of(model: SignalJEPAModule, checkpoint: Checkpoint, folder: Path) -> Bundle:
    """Return the bundle of a model in `folder`, which is exported where it is missing or of other weights."""
    if folder.exists():
        bundle = Bundle.open(folder)
        if bundle.manifest.weights.sha256 == checkpoint.sha256:
            return bundle
    source = Provenance(source=checkpoint.file_name, format=checkpoint.file_format, sha256=checkpoint.sha256)
    return to_bundle(model, folder, weights=source, precisions=("fp32",), check_unit=False, force=True)


def through_live_path(config: DataConfig) -> Windows | None:
    """Return the windows of recordings as the live decoder makes them, NaN where it makes none; None without recordings.

    Sources that were cut before (synthetic EEG, ``*-epo.fif``, ``.npz``) have no live path.
    """
    if any(source == SYNTHETIC or source.endswith((*EPOCHS, ".npz")) for source in config.source):
        return None

    def cut(raw: mne.io.BaseRaw, fitted: FittedRecording, starts: NDArray[np.intp]) -> NDArray[np.float32]:
        signal, share = fitted.signal, config.interpolate_share if config.interpolate else 0.0
        causal = fitted
        if signal.phase != "causal":
            causal = fit_recording(raw, signal, interpolate=share, check_unit=False, phase="causal")
        live, whole = causal.place_windows(fitted.times(starts), 0.0)
        eeg = np.full((len(starts), *signal.input_shape), np.nan, np.float32)
        made = live_windows(raw, causal, live[whole], signal, interpolate=share, seed=0)
        for row, window in zip(np.flatnonzero(whole), made, strict=True):
            eeg[row] = window
        return eeg

    return load_windows(config, cut=cut)


def rows_of(windows: Windows, fold: Fold) -> dict[str, Any]:
    """Return what is known of the test windows of a fold, as fields of `Predictions`."""
    assert windows.targets is not None
    tested = fold.split.test
    places = {name: getattr(windows, name)[tested] for name in ("subject", "session", "recording", "onset")}
    return {
        "window": tested,
        "truth": windows.targets[tested].astype(np.float64 if windows.class_names is None else np.intp),
        "fold": np.full(len(tested), fold.number),
        **places,
    }


def _run(model: SignalJEPAModule, eeg: NDArray[np.float32], rows: NDArray[np.intp]) -> NDArray[np.float32]:
    with reference_mode(model):
        batches = [model(torch.from_numpy(eeg[rows[i : i + BATCH]])).numpy() for i in range(0, len(rows), BATCH)]
    return np.concatenate(batches)
