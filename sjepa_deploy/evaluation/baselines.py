"""Fits the decoders that every model must beat: CSP with LDA, and Xdawn with logistic regression in the tangent space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.errors import DataError, MissingDependencyError
from sjepa_deploy.evaluation.folds import Fold
from sjepa_deploy.evaluation.predictions import Predictions
from sjepa_deploy.evaluation.train import rows_of
from sjepa_deploy.learning.data import Windows

N_CSP = 6
"""Filters of CSP: MOABB's number (moabb/pipelines/CSP.yml)."""

N_XDAWN = 4
"""Filters of Xdawn for each class: MOABB's number (moabb/pipelines/xDAWN_LDA.yml)."""


def _csp_lda(n_chans: int, n_classes: int, balanced: bool) -> Any:
    from pyriemann.estimation import Covariances
    from pyriemann.spatialfilters import CSP
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.pipeline import make_pipeline

    priors = np.full(n_classes, 1 / n_classes) if balanced else None
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=priors)
    return make_pipeline(Covariances("oas"), CSP(nfilter=min(N_CSP, n_chans)), lda)


def _xdawn_ts(n_chans: int, n_classes: int, balanced: bool) -> Any:
    from pyriemann.estimation import XdawnCovariances
    from pyriemann.tangentspace import TangentSpace
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    logistic = LogisticRegression(class_weight="balanced" if balanced else None, max_iter=1000)
    covariances = XdawnCovariances(nfilter=min(N_XDAWN, n_chans), estimator="oas", xdawn_estimator="oas")
    return make_pipeline(covariances, TangentSpace(), logistic)


BASELINES: dict[str, Callable[[int, int, bool], Any]] = {"csp-lda": _csp_lda, "xdawn-ts": _xdawn_ts}
"""Scikit-learn pipelines by their names. They get the channels, the classes, and whether all classes count alike."""


def predict_baseline(name: str, windows: Windows, fold: Fold, *, balanced: bool) -> Predictions:
    """Fit a baseline on the training and validation parts of a fold, and predict the test part.

    Parameters
    ----------
    name : str
        One of `BASELINES`.
    windows : Windows
        All windows, of classes.
    fold : Fold
        The fold.
    balanced : bool
        Whether all classes count alike, however rare they are.

    Raises
    ------
    DataError
        If the windows are of no classes.
    MissingDependencyError
        If pyriemann or scikit-learn is not installed.
    """
    if windows.class_names is None or windows.targets is None:
        raise DataError("Baselines tell classes apart, and the targets are numbers.", "Leave --baseline out.")
    try:
        pipeline = BASELINES[name](windows.signal.n_chans, len(windows.class_names), balanced)
    except ImportError as error:
        raise MissingDependencyError("pyriemann", "evaluate") from error
    known = np.concatenate([fold.split.train, fold.split.val])
    pipeline.fit(_samples(windows, known), windows.targets[known])
    probabilities = pipeline.predict_proba(_samples(windows, fold.split.test))
    score = probabilities.max(axis=1)
    if len(windows.class_names) == 2:
        score = pipeline.decision_function(_samples(windows, fold.split.test))
    return Predictions(
        model=name,
        way="offline",
        class_names=windows.class_names,
        seed=np.zeros(len(score), np.intp),
        score=score,
        probabilities=probabilities,
        decision=probabilities.argmax(axis=1),
        **rows_of(windows, fold),
    )


def _samples(windows: Windows, rows: NDArray[np.intp]) -> NDArray[np.float64]:
    return np.asarray(windows.eeg[rows], np.float64)
