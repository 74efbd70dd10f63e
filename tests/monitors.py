"""A small stream and a live decoder, for tests of what watches a decoder."""

import threading

import numpy as np
from bundles import MONTAGE
from streams import eeg, info_of

from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.counters import Counters
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.markers import Event
from sjepa_deploy.runtime.live.places import Undecided
from sjepa_deploy.runtime.live.sources import Incident, ReplaySource
from sjepa_deploy.runtime.predictor import load
from sjepa_deploy.runtime.watch.monitor import Monitor
from sjepa_deploy.runtime.watch.snapshot import StreamFacts
from sjepa_deploy.runtime.watch.watching import watch


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
        "overdue": 7.0,
        "output_names": ("left", "right"),
    }
    return StreamFacts(**known | changes)


def decision(index, *, time=None, transport=0.0, latency=0.01, deadline=0.1, prediction=(0.0, 0.0), **fields) -> Decision:
    """Return a decision on window `index` of a stream with a hop of 0.1 s, whose newest sample took `transport` seconds."""
    time = index * 0.1 if time is None else time
    received = time + transport
    known = {"infer_s": latency, "held": False, "bridged": False, "bad_channels": ()} | fields
    prediction = np.asarray(prediction, np.float32)
    return Decision(index, prediction, time, time + deadline, received, received + latency, **known)


class Written:
    """A monitor that is written as a decoder writes it, with counters that the test sets."""

    def __init__(self, **options):
        self.counters = Counters()
        changes = {name: options.pop(name) for name in list(options) if name in StreamFacts.__dataclass_fields__}
        self.monitor = Monitor(facts(**changes), self.counters, **options)

    def decide(self, index, **fields):
        made = decision(index, **fields)
        self.counters.windows += 1
        self.counters.decisions += 1
        self.monitor.decided(made)
        return made

    def event(self, onset, description, state=None):
        """Write an event at the time `onset`, with its decision or, without a state, the reason "gap"."""
        event = Event(onset, description, onset + 0.02)
        self.monitor.marked(event, wanted=True)
        if state is None:
            self.monitor.left(Undecided(event, "gap"))
        else:
            self.decide(self.counters.windows, time=onset + 2.0, state=state, event=event)

    def count(self, **more):
        """Add to the counters, and let the monitor see them."""
        for name, n in more.items():
            setattr(self.counters, name, getattr(self.counters, name) + n)
        self.monitor.received(self.monitor.snapshot().newest_sample)

    def happen(self, text, *, kind="gap", time=0.0):
        self.monitor.happened(Incident(kind=kind, time=time, text=text))


class LiveDecoder(threading.Thread):
    """A decoder of synthetic EEG in a thread, in real time, and its monitor.

    Parameters
    ----------
    bundle : Bundle
        What to decode with.
    hop : float
        Seconds from one decision to the next.
    flat, saturated : int or None
        Channels that carry no EEG.
    """

    def __init__(self, bundle, *, hop=0.1, flat=None, saturated=None):
        super().__init__(name="decoder", daemon=True)
        spec = bundle.spec
        n_loop = 6000
        loop = eeg(n_loop, spec.n_chans, spec.sfreq)
        if flat is not None:
            loop[:, flat] = 0.0
        if saturated is not None:
            loop[:, saturated] = 2e5
        source = ReplaySource(
            info_of(spec), lambda start, stop: loop[np.arange(start, stop) % n_loop], chunk=round(hop * spec.sfreq)
        )
        self._predict = load(bundle, check_unit=False)
        self.decoder = Decoder(self._predict, source, StreamConfig(hop=hop, bad_channels="repair", late="queue"))
        self.monitor = watch(self.decoder)
        self.latencies: list[float] = []
        """Seconds from the arrival of each window's newest sample to its decision."""
        self.decoder.on_decision(lambda made: self.latencies.append(made.latency))

    def run(self):
        self.decoder.run()
        self.monitor.set_state("stopped")

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exception):
        self.decoder.stop()
        self.join()
        self.decoder.close()
        self._predict.close()
