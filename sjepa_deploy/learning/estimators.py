"""Offers the models as estimators of scikit-learn: `SJEPAClassifier` and `SJEPARegressor`, for pipelines, searches and MOABB."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sjepa_deploy.errors import MissingDependencyError
from sjepa_deploy.learning.brief import train_briefly
from sjepa_deploy.learning.calibrate import BATCH
from sjepa_deploy.models.checkpoint import in_target_unit, read_checkpoint, write_checkpoint
from sjepa_deploy.models.networks import SignalJEPAModule, SignalJEPAWithTransformer, build_model, reference_mode
from sjepa_deploy.models.transfer import NEW_PARTS, base_encoder, transfer
from sjepa_deploy.spec import EncoderSpec, ModelSpec, SignalSpec, Variant

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise MissingDependencyError("scikit-learn", "sklearn") from error


_NO_TARGETS = "no_validation"
"""By this `validate_data` knows that there are no targets."""


class _Estimator(BaseEstimator):  # type: ignore[misc]  # scikit-learn ships no types
    """Holds what both estimators share; its parameters are theirs."""

    model_: SignalJEPAModule
    window_shape_: tuple[int, int]

    def __init__(
        self,
        *,
        variant: Variant = "prelocal",
        signal: SignalSpec | None = None,
        sfreq: float = 100.0,
        pretrained: str | None = None,
        freeze_encoder: bool = False,
        encoder_to_prelocal: bool = False,
        n_spat_filters: int = 4,
        encoder: EncoderSpec | None = None,
        max_epochs: int = 50,
        warmup_epochs: int = 10,
        batch_size: int = 32,
        lr: float = 1e-3,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.variant = variant
        self.signal = signal
        self.sfreq = sfreq
        self.pretrained = pretrained
        self.freeze_encoder = freeze_encoder
        self.encoder_to_prelocal = encoder_to_prelocal
        self.n_spat_filters = n_spat_filters
        self.encoder = encoder
        self.max_epochs = max_epochs
        self.warmup_epochs = warmup_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        """Return what the estimator takes."""
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def write(self, folder: Path | str) -> None:
        """Write the fitted model as a checkpoint, which ``sjepa-export --checkpoint`` takes."""
        check_is_fitted(self)
        write_checkpoint(self.model_, folder)

    def _windows(self, X: Any, y: Any = _NO_TARGETS, *, reset: bool, **checks: Any) -> Any:  # noqa: N803
        """Return checked windows, and targets where there are some. A window of one channel may be a row."""
        checks |= {"allow_nd": True, "dtype": np.float32, "reset": reset}
        X = np.asarray(X) if isinstance(X, Sequence) and hasattr(X, "__array__") else X  # noqa: N806  # of skorch
        checked = validate_data(self, X, y, **checks)
        alone = isinstance(y, str) and y == _NO_TARGETS
        eeg = checked if alone else checked[0]
        eeg = eeg[:, None] if eeg.ndim == 2 else eeg
        if eeg.ndim != 3:
            raise ValueError(f"Windows have the shape {eeg.shape}, not (n_windows, n_chans, n_times).")
        if not reset and eeg.shape[1:] != self.window_shape_:
            raise ValueError(f"Windows have the shape {eeg.shape[1:]}, those of fit {self.window_shape_}.")
        if reset:
            self.window_shape_ = eeg.shape[1:]
        return eeg if alone else (eeg, checked[1])

    def _build(self, seed: int, n_outputs: int, class_names: tuple[str, ...] | None) -> None:
        """Build the model, with weights of the base model where there is one."""
        n_chans, n_times = self.window_shape_
        base = None if self.pretrained is None else read_checkpoint(self.pretrained)
        encoder = self.encoder or EncoderSpec()
        if base is not None:
            encoder, _ = base_encoder(base, self.encoder)
        self._pad = max(0, encoder.min_n_times - n_times)
        signal = self.signal or SignalSpec(n_chans=n_chans, n_times=n_times + self._pad, sfreq=self.sfreq)
        spec = ModelSpec(
            variant=self.variant,
            signal=signal,
            n_outputs=n_outputs,
            n_spat_filters=self.n_spat_filters,
            class_names=class_names,
            encoder=encoder,
        )
        if (n_chans, n_times + self._pad) != spec.input_shape:
            raise ValueError(f"Windows have the shape {self.window_shape_}, the signal says {spec.input_shape}.")
        if base is None:
            self.model_, self.transfer_ = build_model(spec, seed=seed), None
        else:
            self.model_, self.transfer_ = transfer(base, spec, seed=seed, encoder_to_prelocal=self.encoder_to_prelocal)

    def _learn(self, eeg: NDArray[np.float32], targets: NDArray[Any], seed: int) -> None:
        """Train new layers alone where others were pretrained, then all; or new layers alone where the encoder is frozen."""
        model = self.model_
        if isinstance(model, SignalJEPAWithTransformer):
            model.transformer.decoder.requires_grad_(False)
        new = NEW_PARTS[model.spec.variant]
        parts = dict(model.named_children())
        taken = self.transfer_ is not None and bool(self.transfer_.taken)
        warmup = self.max_epochs if self.freeze_encoder else min(self.warmup_epochs, self.max_epochs) if taken else 0
        for epochs, alone in ((warmup, True), (self.max_epochs - warmup, False)):
            for name, part in parts.items():
                part.train(name in new or not alone)
            learned = [p for name, part in parts.items() if name in new or not alone for p in part.parameters()]
            train_briefly(
                model,
                self._padded(eeg),
                targets,
                epochs=epochs,
                seed=seed,
                parameters=learned,
                lr=self.lr,
                batch_size=self.batch_size,
            )
        model.eval()

    def _padded(self, eeg: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return windows with zeros behind them where they are shorter than what one time token is made of."""
        return np.pad(eeg, ((0, 0), (0, 0), (0, self._pad))) if self._pad else eeg

    def _outputs(self, X: Any) -> NDArray[np.float64]:  # noqa: N803
        """Return the model's outputs, shape (n_windows, n_outputs)."""
        check_is_fitted(self)
        eeg = self._padded(self._windows(X, reset=False))
        model = copy.deepcopy(self.model_).double()  # outputs of a window depend on no other window but for rounding
        with reference_mode(model):
            found = [model(torch.tensor(eeg[start : start + BATCH], dtype=torch.float64)) for start in range(0, len(eeg), BATCH)]
        outputs: NDArray[np.float64] = torch.cat(found).numpy()
        return outputs


