"""Calibrates a trained model for one person, with few labelled trials of that person.

The closed form fits the last layer anew, on what enters that layer; all other weights stay. The short fine-tuning changes all
weights. Both are judged on trials that they were not fitted on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from sjepa_deploy.eeg.steps import Alignment, Channels, Resample, RunningAlignment
from sjepa_deploy.errors import DataError, SpecError
from sjepa_deploy.last_layer import MIN_TRIALS, LastLayer, fit_classes, fit_numbers
from sjepa_deploy.learning.brief import train_briefly
from sjepa_deploy.learning.metrics import Score, scores
from sjepa_deploy.models.checkpoint import in_target_unit
from sjepa_deploy.models.networks import SignalJEPAModule, SignalJEPAWithTransformer, last_linear, reference_mode
from sjepa_deploy.spec import ModelSpec, SignalSpec

Method = Literal["closed-form", "fine-tune"]

N_FOLDS = 5
"""Stretches of trials, each of which is judged by a model that was fitted on the others."""

BATCH = 64

N_BOOTSTRAP = 300
"""Samples behind the interval of each point of a learning curve."""

CURVE = (4, 8, 12, 16, 24, 32, 40, 48, 64, 96, 128, 192, 256)
"""Numbers of trials in the learning curve."""


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Says how a model is calibrated.

    Attributes
    ----------
    method : {"closed-form", "fine-tune"}
        "closed-form" fits the last layer: shrinkage LDA of classes, ridge regression of numbers. "fine-tune" changes all weights.
    epochs : int
        Epochs of the fine-tuning.
    lr : float
        Its learning rate: a third of that of `sjepa_deploy.learning.loop.Engine`, as the weights are trained already. A choice.
    batch_size : int
        Its trials of a step.
    seed : int
        Seed of the order of trials.
    """

    method: Method = "closed-form"
    epochs: int = 20
    lr: float = 3e-4
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not self.lr > 0:
            raise DataError("The fine-tuning has no steps.", "Use a positive number of epochs, batch size and learning rate.")


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Holds the scores of a model that was calibrated with some trials, on other trials.

    Attributes
    ----------
    n_trials : int
        Trials that the model was fitted on; 0 is the model as it was.
    scores : dict of str to Score
        Balanced accuracy and AUC, or R2, NRMSE and MAE.
    """

    n_trials: int
    scores: dict[str, Score]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Says what a calibration did.

    Attributes
    ----------
    method : {"closed-form", "fine-tune"}
        How.
    n_trials : int
        Trials that the written model was fitted on.
    curve : tuple of CurvePoint
        Scores over the number of trials. The first is the model as it was, the last was fitted on all trials but those judged.
    """

    method: Method
    n_trials: int
    curve: tuple[CurvePoint, ...]

    @property
    def metric(self) -> str:
        """Return the score that decides: balanced accuracy or R2."""
        return next(iter(self.curve[0].scores))

    @property
    def gain(self) -> float:
        """Return how much better the last point of the curve is than the model as it was."""
        return self.curve[-1].scores[self.metric].value - self.curve[0].scores[self.metric].value


def before_alignment(signal: SignalSpec) -> SignalSpec:
    """Return the signal that enters the alignment of `signal`: its steps up to there.

    Raises
    ------
    SpecError
        If the signal has no step that aligns: its model did not learn from aligned EEG.
    """
    found = [i for i, step in enumerate(signal.steps) if isinstance(step, (Alignment, RunningAlignment))]
    if not found:
        raise SpecError(
            "The model did not learn from aligned EEG: no step of its signal aligns.",
            "Leave the alignment out, or train with the step running-alignment.",
        )
    kept = list(signal.steps[: found[0]])
    kept += [step for step in signal.steps[found[0] :] if isinstance(step, (Resample, Channels))]
    return signal.replace(steps=tuple(kept))


def aligned(signal: SignalSpec, windows: NDArray[Any]) -> SignalSpec:
    """Return `signal` whose alignment is that of a person: the Euclidean alignment of `windows`.

    Parameters
    ----------
    signal : SignalSpec
        A signal with the step alignment or running-alignment, which is replaced.
    windows : ndarray, shape (n_windows, n_chans, n_times)
        Windows of the person, of the signal that `before_alignment` returns.
    """
    assert signal.ch_names is not None, "steps that align have channels with names"
    fitted = Alignment.fit(windows, signal.ch_names)
    steps = list(signal.steps)
    steps[next(i for i, step in enumerate(steps) if isinstance(step, (Alignment, RunningAlignment)))] = fitted
    return signal.replace(steps=tuple(steps))


