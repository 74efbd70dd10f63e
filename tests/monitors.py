"""A small stream and a pretended decoder, for tests of what watches a decoder."""

import itertools
import threading
import time

import numpy as np
from bundles import MONTAGE

from sjepa_deploy.eeg.quality import ChannelState
from sjepa_deploy.eeg.recording import fit_recording, read_recording, windows
from sjepa_deploy.runtime.predictor import load
from sjepa_deploy.runtime.watch.monitor import Monitor, StreamFacts


def facts(**changes) -> StreamFacts:
    """Return the facts of a stream of 8 channels with two outputs."""
    known = {
        "bundle": "left-or-right",
        "bundle_hash": "0123456789abcdef" * 4,
        "backend": "ort-cpu",
        "source": "synthetic",
        "ch_names": MONTAGE.ch_names,
        "positions": MONTAGE.positions,
        "sfreq": 100.0,
        "unit": "uV",
        "hop": 0.1,
        "deadline": 0.1,
        "output_names": ("left", "right"),
    }
    return StreamFacts(**known | changes)


class PretendDecoder(threading.Thread):
    """A loop that decodes a recording over and over and feeds a monitor, as a live decoder does.

    Parameters
    ----------
    bundle : Bundle
        What to decode with.
    recording : Path
        What to decode: its channels are interpolated to those of the bundle.
    hop : float
        Seconds from one decision to the next.
    """

    def __init__(self, bundle, recording, *, hop=0.1):
        super().__init__(name="decoder", daemon=True)
        spec = bundle.spec
        fitted = fit_recording(read_recording(recording), spec, interpolate=True)
        self._windows = windows(fitted.data, spec.n_times, round(hop * spec.sfreq))
        self._predict = load(bundle)
        self._hop = hop
        self._ended = threading.Event()
        self.lateness: list[float] = []
        """Seconds that each turn of the loop began after its time."""
        names = [f"{spec.output_name} {i}" for i in range(spec.n_outputs)]
        positions = None if spec.positions is None else tuple(spec.positions)
        described = {"ch_names": spec.ch_names, "positions": positions, "sfreq": spec.sfreq, "output_names": tuple(names)}
        self.monitor = Monitor(facts(hop=hop, deadline=hop, bundle_hash=bundle.manifest.digest, **described))
        self.quality = np.zeros(spec.n_chans, np.uint8)

    def run(self):
        self.monitor.set_state("decoding")
        self.monitor.incident("source connected")
        start = time.monotonic()
        for index in itertools.count():
            due = start + index * self._hop
            if self._ended.wait(max(0.0, due - time.monotonic())):
                break
            self.lateness.append(time.monotonic() - due)
            window = self._windows[index % len(self._windows)]
            self.monitor.received(round(self._hop * self.monitor.facts.sfreq), due)
            prediction = self._predict(np.ascontiguousarray(window[None]))[0]
            rms = window.std(axis=1)
            self.monitor.set_quality(self.quality, rms, self.quality > ChannelState.OK)
            flags = ("repaired",) if self.quality.any() else ()
            decided = time.monotonic()
            self.monitor.decided(index=index, time=due, due=due, decided=decided, prediction=prediction, flags=flags)
        self.monitor.set_state("stopped")
        self._predict.close()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exception):
        self._ended.set()
        self.join()