class SJEPAClassifier(ClassifierMixin, _Estimator):  # type: ignore[misc]
    """Classifies windows of EEG with a SignalJEPA model.

    Classes count alike in the loss, however rare they are. Windows are what a model takes: band-passed and scaled to microvolts,
    as `sjepa_deploy.eeg.prepare`, MOABB's paradigms or braindecode's preprocessing make them.

    Parameters
    ----------
    variant : {"prelocal", "postlocal", "contextual"}
        The architecture. "contextual" needs the positions of `signal`.
    signal : SignalSpec or None
        The signal of the windows, which a checkpoint keeps. None: the shape of the windows and `sfreq` alone.
    sfreq : float
        Rate in Hz, where there is no `signal`.
    pretrained : str or None
        Checkpoint of a base model, or its name on the Hub. None trains from scratch.
    freeze_encoder : bool
        Train the spatial filters and the last layer only.
    encoder_to_prelocal : bool
        Take the feature encoder into PreLocal too.
    n_spat_filters : int
        Spatial filters.
    encoder : EncoderSpec or None
        Sizes of the encoder; those of the base model where there is one.
    max_epochs : int
        Epochs.
    warmup_epochs : int
        Of these, epochs in which only the new layers learn, where others were pretrained.
    batch_size : int
        Windows of a step.
    lr : float
        Learning rate of Adam.
    random_state : int, RandomState or None
        Seed of weights, order and dropout.

    Attributes
    ----------
    classes_ : ndarray, shape (n_classes,)
        The classes.
    model_ : SignalJEPAModule
        The fitted model.
    transfer_ : TransferReport or None
        What it took from the base model.
    n_features_in_ : int
        Length of the second axis of `X`.

    Examples
    --------
    >>> from sklearn.model_selection import cross_val_score
    >>> cross_val_score(SJEPAClassifier(sfreq=128.0), X, y, scoring="balanced_accuracy")  # doctest: +SKIP
    """

    classes_: NDArray[Any]

    def __sklearn_tags__(self) -> Any:
        """Return what the estimator takes. A channel's scale and offset are normalised away: tables of features score poorly."""
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = True
        return tags

    def fit(self, X: Any, y: Any) -> SJEPAClassifier:  # noqa: N803
        """Fit the model.

        Parameters
        ----------
        X : array-like, shape (n_windows, n_chans, n_times), or (n_windows, n_times) of one channel
            Windows in microvolts. Shorter ones than a time token is made of get zeros behind them.
        y : array-like, shape (n_windows,)
            Classes.

        Raises
        ------
        ValueError
            If samples are NaN or infinite, shapes do not go together, or there is one class alone.
        """
        eeg, y = self._windows(X, y, reset=True, ensure_min_samples=2)
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError("A classifier needs windows of two classes or more; there is one class.")
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self._build(seed, len(self.classes_), tuple(map(str, self.classes_)))
        self._learn(eeg, numbers.astype(np.int64), seed)
        return self

    def decision_function(self, X: Any) -> NDArray[np.float64]:  # noqa: N803
        """Return the logits, shape (n_windows, n_classes); of two classes that of the second against the first, (n_windows,)."""
        outputs = self._outputs(X)
        return outputs[:, 1] - outputs[:, 0] if outputs.shape[1] == 2 else outputs

    def predict_proba(self, X: Any) -> NDArray[np.float64]:  # noqa: N803
        """Return the probability of each class, shape (n_windows, n_classes)."""
        outputs = self._outputs(X)
        shifted = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        probabilities: NDArray[np.float64] = shifted / shifted.sum(axis=1, keepdims=True)
        return probabilities

    def predict(self, X: Any) -> NDArray[Any]:  # noqa: N803
        """Return the class of each window, shape (n_windows,)."""
        outputs = self._outputs(X)
        classes: NDArray[Any] = self.classes_[outputs.argmax(axis=1)]
        return classes


