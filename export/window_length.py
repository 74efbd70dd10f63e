"""Measures how outputs change when weights trained on windows of one length run on windows of another length.

Two lengths with the same number of time tokens take the same weights. The tokens are made of the same samples, counted from the
window's start. The other samples, the tail, act through the statistics of the group normalisation only. A window without a tail
gives its decision earlier by the length of the tail: the low-latency contract (docs/latency.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.models.networks import SignalJEPAModule, build_model
from sjepa_deploy.runtime.backend import FloatArray
from sjepa_deploy.runtime.backends.reference import run_reference

MAX_WINDOWS = 128
"""Most windows that are compared, evenly spaced."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Compares the outputs of two lengths, both in float64.

    Attributes
    ----------
    change : float
        Root mean square of the difference, over `WindowLengthChange.spread`.
    correlation : float
        Pearson correlation over windows, averaged over the outputs that vary.
    decision_flips : int or None
        Windows whose largest output changes to another output. None for a single output.
    """

    change: float
    correlation: float
    decision_flips: int | None


@dataclass(frozen=True, kw_only=True)
class WindowLengthChange:
    """Holds the outputs of one set of weights on windows of two lengths.

    Attributes
    ----------
    trained, exported : int
        Samples of a window.
    earlier : float
        Seconds by which the decisions of the exported length are younger. Negative where they are older.
    n_windows : int
        Windows that were compared.
    eeg : str
        Source of the windows.
    spread : float
        Standard deviation of the trained length's outputs over windows, averaged (root mean square) over outputs.
    same_tokens : Agreement
        Both windows begin at the same sample: the tokens are made of the same EEG, only the normalisation differs.
    same_moment : Agreement
        Both windows end at the same sample, as two live decoders would compare: the EEG in the tokens differs by `earlier`.
    """

    trained: int
    exported: int
    earlier: float
    n_windows: int
    eeg: str
    spread: float
    same_tokens: Agreement
    same_moment: Agreement

    def __str__(self) -> str:
        same, moment = self.same_tokens, self.same_moment
        flips = "" if same.decision_flips is None else f", {same.decision_flips} of {self.n_windows} decisions flip"
        return (
            f"decisions are {abs(self.earlier):.3g} s {'younger' if self.earlier >= 0 else 'older'}; where the tokens hold the "
            f"same EEG the outputs change by {100 * same.change:.2g} % of their spread (correlation {same.correlation:.4f}"
            f"{flips}), at the same moment they correlate at {moment.correlation:.2f}, on {self.n_windows} windows of {self.eeg}"
        )


def compare_window_lengths(model: SignalJEPAModule, trained: int, eeg: FloatArray, what: str) -> WindowLengthChange | None:
    """Compare `model` with the same weights on windows of the length that they were trained on.

    Returns None where the outputs are the same for every window, so that there is no spread to compare with.

    Parameters
    ----------
    model : SignalJEPAModule
        The model, with the spec of the exported length.
    trained : int
        Samples of the windows that the weights were trained on, with as many tokens.
    eeg : array of float32, shape (n, n_chans, max(trained, exported))
        Stretches of EEG that hold a window of either length; `MAX_WINDOWS` of them are taken.
    what : str
        Source of the stretches.
    """
    spec = model.spec
    before = spec.replace(n_times=trained)
    assert before.n_tokens_per_channel == spec.n_tokens_per_channel, "both lengths have the same tokens"
    assert eeg.shape[1:] == (spec.n_chans, max(trained, spec.n_times))
    chosen = eeg[np.unique(np.linspace(0, len(eeg) - 1, MAX_WINDOWS).round().astype(int))]
    weights = model.state_dict()
    outputs = {}
    for n_times in (trained, spec.n_times):
        double = build_model(spec.replace(n_times=n_times), seed=0).double()
        double.load_state_dict(weights)
        for place, windows in (("start", chosen[..., :n_times]), ("end", chosen[..., -n_times:])):
            batches = np.array_split(windows, math.ceil(len(windows) / 16))
            rows = np.concatenate([run_reference(double, np.ascontiguousarray(batch)) for batch in batches])
            outputs[n_times, place] = rows.reshape(len(rows), -1)
    spread = float(np.sqrt(np.mean(outputs[trained, "end"].var(axis=0))))
    if spread == 0:
        return None

    def agreement(place: str) -> Agreement:
        return _agreement(outputs[trained, place], outputs[spec.n_times, place], spread)

    return WindowLengthChange(
        trained=trained,
        exported=spec.n_times,
        earlier=before.tail - spec.tail,
        n_windows=len(chosen),
        eeg=what,
        spread=spread,
        same_tokens=agreement("start"),
        same_moment=agreement("end"),
    )


def _agreement(before: NDArray[np.float64], after: NDArray[np.float64], spread: float) -> Agreement:
    centred = [outputs - outputs.mean(axis=0) for outputs in (before, after)]
    norms = np.linalg.norm(centred, axis=1)
    varies = (norms > 0).all(axis=0)
    products = (centred[0] * centred[1]).sum(axis=0)[varies] / norms.prod(axis=0)[varies]
    flips = None if before.shape[1] == 1 else int((before.argmax(axis=1) != after.argmax(axis=1)).sum())
    return Agreement(
        change=float(np.sqrt(np.mean((after - before) ** 2))) / spread,
        correlation=float(products.mean()),
        decision_flips=flips,
    )