def features_of(model: SignalJEPAModule, eeg: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what enters the last layer of `model`, shape (n, n_features), for windows of shape (n, n_chans, n_times)."""
    found: list[torch.Tensor] = []
    handle = last_linear(model).register_forward_pre_hook(lambda layer, inputs: found.append(inputs[0]))
    try:
        with reference_mode(model):
            for start in range(0, len(eeg), BATCH):
                model(torch.tensor(eeg[start : start + BATCH]))  # a copy: the windows may be read-only
    finally:
        handle.remove()
    features: NDArray[np.float32] = torch.cat(found).numpy()
    return features


def last_layer_of(model: SignalJEPAModule) -> LastLayer:
    """Return a copy of the last layer of `model`."""
    layer = last_linear(model)
    return LastLayer(weight=layer.weight.detach().double().numpy(), bias=layer.bias.detach().double().numpy())


def with_last_layer(model: SignalJEPAModule, layer: LastLayer) -> SignalJEPAModule:
    """Return a copy of `model` with another last layer. All other weights are the same bits."""
    changed = copy.deepcopy(model)
    own = last_linear(changed)
    with torch.no_grad():
        own.weight.copy_(torch.from_numpy(layer.weight))
        own.bias.copy_(torch.from_numpy(layer.bias))
    return changed.eval()


def refit(model: SignalJEPAModule, features: NDArray[Any], targets: NDArray[Any]) -> LastLayer:
    """Return the last layer of `model` that the closed form fits to trials.

    Parameters
    ----------
    model : SignalJEPAModule
        The model.
    features : ndarray, shape (n, n_features)
        What enters its last layer, see `features_of`.
    targets : ndarray, shape (n,)
        Numbers of the classes, or the true numbers of a regression.
    """
    spec = model.spec
    if spec.task == "classification":
        return fit_classes(features, targets, n_classes_of(spec), n_outputs=spec.n_outputs)
    return fit_numbers(features, targets, last_layer_of(model))


def n_classes_of(spec: ModelSpec) -> int:
    """Return the number of classes of a classifier: a single output tells two classes apart."""
    return max(2, spec.n_outputs)


def calibrate(
    model: SignalJEPAModule, eeg: NDArray[np.float32], targets: NDArray[Any], config: CalibrationConfig | None = None
) -> tuple[SignalJEPAModule, Calibration]:
    """Calibrate a model for one person.

    Parameters
    ----------
    model : SignalJEPAModule
        The model, which stays as it is.
    eeg : ndarray of float32, shape (n_trials, n_chans, n_times)
        One window of each trial after the steps of the model's signal, in the order of time.
    targets : ndarray, shape (n_trials,)
        Number of the class of each trial, or the true numbers of a regression.
    config : CalibrationConfig or None
        How.

    Returns
    -------
    calibrated : SignalJEPAModule
        The model, fitted on all trials.
    calibration : Calibration
        The learning curve. Each fifth of the trials, in stretches of time, is judged by models that were fitted on the first
        trials of the rest.

    Raises
    ------
    SpecError
        If the model is a base model, or has several numbers as outputs.
    DataError
        If there are too few trials, values that are not finite, or all targets are equal.
    """
    config = config or CalibrationConfig()
    _check(model.spec, eeg, targets)
    fold = np.arange(len(eeg)) * N_FOLDS // len(eeg)
    fit: Callable[[NDArray[Any]], SignalJEPAModule]
    if config.method == "closed-form":
        features = features_of(model, eeg)

        def outputs(fitted: SignalJEPAModule, rows: NDArray[Any]) -> NDArray[Any]:
            return last_layer_of(fitted)(features[rows])

        def fit(rows: NDArray[Any]) -> SignalJEPAModule:
            return with_last_layer(model, refit(model, features[rows], targets[rows]))
    else:

        def outputs(fitted: SignalJEPAModule, rows: NDArray[Any]) -> NDArray[Any]:
            return last_layer_of(fitted)(features_of(fitted, eeg[rows]))

        def fit(rows: NDArray[Any]) -> SignalJEPAModule:
            return _fine_tuned(model, eeg[rows], targets[rows], config)

    def point(n: int) -> CurvePoint:
        found = np.empty((len(eeg), model.spec.n_outputs))
        for k in range(N_FOLDS):
            test = np.flatnonzero(fold == k)
            fitted = model if n == 0 else fit(np.flatnonzero(fold != k)[:n])
            found[test] = outputs(fitted, test)
        return CurvePoint(n_trials=n, scores=scores(targets, _predictions(model.spec, found), n_samples=N_BOOTSTRAP))

    fewest = min(int((fold != k).sum()) for k in range(N_FOLDS))
    sizes = [n for n in CURVE if n < fewest] if config.method == "closed-form" else []
    sizes = [n for n in sizes if all(_enough(model.spec, targets[np.flatnonzero(fold != k)[:n]]) for k in range(N_FOLDS))]
    if not all(_enough(model.spec, targets[fold != k]) for k in range(N_FOLDS)):
        raise DataError("A fifth of the trials holds nearly all of a class.", "Give more trials of each class, mixed in time.")
    curve = tuple(point(n) for n in (0, *sizes, fewest))
    return fit(np.arange(len(eeg))), Calibration(method=config.method, n_trials=len(eeg), curve=curve)


def _check(spec: ModelSpec, eeg: NDArray[Any], targets: NDArray[Any]) -> None:
    if spec.variant == "base":
        raise SpecError("A base model outputs features and has no last layer to fit.", "Fine-tune it with sjepa-finetune first.")
    if spec.task == "regression" and spec.n_outputs > 1:
        raise SpecError(f"The model gives {spec.n_outputs} numbers.", "Calibrate a model of one number, or of classes.")
    if eeg.ndim != 3 or eeg.shape[1:] != spec.input_shape or len(eeg) != len(targets):
        raise DataError(
            f"The trials have shape {eeg.shape} with {len(targets)} labels, the model takes {spec.input_shape}.",
            "Give one window of each trial after the steps of the model's signal.",
        )
    if not (np.isfinite(eeg).all() and np.isfinite(targets).all()):
        raise DataError("Some trials hold NaN or infinite values.", "Leave these trials out.")
    if spec.task == "classification":
        counts = np.bincount(targets, minlength=n_classes_of(spec))
        if (counts <= MIN_TRIALS).any() or len(targets) < N_FOLDS:
            names = spec.class_names or tuple(map(str, range(len(counts))))
            told = ", ".join(f"{n} of {name}" for n, name in zip(counts, names, strict=True))
            raise DataError(f"There are too few trials: {told}.", f"Give {MIN_TRIALS + 1} trials or more of each class.")
    elif len(targets) < 2 * N_FOLDS or np.ptp(targets) == 0:
        raise DataError(f"{len(targets)} trials, or trials of the same number, tell nothing.", f"Give {2 * N_FOLDS} or more.")


def _enough(spec: ModelSpec, targets: NDArray[Any]) -> bool:
    if spec.task == "classification":
        return bool((np.bincount(targets, minlength=n_classes_of(spec)) >= MIN_TRIALS).all())
    return len(targets) > MIN_TRIALS and np.ptp(targets) > 0


def _predictions(spec: ModelSpec, outputs: NDArray[Any]) -> NDArray[Any]:
    """Return what scores take of outputs: numbers of shape (n,), or probabilities of shape (n, n_classes)."""
    if spec.task != "classification":
        return outputs[:, 0]
    logits = np.column_stack([np.zeros(len(outputs)), outputs[:, 0]]) if spec.n_outputs == 1 else outputs
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: NDArray[Any] = shifted / shifted.sum(axis=1, keepdims=True)
    return probabilities


def _fine_tuned(
    model: SignalJEPAModule, eeg: NDArray[np.float32], targets: NDArray[Any], config: CalibrationConfig
) -> SignalJEPAModule:
    """Return a copy of `model` that learned from the trials for some epochs. Dropout is off: there are few steps.

    A regression learns what is standardised by the trials, so that learning does not depend on the unit.
    """
    tuned = copy.deepcopy(model).eval()
    if isinstance(tuned, SignalJEPAWithTransformer):
        tuned.transformer.decoder.requires_grad_(False)
    mean, std = torch.tensor(0.0), torch.tensor(1.0)
    if model.spec.task == "regression":
        mean, std = torch.tensor(float(targets.mean())), torch.tensor(float(targets.std()))
        tuned.load_state_dict(in_target_unit(tuned.state_dict(), -mean / std, 1 / std))
        targets = (targets - float(mean)) / float(std)
    train_briefly(tuned, eeg, targets, epochs=config.epochs, lr=config.lr, batch_size=config.batch_size, seed=config.seed)
    tuned.load_state_dict(in_target_unit(tuned.state_dict(), mean, std))
    tuned.requires_grad_(True)
    return tuned
