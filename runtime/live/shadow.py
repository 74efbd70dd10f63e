"""Runs a second bundle on the windows of a live decoder, and says where the two disagree. Nothing of it is sent."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.eeg.chain import finish_windows
from sjepa_deploy.errors import SjepaError
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.swap import Opening, open_candidate
from sjepa_deploy.runtime.live.trials import EventSteps

MOST_WAITING = 64
"""Windows that wait for the second model. What is more is left out, and counted."""

MOST_KEPT = 10_000
"""Disagreements that are kept one by one, the newest ones."""

TELL_EVERY_S = 60.0
"""Seconds of the stream from one incident on disagreements to the next."""


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """Describes a window about which two models disagree.

    Attributes
    ----------
    index : int
        Number of the window.
    time : float
        Stamp of its newest sample.
    ours, theirs : str
        What the model that decides says, and what the second one says.
    """

    index: int
    time: float
    ours: str
    theirs: str


@dataclass(frozen=True, kw_only=True)
class ShadowReport:
    """Says how two models compared over a run.

    Attributes
    ----------
    bundle, digest : str
        The second bundle, and the digest of its manifest.
    n_compared, n_disagree : int
        Windows that both decided, and those about which they disagree: another state or class of their decision layers; without
        layers, another largest output of a classifier.
    n_left_out : int
        Windows that the second model had no time for.
    largest_difference : float
        Largest difference of an output.
    pairs : dict of str to int
        How often each disagreement came, as "left, not right".
    disagreements : tuple of Disagreement
        The newest ones.
    error : str or None
        Why the second model stopped.
    """

    bundle: str
    digest: str
    n_compared: int
    n_disagree: int
    n_left_out: int
    largest_difference: float
    pairs: dict[str, int]
    disagreements: tuple[Disagreement, ...]
    error: str | None = None


class Shadow:
    """Decodes the windows of a decoder with a second bundle, in a thread of its own, from now on until `close`.

    Parameters
    ----------
    decoder : Decoder
        The decoder. If its own bundle is swapped, the second model goes on beside the new one.
    path : Path
        The second bundle, of the same signal, classes and kind of output.
    opening : Opening or None
        How it is opened.

    Raises
    ------
    StreamError, ParityError, BundleError, BackendError, DecisionError
        See `open_candidate`.
    """

    def __init__(self, decoder: Decoder, path: Path, opening: Opening | None = None) -> None:
        self._decoder = decoder
        candidate = open_candidate(decoder, path, opening or Opening())
        self._predict, self._layer = candidate.predict, candidate.layer
        events = decoder.events
        self._steps = None if self._layer is None or events is None else EventSteps(self._layer, events)
        self._names = decoder.spec.class_names or tuple(f"{decoder.spec.output_name}_{i}" for i in range(decoder.spec.n_outputs))
        self._compares_classes = decoder.spec.task == "classification" and decoder.spec.n_outputs > 1
        self._waiting: deque[tuple[Decision, NDArray[np.float32]] | None] = deque()
        self._there = threading.Semaphore(0)
        self._kept: deque[Disagreement] = deque(maxlen=MOST_KEPT)
        self._pairs: dict[str, int] = {}
        self._n_compared = self._n_disagree = self._n_left_out = 0
        self._largest = 0.0
        self._told_at, self._told_n = -np.inf, 0
        self._error: str | None = None
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
        self._thread.start()
        decoder.on_decision(self._take)

    def __enter__(self) -> Shadow:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Decode what waits, and release the second model."""
        self._waiting.append(None)
        self._there.release()
        self._thread.join()
        self._predict.close()

    @property
    def report(self) -> ShadowReport:
        """Return how the models compare up to now."""
        bundle = self._predict.bundle
        return ShadowReport(
            bundle=str(bundle.path),
            digest=bundle.manifest.digest,
            n_compared=self._n_compared,
            n_disagree=self._n_disagree,
            n_left_out=self._n_left_out,
            largest_difference=self._largest,
            pairs=dict(sorted(self._pairs.items(), key=lambda pair: -pair[1])),
            disagreements=tuple(self._kept),
            error=self._error,
        )

    def _take(self, decision: Decision) -> None:
        """Take the window of a decision, in the decoder's thread. A decision that repeats another has no window of its own."""
        if decision.held:
            return
        if self._error is not None or len(self._waiting) >= MOST_WAITING:
            if self._decoder.source.live or self._error is not None:
                self._n_left_out += 1
                return
            while len(self._waiting) >= MOST_WAITING:  # a recording that is decoded as fast as possible waits
                threading.Event().wait(0.001)
        self._waiting.append((decision, self._decoder.eeg.copy()))
        self._there.release()

    def _run(self) -> None:
        while True:
            self._there.acquire()
            given = self._waiting.popleft()
            if given is None:
                return
            try:
                self._compare(*given)
            except SjepaError as e:  # its fault must not end the run
                self._error = str(e)
                self._decoder.note("shadow", f"The shadow stopped: {e}")
                self._n_left_out += len(self._waiting) + 1
                return

    def _compare(self, ours: Decision, eeg: NDArray[np.float32]) -> None:
        predict = self._predict
        if predict.backend.finishes:
            prediction = predict.backend.run_unfinished(np.ascontiguousarray(eeg))[0].copy()
        else:
            prediction = predict(finish_windows(predict.spec.signal, eeg))[0]
        self._n_compared += 1
        self._largest = max(self._largest, float(np.abs(prediction - ours.prediction).max()))
        said = self._said(prediction, ours)
        if said is None or said[0] == said[1]:
            return
        self._n_disagree += 1
        pair = f"{said[0]}, not {said[1]}"
        self._pairs[pair] = self._pairs.get(pair, 0) + 1
        self._kept.append(Disagreement(index=ours.index, time=ours.time, ours=said[0], theirs=said[1]))
        if ours.time - self._told_at >= TELL_EVERY_S:
            n, self._told_n, self._told_at = self._n_disagree - self._told_n, self._n_disagree, ours.time
            self._decoder.note(
                "shadow", f"The shadow disagrees about {n} more windows, {self._n_disagree} of {self._n_compared}."
            )

    def _said(self, prediction: NDArray[np.float32], ours: Decision) -> tuple[str, str] | None:
        """Return what both say; None where outputs are compared alone."""
        if self._layer is not None and ours.state is not None:
            if self._steps is None:
                state = self._layer.step(prediction, ours.time, ours.flags)
            else:
                state = self._steps.step(prediction, ours.time, ours.flags, ours.trial)
            if self._layer.class_names:
                return ours.state.class_name or ours.state.name, state.class_name or state.name
        if not self._compares_classes:
            return None
        return self._names[int(ours.prediction.argmax())], self._names[int(prediction.argmax())]