class SJEPARegressor(RegressorMixin, _Estimator):  # type: ignore[misc]
    """Predicts a number from windows of EEG with a SignalJEPA model. Parameters and windows are those of `SJEPAClassifier`.

    The model learns standardised targets; their mean and spread are folded into its last layer.

    Attributes
    ----------
    model_ : SignalJEPAModule
        The fitted model, which answers in the unit of the target.
    transfer_ : TransferReport or None
        What it took from the base model.
    n_features_in_ : int
        Length of the second axis of `X`.
    """

    def __sklearn_tags__(self) -> Any:
        """Return what the estimator takes. A channel's scale and offset are normalised away: tables of features score poorly."""
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = True
        return tags

    def fit(self, X: Any, y: Any) -> SJEPARegressor:  # noqa: N803
        """Fit the model to numbers `y`, shape (n_windows,). `X` is that of `SJEPAClassifier.fit`.

        Raises
        ------
        ValueError
            If samples or targets are NaN or infinite, or shapes do not go together.
        """
        eeg, y = self._windows(X, y, reset=True, y_numeric=True, ensure_min_samples=2)
        y = np.asarray(y, np.float64)
        mean, std = y.mean(), y.std() or 1.0
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self._build(seed, 1, None)
        self._learn(eeg, (y - mean) / std, seed)
        self.model_.load_state_dict(in_target_unit(self.model_.state_dict(), torch.tensor(mean), torch.tensor(std)))
        return self

    def predict(self, X: Any) -> NDArray[np.float64]:  # noqa: N803
        """Return the number of each window, shape (n_windows,)."""
        return self._outputs(X)[:, 0]
